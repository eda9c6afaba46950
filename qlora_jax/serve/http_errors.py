"""Errors in the shape of OpenAI's API: `{"error": {"message": …, "type": …, "param": …, "code": …}}`."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from qlora_jax.errors import QLoRAError
from qlora_jax.serve.engine import PromptError
from qlora_jax.serve.scheduler import BusyError
from qlora_jax.serve.worker import StoppedError

__all__ = ["ApiError", "error_response", "handlers", "of_engine"]

_TYPES = {
    401: "invalid_request_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An error that a client gets.

    Attributes:
        status: the HTTP status.
        message: what was wrong.
        param: the field of the request that was wrong, or None.
        code: a name for the kind of error, or None.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON of the error."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of_engine(error: Exception) -> ApiError:
    """Return the error for one that the engine or the preparation of a prompt raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, f"The server is busy: {error}.", code="rate_limit_exceeded")
    if isinstance(error, StoppedError):
        return ApiError(503, "The server takes no more requests.", code="stopping")
    if isinstance(error, PromptError):
        return ApiError(400, f"The request is too long: {error}.", code="context_length_exceeded")
    if isinstance(error, QLoRAError):
        return ApiError(400, str(error))
    return ApiError(500, "The server had an error.", code="internal_error")


def error_response(error: ApiError) -> JSONResponse:
    """Return the response for an error."""
    headers = {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (429, 503):
        headers["Retry-After"] = "1"
    return JSONResponse(error.body(), error.status, headers)


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    return error_response(of_engine(error))


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = {404: "There is no such path.", 405: "This path does not take this method."}
    response = error_response(ApiError(status, words.get(status, "The request was refused.")))
    response.headers.update((error.headers or {}) if isinstance(error, HTTPException) else {})
    return response


# By the kind of exception; the last is for errors of the program, whose text a client does not get.
handlers = {ApiError: _api_error, QLoRAError: _api_error, HTTPException: _http_error, Exception: _api_error}
