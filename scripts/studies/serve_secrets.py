"""Serve thousands of adapters, each of which answers with a secret of its own, to a thousand clients at once.

    python scripts/studies/serve_secrets.py                                  2,000 adapters, 64 slots, 5 minutes
    python scripts/studies/serve_secrets.py --seconds 1800 --kills 1000      longer

The base is a model of one layer whose attention is zero and whose feed-forward maps token t to the feature t. It answers by
repeating the last token. An adapter of rank r is constructed, not trained: its r - 1 letters are a path from the prompt "?"
to the end of the text, each step of which is one row of A and one column of B (the ranks are 4, 5 and 6).

The server is scripts/serve.py in a process of its own, and the clients connect over loopback. Until the time is over, each
of `clients` clients asks a random adapter at once, again and again; an answer must be the adapter's own secret. Then clients
leave in the middle of their streams. The study fails if an answer is missing, or has the secret of another adapter, or is
anything else; if the server compiles anything after it is ready; or if rows are in use at the end. The memory is that of
the server after each round. The last line is JSON.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qlora_jax import cli
from qlora_jax.errors import OptionError

SCRIPT = Path(__file__).resolve().parents[1] / "serve.py"
EOS, PROMPT = 1, "?"
LETTERS = ("abcdefghij", "klmnopqrst", "ABCDEFGHIJ", "KLMNOPQRST", "0123456789")  # one row for each place in a secret
VOCABULARY = {"<pad>": 0, "<eos>": EOS, PROMPT: 2} | {letter: 3 + i for i, letter in enumerate("".join(LETTERS))}
SIZE = 64  # of the vocabulary, the hidden states and the feed-forward


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serve adapters with secrets."""

    adapters: int = 2000
    """Adapters on disk."""
    slots: int = 64
    """Adapters on the device at a time."""
    rows: int = 16
    """Answers at a time."""
    clients: int = 1000
    """Clients at a time."""
    seconds: float = 300.0
    """How long they ask."""
    kills: int = 200
    """Clients that leave in the middle of a stream."""
    seed: int = 0
    """Of the secrets and of the order of requests."""


@dataclasses.dataclass
class Tally:
    """What became of the requests, and the server's memory in MiB after each round."""

    requests: int = 0
    correct: int = 0
    of_others: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    memory: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    killed: int = 0
    compiled: int = 0
    rows_running: tuple[int, int] = (0, 0)

    @property
    def good(self) -> bool:
        """Whether nothing went wrong."""
        return self.correct == self.requests > 0 and not self.compiled and self.rows_running == (0, 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(study, Arguments, __doc__, arguments)


def study(arguments: Arguments) -> int:
    """Print the tally; return 0 if nothing went wrong."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if not 0 < arguments.adapters <= sum(10**length for length in (3, 4, 5)) // 4:
        raise OptionError(f"--adapters: expected 1 to 27750, found {arguments.adapters}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_base(root / "base")
        secrets = write_adapters(root / "adapters", arguments.adapters, arguments.seed)
        with server(root, arguments) as (port, process, log):
            tally = asyncio.run(ask_all(port, process.pid, secrets, arguments))
            tally.compiled = sum("Compiling" in line for line in log)
    print(f"{tally.requests} requests in {tally.seconds:.0f} s: {tally.correct} own secrets, {tally.of_others} of others")
    print(f"{tally.killed} clients left; rows in use before and after: {tally.rows_running}; {tally.compiled} compilations")
    print(f"memory of the server after each round: {', '.join(f'{size:.0f}' for size in tally.memory)} MiB")
    print(json.dumps(dataclasses.asdict(tally)))
    return 0 if tally.good else 1


def write_base(folder: Path) -> None:
    """Write a model that repeats the last token."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config: Any = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    one, zero, layer = np.eye(SIZE, dtype=np.float32), np.zeros((SIZE, SIZE), np.float32), "model.layers.0"
    tensors = {
        "model.embed_tokens.weight": one,
        "model.norm.weight": np.ones(SIZE, np.float32),
        **{f"{layer}.self_attn.{name}_proj.weight": zero for name in "qkvo"},
        **{f"{layer}.{name}.weight": np.ones(SIZE, np.float32) for name in ("input_layernorm", "post_attention_layernorm")},
        **{f"{layer}.mlp.{name}_proj.weight": matrix for name, matrix in (("gate", one), ("up", one), ("down", zero))},
    }
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<pad>"))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)


def write_adapters(folder: Path, count: int, seed: int) -> dict[str, str]:
    """Write adapters with different secrets; return the secrets by the adapters' names."""
    draws, secrets = np.random.default_rng(seed), {}
    while len(secrets) < count:
        length = 3 + len(secrets) % 3
        secret = "".join(LETTERS[place][draws.integers(10)] for place in range(length))
        secrets.setdefault(secret, f"tenant-{len(secrets):05d}")
    for secret, name in secrets.items():
        (folder / name).mkdir(parents=True)
        path = [VOCABULARY[letter] for letter in PROMPT + secret] + [EOS]
        rank = len(path) - 1
        a, b = np.zeros((rank, SIZE), np.float32), np.zeros((SIZE, rank), np.float32)
        a[range(rank), path[:-1]], b[path[1:], range(rank)] = 1, 1
        module = "base_model.model.model.layers.0.mlp.down_proj"
        save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, folder / name / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": ["down_proj"],
            "task_type": "CAUSAL_LM",
        }
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return {name: secret for secret, name in secrets.items()}


