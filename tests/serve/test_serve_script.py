"""scripts/serve.py: who may listen where, adapters' paths, and a whole server that is drained (8 CPU-seconds)."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from qlora_jax.commands.serve import (
    AdapterOptions,
    ServerOptions,
    adapter_sources,
    check_access,
    listen,
    main,
    path_within,
    warn_of_templates,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org", ""])
def test_an_address_that_others_reach_needs_keys_or_is_said_twice(host: str) -> None:
    with pytest.raises(ValueError, match=r"expected --keys FILE, because others may reach this address"):
        check_access(ServerOptions(host=host))
    with pytest.raises(ValueError, match="expected --keys FILE"):
        check_access(ServerOptions(host=host, open_to_everyone="127.0.0.1"))
    assert check_access(ServerOptions(host=host, open_to_everyone=host)) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_an_address_of_this_machine_needs_no_keys(host: str) -> None:
    assert check_access(ServerOptions(host=host)) is None


def test_numbers_outside_their_range_are_refused() -> None:
    wrong: Any = (
        (AdapterOptions, "rank", 0),
        (ServerOptions, "drain_seconds", float("inf")),
        (ServerOptions, "most_body_bytes", 0),
    )
    for options, name, value in wrong:
        with pytest.raises(ValueError, match=f"{name}: expected"):
            options(**{name: value})


def test_a_second_server_on_the_port_says_so() -> None:
    with listen(ServerOptions(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"--host 127.0.0.1 --port {port}: cannot listen there: .*in use"):
            listen(ServerOptions(port=port))


def test_a_new_key_is_not_in_the_lines_for_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--new-key", "alice"]) == 0
    captured = capsys.readouterr()
    key = captured.err.strip().rpartition(" ")[2]
    assert key.startswith("sk-")
    assert key not in captured.out
    assert 'name = "alice"' in captured.out


def test_names_of_adapters(tmp_path: Path) -> None:
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    found = adapter_sources(AdapterOptions(adapters=("a=x", "b=y"), adapter_folder=tmp_path))
    assert found == {"a": Path("x"), "b": Path("y"), "c": tmp_path / "c", "run": tmp_path / "run" / "adapter"}
    for wrong in (("a",), ("=x",), ("a=",), ("a=x", "a=y")):
        with pytest.raises(ValueError, match="expected different names as in NAME=PATH"):
            adapter_sources(AdapterOptions(adapters=wrong))


def test_adapters_of_other_templates_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = {name: tmp_path / name for name in ("alpaca", "chat", "unknown")}
    for name, folder in sources.items():
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        if name != "unknown":
            (folder / "qlora_jax.json").write_text(json.dumps({"quantization": None, "template": name}))
    warn_of_templates(sources, "auto", has_chat_template=True)
    (message,) = caplog.messages
    assert "adapter alpaca was trained with the template alpaca, but requests are written with chat" in message
    caplog.clear()
    warn_of_templates({"alpaca": sources["alpaca"]}, "alpaca", has_chat_template=True)
    assert caplog.messages == []


def test_an_adapter_s_files_are_within_the_root_wherever_links_lead(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "good", root / "pickled", root / "linked", root / "described", outside):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    for folder in (root / "good", root / "described", outside):
        (folder / "adapter_model.safetensors").write_bytes(b"")
    (root / "pickled" / "adapter_model.bin").write_bytes(b"")
    (root / "link").symlink_to(outside)
    (root / "linked" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (root / "described" / "qlora_jax.json").symlink_to(outside / "adapter_config.json")
    assert path_within(root, "good") == root / "good"
    for path in ("../outside", str(outside), "link", "linked", "described", "good/../../outside", "good\0"):
        with pytest.raises(ValueError, match="expected a folder within the folder of adapters"):
            path_within(root, path)
    for path in ("pickled", "nothing"):
        with pytest.raises(ValueError, match=r"adapter_config.json and adapter_model.safetensors"):
            path_within(root, path)


@pytest.mark.integration
@pytest.mark.parametrize("installed", ["uvicorn"])
def test_a_server_with_an_adapter_answers_and_drains(
    installed: str, tiny_llama: Path, tmp_path: Path, make_adapter: Callable[[Path], Path]
) -> None:
    """SIGTERM comes in the middle of a stream, whose end arrives all the same."""
    pytest.importorskip(installed, reason=f"{installed}, for the server, is not installed")
    adapter = make_adapter(tmp_path / "mine")
    command = [sys.executable, "scripts/serve.py", "--model", str(tiny_llama), "--adapters", f"mine={adapter}"]
    command += ["--port", "0", "--rows", "2", "--capacity", "256", "--chunk", "16", "--drain-seconds", "200"]
    log = tmp_path / "log"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stderr=stack.enter_context(log.open("w"))))
        try:
            connection = wait_until_ready(server, log)
            stack.callback(connection.close)
            texts = {model: ask(connection, model) for model in ("mine", tiny_llama.name)}
            assert texts["mine"] != texts[tiny_llama.name]
            body = {"model": "mine", "prompt": "a", "max_tokens": 200, "temperature": 0, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body))
            response = connection.getresponse()
            first = response.read(20)
            server.send_signal(signal.SIGTERM)
            assert (first + response.read()).endswith(b"data: [DONE]\n\n")
            assert server.wait(200) == 0
        finally:
            server.kill()
    assert "no more requests are taken" in log.read_text()


def wait_until_ready(server: "subprocess.Popen[bytes]", log: Path) -> http.client.HTTPConnection:
    """Return a connection to the port that the server says it has."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        if (found := re.search(r"at http://127\.0\.0\.1:(\d+)/v1", log.read_text())) is None:
            time.sleep(0.2)
            continue
        port = int(found[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        with contextlib.suppress(OSError):
            connection.request("GET", "/ready")
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                return connection
        connection.close()
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def ask(connection: http.client.HTTPConnection, model: str) -> str:
    body = {"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    answer: Any = json.loads(response.read())
    assert response.status == 200, answer
    return answer["choices"][0]["text"]


@pytest.fixture
def make_adapter() -> Callable[[Path], Path]:
    """Writes an adapter of the tiny Llama in PEFT's format."""
    import numpy as np

    def make(folder: Path) -> Path:
        folder.mkdir()
        draws, tensors = np.random.default_rng(0), {}
        for layer in range(2):
            name = f"base_model.model.model.layers.{layer}.mlp.up_proj"
            tensors[f"{name}.lora_A.weight"] = draws.standard_normal((4, 64), np.float32)
            tensors[f"{name}.lora_B.weight"] = draws.standard_normal((128, 4), np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "task_type": "CAUSAL_LM"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make
