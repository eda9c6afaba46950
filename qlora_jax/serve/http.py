"""The server: OpenAI's API over the engine, as an ASGI application.

    POST /v1/chat/completions, /v1/completions     answers (`http_calls`, `http_answers`)
    GET  /v1/models, /v1/models/NAME               the base and the adapters that the key may use
    POST /v1/load_lora_adapter, …/unload_…         names of adapters that come and go, off unless the service has a `Manage`
    GET  /                                         a page to chat (`http_page`)
    GET  /health, /ready, /metrics                 whether the engine works, whether it takes requests, and what it does

The adapter is the `model` field. A model that a key may not use is answered like one that does not exist. A client that
closes its connection ends its answers, streamed or not. Logs have neither texts nor keys.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_jax.errors import QLoRAError
from qlora_jax.serve.answer import Event
from qlora_jax.serve.api_keys import ApiKey, find_key
from qlora_jax.serve.http_answers import Asked, stream_answers, whole_answers
from qlora_jax.serve.http_body import Fields, read_object
from qlora_jax.serve.http_calls import Call, Prepared, chat_call, completion_call
from qlora_jax.serve.http_errors import ApiError, error_response, handlers, of_engine
from qlora_jax.serve.http_page import check_origin, page
from qlora_jax.serve.metrics import Metrics
from qlora_jax.serve.worker import Worker

__all__ = ["Manage", "Service", "make_app"]

_logger = logging.getLogger(__name__)
_SEND_SECONDS = 60.0  # how long a client may take nothing of a stream; the server then closes the connection


@dataclasses.dataclass(frozen=True)
class Manage:
    """How adapters come and go while the server runs; both functions raise QLoRAError or OSError.

    Attributes:
        load: registers a name for the adapter at a path.
        unload: removes a name.
    """

    load: Callable[[str, str], None]
    unload: Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Service:
    """What the application serves.

    Attributes:
        worker: the engine.
        base: the name of the base model.
        adapters: returns the names of the adapters.
        prepared: how prompts become tokens.
        token_text: returns (the text, the bytes) of a token.
        keys: the API keys; None: requests need none.
        most_bytes: the largest body of a request.
        manage: how adapters come and go, for keys that may use all models; None: they do not.
    """

    worker: Worker
    base: str
    adapters: Callable[[], Sequence[str]]
    prepared: Prepared
    token_text: Callable[[int], tuple[str, bytes]]
    keys: tuple[ApiKey, ...] | None = None
    most_bytes: int = 2**20
    manage: Manage | None = None


def make_app(service: Service) -> Starlette:
    """Return the application."""
    calls = _Calls(service)
    manage = (
        Route("/v1/load_lora_adapter", calls.load_adapter, methods=["POST"]),
        Route("/v1/unload_lora_adapter", calls.unload_adapter, methods=["POST"]),
    )
    return Starlette(
        routes=[
            *(manage if service.manage is not None else ()),
            Route("/v1/chat/completions", calls.chat, methods=["POST"]),
            Route("/v1/completions", calls.completion, methods=["POST"]),
            Route("/v1/models", calls.models, methods=["GET"]),
            Route("/v1/models/{name:path}", calls.model, methods=["GET"]),
            Route("/", calls.page, methods=["GET"]),
            Route("/health", calls.health, methods=["GET"]),
            Route("/ready", calls.ready, methods=["GET"]),
            Route("/metrics", calls.metrics_page, methods=["GET"]),
        ],
        exception_handlers=handlers,  # pyright: ignore[reportArgumentType]
        middleware=[Middleware(calls.watched)],  # pyright: ignore[reportArgumentType]
        lifespan=calls.lifespan,
    )


class _Calls:
    def __init__(self, service: Service) -> None:
        self._service, self._started = service, int(time.time())
        self._metrics, self._page = Metrics(service.worker.engine), page()
        # One thread, because texts of many requests at a time would only take the engine's processor.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """End the thread of the tokenizer with the application."""
        yield
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def watched(self, app: ASGIApp) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """Return the application, which counts its errors and refuses a body that two servers could end in two places."""

        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            async def counted(message: Message) -> None:
                if message["type"] == "http.response.start" and message["status"] >= 400:
                    self._metrics.refused(message["status"])
                await send(message)

            names = {name for name, _ in scope["headers"]} if scope["type"] == "http" else set()
            if {b"content-length", b"transfer-encoding"} <= names:
                response = error_response(
                    ApiError(400, "Content-Length and Transfer-Encoding: expected one of them, found both.")
                )
                response.headers["Connection"] = "close"
                await response(scope, receive, counted)
            else:
                await app(scope, receive, counted)

        return call

    async def chat(self, request: HttpRequest) -> Response:
        """Answer a conversation."""
        return await self._answer(request, chat_call)

    async def completion(self, request: HttpRequest) -> Response:
        """Continue texts."""
        return await self._answer(request, completion_call)

    async def models(self, request: HttpRequest) -> Response:
        """List the models that the key may use."""
        names = self._names(self._key(request))
        return JSONResponse({"object": "list", "data": [self._described(name) for name in names]})

    async def model(self, request: HttpRequest) -> Response:
        """Describe one model."""
        name = request.path_params["name"]
        self._check_model(name, self._key(request))
        return JSONResponse(self._described(name))

    async def load_adapter(self, request: HttpRequest) -> Response:
        """Register an adapter, as vLLM's path of this name does."""
        fields = await self._managing(request)
        name, path = (fields.must(one, fields.text(one)) for one in ("lora_name", "lora_path"))
        fields.none_left()
        return await self._manage(f"Success: LoRA adapter '{name}' added successfully.", lambda how: how.load(name, path))

    async def unload_adapter(self, request: HttpRequest) -> Response:
        """Remove an adapter; answers that run are finished with it."""
        fields = await self._managing(request)
        name = fields.must("lora_name", fields.text("lora_name"))
        fields.ignore("lora_int_id")
        fields.none_left()
        return await self._manage(f"Success: LoRA adapter '{name}' removed successfully.", lambda how: how.unload(name))

    async def _managing(self, request: HttpRequest) -> Fields:
        key = self._key(request)
        if key is not None and "*" not in key.models:
            raise ApiError(403, "This key may not load or unload adapters.", code="forbidden")
        return Fields(await read_object(request, self._service.most_bytes))

    async def _manage(self, done: str, change: Callable[[Manage], None]) -> Response:
        how = self._service.manage
        assert how is not None  # otherwise there are no such paths
        try:
            await asyncio.get_running_loop().run_in_executor(None, change, how)
        except (QLoRAError, OSError) as error:
            raise ApiError(400, str(error)) from error
        return PlainTextResponse(done)

    async def page(self, _: HttpRequest) -> Response:
        """Return the page to chat."""
        return self._page

    async def health(self, _: HttpRequest) -> Response:
        """Tell whether the engine works."""
        works = self._service.worker.failure is None
        return JSONResponse({"status": "ok" if works else "failed"}, 200 if works else 503)

    async def ready(self, _: HttpRequest) -> Response:
        """Tell whether requests are taken."""
        takes = self._service.worker.alive
        return JSONResponse({"status": "ready" if takes else "not ready"}, 200 if takes else 503)

    async def metrics_page(self, _: HttpRequest) -> Response:
        """Return the metrics in Prometheus' format."""
        text, kind = self._metrics.page()
        return PlainTextResponse(text, media_type=kind)

    async def _answer(self, request: HttpRequest, parse: Callable[[dict[str, Any]], Call]) -> Response:
        started, key = time.monotonic(), self._key(request)
        call = parse(await read_object(request, self._service.most_bytes))
        self._check_model(call.model, key)
        asked = await self._ask(call, key)
        self._metrics.asked(call.kind)

        asked.on_first = lambda: self._metrics.first(call.kind, time.monotonic() - started)

        def ended() -> None:
            for ticket in asked.tickets:
                self._service.worker.cancel(ticket)  # does nothing if its answers have ended
            seconds = time.monotonic() - started
            self._metrics.ended(call.kind, seconds)
            _logger.info(
                "%s model=%r tenant=%r prompt_tokens=%d answer_tokens=%d complete=%s seconds=%.3f",
                *(call.kind, call.model, key.name if key else "", asked.prompt_tokens, asked.answer_tokens),
                *(not asked.running, seconds),
            )

        if call.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return _Stream(stream_answers(asked), ended, headers)
        try:
            return JSONResponse(await _unless_gone(request, whole_answers(asked)))
        finally:
            ended()

    async def _ask(self, call: Call, key: ApiKey | None) -> Asked:
        """Give the requests of a call to the engine."""
        service, loop = self._service, asyncio.get_running_loop()
        adapter = "" if call.model == service.base else call.model
        tenant = f"key {key.name}" if key else f"model {call.model}"
        events: asyncio.Queue[Event] = asyncio.Queue()

        def listener(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(events.put_nowait, event)

        futures: list[Future[int]] = []
        try:
            requests = await loop.run_in_executor(
                self._tokenizing, lambda: call.requests(service.prepared, adapter=adapter, tenant=tenant)
            )
            for one in requests:
                futures.append(service.worker.submit(one, listener))
            tickets = {await asyncio.wrap_future(future): number for number, future in enumerate(futures)}
        except BaseException as error:
            for future in futures:
                future.add_done_callback(self._cancel)
            if not isinstance(error, Exception):
                raise
            known = of_engine(error)
            if known.status >= 500 and known.code != "stopping":
                _logger.exception("a request could not be given to the engine")
            raise known from error
        return Asked(call, tickets, sum(len(one.prompt) for one in requests), events, service.prepared, service.token_text)

    def _cancel(self, future: "Future[int]") -> None:
        if not future.cancelled() and future.exception() is None:
            self._service.worker.cancel(future.result())

    def _key(self, request: HttpRequest) -> ApiKey | None:
        """Return the key of a request; None if requests need none."""
        keys = self._service.keys
        check_origin(request, keys=keys is not None)
        if keys is None:
            return None
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        key = find_key(keys, sent.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            words = "Incorrect API key provided." if scheme else "You did not provide an API key (Authorization: Bearer …)."
            raise ApiError(401, words, code="invalid_api_key")
        return key

    def _names(self, key: ApiKey | None) -> list[str]:
        names = [self._service.base, *self._service.adapters()]
        return [name for name in names if key is None or key.allows(name)]

    def _check_model(self, name: str, key: ApiKey | None) -> None:
        if name not in self._names(key):
            raise ApiError(
                404,
                "The model of the request does not exist, or you do not have access to it.",
                param="model",
                code="model_not_found",
            )

    def _described(self, name: str) -> dict[str, Any]:
        parent = None if name == self._service.base else self._service.base
        return {"id": name, "object": "model", "created": self._started, "owned_by": "qlora_jax", "parent": parent}


class _Stream(StreamingResponse):
    """Server-sent events; `ended` is called after the last one, or when the client has gone or does not read them."""

    def __init__(self, parts: AsyncIterator[str], ended: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(parts, media_type="text/event-stream", headers=headers)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(_SEND_SECONDS):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except (TimeoutError, ClientDisconnect):
            _logger.info("a client left its stream, or did not read it for %g seconds", _SEND_SECONDS)
        finally:
            self._ended()


async def _unless_gone(request: HttpRequest, answers: Any) -> dict[str, Any]:
    """Return what `answers` returns, unless the client closes the connection before.

    Raises:
        ApiError: the client has gone; nobody gets this error.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(answers), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError(499, "The client closed the connection.")
        return answer.result()
    finally:
        answer.cancel()
        leaving.cancel()
