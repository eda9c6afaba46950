"""Serve a model and many adapters over OpenAI's API.

    python scripts/serve.py
    python scripts/serve.py --adapters alice=runs/alice/adapter bob=runs/bob/adapter --rows 16
    python scripts/serve.py --new-key alice >> keys.toml
    python scripts/serve.py --host 0.0.0.0 --keys keys.toml --adapter-folder adapters

The adapter is the `model` field of a request: the name of an adapter, or that of the base. Ctrl-C and SIGTERM let the
answers that run come to their end, for a limited time. docs/serving.md describes the API and the file of keys.
"""

import copy
import dataclasses
import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import nnx

from qlora_jax import cli
from qlora_jax.adapters.bank import slot_values
from qlora_jax.adapters.files import Adapter, read_adapter
from qlora_jax.adapters.metadata import AdapterMetadata, QuantizationChoice, read_adapter_metadata
from qlora_jax.adapters.peft_config import read_adapter_method, resolve_adapter
from qlora_jax.adapters.pretrained import Pretrained, PretrainedOptions, open_pretrained
from qlora_jax.checkpoint.load import default_dtype
from qlora_jax.commands.serving import AdapterOptions, adapter_sources, path_within, warn_of_templates
from qlora_jax.data import Template, encode_prompt, read_chat_template
from qlora_jax.errors import OptionError, UnsupportedError
from qlora_jax.interrupts import deferred
from qlora_jax.models import CausalLM
from qlora_jax.peft import Method
from qlora_jax.peft.bank import Bank
from qlora_jax.serve.adapter_slots import AdapterSlots
from qlora_jax.serve.api_keys import ApiKey, new_key, read_api_keys
from qlora_jax.serve.engine import Engine
from qlora_jax.serve.grammars import constrain_by
from qlora_jax.serve.scheduler import Limits
from qlora_jax.serve.token_text import token_text
from qlora_jax.serve.tool_format import special_markers, tool_format
from qlora_jax.serve.worker import Worker

if TYPE_CHECKING:
    from qlora_jax.serve.http import Service
    from qlora_jax.serve.http_server import HttpServer

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Options of the server."""

    host: str = "127.0.0.1"
    """Address to listen at. Without keys it must be one of this machine alone, unless --open-to-everyone repeats it."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    keys: Path | None = None
    """File of API keys; without it, requests need no key."""
    open_to_everyone: str | None = None
    """The host once more, to serve without keys to all who can reach it."""
    new_key: str | None = None
    """Only print a new key for a tenant of this name on stderr, and its lines for the file of keys on stdout."""
    drain_seconds: float = 30.0
    """How long answers may take after Ctrl-C or SIGTERM."""
    most_body_bytes: int = 2**20
    """Largest body of a request."""

    def __post_init__(self) -> None:
        if not 0 <= self.drain_seconds <= 86400:
            raise OptionError(f"drain_seconds: expected 0 to 86400, found {self.drain_seconds}")
        if self.most_body_bytes < 1:
            raise OptionError(f"most_body_bytes: expected at least 1, found {self.most_body_bytes}")


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    model: PretrainedOptions = dataclasses.field(default_factory=PretrainedOptions)
    adapter: AdapterOptions = dataclasses.field(default_factory=AdapterOptions)
    engine: Limits = dataclasses.field(default_factory=Limits)
    server: ServerOptions = dataclasses.field(default_factory=ServerOptions)
    name: str | None = None
    """Name of the base model in requests; the last part of its path or id if left out."""
    template: Template = "auto"
    """Template of conversations; auto: the chat template if the tokenizer has one, else guanaco."""
    chat_template: str | None = None
    """Chat template instead of the tokenizer's: a file, or a name such as chatml, which has tools."""


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(serve, Options, __doc__, arguments, program=program)


def serve(options: Options) -> int:
    """Serve until a signal comes; return 0 if all answers came to their end, else 1."""
    if options.server.new_key is not None:
        key, lines = new_key(options.server.new_key)
        print(f"the key, which is not saved anywhere: {key}", file=sys.stderr)
        print(lines)
        return 0
    keys = check_access(options.server)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    listening, drain = listen(options.server), options.server.drain_seconds
    server, service = start(options, keys, listening)
    print(
        f"serving {service.base} and {len(service.adapters())} adapters at {server.address}/v1, and a page to chat at "
        f"{server.address}/",
        file=sys.stderr,
        flush=True,
    )
    with deferred(f"no more requests are taken; answers that run may take {drain:g} seconds more") as deferral:
        while deferral.number is None and server.works:
            time.sleep(0.1)
        complete = service.worker.failure is None and deferral.number is not None
        complete = server.stop(drain) and complete
    return 0 if complete else 1


def start(options: Options, keys: tuple[ApiKey, ...] | None, listening: socket.socket) -> "tuple[HttpServer, Service]":
    """Load the model and start to serve it."""
    try:
        from qlora_jax.serve.http_server import HttpServer
    except ModuleNotFoundError as error:
        raise OptionError(f'serve: {error.name} is not installed: pip install "qlora-jax[serve]"') from error
    service, engine = load_service(options, keys), options.engine
    most = 2 * (engine.waiting + engine.rows)
    return HttpServer(service, listening, connections=most, drain_seconds=options.server.drain_seconds), service


