"""Every family against transformers' own, on tiny random models: forward, packed, with a cache, greedy; PEFT's adapters too.

The weights are random with the scale of a trained model, biases and norms included, so that a part that is left out shows.
"""

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
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.models import FAMILIES, CausalLM, Remat, family_of
from qlora_jax.peft import LoRA
from qlora_jax.serve import generate
from qlora_jax.train import language_model_loss

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "partial_rotary_factor": 0.75,
}
# model_type, transformers' class, and what differs from SIZES. The first case of each model_type is the hardest.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "mistral with a window": ("mistral", "Mistral", {"sliding_window": 7}),
    "mistral without": ("mistral", "Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2 with windows": (
        "qwen2",
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32, "attention_bias": True}),
    "gemma": ("gemma", "Gemma", {"head_dim": 32, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {
            "head_dim": 32,
            "sliding_window": 6,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        "Gemma3",
        {
            "head_dim": 32,
            "num_hidden_layers": 6,
            "sliding_window": 6,
            "query_pre_attn_scalar": 40,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3 with longrope": (
        "phi3",
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "phi3": ("phi3", "Phi3", {"sliding_window": 9}),
    "smollm3 with windows": ("smollm3", "SmolLM3", {"use_sliding_window": True, "sliding_window": 5}),
    "smollm3": ("smollm3", "SmolLM3", {}),
    "gpt_neox": ("gpt_neox", "GPTNeoX", {}),
    "gpt_neox one after the other": ("gpt_neox", "GPTNeoX", {"use_parallel_residual": False}),
}
# The cases that every run of the tests has; the others are integration tests.
# One case of each kind of layer: of the other families, all cases run in the integration tier.
_KINDS = ("llama", "qwen2", "phi3", "gemma3_text", "gpt_neox")
QUICK = tuple({of: case for case, (of, _, _) in reversed(CASES.items()) if of in _KINDS}.values())
TOLERANCE = 1e-3  # on logits whose standard deviation is between 2 and 10
# PEFT asks transformers a question by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


class Peer:
    """A random model of transformers, and ours read from the folder that it saves."""

    def __init__(self, folder: Path, case: str) -> None:
        self.torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
        transformers: Any = pytest.importorskip("transformers")
        _, name, fields = CASES[case]
        config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
        self.torch.manual_seed(0)
        self.model = getattr(transformers, f"{name}ForCausalLM")(config_class(**(SIZES | fields))).eval()
        with self.torch.no_grad():
            for parameter_name, parameter in self.model.named_parameters():
                if parameter.ndim == 2:
                    table = "embed" in parameter_name or "lm_head" in parameter_name
                    parameter.normal_(0.0, 0.5 if table else parameter.shape[1] ** -0.5)
                else:
                    parameter.add_(0.2 * self.torch.randn(parameter.shape))
        self.model.save_pretrained(folder)
        self.folder = folder

    def ours(self, lora: LoRA | None = None) -> CausalLM:
        return load_model(
            open_checkpoint(str(self.folder)), quantization=None, method=lora, dtype=jnp.float32, progress=False
        )

    def logits(self, tokens: np.ndarray, model: Any = None) -> np.ndarray:
        with self.torch.no_grad():
            return (model or self.model)(self.torch.from_numpy(tokens).long()).logits.numpy()


@pytest.fixture
def make_peer(tmp_path: Path) -> Callable[[str], Peer]:
    return lambda case: Peer(tmp_path / "peer", case)


def random_tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, SIZES["vocab_size"], (batch, length), np.int32)


def run(model: CausalLM, tokens: np.ndarray, **options: Any) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens, **options))(state, tokens))


