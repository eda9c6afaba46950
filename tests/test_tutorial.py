"""The steps of docs/tutorial.md, in its own files and commands, with a tiny model in place of the default one (20 CPU-s)."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from pages import blocks

from qlora_jax.commands import main
from qlora_jax.serve.http_calls import chat_call


def code_of(language: str) -> list[str]:
    return [block.text for block in blocks("docs/tutorial.md") if block.language == language]


@pytest.mark.integration
def test_a_reader_gets_from_data_to_two_adapters_that_answer(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = code_of("python")
    Path("make_data.py").write_text(source, encoding="utf-8")
    runpy.run_path("make_data.py")
    (tenants,) = (block for block in code_of("") if block.startswith("output ="))
    tenants = tenants.replace("max_length = 64", "max_length = 256")  # the tokens of the tiny model are bytes
    Path("TENANTS.toml").write_text(f'{tenants}\n[model]\nmodel = "{tiny_llama}"\n', encoding="utf-8")
    lines = "".join(code_of("")).replace("\\\n", " ").splitlines()
    typed = {name: rest for line in lines if line.startswith("python scripts/") for name, *rest in [shlex.split(line)[1:]]}
    assert set(typed) == {"scripts/train_many.py", "scripts/generate.py", "scripts/serve.py"}

    assert main(["train_many", *typed["scripts/train_many.py"]]) == 0
    assert re.search(r"bob +finished +20/20", capsys.readouterr().err)
    (request,) = (shlex.split(line) for line in lines if line.startswith("curl "))
    assert chat_call(json.loads(request[request.index("-d") + 1])).model == "bob"
    assert request[1].endswith("/v1/chat/completions")
    assert main(["generate", "--model", str(tiny_llama), "--max-new-tokens", "4", *typed["scripts/generate.py"]]) == 0
    assert capsys.readouterr().out
