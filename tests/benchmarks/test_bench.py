"""scripts/benchmarks/bench.py: both sides do the same work on the same tiny model; how metrics are combined."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.models.llama import llama_config
from scripts.benchmarks import bench as script
from scripts.benchmarks import compiled, decoding, memory, page, training, workers
from scripts.benchmarks.workers import OURS, Found, Peer, Run

PYTHON = Path(sys.executable)
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # of which Qwix needs a multiple
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
WORK = {"batch_size": 2, "length": 16, "rank": 4, "steps": 1, "warmup": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny random model."""
    path = tmp_path_factory.mktemp("model")
    hidden, inner, heads, key_value, vocabulary = 64, 128, 256, 128, 97
    shapes = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
        "norm": (hidden,),
    }
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    config = llama_config(CONFIG)
    for key in config.parameter_mappings:
        for name in key.names():
            shape = next(shape for suffix, shape in shapes.items() if name.endswith(f"{suffix}.weight"))
            # Large enough that a loss from random logits is not just the logarithm of the vocabulary.
            value = generator.standard_normal(shape, np.float32) * np.float32(2 * shape[-1] ** -0.5)
            tensors[name] = np.ones(shape, np.float32) if len(shape) == 1 else value
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def needs(peer: Peer) -> None:
    if missing := workers.missing_packages(PYTHON, peer.packages):
        pytest.skip(f"the peer's packages are not installed: {', '.join(missing)}")


def train_runs(folder: Path, **variants: tuple[str, ...]) -> list[Run]:
    return training.runs_of(folder, variants, dict.fromkeys(variants, PYTHON), **WORK)


def check_train(found: dict[str, Any]) -> None:
    assert len(found["step_seconds"]) == len(found["step_cpu_seconds"]) == 1
    assert len(found["losses"]) == 2
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert found["peak_resident_bytes"] > 50e6
    assert found["start_seconds"] > found["load_seconds"] + found["first_step_seconds"]


@pytest.mark.integration
def test_both_sides_compute_the_same_first_loss(folder: Path) -> None:
    needs(script.HF)
    runs = train_runs(folder, ours=("float32-full",), hf=("float32-checkpointing", "float32-prepared"))
    ours, peer, prepared = (workers.run_worker(run.command) for run in runs)
    for found in (ours, peer, prepared):
        check_train(found)
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], rel=1e-4)
    assert prepared["losses"] == pytest.approx(peer["losses"], rel=1e-5)
    assert abs(ours["losses"][0] - math.log(97)) > 0.1, "the model is too flat for the loss to tell anything"
    assert ours["trainable_parameters"] == peer["trainable_parameters"]


@pytest.mark.integration
def test_both_sides_decode_the_same_tokens(folder: Path) -> None:
    needs(script.HF)
    variants = {OURS: ("dense-float32",), "hf": ("dense-float32",)}
    work: dict[str, Any] = {"batch_size": 2, "prompt": [5, 3, 8, 1], "new_tokens": 6, "answers": 1}
    runs = decoding.runs_of(folder, variants, dict.fromkeys(variants, PYTHON), **work)
    found = {run.name: [workers.run_worker(run.command)] for run in runs}
    results = {name: decoding.summary(one, 2, "cpu") for name, one in found.items()}
    assert decoding.agreement(results) == {"ours dense-float32": 6}
    for row in results.values():
        assert row["tokens_per_second"] == 2 / row["token_seconds"]
        assert row["start_seconds"] > row["prefill_seconds"]
    results["ours dense-float32"]["tokens"][2] += 1
    assert decoding.agreement(results) == {"ours dense-float32": 2}
    [sentence] = decoding.agreement_sentences(decoding.agreement(results), 6)
    assert "do NOT agree (from token 3 on)" in sentence


@pytest.mark.integration
def test_qwix_trains_the_same_adapter(folder: Path) -> None:
    needs(script.QWIX)
    ours, peer = (workers.run_worker(run.command) for run in train_runs(folder, ours=("float32-full",), qwix=("float32",)))
    check_train(peer)
    assert ours["trainable_parameters"] == peer["trainable_parameters"]
    # Without double quantisation, and with a rotary theta of its own.
    assert ours["losses"][0] == pytest.approx(peer["losses"][0], rel=0.05)


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark of memory is Linux's")
def test_planned_memory_is_measured(folder: Path) -> None:
    [run] = memory.runs_of(folder, ["float32-none-4x64"], PYTHON, rank=4)
    result = workers.run_worker(run.command)
    parts = (result[name] for name in ("arguments", "temporaries", "outputs"))
    assert result["planned"] == sum(parts) - result["aliased"]
    assert result["losses"][0] > result["losses"][-1]
    assert result["measured"] > 0  # of so small a model libraries take more than the step
    found = Found({run.name: [{**result, "error": -0.2}]}, {})
    assert "NOT within the limit of 15%" in memory.section(found, {"model": "x", "rank": 4}).after[0]


