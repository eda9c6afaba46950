"""IA3 against PEFT: outputs, files in both directions, training, merging; and what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from method_peer import MethodPeer, largest, our_losses, random_batches, randomised, run
from tiers import tiered

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.peft import IA3, FieldErrors, ModelShape
from qlora_jax.peft.ia3 import DEFAULTS
from qlora_jax.train import split, without_adapter

# PEFT calls a property of transformers that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOLERANCE = 1e-4  # on logits whose standard deviation is about 1

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),  # whose keys and values have biases
    ("t5", {}),
    ("llama", {"target_modules": ["q_proj", "layers.1.mlp.up_proj", "o_proj"], "feedforward_modules": ["o_proj"]}),
    ("llama", {"target_modules": r".*\.(v_proj|down_proj)", "feedforward_modules": r".*mlp.*", "modules_to_save": ["norm"]}),
    ("llama", {"target_modules": "all-linear", "feedforward_modules": ["down_proj"], "exclude_modules": ["q_proj"]}),
]


@pytest.fixture
def shape() -> ModelShape:
    return ModelShape("llama", 32, 2, 2, 2, 8, False)


@pytest.mark.parametrize(("family", "fields"), CASES, ids=str)
def test_files_both_ways(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    peer = MethodPeer(tmp_path / "base", family)
    theirs = peer.random_adapter(tmp_path / "theirs", "IA3Config", **fields)
    method = read_adapter_method(tmp_path / "theirs")
    ours = load_adapter(peer.ours(method), tmp_path / "theirs")
    assert largest(run(ours), peer.logits(theirs)) < TOLERANCE
    assert largest(run(ours), peer.logits(peer.base())) > 100 * TOLERANCE
    save_adapter(randomised(ours), tmp_path / "ours")
    expected, found = (safetensors.numpy.load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours"))
    assert {name: tensor.shape for name, tensor in expected.items()} == {name: t.shape for name, t in found.items()}
    assert largest(run(randomised(ours)), peer.logits(peer.loaded(tmp_path / "ours"))) < TOLERANCE


@pytest.mark.parametrize("family", sorted(DEFAULTS))
def test_the_usual_targets_are_those_of_peft(family: str) -> None:
    constants = pytest.importorskip("peft.utils.constants", reason="PEFT, to compare with, is not installed")
    targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[family]
    assert DEFAULTS[family][0] == tuple(targets)
    assert DEFAULTS[family][1] == tuple(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[family])


@pytest.mark.parametrize("family", tiered(["llama", "t5"], quick=["llama"]))
def test_the_same_training(tmp_path: Path, family: str) -> None:
    peer, data = MethodPeer(tmp_path / "base", family), random_batches(family == "t5")
    ours, model = our_losses(peer.ours(IA3()), data, 3e-2)
    theirs = peer.losses(peer.adapted("IA3Config"), data, 3e-2)
    assert largest(ours, theirs) < 1e-4
    assert largest(ours, peer.losses(peer.adapted("IA3Config"), data, 1e-9)) > 1e-2, "training moves the loss"
    assert largest(run(without_adapter(model)), peer.logits(peer.base())) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen2", "t5"])
def test_merged_weights_compute_the_same(tmp_path: Path, family: str) -> None:
    peer = MethodPeer(tmp_path / "base", family)
    theirs = peer.random_adapter(tmp_path / "adapter", "IA3Config")
    checkpoint, adapter = open_checkpoint(str(peer.folder)), read_adapter(tmp_path / "adapter")
    merge(checkpoint, adapter, tmp_path / "merged", dtype="float32", progress=False)
    merged = peer.kind.from_pretrained(tmp_path / "merged", dtype=peer.torch.float32)
    assert largest(peer.logits(merged), peer.logits(theirs)) < TOLERANCE
    expected = theirs.merge_and_unload().state_dict()
    found = merged.state_dict()
    assert max(largest(found[name], tensor) for name, tensor in expected.items()) < 1e-6


def test_padding_of_a_stack_has_no_gradient(tmp_path: Path) -> None:
    peer = MethodPeer(tmp_path / "base", "llama")
    method = IA3(("layers.1.self_attn.v_proj", "layers.2.self_attn.v_proj"), ())
    graph, adapter, frozen = split(randomised(peer.ours(method)))
    tokens = jnp.ones((1, 4), jnp.int32)
    gradient = jax.jit(jax.grad(lambda a: nnx.merge(graph, a, frozen)(tokens).sum()))(adapter)
    (leaf,) = jax.tree.leaves(gradient)
    assert [bool(np.abs(layer).max() > 0) for layer in np.asarray(leaf)] == [False, True, True]


def test_a_random_start(tmp_path: Path) -> None:
    model = MethodPeer(tmp_path / "base", "llama").ours(IA3(init_ia3_weights=False))
    values = np.concatenate([1 + np.asarray(leaf).ravel() for leaf in jax.tree.leaves(split(model)[1])])
    assert abs(values.mean()) < 0.2
    assert 0.8 < values.std() < 1.2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ()}, "target_modules: expected names"),
        ({"target_modules": "("}, "no regular expression"),
    ],
)
def test_descriptions_of_nothing(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IA3(**fields)


def test_what_a_model_lacks(shape: ModelShape) -> None:
    layers = {"layers.mlp.up_proj": ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]}
    with pytest.raises(ValueError, match="IA3 target 'k_proj' matches no linear layer"):
        IA3().for_model(shape).targets(layers)
    with pytest.raises(ValueError, match=r"feedforward_modules '\.\*down' matches no target"):
        IA3("all-linear", ".*down").targets(layers)
    with pytest.raises(ValueError, match="expected all modules like"):
        IA3("all-linear", r".*\.1\..*").targets(layers)
    with pytest.raises(ValueError, match="a phi3 has no usual ones"):
        IA3().for_model(ModelShape("phi3", 32, 2, 2, 2, 8, False))


def test_fields_that_are_not_supported(tmp_path: Path) -> None:
    with pytest.raises(FieldErrors, match="use_something_new = true is not supported"):
        IA3.from_peft({"target_modules": ["q"], "feedforward_modules": [], "use_something_new": True})
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "IA3", "target_modules": ["v_proj"], "feedforward_modules": []}), encoding="utf-8"
    )
    name = "base_model.model.model.layers.0.self_attn.v_proj.ia3_l"
    safetensors.numpy.save_file({name: np.ones((1, 4), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"expected \[out, 1\]"):
        read_adapter(tmp_path)
