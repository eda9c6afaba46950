"""The page to chat: it needs nothing from elsewhere, its policy allows it alone, and pages of others are not answered."""
# ruff: noqa: E402 - the server's own dependencies may be missing

import base64
import hashlib
import re

import pytest

for name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name}, for the server, is not installed")

from starlette.requests import Request

from qlora_jax.serve.http_errors import ApiError
from qlora_jax.serve.http_page import check_origin, page


def test_the_page_stands_alone_and_writes_no_html() -> None:
    text = bytes(page().body).decode()
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|src=|\son[a-z]+=|style=", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|localStorage|sessionStorage|cookie", text)
    fields = set(re.findall(r'<(?:input|select|textarea)[^>]* id="([^"]+)"|<(?:select|input) id="([^"]+)"', text))
    labels = re.findall(r'<label[^>]* for="([^"]+)"', text)
    assert {a or b for a, b in fields} == set(labels)


def test_the_policy_allows_this_script_and_this_style_alone() -> None:
    found = page()
    policy = dict(part.split(" ", 1) for part in found.headers["Content-Security-Policy"].split("; "))
    for name in ("script", "style"):
        (content,) = re.findall(rf"<{name}>(.*?)</{name}>", bytes(found.body).decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)


@pytest.mark.parametrize(
    ("origin", "host", "keys", "taken"),
    [
        (None, "127.0.0.1:8000", False, True),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", False, True),
        ("http://localhost:8000", "localhost:8000", False, True),
        ("http://[::1]:8000", "[::1]:8000", False, True),
        ("http://gpu-box:8000", "gpu-box:8000", False, True),
        ("https://chat.example.org", "chat.example.org", True, True),
        ("http://evil.example:8000", "evil.example:8000", False, False),  # whose name now means 127.0.0.1
        ("http://evil.example", "127.0.0.1:8000", True, False),
        ("http://127.0.0.1:9000", "127.0.0.1:8000", True, False),
        ("null", "127.0.0.1:8000", True, False),
        ("http://[", "127.0.0.1:8000", True, False),
    ],
)
def test_pages_of_other_servers_are_not_answered(origin: str | None, host: str, keys: bool, taken: bool) -> None:
    headers = [(b"host", host.encode()), *([] if origin is None else [(b"origin", origin.encode())])]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers})
    if taken:
        check_origin(request, keys=keys)
    else:
        with pytest.raises(ApiError) as raised:
            check_origin(request, keys=keys)
        assert raised.value.status == 403
