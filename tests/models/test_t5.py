"""T5 against transformers' own and PEFT on tiny random models: logits, greedy answers, adapters, training, 4-bit storage.

The weights are random with the scale of a trained model, norms and position tables included, so that a part that is left out
shows.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import tiered

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.data import Seq2SeqExample, seq2seq_batches
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.models import FAMILIES, T5, CausalLM, Remat, causal_family_of, family_of
from qlora_jax.models.t5_config import t5_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization, QuantizedTensor
from qlora_jax.serve import Sampling, generate_seq2seq
from qlora_jax.train import adamw, create_state, jit_train_step, seq2seq_loss, split

torch: Any = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
peft: Any = pytest.importorskip("peft", reason="PEFT is not installed")
transformers: Any = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
# What differs from SIZES.
CASES: dict[str, dict[str, Any]] = {
    "v1.0": {},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "more decoder layers": {"num_decoder_layers": 4, "d_kv": 24},
    "more encoder layers": {
        "num_layers": 3,
        "num_decoder_layers": 1,
        "feed_forward_proj": "gated-silu",
        "tie_word_embeddings": False,
        "relative_attention_num_buckets": 12,
        "relative_attention_max_distance": 20,
    },
}
TOLERANCE = 1e-3  # on logits whose standard deviation is between 1 and 10
LENGTHS = (40, 23)  # real tokens of the two sources
# PEFT asks transformers a question by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Peer:
    """A random model of transformers, and ours read from the folder that it saves."""

    def __init__(self, folder: Path, case: str) -> None:
        torch.manual_seed(0)
        fields = SIZES | CASES[case]
        self.model = transformers.T5ForConditionalGeneration(transformers.T5Config(**fields)).eval()
        tied = fields.get("tie_word_embeddings", True)
        if not tied:  # version 5 of transformers ties where it makes a new model
            self.model.lm_head.weight = torch.nn.Parameter(torch.empty_like(self.model.shared.weight))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
                    if name == "decoder.final_layer_norm.weight":
                        parameter.mul_(30 if tied else 1)
                elif name == "shared.weight":  # small, so that what the layers add decides: else a tied model repeats itself
                    parameter.normal_(0.0, 0.1)
                elif name.endswith("relative_attention_bias.weight"):
                    parameter.normal_(0.0, 2.0)
                elif name.endswith(".q.weight"):  # scores are not scaled
                    parameter.normal_(0.0, (parameter.shape[1] * fields["d_kv"]) ** -0.5)
                else:
                    parameter.normal_(0.0, (3 if name == "lm_head.weight" else 1) * parameter.shape[1] ** -0.5)
        self.model.save_pretrained(folder)
        self.folder = folder

    def ours(self, lora: LoRA | None = None, quantization: Quantization | None = None) -> T5:
        checkpoint = open_checkpoint(str(self.folder))
        model = load_model(checkpoint, quantization=quantization, method=lora, dtype=jnp.float32, progress=False)
        assert isinstance(model, T5)
        return model

    def logits(self, sources: np.ndarray, mask: np.ndarray, inputs: np.ndarray, model: Any = None) -> np.ndarray:
        with torch.no_grad():
            output = (model or self.model)(
                input_ids=torch.from_numpy(sources).long(),
                attention_mask=torch.from_numpy(mask).long(),
                decoder_input_ids=torch.from_numpy(inputs).long(),
            )
        return output.logits.numpy()


@pytest.fixture
def make_peer(tmp_path: Path) -> Callable[[str], Peer]:
    return lambda case: Peer(tmp_path / "peer", case)


def example(length: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources, their mask and inputs of the decoder; the second source is padded."""
    draws = np.random.default_rng(seed)
    sources = draws.integers(2, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)), np.int32)
    mask = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32)
    inputs = draws.integers(2, SIZES["vocab_size"], (len(LENGTHS), length), np.int32)
    inputs[:, 0] = 0
    return sources * mask, mask, inputs


def run(model: T5, sources: np.ndarray, mask: np.ndarray | None, inputs: np.ndarray, **options: Any) -> np.ndarray:
    graph, state = nnx.split(model)

    def forward(state: Any, sources: Any, mask: Any, inputs: Any) -> Any:
        return nnx.merge(graph, state)(sources, inputs, source_mask=mask, **options)

    return np.asarray(jax.jit(forward)(state, sources, mask, inputs))


