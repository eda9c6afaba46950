"""The Python of README.md, docs/library.md, docs/serving.md and docs/tenants.md runs as written, on a tiny model.

Sizes are made small by SMALL, which replaces each of its texts at least once. About 15 CPU-seconds, of integration.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pages import python_of

import qlora_jax as qj

SMALL = {"(1, 4, 512)": "(1, 4, 32)", "4096, 4096": "64, 64", "256, 256": "64, 64"}
LLAMA = '"meta-llama/Llama-3.1-8B-Instruct"'


def code_of(page: str, model: Path, *small: str) -> str:
    """Return the code of a page, with the tiny model and the small sizes."""
    code = "\n".join(python_of(page))
    for text, other in {LLAMA: repr(str(model)), **{text: SMALL[text] for text in small}}.items():
        assert text in code, f"{page}: expected {text}"
        code = code.replace(text, other)
    return code


@pytest.mark.integration
def test_library(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[Any] = []
    monkeypatch.setattr(qj, "finetune", lambda options: runs.append(options))  # test_notebook.py trains
    names: dict[str, Any] = {}
    exec(code_of("docs/library.md", tiny_llama, *SMALL), names)
    (options,) = runs
    assert (options.lora.rank, options.data.max_length, options.run.output) == (16, 2048, Path("runs/mine"))
    assert Path("merged/config.json").is_file()
    assert np.isfinite(names["metrics"]["loss"])
    (answer,) = names["answers"]
    assert 0 < len(answer) <= 32
    x = jnp.ones((2, 64))
    assert names["dense"](x).shape == (2, 64)
    block = names["Block"]()
    assert block.apply(block.init(jax.random.key(0), x), x).shape == (2, 64)

    exec(code_of("README.md", tiny_llama, "(1, 4, 512)"), names)  # the programs are compiled already
    assert np.isfinite(names["metrics"]["loss"])
    answers_of_two_tenants(tiny_llama)


def answers_of_two_tenants(model: Path) -> None:
    """Run the code of docs/tenants.md, for the adapter that library.md has saved and one of the same rank."""
    code = "\n".join(python_of("docs/tenants.md"))
    for name in ("alice", "bob"):
        code = code.replace(f"runs/tenants/{name}/adapter", "adapter")
    assert "open_pretrained(method" in code
    tokens = np.arange(3, 27, dtype=np.int32).reshape(3, 8)
    names: dict[str, Any] = {"tokens": tokens, "ids": np.asarray([1, 2, 0], np.int32)}
    exec(code.replace("open_pretrained(method", f"open_pretrained({str(model)!r}, method"), names)
    assert names["logits"].shape[:2] == (3, 8)


@pytest.mark.integration
def test_serving(tiny_llama: Path) -> None:
    for name in ("openai", "starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from http_server import running
    from test_http import service

    with running(service(tiny_llama, adapters=("alice",))) as client:
        code = "\n".join(python_of("docs/serving.md"))
        assert "http://127.0.0.1:8000/v1" in code
        names: dict[str, Any] = {}
        exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{client.port}").replace('"alice"', '"counter"'), names)
        assert names["answer"].choices[0].message.content
        names["client"].close()