def test_a_recipe_that_is_none_is_an_error() -> None:
    assert memory.parsed("bfloat16-dots-2x64") == {"dtype": "bfloat16", "remat": "dots", "batch_size": 2, "length": 64}
    with pytest.raises(ValueError, match="expected dtype-remat-BxT such as float32-full-4x256, found float32-all-4x256"):
        memory.parsed("float32-all-4x256")


def test_a_worker_that_fails_is_reported_with_what_it_said(folder: Path) -> None:
    [run] = training.runs_of(folder, {OURS: ("float32-full",)}, {OURS: PYTHON}, **{**WORK, "warmup": 0})
    with pytest.raises(ValueError, match="--warmup: expected at least 1"):
        workers.run_worker(run.command)


def test_a_peer_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_worker(command: tuple[str, ...], platform: str) -> dict[str, Any]:
        if command[0] == "hf":
            raise ValueError("exit status 1: it\nhas no kernels")
        return {"versions": {"jax": "1"}}

    monkeypatch.setattr(workers, "run_worker", run_worker)
    runs = [Run(OURS, "a", ("ours",)), Run("hf", "b", ("hf",))]
    found = workers.in_rounds(runs, 2, "cpu", lambda result: "done", "train")
    assert [len(results) for results in found.runs.values()] == [2]
    assert found.skipped == {"hf b": "has no kernels"}
    assert found.versions == {OURS: {"jax": "1"}}


def test_a_peer_takes_the_first_interpreter_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = {Path("a"): ("tunix",), Path("b"): ()}
    monkeypatch.setattr(workers, "missing_packages", lambda python, packages: lacks[python])
    monkeypatch.setattr(workers, "has_cuda", lambda python: False)
    assert workers.find_python(script.QWIX, [Path("a"), Path("b")]) == (Path("b"), "")
    assert workers.find_python(script.QWIX, [Path("a")]) == (None, "a has no tunix")
    assert workers.find_python(script.UNSLOTH, [Path("b")]) == (None, "b: needs a CUDA GPU, found none")


def test_an_interpreter_that_is_none_is_said() -> None:
    with pytest.raises(ValueError, match="expected a Python interpreter"):
        workers.missing_packages(Path("/no/such/python"), ("torch",))


def test_the_sides_take_turns() -> None:
    variants = {
        OURS: ("float32-dots", "bfloat16-full"),
        "hf": ("float32", "bfloat16-checkpointing", "bfloat16-prepared"),
        "qwix": ("bfloat16-block",),
    }
    pythons = {OURS: Path("a"), "hf": Path("b"), "qwix": Path("c")}
    runs = workers.in_turns(training.runs_of(Path("x"), variants, pythons, **WORK))
    assert [run.name for run in runs] == [
        "ours float32-dots",
        "hf float32",
        "ours bfloat16-full",
        "hf bfloat16-checkpointing",
        "hf bfloat16-prepared",
        "qwix bfloat16-block",
    ]
    commands = {run.name: run.command for run in runs}
    assert commands["ours bfloat16-full"][-2:] == ("--dtype=bfloat16", "--remat=full")
    assert commands["hf bfloat16-checkpointing"][-3:] == ("--dtype=bfloat16", "--library=peft", "--gradient-checkpointing")
    assert commands["hf bfloat16-prepared"][-3:] == ("--dtype=bfloat16", "--library=peft", "--prepared")
    assert commands["hf float32"][-1] == "--library=peft"
    assert commands["qwix bfloat16-block"][0] == "c"


def trained(steps: list[float], peak: int) -> dict[str, Any]:
    """What a worker that trained would print."""
    return {
        "step_seconds": steps,
        "step_cpu_seconds": [2 * step for step in steps],
        "peak_resident_bytes": peak,
        "peak_device_bytes": None,
        "load_seconds": 1.0,
        "first_step_seconds": 5.0,
        "start_seconds": 8.0,
        "losses": [3.0, 2.0],
        "trainable_parameters": 7,
        "versions": {"python": "3", "jax": "1.2"},
    }