def largest(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def test_these_are_the_families_that_are_no_decoders() -> None:
    assert {name for name, family in FAMILIES.items() if family.model is not CausalLM} == {"t5"}
    with pytest.raises(ValueError, match=r"decoder-only model \(llama, .*\), found model_type 't5'"):
        causal_family_of({"model_type": "t5"})
    assert causal_family_of({"model_type": "llama"}) is FAMILIES["llama"]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(make_peer: Callable[[str], Peer], case: str, record_property: Any) -> None:
    """With padding in a source, which changes nothing for the rest."""
    peer = make_peer(case)
    model, (sources, mask, inputs) = peer.ours(), example()
    expected = peer.logits(sources, mask, inputs)
    assert expected.std() > 1
    found = run(model, sources, mask, inputs)
    record_property("largest difference of logits", f"{largest(found, expected):.2e}")
    assert largest(found, expected) < TOLERANCE
    alone = run(model, sources[1:, : LENGTHS[1]], None, inputs[1:])
    assert largest(alone, expected[1:]) < TOLERANCE
    unmasked = run(model, sources, np.ones_like(mask), inputs)
    assert largest(unmasked[1], expected[1]) > 0.1


@pytest.mark.parametrize("case", tiered(CASES, quick=["v1.0", "v1.1"]))
def test_greedy_answers_equal_transformers(make_peer: Callable[[str], Peer], case: str) -> None:
    """Token for token, each source by itself and all in one batch, to the limit or up to a token that ends them."""
    peer = make_peer(case)
    model, (sources, mask, _) = peer.ours(), example()
    rows = [row[:length].tolist() for row, length in zip(sources, LENGTHS, strict=True)]
    theirs = peer.model.generate(
        torch.from_numpy(sources).long(),
        attention_mask=torch.from_numpy(mask).long(),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        use_cache=False,  # theirs has room for as many layers as the encoder has
    )
    expected = theirs[:, 1:].tolist()  # the first token is the decoder's start
    assert len({*expected[0], *expected[1]}) > 5, "answers of few tokens show little"
    assert expected[0] != expected[1]
    split_model, seen = nnx.split(model), []
    found = generate_seq2seq(*split_model, rows, max_new_tokens=24, on_token=lambda row, token: seen.append((row, token)))
    assert found == expected
    assert [[token for row, token in seen if row == wanted] for wanted in range(2)] == expected
    assert generate_seq2seq(*split_model, rows[1:], max_new_tokens=24) == expected[1:]
    end = expected[0][7]
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in expected]
    assert generate_seq2seq(*split_model, rows, max_new_tokens=24, eos_ids={end}) == cut


