"""What all tests share: XLA's flags, a folder of compiled programs, checkpoints of a tiny random Llama, and the two tiers.

Every run of a job makes its programs anew, and so does every process that a test starts. JAX's cache of compiled programs
compiles each of them once a session: it is one folder, which both test processes use, and the environment brings it to the
processes that tests start.
"""

import gc
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_llama

import qlora_jax  # noqa: F401  it sets the variables of absent devices, which processes that tests start inherit

# Most of the suite's time is compiling for the CPU, and most of that LLVM's: tests have it optimise nothing, on which no
# result depends but for rounding. Where they can, they take XLA's older code generator, too, which has less to do.
# `XLA_FLAGS= python -m pytest -m optimised` compiles the tests of arithmetic as users do.
_LIGHT = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _LIGHT += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", _LIGHT)

# Before JAX and `datasets` are imported, which read them then. Who names a folder for JAX's cache shares it among sessions.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")  # it is removed when the first process of the session ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `datasets` reports each local file that it opens to the hub
}

MOST_MEMORY = 5 * 2**29  # bytes; a process that runs all modules would need more for its programs


# Tracing makes many small objects, for which Python's collector by default walks over all others again and again, those of
# the imported libraries included: a fifth of the suite's time. Nearly all of them are freed without it.
COLLECT_AFTER = (100_000, 50, 100)


# What a module says that has tests of a mark: for the expressions of `-m` that .ci/run uses.
SAID = {"integration": ("integration", "tiered("), "optimised and not integration": ("optimised",)}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out modules without a test of the mark that is asked for, which each process would import."""
    said = SAID.get(config.getoption("markexpr"))
    if said is None or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    return None if any(word in text for word in said) else True


def pytest_collection_finish() -> None:
    """Leave the modules, which live to the end, out of what the collector walks over, and let it run seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


@pytest.fixture(scope="module", autouse=True)
def _memory_is_bounded() -> Iterator[None]:
    """Forget the compiled programs after a module at whose end the process is large."""
    import jax  # which reads the environment

    yield
    pages = Path("/proc/self/statm")  # Linux has it
    if not pages.exists() or int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY:
        jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_as_for_users() -> Iterator[None]:
    """Compile with XLA's optimisations: with weights of real size, a program runs for longer than it compiles.

    XLA_FLAGS is read once in a process, and JAX has no other public way to set an option of all programs.
    """
    from jax._src import compiler

    get_compile_options = compiler.get_compile_options

    def optimised(*args: Any, env_options_overrides: dict[str, Any] | None = None, **options: Any) -> Any:
        overrides = {"xla_backend_optimization_level": 3} | (env_options_overrides or {})
        return get_compile_options(*args, env_options_overrides=overrides, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", optimised)
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of 2 layers of 64 features, with a tokenizer whose tokens are bytes."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def make_tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Such folders with other seeds and other fields of config.json."""

    def make(**options: Any) -> Path:
        return write_tiny_llama(tmp_path_factory.mktemp("llama"), **options)

    return make
