"""The folder that is kept between runs."""

from pathlib import Path

import pytest

from qlora_jax.cache_folder import cache_folder


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_JAX_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("QLORA_JAX_CACHE")
    assert cache_folder() == Path("/two/qlora_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "qlora_jax"