def test_another_start_token_and_sampling(make_peer: Callable[[str], Peer]) -> None:
    peer = make_peer("v1.1")
    model = nnx.split(peer.ours())
    source = example()[0][0].tolist()
    theirs = peer.model.generate(
        torch.tensor([source]), max_new_tokens=10, do_sample=False, eos_token_id=None, decoder_start_token_id=7
    )
    assert generate_seq2seq(*model, [source], max_new_tokens=10, decoder_start_id=7) == theirs[:, 1:].tolist()
    greedy = generate_seq2seq(*model, [source], max_new_tokens=10)
    hot = Sampling(temperature=1.5)
    drawn = [generate_seq2seq(*model, [source], max_new_tokens=10, sampling=hot, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != greedy
    top = Sampling(temperature=1.5, top_k=1)
    assert generate_seq2seq(*model, [source], max_new_tokens=10, sampling=top) == greedy
    with pytest.raises(ValueError, match=r"source 1: .* found none; max_new_tokens: expected at least 1, found 0"):
        generate_seq2seq(*model, [source, []], max_new_tokens=0)


@pytest.mark.parametrize("case", tiered(CASES, quick=["v1.1"]))
def test_adapters_go_both_ways(make_peer: Callable[[str], Peer], case: str, tmp_path: Path) -> None:
    """A random adapter of PEFT on all linear layers: loaded, it gives PEFT's logits; saved, PEFT loads it and they stay."""
    peer = make_peer(case)
    batch = example(20, seed=1)
    plain = peer.logits(*batch)
    tuned = peft.get_peft_model(
        peer.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    expected = peer.logits(*batch, tuned)
    assert largest(expected, plain) > 0.1
    tuned.save_pretrained(tmp_path / "theirs")
    model = load_adapter(peer.ours(read_adapter_method(tmp_path / "theirs")), tmp_path / "theirs")
    assert largest(run(model, *batch), expected) < TOLERANCE

    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tuned.unload(), tmp_path / "ours").eval()
    assert isinstance(again, peft.PeftModelForSeq2SeqLM)
    assert largest(peer.logits(*batch, again), expected) < 1e-5
    ours, theirs = (read_adapter(tmp_path / name).tensors for name in ("ours", "theirs"))
    assert "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight" in ours
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)


def test_a_merged_adapter_is_what_peft_computes(make_peer: Callable[[str], Peer], tmp_path: Path) -> None:
    peer = make_peer("v1.1")
    batch = example(20, seed=2)
    tuned = peft.get_peft_model(peer.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v", "wi_1"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    expected = peer.logits(*batch, tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    checkpoint, adapter = open_checkpoint(str(peer.folder)), read_adapter(tmp_path / "adapter")
    folder = merge(checkpoint, adapter, tmp_path / "merged", dtype="float32", progress=False)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    assert largest(peer.logits(*batch, theirs), expected) < 1e-4


def training_batches(steps: int) -> list[dict[str, np.ndarray]]:
    """Random pairs of unlike lengths, four a batch."""
    draws = np.random.default_rng(0)

    def text(most: int) -> np.ndarray:
        return draws.integers(2, SIZES["vocab_size"], draws.integers(3, most + 1)).astype(np.int32)

    examples = [Seq2SeqExample(text(30), text(20)) for _ in range(4 * steps)]
    sizes: dict[str, int] = {"batch_size": 4, "source_length": 30, "target_length": 20}
    return list(seq2seq_batches(examples, **sizes, pad_id=0, decoder_start_id=0, epochs=1))


@pytest.mark.integration
@pytest.mark.parametrize("case", ["v1.0", "v1.1"])
def test_training_equals_transformers_with_peft(
    make_peer: Callable[[str], Peer], case: str, tmp_path: Path, record_property: Any
) -> None:
    """Ten steps of AdamW from the same fresh adapter; ours cuts the batches in two."""
    peer, steps, rate, lora = make_peer(case), 10, 2e-3, LoRA(rank=4, alpha=8)
    data = training_batches(steps)
    model = peer.ours(lora)
    last = {name: jnp.asarray(x) for name, x in data[-1].items()}
    untrained = float(jax.jit(seq2seq_loss)(model, last, None) / last["loss_mask"].sum())
    save_adapter(model, tmp_path / "fresh")
    graph, adapter, frozen = split(model)
    tx = adamw(rate, max_grad_norm=None)
    state = create_state(tx, adapter)
    step = jit_train_step(graph, tx, seq2seq_loss, state)
    ours, norms = [], []
    for batch in data:
        cut = {name: jnp.asarray(x.reshape(2, -1, x.shape[-1])) for name, x in batch.items()}
        state, metrics = step(state, frozen, cut)
        ours.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    save_adapter(nnx.merge(graph, state.adapter, frozen), tmp_path / "trained")

    tuned = peft.PeftModel.from_pretrained(peer.model, tmp_path / "fresh", is_trainable=True).train()
    trainable = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    update = torch.optim.AdamW(trainable.values(), lr=rate, weight_decay=0.0)
    theirs, their_norms = [], []
    for batch in data:
        labels = np.where(batch["loss_mask"] > 0, batch["targets"], -100)
        loss = tuned(  # shifts the labels right by itself
            input_ids=torch.from_numpy(batch["sources"]).long(),
            attention_mask=torch.from_numpy(batch["source_mask"]).long(),
            labels=torch.from_numpy(labels).long(),
        ).loss
        loss.backward()
        their_norms.append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), float("inf"))))
        update.step()
        update.zero_grad(set_to_none=True)
        theirs.append(loss.item())
    difference, in_norms = largest(ours, theirs), float(np.abs(np.array(norms) / np.array(their_norms) - 1).max())
    record_property("largest difference of losses", f"{difference:.2e}")
    record_property("largest relative difference of gradient norms", f"{in_norms:.2e}")
    assert abs(untrained - theirs[-1]) > 0.05, "ten steps changed little"
    assert difference < 1e-3
    assert in_norms < 1e-3
    trained = read_adapter(tmp_path / "trained").tensors
    names = {name.replace(".default.", "."): p.detach().numpy() for name, p in trainable.items()}
    assert names.keys() == trained.keys()
    for name, tensor in names.items():
        assert np.abs(tensor).max() > 0
        # Not the largest: where a gradient is near zero, rounding decides which way Adam steps.
        assert np.abs(trained[name] - tensor).mean() < 0.01 * steps * rate, name


