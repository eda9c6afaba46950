"""Where compiled programs are kept, unless the user says otherwise. Nothing is compiled here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from qlora_jax.train import keep_compiled_programs

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)


@pytest.fixture(autouse=True)
def _as_jax_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    before = {name: getattr(jax.config, name) for name in NAMES}
    for name, value in zip(NAMES, (None, -1, 1.0, True), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def setting(name: str) -> Any:
    return getattr(jax.config, f"jax_compilation_cache_{name}")


def test_programs_are_kept_in_a_folder_of_the_user(tmp_path: Path) -> None:
    keep_compiled_programs()
    folder = Path(setting("dir"))
    assert folder == tmp_path / "cache" / "compiled"
    assert folder.stat().st_mode & 0o022 == 0, "others would choose the programs that are run"
    assert setting("max_size") == 2 * 2**30


def test_the_user_has_the_last_word(tmp_path: Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    keep_compiled_programs()
    assert setting("dir") is None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", "/mine")
    keep_compiled_programs()
    assert setting("dir") == "/mine"
    assert setting("max_size") == -1


def test_a_run_goes_on_without_the_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    keep_compiled_programs()
    assert setting("dir") is None
