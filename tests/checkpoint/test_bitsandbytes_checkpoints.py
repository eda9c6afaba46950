"""Checkpoints in bitsandbytes' 4 bits: transformers' own, read here bit for bit, and ours, read by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoint.load import load_model, storage_of
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.models import CausalLM
from qlora_jax.quant import DATA_TYPES, MixedStack, Quantization, QuantizedTensor, from_blocks, quantize, to_blocks

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
Q = "model.layers.1.self_attn.q_proj.weight"
KINDS = {
    "nf4": (Quantization(), "uint8"),
    "nf4 as bfloat16": (Quantization(), "bfloat16"),
    "nf4 without nesting": (Quantization(double_quantization=False), "uint8"),
    "fp4 as float32": (Quantization("fp4"), "float32"),
    "fp4 without nesting": (Quantization("fp4", double_quantization=False), "float16"),
}
TOLERANCE = 1e-3


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 101, (2, 24), np.int32)


def run(model: CausalLM) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, tokens()))


class Peer:
    """A random Llama of transformers, saved plain and, by bitsandbytes, in 4 bits."""

    def __init__(self, folder: Path) -> None:
        self.torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("accelerate")
        self.transformers: Any = pytest.importorskip("transformers")
        self.folder = folder
        self.torch.manual_seed(0)
        model = self.transformers.LlamaForCausalLM(self.transformers.LlamaConfig(**SIZES))
        with self.torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, 1.0 if "embed" in name or "lm_head" in name else parameter.shape[1] ** -0.5)
        model.save_pretrained(folder / "plain")

    def quantized(self, quantization: Quantization, storage: str) -> Path:
        config = self.transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.data_type,
            bnb_4bit_use_double_quant=quantization.double_quantization,
            bnb_4bit_quant_storage=getattr(self.torch, storage),
            bnb_4bit_compute_dtype=self.torch.float32,
        )
        model = self.transformers.LlamaForCausalLM.from_pretrained(
            self.folder / "plain", quantization_config=config, device_map="cpu", dtype=self.torch.float32
        )
        model.save_pretrained(self.folder / "packed")
        return self.folder / "packed"

    def logits(self, folder: Path) -> np.ndarray:
        """What transformers computes with the values that bitsandbytes' own dequantisation gives."""
        bnb: Any = pytest.importorskip("bitsandbytes")
        model = self.transformers.LlamaForCausalLM.from_pretrained(folder, device_map="cpu", dtype=self.torch.float32)
        dense = self.transformers.LlamaForCausalLM(self.transformers.LlamaConfig(**SIZES)).eval()
        state = dict(model.named_parameters())
        with self.torch.no_grad():
            for name, parameter in dense.named_parameters():
                value = state[name]
                if hasattr(value, "quant_state") and value.quant_state is not None:
                    value = bnb.functional.dequantize_4bit(value.data, value.quant_state)
                parameter.copy_(value)
            return dense(self.torch.from_numpy(tokens()).long()).logits.numpy()


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return Peer(tmp_path_factory.mktemp("peer"))


def load(folder: Path, quantization: Quantization | None) -> CausalLM:
    return load_model(open_checkpoint(str(folder)), quantization=quantization, dtype=jnp.float32, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_wrote_is_read_bit_for_bit(peer: Peer, kind: str) -> None:
    quantization, storage = KINDS[kind]
    folder = peer.quantized(quantization, storage)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.quantization == quantization
    assert storage_of(checkpoint, Quantization()) == quantization
    model = load(folder, quantization)
    with peer.torch.no_grad():
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as file:
            parts = {name: file.get_tensor(name) for name in file.keys() if name.startswith(Q)}  # noqa: SIM118
    stacked = model.layers.self_attn.q_proj.weight.get_value()
    assert isinstance(stacked, QuantizedTensor)
    one: QuantizedTensor = jax.tree.map(lambda leaf: leaf[1], stacked)
    packed, scales = to_blocks(one)
    np.testing.assert_array_equal(packed, parts[Q].contiguous().view(peer.torch.uint8).numpy().reshape(-1))
    np.testing.assert_array_equal(scales, parts[f"{Q}.absmax"].numpy())
    if quantization.double_quantization:
        np.testing.assert_array_equal(one.scale_absmax, parts[f"{Q}.nested_absmax"].numpy())
        state = json.loads(bytes(parts[f"{Q}.quant_state.bitsandbytes__{quantization.data_type}"].tolist()))
        assert float(one.scale_offset) == np.float32(state["nested_offset"])  # pyright: ignore[reportArgumentType]
    expected = peer.logits(folder)
    assert expected.std() > 1
    assert np.abs(run(model) - expected).max() < TOLERANCE
    assert np.abs(run(load(folder, None)) - expected).max() < TOLERANCE, "the dense values that it stands for"


@pytest.mark.parametrize("quantization", [kind for kind, storage in KINDS.values() if storage != "bfloat16"], ids=str)
def test_transformers_reads_what_is_written_here(peer: Peer, quantization: Quantization, tmp_path: Path) -> None:
    merge(
        open_checkpoint(str(peer.folder / "plain")),
        None,
        tmp_path / "ours",
        dtype="float32",
        quantization=quantization,
        progress=False,
    )
    expected = peer.logits(tmp_path / "ours")
    assert np.abs(run(load(peer.folder / "plain", quantization)) - expected).max() < TOLERANCE
    assert np.abs(run(load(tmp_path / "ours", quantization)) - expected).max() < TOLERANCE


def test_a_checkpoint_in_4_bits_is_exported_as_it_is(peer: Peer, tmp_path: Path) -> None:
    folder = peer.quantized(Quantization(), "uint8")
    merge(
        open_checkpoint(str(folder)), None, tmp_path / "again", dtype="float32", quantization=Quantization(), progress=False
    )
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if "quant_state" in name:
            first, second = (json.loads(found.tobytes()) for found in (tensor, ours[name]))
            assert first == second
        else:
            np.testing.assert_array_equal(ours[name].reshape(tensor.shape), tensor)


@pytest.mark.parametrize("shape", [(64, 48), (128, 3), (50, 7), (33, 5), (65, 1)])
@pytest.mark.parametrize("double", [True, False])
def test_to_blocks_and_back(shape: tuple[int, int], double: bool) -> None:
    """Odd sizes, whose blocks run across columns and whose last byte is half full."""
    q = quantize(jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32)), double_quantization=double)
    packed, scales = to_blocks(q)
    assert packed.size == (shape[0] * shape[1] + 1) // 2
    again = from_blocks(
        packed, scales, q.scale_absmax, q.scale_offset, shape=shape, data_type="nf4", block_size=64, dtype=jnp.float32
    )
    assert jax.tree.structure(again) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, again, q)