def largest(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def test_every_family_has_a_case() -> None:
    """Here, or in test_t5.py where they are no decoders."""
    decoders = {name for name, family in FAMILIES.items() if family.model is CausalLM}
    assert {model_type for model_type, _, _ in CASES.values()} == decoders == set(FAMILIES) - {"t5"}


@pytest.mark.parametrize("case", tiered(CASES, quick=QUICK))
def test_logits_and_generation_equal_transformers(make_peer: Callable[[str], Peer], case: str) -> None:
    """Forward; packed with another text; and greedy decoding through the cache, token for token."""
    peer = make_peer(case)
    model, tokens = peer.ours(), random_tokens(2, 40)
    expected = peer.logits(tokens)
    assert expected.std() > 1
    assert largest(run(model, tokens), expected) < TOLERANCE

    first, second = tokens[:1, :23], tokens[1:, :17]
    packed = np.concatenate([first, second, np.zeros((1, 3), np.int32)], axis=1)
    segments = np.repeat([1, 2, 0], [23, 17, 3])[None]
    positions = np.concatenate([np.arange(23), np.arange(17), np.arange(3)])[None]
    logits = run(model, packed, positions=positions, segment_ids=segments)
    assert largest(logits[:, :23], expected[:1, :23]) < TOLERANCE
    assert largest(logits[:, 23:40], expected[1:, :17]) < TOLERANCE

    prompts = [tokens[0, :11].tolist(), tokens[1, :5].tolist()]
    answers = generate(*nnx.split(model), prompts, max_new_tokens=20)
    for prompt, answer in zip(prompts, answers, strict=True):
        with peer.torch.no_grad():
            theirs = peer.model.generate(
                peer.torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        assert answer == theirs[0, len(prompt) :].tolist()


# llama: tests/adapters. The others of these three have fused or renamed matrices.
@pytest.mark.parametrize("case", tiered(CASES, quick=["phi3", "gpt_neox", "gemma3"]))
def test_adapters_go_both_ways(make_peer: Callable[[str], Peer], case: str, tmp_path: Path) -> None:
    """A random adapter of PEFT on all linear layers: loaded, it gives PEFT's logits; saved, PEFT loads it and they stay."""
    peft: Any = pytest.importorskip("peft")
    peer = make_peer(case)
    tokens = random_tokens(2, 20, seed=1)
    plain = peer.logits(tokens)
    tuned = peft.get_peft_model(peer.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with peer.torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2)
    expected = peer.logits(tokens, tuned)
    assert largest(expected, plain) > 0.1
    tuned.save_pretrained(tmp_path / "theirs")
    lora = read_adapter_method(tmp_path / "theirs")
    model = load_adapter(peer.ours(lora), tmp_path / "theirs")
    assert largest(run(model, tokens), expected) < TOLERANCE

    save_adapter(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(tuned.unload(), tmp_path / "ours").eval()
    assert largest(peer.logits(tokens, again), expected) < 1e-5
    ours, theirs = (read_adapter(tmp_path / name).tensors for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)


@pytest.mark.parametrize("case", CASES)
def test_all_that_is_missing_is_named(case: str) -> None:
    model_type, _, fields = CASES[case]
    bare = {"model_type": model_type, **fields}
    if model_type == "gemma3_text":  # whose files may leave everything out
        family_of(bare).config(bare | {"num_hidden_layers": 6})
        return
    with pytest.raises(ValueError, match=r"vocab_size is missing.*intermediate_size is missing"):
        family_of(bare).config(bare)


def test_older_files_of_gemma3() -> None:
    """Scaling for the far layers, another base frequency for the near ones: as the first files say it."""
    newer = SIZES | CASES["gemma3"][2]
    older = {name: value for name, value in newer.items() if name != "rope_parameters"} | {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
    }
    read = FAMILIES["gemma3_text"].config
    assert read(older) == read(newer)
    assert read(newer).layer_kinds == (0, 0, 0, 0, 0, 1)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("case", "remat"),
    [("gemma2", "full"), ("gemma3", "dots"), ("gemma3", "offload")],
)
def test_remat_changes_no_gradient_where_layers_differ(case: str, remat: Remat) -> None:
    """Windows and positions are chosen while the program runs, in the backward pass as well."""
    config = family_of({"model_type": CASES[case][0]}).config(SIZES | CASES[case][2])
    tokens = jnp.asarray(random_tokens(2, 24))
    batch = {"inputs": tokens, "targets": jnp.roll(tokens, -1, 1), "loss_mask": jnp.ones(tokens.shape)}

    def gradients(remat: Remat) -> Any:
        model = CausalLM(config, method=LoRA(rank=4), remat=remat, rngs=nnx.Rngs(0))
        graph, adapter, frozen = nnx.split(model, nnx.LoRAParam, ...)
        adapter = jax.tree.map(lambda leaf: leaf + 0.05, adapter)

        def loss(adapter: Any, frozen: Any) -> jax.Array:
            return language_model_loss(nnx.merge(graph, adapter, frozen), batch, None)

        # Unoptimised programs of jax 0.12 differ by more than the bound: these are optimised, as those of users are.
        optimised = {"xla_backend_optimization_level": 1}
        return jax.jit(jax.value_and_grad(loss), compiler_options=optimised)(adapter, frozen)

    (expected, gradient), (found, found_gradient) = gradients("none"), gradients(remat)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-2
    for a, b in zip(jax.tree.leaves(found_gradient), jax.tree.leaves(gradient), strict=True):
        assert largest(a, b) < 1e-3 * float(jnp.abs(b).max())
