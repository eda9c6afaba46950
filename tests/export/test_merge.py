"""Merging: against PEFT's own, read by transformers and by ourselves, and never half written."""

import dataclasses
import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tiers import tiered

import qlora_jax as qj
from qlora_jax.adapters.bind import load_adapter
from qlora_jax.adapters.files import Adapter, write_adapter
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.adapters.names import tensor_name
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.errors import CheckpointError, OptionError
from qlora_jax.export import merge as merge_module
from qlora_jax.export.drift import logit_drift, sample_logits
from qlora_jax.export.merge import merge
from qlora_jax.models import CausalLM, linear_modules
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import EmbeddingStorage, Quantization, dequantize, quantize

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "merge.py"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "quantization_config": {"quant_method": "some"},
    "dtype": "float32",
}
LORA = LoRA(rank=4, alpha=6, target_modules=("q_proj", "down_proj"))
Q = "model.layers.1.self_attn.q_proj"
# PEFT calls a property of transformers that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """float32 tensors of a tiny model, in Hugging Face's orientation."""
    config, generator = llama_config(CONFIG), np.random.default_rng(0)
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    found: dict[str, np.ndarray] = {}
    for key in config.parameter_mappings:
        value: Any = model
        for name in key.path:
            value = getattr(value, name)
        shape = value.shape[1:] if key.stacked else value.shape
        for name in key.names():
            tensor = generator.standard_normal(shape[::-1] if key.linear else shape, np.float32)
            plain = "embed" in name or "lm_head" in name
            found[name] = tensor if plain else tensor / 8 if key.linear else 1 + tensor / 8
    return found


@pytest.fixture
def checkpoint(tensors: dict[str, np.ndarray]) -> Checkpoint:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return Checkpoint("memory", CONFIG, shapes, tensors.__getitem__)


@pytest.fixture
def adapter(checkpoint: Checkpoint) -> Adapter:
    return random_adapter(checkpoint, LORA)


def random_adapter(checkpoint: Checkpoint, lora: LoRA, scale: float = 0.1) -> Adapter:
    generator, config = np.random.default_rng(1), llama_config(checkpoint.config)
    modules = linear_modules(config.parameter_mappings)
    found: dict[str, np.ndarray] = {}
    for path in sorted(lora.targets(modules)):
        for module in modules[path]:
            outputs, inputs = checkpoint.shapes[f"{module}.weight"]
            name_a, name_b = names_of(module)
            found[name_a] = scale * generator.standard_normal((lora.rank, inputs), np.float32)
            found[name_b] = scale * generator.standard_normal((outputs, lora.rank), np.float32)
    return Adapter("memory", lora, "owner/base", found)


def names_of(module: str) -> list[str]:
    return [tensor_name(module, suffix) for suffix in ("lora_A.weight", "lora_B.weight")]


def read_all(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(str(folder))
    return {name: checkpoint.read(name) for name in checkpoint.shapes}


def test_merged_in_float32_the_weights_are_those_of_peft(checkpoint: Checkpoint, adapter: Adapter, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    peft = pytest.importorskip("peft", reason="PEFT, to compare with, is not installed")
    transformers = pytest.importorskip("transformers")
    merge(checkpoint, None, tmp_path / "base", dtype="float32", progress=False)
    write_adapter(adapter.tensors, tmp_path / "adapter", method=LORA)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()

    merge(checkpoint, adapter, tmp_path / "merged", dtype="float32", progress=False)
    ours = read_all(tmp_path / "merged")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"),
    [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)],
)
def test_weights_are_rounded_once(
    checkpoint: Checkpoint,
    adapter: Adapter,
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
    dtype: Any,
    numpy_dtype: Any,
) -> None:
    merge(checkpoint, adapter, tmp_path / "merged", dtype=dtype, progress=False)
    found = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        expected = tensor.astype(np.float64)
        if names_of(module)[0] in adapter.tensors:
            a, b = (adapter.tensors[part].astype(np.float64) for part in names_of(module))
            expected = expected + 6 / 4 * b @ a
            assert np.abs(expected - tensor).max() > 0.01
        assert found[name].dtype == numpy_dtype
        # Half a unit in the last place, and float32's own rounding.
        half = float(jnp.finfo(numpy_dtype).eps) / 2
        np.testing.assert_allclose(found[name].astype(np.float64), expected, rtol=half, atol=1e-6)


