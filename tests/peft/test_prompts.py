"""Prompt tuning, P-tuning and prefix tuning against PEFT: outputs, files in both directions, training, generation; rows
that share documents; and what is refused."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from method_peer import (
    VOCABULARY,
    MethodPeer,
    largest,
    our_answers,
    our_losses,
    random_batches,
    random_tokens,
    randomised,
    run,
)
from tiers import tiered

from qlora_jax.adapters.bind import adapter_tensors, load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.adapters.virtual_tokens import ENCODER
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.models.prompts import initialize_from_tokens
from qlora_jax.peft import FieldErrors, ModelShape, PrefixTuning, PromptTuning, PTuning, peft_methods
from qlora_jax.peft.prompt import attribute_of
from qlora_jax.train import dpo_loss, split, without_adapter

# PEFT calls properties of transformers that are to be renamed, and transformers says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values.*is deprecated:FutureWarning"),
]
TOLERANCE = 1e-4  # on logits whose standard deviation is about 1
N = 5
TINY = ModelShape("llama", 32, 3, 3, 2, 8, False)

METHODS_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 24}),
    "lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 12, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 2},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "projected prefix": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 24}),
}
NAMES = list(METHODS_OF)


def config_of(name: str) -> tuple[str, dict[str, Any]]:
    kind, fields = METHODS_OF[name]
    return kind, fields | {"num_virtual_tokens": N}


def ours_like(peer: MethodPeer, theirs: Any) -> Any:
    """Our model with the very parameters of PEFT's encoder, in a fresh method of its configuration."""
    config = theirs.peft_config["default"]
    method = peft_methods()[config.peft_type.value].from_peft(json.loads(json.dumps(config.to_dict(), default=str)))
    model = peer.ours(method)
    assert model.prompt is not None
    state = theirs.prompt_encoder["default"].state_dict()
    assert set(model.prompt.names) == set(state)
    for name, value in state.items():
        variable = getattr(model.prompt, attribute_of(name))
        assert variable.shape == tuple(value.shape)
        setattr(model.prompt, attribute_of(name), nnx.LoRAParam(jnp.asarray(value.numpy())))
    return model


@pytest.mark.parametrize(
    ("family", "name"),
    tiered(
        itertools.product(("llama", "t5"), NAMES),
        quick=[("llama", "prompt"), ("llama", "mlp"), ("llama", "projected prefix")],
    ),
)
def test_outputs_and_files_both_ways(tmp_path: Path, family: str, name: str) -> None:
    kind, fields = config_of(name)
    peer = MethodPeer(tmp_path / "base", family)
    theirs = peer.random_adapter(tmp_path / "theirs", kind, **fields)
    expected = peer.logits(theirs)
    if family == "llama" and kind != "PrefixTuningConfig":
        expected = expected[:, N:]
    ours = ours_like(peer, theirs)
    assert largest(run(ours), expected) < TOLERANCE
    assert largest(run(without_adapter(ours)), peer.logits(peer.base())) < TOLERANCE
    assert largest(run(ours), peer.logits(peer.base())) > 100 * TOLERANCE

    # Theirs to ours: the values alone.
    loaded = load_adapter(peer.ours(read_adapter_method(tmp_path / "theirs")), tmp_path / "theirs")
    assert largest(run(loaded), expected) < TOLERANCE

    # Ours to theirs, and back with the encoder.
    moved = randomised(ours, 0.1)
    save_adapter(moved, tmp_path / "ours")
    (tensor,) = safetensors.numpy.load_file(tmp_path / "ours" / "adapter_model.safetensors").values()
    assert tensor.shape == adapter_tensors(loaded)["prompt_embeddings"].shape
    reread = peer.logits(peer.loaded(tmp_path / "ours"))[:, -expected.shape[1] :]
    assert largest(run(moved), reread) < TOLERANCE
    again = load_adapter(peer.ours(read_adapter_method(tmp_path / "ours")), tmp_path / "ours")
    assert again.prompt.names == ours.prompt.names
    pairs = zip(jax.tree.leaves(split(again)[1]), jax.tree.leaves(split(moved)[1]), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("family", "name"),
    tiered(
        [*(("llama", name) for name in NAMES), ("t5", "mlp"), ("t5", "prefix")],
        quick=[("llama", "prefix")],
    ),
)
def test_the_same_training(tmp_path: Path, family: str, name: str) -> None:
    kind, fields = config_of(name)
    peer, data = MethodPeer(tmp_path / "base", family), random_batches(family == "t5")
    theirs = peer.adapted(kind, **fields)
    ours = ours_like(peer, theirs)
    found = our_losses(ours, data, 1e-2)[0]
    still = peer.losses(peer.adapted(kind, **fields), data, 1e-9)  # which compiles nothing, as ours would
    assert largest(found, peer.losses(theirs, data, 1e-2)) < 1e-3
    assert largest(found, still) > 3e-3, "training moves the loss"


