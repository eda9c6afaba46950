"""scripts/evaluate.py as a command: the figures of a model and of its adapter, and one line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from virtual_devices import virtual_devices

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.commands.evaluate import main
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    environment = virtual_devices(devices) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "mmlu.jsonl"
    rows = [
        {
            "subject": f"subject_{n % 2}",
            "input": f"{'so ' * n}what?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
            "output": "ABCD"[n % 4],
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.integration
def test_an_adapter_is_asked(tiny_llama: Path, tmp_path: Path, questions: Path) -> None:
    """By two devices; the accuracies are those of full logits, one prompt at a time, of the model with the adapter."""
    lora = LoRA(rank=4, alpha=64.0)
    model = load_model(open_checkpoint(str(tiny_llama)), quantization=Quantization(), method=lora)
    graphdef, adapter, rest = nnx.split(model, nnx.LoRAParam, ...)
    draws = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: x + 0.3 * draws.standard_normal(x.shape, np.float32), adapter)
    folder = save_adapter(nnx.merge(graphdef, adapter, rest), tmp_path / "adapter")
    model_flags = ["--model", str(tiny_llama), "--adapter", str(folder)]
    done = call("--mmlu", str(questions), *model_flags, "--batch-size", "5", devices=2)
    assert done.returncode == 0, done.stderr
    asked = load_adapter(model, folder)
    tokenizer = load_tokenizer(tiny_llama)
    letters = tokenizer.convert_tokens_to_ids(list("ABCD"))
    graphdef, state = nnx.split(asked)
    forward = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))
    right: dict[str, list[bool]] = {}
    for line in questions.read_text().splitlines():
        row = json.loads(line)
        tokens = tokenizer(row["input"] + " ")["input_ids"]
        padded = np.zeros((1, 128), np.int32)  # one shape to compile; padding on the right changes nothing
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(forward(state, padded))[0, len(tokens) - 1, letters]
        right.setdefault(row["subject"], []).append("ABCD"[logits.argmax()] == row["output"])
    *subjects, last = done.stdout.splitlines()
    assert subjects == [f"{name:<40} {np.mean(found):.3f} of 6" for name, found in sorted(right.items())]
    assert json.loads(last) == {
        "accuracy": pytest.approx(np.mean([np.mean(found) for found in right.values()])),
        "questions": 12,
        "subjects": 2,
    }
    assert "12 of 12 questions, 2 subjects, 0-shot; 12 prompts" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --mmlu: expected a file of questions or cais/mmlu, found none"),
        (["--mmlu", "missing.jsonl"], "error: missing.jsonl: expected a data file or a folder, found nothing at"),
        (["--mmlu", "mmlu.jsonl", "--batch-size", "0"], "batch_size: expected at least 1, found 0"),
    ],
)
def test_one_line_for_what_is_wrong(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code = main(["--model", str(tiny_llama), *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code != 0
    said = capsys.readouterr().err
    assert message in " ".join(said.replace("│", " ").split())
    assert "Traceback" not in said
