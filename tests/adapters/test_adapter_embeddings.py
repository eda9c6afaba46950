"""Token tables, heads and norms that train as a whole, and rows of tables, against PEFT in both directions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from peft_peer import VOCABULARY, Peer, largest, randomised, run
from tiers import tiered

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.models import CausalLM
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.train import adamw, create_state, jit_train_step, language_model_loss, split
from qlora_jax.train.dpo import without_adapter

TOLERANCE = 1e-4  # on logits whose standard deviation is about 3
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = [
    # PEFT calls a property of transformers that is to be renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {  # (family, whether table and head are one, fields of LoraConfig)
    "both-tables": (
        "llama",
        False,
        {
            "modules_to_save": ["embed_tokens", "lm_head"],
            "rank_pattern": {r"layers\.1\..*": 2},
            "target_modules": ["v_proj"],
        },
    ),
    "tied-table": ("llama", True, {"modules_to_save": ["embed_tokens", "norm"]}),
    "tied-head": ("llama", True, {"modules_to_save": ["lm_head"]}),
    "tied-both": ("llama", True, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "neox": ("gpt_neox", False, {"modules_to_save": ["lm_head", "layernorm", "final_layer_norm"]}),
    "t5": ("t5", True, {"modules_to_save": ["layer_norm", "relative_attention_bias"], "target_modules": ["q", "wo"]}),
    "rows": ("llama", False, {"trainable_token_indices": [7, 3, 60]}),
    "rows-tied": ("llama", True, {"trainable_token_indices": [7, 3, 60], "modules_to_save": ["model.norm"]}),
    "rows-of-both": ("llama", False, {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [5, 9, 2]}}),
    "rows-neox": ("gpt_neox", False, {"trainable_token_indices": [11, 4]}),
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Peer]:
    made: dict[tuple[str, bool], Peer] = {}

    def peer(family: str, tied: bool) -> Peer:
        if (family, tied) not in made:
            made[family, tied] = Peer(tmp_path_factory.mktemp(family), family, tie_word_embeddings=tied)
        return made[family, tied]

    return peer


@pytest.mark.parametrize("case", tiered(CASES, quick=["both-tables", "rows-tied", "rows-of-both"]))
def test_there_and_back_and_merged(peers: Callable[[str, bool], Peer], tmp_path: Path, case: str) -> None:
    """An adapter of PEFT's computes the same here and merged; noise on it, saved from here, the same there."""
    family, tied, fields = CASES[case]
    peer = peers(family, tied)
    expected = peer.logits(peer.random_adapter(tmp_path / "theirs", **fields))
    adapter = read_adapter(tmp_path / "theirs")
    model = load_adapter(peer.ours(adapter.method), adapter)
    assert largest(run(model), expected) < TOLERANCE
    assert largest(run(without_adapter(model)), peer.logits(peer.base())) < TOLERANCE

    moved = randomised(model)
    save_adapter(moved, tmp_path / "ours", base_model_name_or_path=str(peer.folder))
    theirs = peer.logits(peer.peft.PeftModel.from_pretrained(peer.base(), tmp_path / "ours"))
    assert largest(theirs, expected) > 1000 * TOLERANCE
    assert largest(run(moved), theirs) < 5 * TOLERANCE
    files = [safetensors.numpy.load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours")]
    assert {name: tensor.shape for name, tensor in files[0].items()} == {n: t.shape for n, t in files[1].items()}
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours")]
    for name in ("modules_to_save", "trainable_token_indices"):
        assert configs[0][name] == configs[1][name]

    merge(open_checkpoint(str(peer.folder)), adapter, tmp_path / "merged", dtype="float32", progress=False)
    merged = load_model(open_checkpoint(str(tmp_path / "merged")), quantization=None, progress=False)
    assert largest(run(merged), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("tied", "fields"),
    [
        (
            False,
            {
                "rank_pattern": {r"layers\.0\..*": 2, "o_proj": 6},
                "alpha_pattern": {"v_proj": 3},
                "modules_to_save": ["embed_tokens", "lm_head", "norm"],
            },
        ),
        pytest.param(
            True,
            {"exclude_modules": ["layers.2.mlp.up_proj"], "trainable_token_indices": [0, 5, 17, 60]},
            marks=pytest.mark.integration,
        ),
    ],
    ids=["patterns-and-tables", "rows-of-a-tied-table"],
)
def test_five_steps_of_training_as_in_peft(
    peers: Callable[[str, bool], Peer], tmp_path: Path, tied: bool, fields: dict[str, Any]
) -> None:
    peer = peers("llama", tied)
    torch, theirs = peer.torch, peer.adapted(**fields)
    theirs.save_pretrained(tmp_path)
    lora = read_adapter_method(tmp_path)
    graphdef, adapter, frozen = split(load_adapter(peer.ours(lora), tmp_path))
    draws = np.random.default_rng(1)
    tokens = draws.integers(0, VOCABULARY, (5, 3, 13), np.int32)
    mask = (draws.random((5, 3, 12)) < 0.7).astype(np.float32)

    tx = adamw(5e-3, max_grad_norm=None)
    state = create_state(tx, adapter)
    step = jit_train_step(graphdef, tx, language_model_loss, state)
    ours = []
    for rows, learned in zip(tokens, mask, strict=True):
        batch = {"inputs": rows[None, :, :-1], "targets": rows[None, :, 1:], "loss_mask": learned[None]}
        state, metrics = step(state, frozen, {name: jnp.asarray(value) for name, value in batch.items()})
        ours.append(float(metrics["loss"]))

    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    descent, expected = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.0), []
    for rows, learned in zip(tokens, mask, strict=True):
        rows, learned = torch.from_numpy(rows).long(), torch.from_numpy(learned)
        logits = theirs(rows[:, :-1]).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        loss = (each * learned).sum() / learned.sum()
        descent.zero_grad()
        loss.backward()
        descent.step()
        expected.append(loss.item())
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert largest(run(nnx.merge(graphdef, state.adapter, frozen)), peer.logits(theirs)) < 0.02
    assert largest(peer.logits(theirs), peer.logits(peer.base())) > 0.5, "the steps have to be seen"
    moments = sum(leaf.size for leaf in (*jax.tree.leaves(state.opt_state[0].mu), *jax.tree.leaves(state.opt_state[0].nu)))
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(adapter))