def test_4_bits_equal_bitsandbytes(make_peer: Callable[[str], Peer]) -> None:
    """Quantised here, the model computes what transformers does on the weights that bitsandbytes rounds."""
    functional: Any = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    peer, batch = make_peer("v1.1"), example()
    quantization = Quantization("nf4", 64, double_quantization=True)
    plain, model = peer.logits(*batch), peer.ours(quantization=quantization)
    weight = model.decoder.layers.cross_attention.q.weight.get_value()
    assert isinstance(weight, QuantizedTensor)
    with torch.no_grad():
        for name, module in peer.model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                codes, state = functional.quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
                module.weight.data = functional.dequantize_4bit(codes, state)
    expected = peer.logits(*batch)
    assert largest(expected, plain) > 0.1
    assert largest(run(model, *batch), expected) < TOLERANCE


@functools.cache
def loss_and_gradient(remat: Remat) -> tuple[float, Any]:
    """Of an adapter with dropout."""
    config = t5_config(SIZES | {"feed_forward_proj": "gated-gelu"})
    batch = {name: jnp.asarray(x) for name, x in training_batches(1)[0].items()}
    model = T5(config, method=LoRA(rank=4, dropout=0.2), remat=remat, rngs=nnx.Rngs(0))
    model.shared.weight[...] *= 50  # to embeddings of unit variance, so that no gradient is lost in rounding
    graph, adapter, frozen = nnx.split(model, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    adapter = tree.unflatten([0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)])

    def loss(adapter: Any, frozen: Any) -> jax.Array:
        return seq2seq_loss(nnx.merge(graph, adapter, frozen), batch, jax.random.key(1))

    return jax.jit(jax.value_and_grad(loss))(adapter, frozen)


@pytest.mark.integration
@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_remat_changes_no_gradient(remat: Remat) -> None:
    (expected, gradient), (found, found_gradient) = loss_and_gradient("none"), loss_and_gradient(remat)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found_gradient), jax.tree.leaves(gradient), strict=True):
        assert float(jnp.abs(b).max()) > 1e-5
        assert largest(a, b) < 1e-3 * float(jnp.abs(b).max())


