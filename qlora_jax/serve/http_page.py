"""The page at `/`: a chat with two models side by side, one static file without anything from elsewhere.

Its Content-Security-Policy allows this one script and this one style, by their hashes, and connections to this server alone.
A browser sends requests for other pages, too, which the server must not answer: `check_origin` refuses them.
"""

import base64
import hashlib
import ipaddress
import re
from importlib import resources
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse

from qlora_jax.serve.http_errors import ApiError

__all__ = ["check_origin", "page"]


def page() -> HTMLResponse:
    """Return the page, which may be sent any number of times."""
    text = resources.files("qlora_jax.serve").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {name: _hash(re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL)) for name in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def check_origin(request: Request, *, keys: bool) -> None:
    """Raise ApiError for what a browser sends for a page of another server.

    Without keys, a page whose name anybody can let point to this machine (a name with a dot, DNS rebinding) is refused.
    """
    origin = request.headers.get("origin")
    if origin is None:  # no browser
        return
    try:
        site = urlsplit(origin)
        own = site.scheme in ("http", "https") and site.netloc == request.headers.get("host")
        named = "." in (site.hostname or "") and not _is_address(site.hostname or "")
    except ValueError:
        own, named = False, False
    if not own:
        raise ApiError(403, "This server does not answer pages of other servers.", code="forbidden")
    if named and not keys:
        raise ApiError(
            403, "Without --keys, this server answers pages by its address or a name without a dot.", code="forbidden"
        )


def _hash(texts: list[str]) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