@pytest.mark.parametrize(
    ("family", "name"),
    tiered(
        [*itertools.product(("llama", "t5"), ("prompt", "prefix")), ("gemma2", "prompt"), ("mistral", "prefix")],
        quick=[("llama", "prompt")],
    ),
)
def test_greedy_answers_are_those_of_peft(tmp_path: Path, family: str, name: str) -> None:
    kind, fields = config_of(name)
    peer = MethodPeer(tmp_path / "base", family)
    peer.random_adapter(tmp_path / "adapter", kind, scale=1.0, **fields)
    theirs = peer.loaded(tmp_path / "adapter")
    ours = load_adapter(peer.ours(read_adapter_method(tmp_path / "adapter")), tmp_path / "adapter")
    draws = np.random.default_rng(5)
    prompts = [draws.integers(1, VOCABULARY, size).tolist() for size in (7, 3, 12)]
    answers = our_answers(ours, prompts, 12)
    assert answers == peer.answers(theirs, prompts, 12)
    assert answers != our_answers(peer.ours(None), prompts, 12)


@pytest.mark.parametrize(("family", "name"), [("llama", "prompt"), ("gemma2", "prompt"), ("mistral", "prefix")])
def test_decoding_with_a_cache_is_the_whole_pass(tmp_path: Path, family: str, name: str) -> None:
    """Token by token, in rows padded on the right, against the logits of each row alone."""
    peer = MethodPeer(tmp_path / "base", family)
    method = PromptTuning(N) if name == "prompt" else PrefixTuning(N)
    model = randomised(peer.ours(method))
    rows = [np.arange(1, 12), np.arange(20, 26)]
    graph, state = nnx.split(model)
    padded, positions = np.zeros((2, 10), np.int32), np.full((2, 10), -1, np.int32)
    for row, tokens in enumerate(rows):
        padded[row, : len(tokens) - 1] = tokens[:-1]
        positions[row, : len(tokens) - 1] = np.arange(len(tokens) - 1)
    decode = jax.jit(lambda state, *inputs: nnx.merge(graph, state).decode(*inputs))
    cache = model.init_cache(2, 16)
    _, cache = decode(state, padded, positions, cache)
    last = np.asarray([[row[-1]] for row in rows], np.int32)
    logits, _ = decode(state, last, np.asarray([[len(row) - 1] for row in rows], np.int32), cache)
    for row, tokens in enumerate(rows):
        assert largest(logits[row], run(model, tokens[None].astype(np.int32))[0, -1]) < TOLERANCE


@pytest.mark.parametrize("method", [PromptTuning(N), PrefixTuning(N)], ids=["prompt", "prefix"])
def test_documents_that_share_a_row(tmp_path: Path, method: Any) -> None:
    """Each sees the virtual tokens and itself, as in a row of its own."""
    model = randomised(MethodPeer(tmp_path / "base", "llama").ours(method))
    first, second = random_tokens(9)[0], random_tokens(9)[1, :6]
    tokens = np.concatenate([first, second, [0]])[None]
    segments = np.asarray([1] * 9 + [2] * 6 + [0], np.int32)[None]
    positions = np.concatenate([np.arange(9), np.arange(6), [0]])[None].astype(np.int32)
    graph, state = nnx.split(model)
    packed = jax.jit(lambda s, *x: nnx.merge(graph, s)(x[0], positions=x[1], segment_ids=x[2]))(
        state, tokens, positions, segments
    )
    assert largest(packed[0, :9], run(model, first[None])[0]) < TOLERANCE
    assert largest(packed[0, 9:15], run(model, second[None])[0]) < TOLERANCE