def test_transformers_reads_the_folder_and_computes_the_same(
    checkpoint: Checkpoint, adapter: Adapter, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    transformers = pytest.importorskip("transformers")
    merge(checkpoint, adapter, tmp_path / "merged", dtype="bfloat16", shard_bytes=30_000, progress=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert theirs.dtype == torch.bfloat16
    tokens = np.random.default_rng(0).integers(0, 101, (2, 20), np.int32)
    with torch.no_grad():
        expected = theirs.float().eval()(torch.from_numpy(tokens).long()).logits.numpy()
    merged = open_checkpoint(str(tmp_path / "merged"))
    (found,) = sample_logits(load_model(merged, quantization=None, dtype=jnp.float32, progress=False), [tokens])
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_shards_and_their_index(checkpoint: Checkpoint, tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    merge(checkpoint, None, tmp_path / "whole", progress=False)
    assert sorted(os.listdir(tmp_path / "whole")) == ["config.json", "model.safetensors"]
    merge(checkpoint, None, tmp_path / "parts", shard_bytes=30_000, progress=False)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(4 * tensor.size for tensor in tensors.values())
    assert sorted(set(index["weight_map"].values())) == files
    for file in files:
        held = safetensors.numpy.load_file(tmp_path / "parts" / file)
        assert held.keys() == {name for name, place in index["weight_map"].items() if place == file}
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 30_000
    whole, parts = read_all(tmp_path / "whole"), read_all(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        np.testing.assert_array_equal(parts[name], tensor)


@pytest.mark.parametrize(
    "quantization", tiered([Quantization(), Quantization("fp4", 128, False)], quick=[Quantization()]), ids=str
)
def test_onto_what_training_saw(
    checkpoint: Checkpoint,
    adapter: Adapter,
    tensors: dict[str, np.ndarray],
    tmp_path: Path,
    quantization: Quantization,
) -> None:
    """Logits equal those of the adapter on the quantised base; onto the original weights they do not."""
    for name, base in (("dequantized", quantization), ("original", None)):
        merge(checkpoint, adapter, tmp_path / name, dtype="float32", from_dequantized=base, progress=False)
    found = read_all(tmp_path / "dequantized")
    np.testing.assert_array_equal(found["lm_head.weight"], tensors["lm_head.weight"])
    k = "model.layers.0.self_attn.k_proj.weight"
    quantized = quantize(
        jnp.asarray(tensors[k]).T,
        quantization.data_type,
        quantization.block_size,
        quantization.double_quantization,
    )
    np.testing.assert_allclose(found[k], dequantize(quantized).T, atol=1e-7)

    batches = [
        np.random.default_rng(0).integers(0, 101, (2, 20), np.int32),
        np.arange(9, dtype=np.int32)[None],
    ]
    trained = load_model(checkpoint, quantization=quantization, method=adapter.method, dtype=jnp.float32, progress=False)
    before = sample_logits(load_adapter(trained, adapter), batches)
    drift = {}
    for name in ("dequantized", "original"):
        merged = open_checkpoint(str(tmp_path / name))
        model = load_model(merged, quantization=None, dtype=jnp.float32, progress=False)
        drift[name] = logit_drift(before, sample_logits(model, batches))
    assert drift["dequantized"].max < 1e-3
    assert drift["dequantized"].same_token == 1
    assert drift["dequantized"].positions == 49
    assert drift["original"].mean > 0.1


@pytest.mark.parametrize("embedding_storage", ["int8", "nf4"])
def test_onto_the_packed_tables_that_training_saw(
    checkpoint: Checkpoint, tensors: dict[str, np.ndarray], tmp_path: Path, embedding_storage: EmbeddingStorage
) -> None:
    """Logits equal those of the adapter on packed tables, of which it trained one row."""
    lora = LoRA(rank=4, alpha=6, target_modules=("q_proj",), trainable_token_indices=(7,))
    row = np.full((1, 64), 0.5, np.float32)
    found = random_adapter(checkpoint, lora)
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    adapter = dataclasses.replace(found, tensors={**found.tensors, name: row})
    merge(checkpoint, adapter, tmp_path / "it", dtype="float32", from_embedding_storage=embedding_storage, progress=False)
    np.testing.assert_array_equal(read_all(tmp_path / "it")["model.embed_tokens.weight"][7], row[0])
    trained = load_model(
        checkpoint, quantization=None, embedding_storage=embedding_storage, method=lora, dtype=jnp.float32, progress=False
    )
    merged = load_model(open_checkpoint(str(tmp_path / "it")), quantization=None, dtype=jnp.float32, progress=False)
    before, after = (
        sample_logits(model, [np.arange(9, dtype=np.int32)[None]]) for model in (load_adapter(trained, adapter), merged)
    )
    assert logit_drift(before, after).max < 1e-3


def test_drift_of_known_logits() -> None:
    before = [np.zeros((1, 2, 3), np.float32), np.eye(3, dtype=np.float32)[None]]
    after = [np.zeros((1, 2, 3), np.float32), np.roll(np.eye(3, dtype=np.float32), 1, axis=1)[None]]
    drift = logit_drift(before, after)
    assert (drift.max, drift.positions) == (1.0, 5)
    assert drift.mean == pytest.approx(6 / 15)
    assert drift.same_token == pytest.approx(2 / 5)


def test_an_output_in_use_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(CheckpointError, match="found it in use"):
            merge(checkpoint, None, output, progress=False)
    assert os.listdir(tmp_path) == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    merge(checkpoint, None, tmp_path / "empty", progress=False)
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("failure", ["full", "filled meanwhile"])
def test_a_full_disk_leaves_nothing_behind(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    def write_shard(path: Path, *_arguments: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failure == "full":
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda _path: usage)
        message = "expected .* free bytes for the merged model, found 10"
    else:
        monkeypatch.setattr(merge_module, "write_shard", write_shard)
        message = r"not saved: No space left on device \(it needs"
    with pytest.raises(CheckpointError, match=message):
        merge(checkpoint, None, tmp_path / "merged", progress=False)
    assert os.listdir(tmp_path) == []


def test_an_adapter_that_does_not_fit(checkpoint: Checkpoint, adapter: Adapter, tmp_path: Path) -> None:
    broken = dict(adapter.tensors)
    name_a, name_b = names_of(Q)
    del broken[name_a]
    broken[name_b] = np.zeros((3, 4), np.float32)
    with pytest.raises(CheckpointError) as caught:
        merge(checkpoint, Adapter("x", LORA, "owner/base", broken), tmp_path / "merged", progress=False)
    for part in (
        "names the base 'owner/base'",
        f"lacks (1): {name_a}",
        f"{name_b}: expected [64, 4], found [3, 4]",
    ):
        assert part in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_values_that_cannot_be_written(
    checkpoint: Checkpoint, adapter: Adapter, tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    tensors["lm_head.weight"][3, 4] = 1e6
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: 1e\+06 is too large for float16; use bfloat16"):
        merge(checkpoint, adapter, tmp_path / "merged", dtype="float16", progress=False)
    tensors["lm_head.weight"][3, 4] = np.nan
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight holds NaN"):
        merge(checkpoint, adapter, tmp_path / "merged", progress=False)
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        merge(checkpoint, adapter, tmp_path / "merged", dtype="int8", progress=False)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


@pytest.mark.integration
def test_host_memory_holds_a_few_matrices_not_the_model(tmp_path: Path) -> None:
    """12 layers, 480 MB in float32, made when they are read; the largest matrix has 8 MB."""
    code = f"""
import resource
import numpy as np
from qlora_jax.export.merge import merge
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.models.llama import llama_config
config = {CONFIG!r} | dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=12,
                           num_attention_heads=8, num_key_value_heads=8, head_dim=128)
parsed = llama_config(config)
sizes = dict(q_proj=(1024, 1024), k_proj=(1024, 1024), v_proj=(1024, 1024), o_proj=(1024, 1024),
             gate_proj=(2048, 1024), up_proj=(2048, 1024), down_proj=(1024, 2048), embed_tokens=(101, 1024),
             lm_head=(101, 1024))
names = [name for key in parsed.parameter_mappings for name in key.names()]
shapes = {{name: sizes.get(name.split(".")[-2], (1024,)) for name in names}}
checkpoint = Checkpoint("memory", config, shapes, lambda name: np.ones(shapes[name], np.float32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(checkpoint, None, {str(tmp_path / "merged")!r}, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 240_000_000
    assert int(done.stdout.split()[-1]) < 100_000, "KiB beyond what the imports took"
    shutil.rmtree(tmp_path / "merged")


@pytest.fixture
def script() -> ModuleType:
    """The command that scripts/merge.py runs."""
    return importlib.import_module("qlora_jax.commands.merge")


@pytest.mark.integration
@pytest.mark.usefixtures("compiled_as_for_users")
def test_script_merges_the_default_model(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    default = fetch_default_model()
    lora = LoRA(rank=2, target_modules=("q_proj", "down_proj"))
    write_adapter(random_adapter(open_checkpoint(str(default)), lora, 0.02).tensors, tmp_path / "adapter", method=lora)
    (tmp_path / "sample.txt").write_text("The capital of France is Paris.\n\nWater boils at 100 degrees.\n")
    arguments = [
        "--adapter",
        "adapter",
        "--output",
        "merged",
        "--sample",
        "sample.txt",
        "--base",
        "dequantized",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["merge.py", *arguments])
    assert script.main() == 0
    printed = capsys.readouterr().out
    assert "Merged adapter into" in printed
    assert "largest difference" in printed
    merged = open_checkpoint(str(tmp_path / "merged"))
    assert merged.read("model.norm.weight").dtype == ml_dtypes.bfloat16
    tokens = load_tokenizer(tmp_path / "merged")("Hello world")["input_ids"]
    assert tokens == load_tokenizer(default)("Hello world")["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "absent/one/two"], "error: absent/one/two: no such file or folder"),
        (["--model", "absent.gguf"], "error: absent.gguf: no such file or folder"),
        (["--block-size", "63"], "error: unknown block size 63"),
        (["--block-size", "0"], "error: unknown block size 0"),
    ],
    ids=str,
)
def test_script_says_what_is_wrong_in_one_line(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = [] if "--adapter" in arguments else ["--adapter", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["merge.py", *adapter, "--output", "merged", *arguments])
    assert script.main() == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_dense_weights_have_no_dequantized_values(
    script: ModuleType, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The public call and the command refuse them with the same message."""
    lora = LoRA(rank=2)
    folder = write_adapter(
        random_adapter(open_checkpoint(tiny_llama), lora, 0.02).tensors, tmp_path / "adapter", method=lora
    )
    names = ["--model", str(tiny_llama), "--adapter", str(folder), "--output", str(tmp_path / "merged")]
    assert script.main([*names, "--base", "dequantized", "--data-type", "none"]) == 1
    message = "--base dequantized: expected an adapter that was trained on 4 bits, found one on dense weights"
    assert capsys.readouterr().err.strip() == f"error: {message}"
    AdapterMetadata(None, None).save(folder)
    with pytest.raises(OptionError, match=message):
        qj.merge(tiny_llama, folder, tmp_path / "merged", base="dequantized", progress=False)
    assert not (tmp_path / "merged").exists()


def test_script_refuses_unknown_flags(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["merge.py", "--adapter", "a", "--output", "b", "--outptu", "c"])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