@pytest.mark.integration
def test_dropout_acts_in_both_stacks() -> None:
    """A random key changes what an adapter of either stack adds, and nothing without an adapter."""
    sources, mask, inputs = example(8)
    for target in (r"encoder\..*", r"decoder\..*EncDecAttention\.k"):
        model = T5(t5_config(SIZES), method=LoRA(rank=4, dropout=0.5, target_modules=target), rngs=nnx.Rngs(0))
        graph, adapter, frozen = nnx.split(model, nnx.LoRAParam, ...)
        model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf + 0.1, adapter), frozen)
        plain = run(model, sources, mask, inputs)
        first, again, other = (run(model, sources, mask, inputs, key=jax.random.key(seed)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert largest(first, other) > 1e-3
        assert largest(first, plain) > 1e-3


def test_older_files() -> None:
    """transformers 4 tells v1.1 by tie_word_embeddings, 5 by scale_decoder_outputs."""
    newer = SIZES | {"tie_word_embeddings": True}
    tied = t5_config(SIZES)
    assert tied.tie_word_embeddings
    assert tied == t5_config(newer | {"scale_decoder_outputs": True}) == t5_config(newer)
    assert t5_config(SIZES | {"tie_word_embeddings": False}) == t5_config(newer | {"scale_decoder_outputs": False})
    assert not t5_config(newer | {"scale_decoder_outputs": False}).tie_word_embeddings


@pytest.mark.parametrize("case", ["v1.0", "v1.1"])
def test_files_of_transformers_4(make_peer: Callable[[str], Peer], case: str) -> None:
    """Its config.json, and its copies of the token table; an own head that is not there is named."""
    peer = make_peer(case)
    checkpoint = open_checkpoint(str(peer.folder))
    tied = case == "v1.0"
    config = {name: x for name, x in checkpoint.config.items() if name != "scale_decoder_outputs"}
    config["tie_word_embeddings"] = tied
    copies = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
    if tied:
        copies["lm_head.weight"] = "shared.weight"
    shapes = {**checkpoint.shapes, **{name: checkpoint.shapes[original] for name, original in copies.items()}}

    def load(shapes: dict[str, Any]) -> Any:
        older = Checkpoint("older", config, shapes, lambda name: checkpoint.read(copies.get(name, name)))
        return load_model(older, quantization=None, dtype=jnp.float32, progress=False)

    batch = example()
    assert largest(run(load(shapes), *batch), peer.logits(*batch)) < TOLERANCE
    if not tied:
        with pytest.raises(CheckpointError, match=r"missing tensors \(1\): lm_head\.weight"):
            load({name: shape for name, shape in shapes.items() if name != "lm_head.weight"})


def test_files_of_a_v1_1_that_transformers_5_made(tmp_path: Path) -> None:
    """One table for tokens and head, in the file once, and nothing scaled; merged, transformers still reads it."""
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**(SIZES | CASES["v1.1"]))).eval()
    theirs.save_pretrained(tmp_path / "v1.1")
    checkpoint = open_checkpoint(str(tmp_path / "v1.1"))
    if not checkpoint.config["tie_word_embeddings"]:
        pytest.skip("this version of transformers does not tie the tables of a new v1.1")
    assert not checkpoint.config["scale_decoder_outputs"]
    assert "lm_head.weight" not in checkpoint.shapes
    sources, mask, inputs = example()
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(sources).long(),
            attention_mask=torch.from_numpy(mask).long(),
            decoder_input_ids=torch.from_numpy(inputs).long(),
        ).logits.numpy()
    assert expected.std() > 0.5
    model = load_model(checkpoint, quantization=None, dtype=jnp.float32, progress=False)
    assert isinstance(model, T5)
    assert largest(run(model, sources, mask, inputs), expected) < TOLERANCE
    folder = merge(checkpoint, None, tmp_path / "merged", dtype="float32", progress=False)
    again = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    np.testing.assert_array_equal(again.lm_head.weight.detach(), theirs.shared.weight.detach())


def test_all_that_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match=r"a T5 model: num_layers is missing.*vocab_size is missing.*d_kv is missing"):
        family_of({"model_type": "t5"}).config({"model_type": "t5"})
    wrong = {
        "feed_forward_proj": "gated-swiglu",
        "relative_attention_num_buckets": 2,
        "relative_attention_max_distance": 1,
    }
    with pytest.raises(ValueError, match=r"'gated-', found 'gated-swiglu'.*at least 4, found 2.*2 buckets, found 1"):
        t5_config(SIZES | wrong)
    with pytest.raises(ValueError, match="found 'dense-relu'"):
        t5_config(SIZES | {"feed_forward_proj": "dense-relu"})


def test_activations_are_those_of_transformers() -> None:
    for value in ("relu", "gated-gelu", "gelu", "gated-gelu_new", "gated-silu", "gated-relu"):
        theirs = transformers.T5Config(**(SIZES | {"feed_forward_proj": value}))
        ours = t5_config(json.loads(theirs.to_json_string()))
        names = {"gelu_tanh": "gelu_new"}
        assert names.get(ours.activation, ours.activation) == theirs.dense_act_fn
        assert ours.glu == theirs.is_gated_act