def test_the_summary_is_a_median_over_rounds_and_a_maximum_of_memory() -> None:
    found = training.summary([trained([1.0, 2.0], 10), trained([4.0], 30)], 100, "cpu")
    assert found["tokens_per_second"] == 50.0
    assert found["step_cpu_seconds"] == 4.0
    assert found["busy"] == 2 / workers.cores()
    assert found["disturbed"]  # one step took four times as long as another
    assert not training.summary([trained([workers.QUIET, 1.0], 10)], 100, "cpu")["disturbed"] or workers.cores() > 2
    assert found["step_seconds_range"] == [1.0, 4.0]
    assert found["peak_resident_bytes"] == 30
    assert found["peak_device_bytes"] is None
    assert found["start_seconds"] == 8.0
    assert (found["first_loss"], found["last_loss"]) == (3.0, 2.0)


def test_compiled_steps_stand_side_by_side() -> None:
    work: dict[str, Any] = {"batch_size": 4, "length": 2048, "rank": 16}
    pythons = {OURS: Path("a"), "qwix": Path("b")}
    runs = compiled.runs_of(["llama-3-8b"], ["h100"], ["train", "decode"], pythons, **work)
    assert [run.name for run in runs] == [
        "ours train llama-3-8b h100",
        "qwix train llama-3-8b h100",
        "ours decode llama-3-8b h100",
    ]
    program = {
        "peak": 3 * 2**30,
        "weights": 2**30,
        "temporaries": 2**29,
        "flops": 2e12,
        "traffic": 5e9,
        "compile_seconds": 7.4,
    }
    none = {"peak": None, "needed": 20 * 2**30}
    results = [program, none, program]
    versions = {"jax": "1.2"}
    found = Found({run.name: [{**one, "versions": versions}] for run, one in zip(runs, results, strict=True)}, {})
    section = compiled.section(found, work)
    assert ("h100 llama-3-8b", "train", "4 x 2048", "ours", "3.00", "1.00", "0.50", "2.000", "5.0", "7") in section.rows
    assert ("h100 llama-3-8b", "train", "4 x 2048", "qwix", "does not fit (20.00)", "", "", "", "", "") in section.rows
    text = page.markdown([section], "python scripts/benchmarks/bench.py")
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {11}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "steps: expected at least 1, found 0"),
        (["--new-tokens", "1"], "new_tokens: expected at least 2"),
        (["--device", "h1000"], "unknown device 'h1000'; did you mean h100"),
        (["--compile-models", "llama-9b"], "compile_models: expected some of smollm2-135m, "),
        (["--memory-recipes", "float32"], "memory-recipes: expected dtype-remat-BxT"),
        (["--output", "/no/such/folder/results.md"], "output: expected a folder that exists"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    assert script.main() == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_checkpoint_of_another_kind_is_exported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.checkpoint_folder(str(folder), tmp_path) == folder
    opened: Checkpoint = script.open_checkpoint(str(folder))
    monkeypatch.setattr(script, "open_checkpoint", lambda source: opened)
    exported = script.checkpoint_folder("some.gguf", tmp_path)
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_report_is_a_page_and_ends_with_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "results.md"
    work = {**WORK, "rounds": 1, "hf": (), "qwix": (), "ours": ("bfloat16-full",)}
    monkeypatch.setattr(sys, "argv", ["/here/scripts/benchmarks/bench.py", f"--model={folder}", "--output", str(output)])
    monkeypatch.setattr(workers, "run_worker", lambda command, platform: trained([1.0], 10))
    script.run(script.Arguments(model=str(folder), tasks=("train",), output=output, **work))
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])["train"]
    assert report["results"].keys() == {"ours bfloat16-full"}
    [found] = report["runs"]["ours bfloat16-full"]
    assert found.keys() == {*trained([1.0], 10), "load_average_before"}
    assert report["versions"]["ours"] == {"python": "3", "jax": "1.2"}
    assert report["skipped"] == {"unsloth": "needs a CUDA GPU (--platform default)"}
    assert any(line.startswith("ours bfloat16-full") for line in lines)
    written = output.read_text()
    assert "| ours bfloat16-full | " in written
    assert "unsloth did not run" in written
    assert str(tmp_path) not in written