def check_access(options: ServerOptions) -> tuple[ApiKey, ...] | None:
    """Return the keys, or None if requests need none, which must be said twice for an address that others can reach."""
    if options.keys is not None:
        return read_api_keys(options.keys)
    try:
        alone = options.host == "localhost" or ipaddress.ip_address(options.host).is_loopback
    except ValueError:
        alone = False
    if not alone and options.open_to_everyone != options.host:
        raise OptionError(
            f"--host {options.host}: expected --keys FILE, because others may reach this address; to serve without keys to "
            f"all of them, repeat it: --open-to-everyone {options.host}"
        )
    return None


def listen(options: ServerOptions) -> socket.socket:
    """Return a socket that listens, before a model is loaded for nothing."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((options.host, options.port))
        found.listen(1024)
    except (OSError, OverflowError) as error:
        found.close()
        raise OptionError(f"--host {options.host} --port {options.port}: cannot listen there: {error}") from error
    return found


def load_service(options: Options, keys: tuple[ApiKey, ...] | None) -> "Service":
    """Load the model and its adapters, compile the programs, and return what the application serves."""
    from qlora_jax.serve.http import Service
    from qlora_jax.serve.http_calls import Prepared

    sources = adapter_sources(options.adapter)
    pretrained = _open(options, [read_adapter_method(path) for path in sources.values()])
    base = options.name or Path(pretrained.base.name).name
    if base in sources:
        raise OptionError(f"--adapters: expected names other than that of the base, found {base}")
    model = pretrained.load(progress=sys.stderr.isatty())
    if not isinstance(model, CausalLM):
        raise UnsupportedError(f"serve: expected a decoder-only model, found {model.config.family}")
    limits, slots = options.engine, None
    if sources or options.adapter.runtime_adapters:
        slots = AdapterSlots(max(options.adapter.slots, limits.rows) + 1, _loader(model), held=options.adapter.held)
        for name, path in sources.items():
            slots.register(name, path)
    if model.max_positions is not None:
        limits = dataclasses.replace(limits, capacity=min(limits.capacity, model.max_positions))
    tokenizer: Any = pretrained.tokenizer
    if options.chat_template is not None:
        tokenizer.chat_template = read_chat_template(options.chat_template, tokenizer)
    warn_of_templates(sources, options.template, has_chat_template=tokenizer.chat_template is not None)
    vocabulary = pretrained.checkpoint.model_config.vocab_size
    own = copy.deepcopy(tokenizer)  # the engine's thread decodes while another one encodes
    constrain = constrain_by(own, vocabulary, pretrained.stop_ids)
    engine = Engine(
        *nnx.split(model),
        limits=limits,
        vocabulary=vocabulary,
        tokenizer=own,
        adapters=slots,
        constrain=constrain,
    )
    start = time.perf_counter()
    engine.warm_up()
    _logger.info("programs compiled in %.1f s", time.perf_counter() - start)
    prepared = Prepared(
        chat=lambda messages, tools: encode_prompt(
            list(messages), tokenizer, template=options.template, tools=tools
        ).tolist(),
        text=lambda text: encode_prompt(text, tokenizer, template="plain").tolist(),
        eos_ids=pretrained.stop_ids,
        capacity=limits.capacity,
        calls=tool_format(tokenizer) if options.template in ("auto", "chat") else None,
        markers=special_markers(tokenizer),
    )
    return Service(
        worker=Worker(engine),
        base=base,
        adapters=slots.names if slots else list,
        prepared=prepared,
        token_text=token_text(copy.deepcopy(tokenizer)),
        keys=keys,
        most_bytes=options.server.most_body_bytes,
        manage=_manage(options.adapter, slots, base) if slots and options.adapter.runtime_adapters else None,
    )


def _open(options: Options, methods: Sequence[Method]) -> Pretrained:
    """Open the base, with a bank if there are adapters, whose methods tell the largest rank."""
    chosen = options.model
    if chosen.adapter is not None:
        raise OptionError(f"--adapter: expected --adapters NAME={chosen.adapter}, by which requests name it")
    if not methods and not options.adapter.runtime_adapters:
        return chosen.open()
    dtype = default_dtype() if chosen.dtype == "auto" else chosen.dtype
    ranks = [max([one.rank or 1, *(rank for _, rank in getattr(one, "rank_pattern", ()))]) for one in methods]
    slots, rank = max(options.adapter.slots, options.engine.rows) + 1, options.adapter.rank or max(ranks, default=16)
    return open_pretrained(
        chosen.model,
        revision=chosen.revision,
        quantization=QuantizationChoice(chosen.data_type, chosen.block_size, chosen.double_quantization),
        embedding_storage=chosen.embedding_storage,
        method=Bank(slots, rank, dtype),  # pyright: ignore[reportAbstractUsage]
        dtype=dtype,
    )


def _read(path: Path) -> tuple[Adapter, AdapterMetadata | None]:
    snapshot = resolve_adapter(path)
    return read_adapter(snapshot), read_adapter_metadata(snapshot)


def _manage(options: AdapterOptions, slots: AdapterSlots, base: str) -> Any:
    from qlora_jax.serve.http import Manage

    root = (options.adapter_folder or Path()).resolve()

    def load(name: str, path: str) -> None:
        if name == base or not name.isprintable() or len(name) > 200:
            raise OptionError(
                f"lora_name: expected a name of at most 200 characters, and not that of the base, found {name!r}"
            )
        slots.register(name, path_within(root, path))

    return Manage(load, slots.remove)


def _loader(model: CausalLM) -> Any:
    # An adapter is read for the shapes of the model, whose arrays the engine's programs donate.
    abstract = nnx.eval_shape(lambda: model)
    return lambda path: slot_values(abstract, *_read(path))