@pytest.fixture
def written(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder in 4 bits that was written here: needs no peer."""
    merge(open_checkpoint(str(make_tiny_llama())), None, tmp_path / "w", quantization=Quantization(), progress=False)
    return tmp_path / "w"


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def edit_state(tensors: dict[str, np.ndarray], **fields: Any) -> None:
    state = json.loads(tensors[STATE].tobytes()) | fields
    tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)


BAD: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "wrong shape": (lambda t: edit_state(t, shape=[64, 128]), r"expected 128 values, found 64"),
    "no state": (lambda t: t.update({STATE: np.frombuffer(b"{nonsense", np.uint8)}), "expected JSON with quant_type"),
    "unknown type": (lambda t: edit_state(t, quant_type="nf5"), "quant_type: expected nf4 or fp4, found nf5"),
    "a type of ours": (lambda t: edit_state(t, quant_type="nf3"), "quant_type: expected nf4 or fp4, found nf3"),
    "no scales": (lambda t: t.pop(f"{Q}.absmax"), r"absmax: expected 64 values, found none"),
    "no codes": (lambda t: t.pop(Q), "missing, though"),
    "two kinds": (lambda t: edit_state(t, blocksize=32) or t.update({f"{Q}.absmax": np.zeros(128, np.uint8)}), "one kind"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named_before_anything_is_loaded(written: Path, case: str) -> None:
    edit, message = BAD[case]
    change(written, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(written))
    assert Q in str(caught.value) or case == "two kinds"


def test_damage_that_only_the_data_show(written: Path) -> None:
    change(written, lambda tensors: tensors[f"{Q}.quant_map"].__setitem__(3, 0.5))
    with pytest.raises(CheckpointError, match=r"quant_map: expected the table .*, found 0.5 in place of -0.39"):
        load(written, Quantization())


def test_another_storage_than_its_own_is_refused(written: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is quantised already: expected .*nf4.* found .*fp4"):
        load(written, Quantization("fp4"))


@pytest.mark.parametrize("data_type", sorted(set(DATA_TYPES) - {"nf4", "fp4"}))
def test_types_that_bitsandbytes_has_not_are_not_written_for_it(
    make_tiny_llama: Callable[..., Path], tmp_path: Path, data_type: Any
) -> None:
    with pytest.raises(ValueError, match=f"bitsandbytes has no {data_type}: expected nf4 or fp4"):
        merge(open_checkpoint(str(make_tiny_llama())), None, tmp_path / "w", quantization=Quantization(data_type))
    assert not (tmp_path / "w").exists()


def test_other_quantisations_are_refused(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    for stated, name in (({"quant_method": "gptq", "bits": 4}, "'gptq'"), ({"load_in_8bit": True}, "8 bits")):
        (written / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
        with pytest.raises(ValueError, match=f"expected none, or bitsandbytes with load_in_4bit, found .*{name}"):
            open_checkpoint(str(written))


def test_dense_layers_among_quantised_ones_stay_dense(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """One layer of a stack, and a whole stack, as llm_int8_skip_modules leaves them; and written so again. About 3 CPU s."""
    base = make_tiny_llama()
    folder = merge(open_checkpoint(str(base)), None, tmp_path / "packed", quantization=Quantization(), progress=False)
    original, tensors = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    dense = ["model.layers.1.mlp.down_proj", *(f"model.layers.{layer}.self_attn.o_proj" for layer in range(2))]
    for module in dense:
        name = f"{module}.weight"
        tensors = {key: value for key, value in tensors.items() if not key.startswith(name)} | {name: original[name]}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.dense_modules == set(dense)
    model = load_model(checkpoint, quantization=Quantization(), progress=False)
    layers = model.layers  # type: ignore[union-attr]
    mixed = layers.mlp.down_proj.weight.get_value()
    assert isinstance(mixed, MixedStack)
    assert mixed.places == (0, -1)
    np.testing.assert_array_equal(mixed.dense[0].T, original[f"{dense[0]}.weight"])
    assert isinstance(layers.self_attn.o_proj.weight.get_value(), jax.Array)
    assert isinstance(layers.mlp.up_proj.weight.get_value(), QuantizedTensor)
    expected = run(load_model(checkpoint, quantization=None, progress=False))  # type: ignore[arg-type]
    np.testing.assert_allclose(run(model), expected, atol=1e-4)  # type: ignore[arg-type]
    again = merge(checkpoint, None, tmp_path / "again", quantization=Quantization(), progress=False)
    stated = json.loads((again / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert stated == [*sorted(dense), "lm_head"]
    assert load_file(again / "model.safetensors").keys() == tensors.keys()