def test_documents_that_share_a_row_and_a_window(tmp_path: Path) -> None:
    model = MethodPeer(tmp_path / "base", "mistral").ours(PromptTuning(N))
    tokens = jnp.ones((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="mistral with a window of 5 tokens: expected one document a row"):
        model(tokens, segment_ids=tokens)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_families_that_see_a_window(tmp_path: Path, family: str, name: str) -> None:
    kind, fields = config_of(name)
    peer = MethodPeer(tmp_path / "base", family)
    theirs = peer.random_adapter(tmp_path / "theirs", kind, **fields)
    ours = load_adapter(peer.ours(read_adapter_method(tmp_path / "theirs")), tmp_path / "theirs")
    tokens = random_tokens(4 if name == "prefix" else 17)
    assert largest(run(ours, tokens), peer.logits(theirs, tokens)[:, -tokens.shape[1] :]) < TOLERANCE


def test_the_reference_of_dpo_has_no_virtual_tokens(tmp_path: Path) -> None:
    model = MethodPeer(tmp_path / "base", "llama").ours(PromptTuning(N))
    tokens = jnp.asarray(random_tokens(8))
    batch = {f"{side}_{name}": tokens for side in ("chosen", "rejected") for name in ("inputs", "targets")}
    batch |= {f"{side}_loss_mask": jnp.ones(tokens.shape, jnp.float32) for side in ("chosen", "rejected")}
    loss, sums = dpo_loss(model, batch, None)
    assert float(loss) == pytest.approx(2 * np.log(2), abs=1e-5), "both answers are the same"
    assert abs(float(sums["rewards/chosen"])) > 1e-3, "virtual tokens change the likelihood"


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
def test_starts_from_tokens(tmp_path: Path, family: str) -> None:
    """As PEFT starts from a text; of Gemma's table it takes the rows that the model reads, which are scaled."""
    peer = MethodPeer(tmp_path / "base", family)
    model = peer.ours(PromptTuning(N, init="TEXT", init_text="some"))
    method = model.prompt.method
    tokens = method.initial_tokens([7, 8, 9], VOCABULARY, 0)
    assert tokens[:N].tolist() == [7, 8, 9, 7, 8]
    started = initialize_from_tokens(model, tokens)
    table = peer.base().get_input_embeddings()
    expected = table(peer.torch.tensor(tokens).long()).detach().numpy()
    assert largest(adapter_tensors(started)["prompt_embeddings"], expected) < 1e-6
    drawn = PromptTuning(40, init="SAMPLE_VOCAB").initial_tokens((), VOCABULARY, 1)
    assert drawn is not None
    assert len(set(drawn.tolist())) > 10
    assert drawn.max() < VOCABULARY
    assert PromptTuning(N).initial_tokens((), VOCABULARY, 1) is None


def test_dropout_of_the_lstm_is_for_training_alone() -> None:
    method = PTuning(N, "LSTM", 8, dropout=0.5).for_model(TINY)
    parameters = method.parameters(jax.random.key(0))
    plain, again = method.encode(parameters), method.encode(parameters)
    assert np.array_equal(plain, again)
    assert largest(method.encode(parameters, jax.random.key(1)), plain) > 1e-3


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_of_zeros(projection: bool) -> None:
    method = PrefixTuning(N, projection=projection, zero=True).for_model(TINY)
    assert not np.asarray(method.encode(method.parameters(jax.random.key(0)))).any()


def test_virtual_tokens_are_not_merged(tmp_path: Path) -> None:
    peer = MethodPeer(tmp_path / "base", "llama")
    peer.random_adapter(tmp_path / "adapter", "PrefixTuningConfig", num_virtual_tokens=N)
    with pytest.raises(CheckpointError, match="PREFIX_TUNING\\) are no weights"):
        merge(open_checkpoint(str(peer.folder)), read_adapter(tmp_path / "adapter"), tmp_path / "merged")


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    peer = MethodPeer(tmp_path / "base", "llama")
    method = PTuning(N, hidden_size=8)
    model, folder = peer.ours(method), tmp_path / "adapter"
    save_adapter(model, folder)
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    safetensors.numpy.save_file(
        {"prompt_embeddings": tensors["prompt_embeddings"] + 1}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match="does not make the values of prompt_embeddings"):
        read_adapter(folder)
    (folder / ENCODER).unlink()
    alone = read_adapter(folder)
    assert alone.method == PTuning(N, hidden_size=8, encoded=False, shape=alone.method.shape)  # pyright: ignore
    with pytest.raises(CheckpointError, match=f"expected {ENCODER} beside it for a model with an encoder"):
        load_adapter(model, alone)
    wider = MethodPeer(tmp_path / "wider", "llama", hidden_size=48)
    with pytest.raises(ValueError, match="PTuning token_dim: expected 48 as in the model, found 32"):
        wider.ours(alone.method)
    save_adapter(peer.ours(method), folder)
    save_adapter(peer.ours(PromptTuning(N)), folder)
    assert not (folder / ENCODER).exists(), "an encoder of what lay there before would be believed"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("PROMPT_TUNING", {"num_virtual_tokens": 0}, "virtual_tokens: expected at least 1, found 0"),
        ("PROMPT_TUNING", {"modules_to_save": ["norm"]}, "modules_to_save beside virtual tokens is not supported"),
        (
            "PROMPT_TUNING",
            {"prompt_tuning_init": "NOISE"},
            "prompt_tuning_init: expected a known initialization, found 'NOISE'",
        ),
        ("P_TUNING", {"encoder_reparameterization_type": "GRU"}, "expected MLP or LSTM, found 'GRU'"),
        ("PREFIX_TUNING", {"num_transformer_submodules": 3}, "num_transformer_submodules: expected 1 or 2, found 3"),
    ],
)
def test_configurations_of_nothing(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises((FieldErrors, ValueError), match=message):
        peft_methods()[kind].from_peft({"num_virtual_tokens": N} | fields)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: PromptTuning(0), "virtual_tokens: expected at least 1"),
        (lambda: PromptTuning(init="TEXT"), "init_text: expected one with init TEXT alone, found None"),
        (lambda: PromptTuning(init_text="a"), "init_text: expected one with init TEXT alone, found 'a'"),
        (lambda: PTuning(dropout=1.0), "dropout: expected 0 <= dropout < 1"),
        (lambda: PTuning(layers=0), "layers, hidden_size: expected at least 1"),
        (lambda: PrefixTuning(hidden_size=0), "hidden_size: expected at least 1"),
        (lambda: PromptTuning(init="TEXT", init_text="").initial_tokens((), 9, 0), "at least one token, found none"),
    ],
)
def test_descriptions_of_nothing(method: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method()