SIZES: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"modules_to_save": ("embed",)},
            "modules_to_save 'embed' matches no module; their names end in: down_proj, embed_tokens",
        ),
        ({"modules_to_save": ("mlp",)}, r"'mlp': expected a module without parts, found model\.layers\.0\.mlp"),
        ({"modules_to_save": ("1.input_layernorm",)}, "expected all modules .*or none, found 1 of the 2"),
        ({"trainable_token_indices": (3, 11)}, "expected tokens below 11, found 11"),
        ({"trainable_token_indices": (3, 3)}, r"expected different numbers from 0 on, found \[3, 3\]"),
        ({"trainable_token_indices": (("norm", (3,)),)}, "'norm': expected the name of the embedding or the output head"),
        (
            {"trainable_token_indices": (("lm_head", (3,)),)},
            "lm_head.weight is tied to model.embed_tokens.weight: expected",
        ),
        ({"trainable_token_indices": (3,), "modules_to_save": ("embed_tokens",)}, "in one of them, found it in both"),
    ],
)
def test_what_cannot_train(fields: dict[str, Any], message: str) -> None:
    config = llama_config(SIZES | {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: CausalLM(config, method=LoRA(**fields), rngs=nnx.Rngs(0)))


def test_files_without_what_the_configuration_names_are_refused(peers: Callable[[str, bool], Peer], tmp_path: Path) -> None:
    peer = peers("llama", False)
    peer.random_adapter(tmp_path, modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    head = tensors.pop("base_model.model.lm_head.weight")
    safetensors.numpy.save_file(tensors | {"base_model.model.model.norm.weight": head[0]}, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"what adapter_config.json names besides, found \(1\): \S+norm\.weight"):
        read_adapter(tmp_path)
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"that the adapter lacks \(1\): base_model\.model\.lm_head\.weight"):
        merge(open_checkpoint(str(peer.folder)), read_adapter(tmp_path), tmp_path / "merged", progress=False)


def test_rows_of_a_packed_table(peers: Callable[[str, bool], Peer], tmp_path: Path) -> None:
    """What is saved of them is what they hold, and comes back as the same."""
    peer = peers("llama", True)
    peer.random_adapter(tmp_path / "theirs", trainable_token_indices=[7, 3, 60])
    adapter = read_adapter(tmp_path / "theirs")
    checkpoint = open_checkpoint(str(peer.folder))
    model = load_model(checkpoint, quantization=None, embedding_storage="int8", method=adapter.method, progress=False)
    model = load_adapter(model, adapter)
    rows = next(tensor for name, tensor in adapter.tensors.items() if "trainable_tokens" in name)
    np.testing.assert_allclose(model.embed_tokens(jnp.asarray([7, 3, 60])), rows, atol=1e-6)
    save_adapter(model, tmp_path / "ours")
    again = read_adapter(tmp_path / "ours").tensors
    for name, tensor in adapter.tensors.items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-6)