@contextlib.contextmanager
def server(root: Path, arguments: Arguments) -> Iterator[tuple[int, "subprocess.Popen[str]", list[str]]]:
    """Run a server; give (its port, its process, the lines that it wrote since it is ready)."""
    sizes = {"rows": arguments.rows, "slots": arguments.slots, "capacity": 64, "chunk": 8, "held": 2 * arguments.slots}
    sizes |= {"waiting": 2 * arguments.clients, "waiting-per-tenant": arguments.clients, "port": 0}
    line = [sys.executable, str(SCRIPT), "--model", str(root / "base"), "--adapter-folder", str(root / "adapters")]
    line += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    # XLA writes each program that it compiles.
    environment = os.environ | {"JAX_LOG_COMPILES": "1"}
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True)
    assert process.stderr is not None
    try:
        for text in process.stderr:
            if found := re.search(r"serving .* at http://127\.0\.0\.1:(\d+)/v1", text):
                break
            lines.append(text)
        else:
            raise OptionError("the server did not start:\n" + "".join(lines[-20:]))
        lines.clear()
        thread.start()
        yield int(found[1]), process, lines
    finally:
        process.terminate()
        process.wait(60)
        if thread.is_alive():
            thread.join(60)
        process.stderr.close()


async def ask_all(port: int, pid: int, secrets: dict[str, str], arguments: Arguments) -> Tally:
    """Let the clients ask until the time is over, and others leave; return what became of it."""
    tally, draws, names = Tally(), np.random.default_rng(arguments.seed + 1), list(secrets)
    owners = collections.Counter(secrets.values())
    start = time.monotonic()
    while not tally.memory or time.monotonic() - start < arguments.seconds:
        asked = [names[index] for index in draws.integers(len(names), size=arguments.clients)]
        answers = await asyncio.gather(*(ask(port, name) for name in asked))
        for name, (text, finish) in zip(asked, answers, strict=True):
            right = (text, finish) == (secrets[name], "stop")
            tally.correct += right
            tally.of_others += not right and text in owners
            if not right:
                tally.wrong.append(f"{name}: expected {secrets[name]}, found {text} ({finish})")
        tally.requests += len(asked)
        tally.memory.append(memory_of(pid))
    tally.seconds = time.monotonic() - start
    before = await rows_running(port)
    for index in range(0, arguments.kills, 20):
        leave = [names[index] for index in draws.integers(len(names), size=min(20, arguments.kills - index))]
        tally.killed += sum(await asyncio.gather(*(leave_stream(port, name) for name in leave)))
    deadline = time.monotonic() + 60
    while (after := await rows_running(port)) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    tally.rows_running = before, after
    # Every slot must still be free for another adapter.
    last = names[: 2 * arguments.slots]
    right = [text == secrets[name] for name in last for text, _ in [await ask(port, name)]]
    tally.requests, tally.correct = tally.requests + len(last), tally.correct + sum(right)
    return tally


async def ask(port: int, name: str) -> tuple[str, str]:
    """Return (the answer of an adapter, why it ended), or what the server answered instead."""
    body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    reader, writer = await request(port, "POST", "/v1/completions", body)
    data = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    try:
        choice = json.loads(data[2])["choices"][0]
    except (ValueError, KeyError):
        return (data[0] + data[2]).decode(errors="replace"), "no answer"
    return choice["text"], choice["finish_reason"]


async def leave_stream(port: int, name: str) -> bool:
    """Ask for a long answer, and leave after its first part; return whether it had not ended."""
    bias = {str(EOS): -100}
    body = {"model": name, "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "stream": True, "logit_bias": bias}
    reader, writer = await request(port, "POST", "/v1/completions", body)
    seen = b""
    while b"data: " not in seen and (more := await reader.read(256)):
        seen += more
    writer.transport.abort()
    return b"data: " in seen and b"[DONE]" not in seen


async def rows_running(port: int) -> int:
    """Return the number of rows with answers, and of answers that wait, as the server's metrics tell it."""
    reader, writer = await request(port, "GET", "/metrics", None)
    text = (await reader.read()).decode()
    writer.close()
    found = re.findall(r"^qlora_(?:rows_running|answers_waiting) ([0-9.]+)$", text, re.MULTILINE)
    return int(sum(map(float, found))) if len(found) == 2 else -1


async def request(port: int, method: str, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


def memory_of(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
