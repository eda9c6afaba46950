"""GGUF files of every architecture: transformers' tiny random models, written as llama.cpp writes them, give their logits.

The names in the file are the gguf package's own; what the converter does to the values is written out here once more. Where
transformers reads the architecture's files as well, what it reads is compared tensor by tensor.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf.quants import quantize

from qlora_jax.checkpoint.gguf.architectures import ARCHITECTURES
from qlora_jax.checkpoint.gguf.config import read_config
from qlora_jax.checkpoint.gguf.header import read_header
from qlora_jax.checkpoint.gguf.open import open_gguf
from qlora_jax.checkpoint.load import load_model
from qlora_jax.errors import CheckpointError

VOCABULARY, HIDDEN, INNER, HEADS, LAYERS = 101, 64, 96, 4, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
FACTORS = {"short": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}
LONGROPE = {"rope_type": "longrope", "short_factor": FACTORS["short"], "long_factor": FACTORS["long"]}
# name: architecture, transformers' class, what differs from SIZES in config.json, what the converter writes of it.
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"attention_bias": True, "head_dim": 32}, {"attention.key_length": 32}),
    "llama with a window": (
        "llama",
        "Mistral",
        {"sliding_window": 7, "tie_word_embeddings": True},
        {"attention.sliding_window": 7},
    ),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}, {"rope.freq_base": 1e4}),
    "qwen2 with yarn": (
        "qwen2",
        "Qwen2",
        {"rope_parameters": YARN | {"attention_factor": 0.9}},
        {
            "rope.scaling.yarn_attn_factor": 0.9,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 8.0,
        },
    ),
    "qwen3": (
        "qwen3",
        "Qwen3",
        {"head_dim": 32, "rope_parameters": DEFAULT_ROPE | {"rope_theta": 5e3}},
        {"attention.key_length": 32, "attention.value_length": 32, "rope.freq_base": 5e3},
    ),
    "gemma": (
        "gemma",
        "Gemma",
        {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True},
        {"attention.key_length": 32, "attention.head_count_kv": 1},
    ),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {
            "head_dim": 32,
            "sliding_window": 6,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 8.0,
            "tie_word_embeddings": True,
        },
        {
            "attention.key_length": 32,
            "attention.sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "gemma3",
        "Gemma3",
        {
            "head_dim": 32,
            "num_hidden_layers": 7,
            "sliding_window": 6,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {
            "block_count": 7,
            "attention.key_length": 32,
            "attention.sliding_window": 6,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "phi3": ("phi3", "Phi3", {"sliding_window": 9}, {"attention.sliding_window": 9}),
    "phi3 with longrope": (
        "phi3",
        "Phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 32,
            "rope_parameters": LONGROPE | {"rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
        {
            "attention.sliding_window": 0,
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(128 / 32) / math.log(32)),
        },
    ),
    "smollm3": ("smollm3", "SmolLM3", {"tie_word_embeddings": True}, {"rope.freq_base": 2e6}),
    "gptneox": (
        "gptneox",
        "GPTNeoX",
        {"layer_norm_eps": 1e-5, "rotary_pct": 0.5},
        {"rope.dimension_count": 8, "use_parallel_residual": True, "attention.layer_norm_epsilon": 1e-5},
    ),
}
BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")  # what its own reader of GGUF knows


def entries_of(case: str) -> dict[str, Any]:
    """The metadata of a case, without the architecture's name."""
    result = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": VOCABULARY,
    } | CASES[case][3]
    if case == "gptneox":
        del result["attention.head_count_kv"], result["attention.layer_norm_rms_epsilon"]
    return result


def write(
    path: Path, architecture: str, entries: dict[str, Any], tensors: dict[str, np.ndarray], storage: str = "F32"
) -> Path:
    """A GGUF file; matrices whose rows are whole blocks are stored as `storage`."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in entries.items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](f"{architecture}.{key}", value)
    kind = gguf.GGMLQuantizationType[storage]
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and storage != "F32":
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Peer:
    """A random model of transformers, and the tensors that the converter makes of it."""

    def __init__(self, case: str) -> None:
        self.torch: Any = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
        transformers: Any = pytest.importorskip("transformers")
        self.architecture, name, fields, _ = CASES[case]
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

    def tensors(self) -> dict[str, np.ndarray]:
        config = self.model.config
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
        result: dict[str, np.ndarray] = {}
        for name, parameter in self.model.named_parameters():  # tied ones once
            module, suffix = name.rsplit(".", 1)
            result[f"{names.get_name(module)}.{suffix}"] = self.converted(name, parameter.detach().numpy())
        if config.rope_parameters.get("rope_type") == "longrope":
            for length, factors in FACTORS.items():
                result[f"rope_factors_{length}.weight"] = np.array(factors, np.float32)
        return result

    def converted(self, name: str, value: np.ndarray) -> np.ndarray:
        """What llama.cpp's converter writes for a tensor of Hugging Face's."""
        if self.architecture in ("llama", "smollm3") and (".q_proj." in name or ".k_proj." in name):
            heads = HEADS if ".q_proj." in name else 2
            return value.reshape(heads, 2, len(value) // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if self.architecture.startswith("gemma") and name.endswith("norm.weight"):
            return value + 1
        if "query_key_value" in name:
            split = value.reshape(HEADS, 3, HIDDEN // HEADS, -1)
            return np.concatenate([split[:, part].reshape(HIDDEN, -1) for part in range(3)]).reshape(value.shape)
        return value

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self.model(self.torch.from_numpy(tokens).long()).logits.numpy()


def test_every_architecture_has_a_case() -> None:
    assert {architecture for architecture, *_ in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_model_that_was_written(case: str, tmp_path: Path) -> None:
    peer = Peer(case)
    checkpoint = open_gguf(write(tmp_path / "m.gguf", peer.architecture, entries_of(case), peer.tensors()))
    state = {name: value.numpy() for name, value in peer.model.state_dict().items()}
    if peer.model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    elif case == "gptneox":  # what it is called in files
        state["embed_out.weight"] = state.pop("lm_head.weight")
    assert checkpoint.shapes == {name: value.shape for name, value in state.items()}
    for name, value in state.items():
        np.testing.assert_allclose(checkpoint.read(name), value, atol=1e-6, err_msg=name)

    model = load_model(checkpoint, quantization=None, dtype=jnp.float32, progress=False)
    # 40 tokens: longer than the windows, and than the context before scaling.
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (2, 40), np.int32)
    expected = peer.logits(tokens)
    assert expected.std() > 1
    graph, weights = nnx.split(model)
    np.testing.assert_allclose(nnx.merge(graph, weights)(tokens), expected, atol=1e-3)


@pytest.mark.parametrize("case", BY_TRANSFORMERS)
def test_tensors_equal_those_that_transformers_reads(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a quantised file: its reader and ours are two ways from the same bytes to the same model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    peer = Peer(case)
    path = write(tmp_path / "m.gguf", peer.architecture, entries_of(case), peer.tensors(), storage="Q8_0")
    theirs = type(peer.model).from_pretrained(tmp_path, gguf_file=path.name, config=peer.model.config, dtype="float32")
    checkpoint, state = open_gguf(path), theirs.state_dict()
    assert checkpoint.shapes.keys() == state.keys() - ({"lm_head.weight"} if theirs.config.tie_word_embeddings else set())
    for name in checkpoint.shapes:
        np.testing.assert_allclose(checkpoint.read(name), state[name].numpy(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("key", "value"),
    [("logit_scale", 0.5), ("attention.clamp_kqv", 8.0), ("rope.scaling.yarn_ext_factor", 0.5), ("residual_scale", 0.25)],
)
def test_an_entry_that_is_not_understood_is_an_error(case: str, key: str, value: float, tmp_path: Path) -> None:
    """None of them has a meaning for these architectures; in others they change every logit."""
    architecture = CASES[case][0]
    path = write(tmp_path / "m.gguf", architecture, entries_of(case) | {key: value}, {})
    with pytest.raises(CheckpointError, match=rf"metadata {architecture}.{key}: expected none of this name, found {value}"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("architecture", "layers", "scalar"), [("gemma2", 46, 144), ("gemma3", 62, 168), ("gemma3", 26, 128)]
)
def test_the_scale_of_the_scores_of_gemma(architecture: str, layers: int, scalar: int, tmp_path: Path) -> None:
    """The largest models are scaled by hidden_size / heads, as the config.json of gemma-2-27b and gemma-3-27b say."""
    hidden = {144: 4608, 168: 5376, 128: 1152}[scalar]
    entries = entries_of(architecture) | {
        "block_count": layers,
        "embedding_length": hidden,
        "attention.head_count": 32,
        "attention.key_length": 128,
        "attention.value_length": 128,
    }
    problems: list[str] = []
    config = read_config(read_header(write(tmp_path / "m.gguf", architecture, entries, {})), problems)
    assert not problems
    assert config["query_pre_attn_scalar"] == scalar


def test_which_layers_have_a_window_can_be_told_by_the_file(tmp_path: Path) -> None:
    peer = Peer("gemma3")
    entries = entries_of("gemma3") | {"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 500.0}
    config = open_gguf(write(tmp_path / "m.gguf", "gemma3", entries, peer.tensors())).config
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    "name", ["blk.0.attn_norm.bias", "token_embd.bias", "blk.0.attn_q_norm.weight", "rope_freqs.weight"]
)
def test_a_tensor_of_another_architecture_is_an_error(name: str, tmp_path: Path) -> None:
    tensors = Peer("qwen2").tensors() | {name: np.zeros(16, np.float32)}
    with pytest.raises(CheckpointError, match=rf"holds 1 tensors unknown to a Qwen2 model of 4 layers: '{name}'"):
        open_gguf(write(tmp_path / "m.gguf", "qwen2", entries_of("qwen2"), tensors))


def test_factors_of_longrope_of_another_length_are_an_error(tmp_path: Path) -> None:
    case = "phi3 with longrope"
    tensors = Peer(case).tensors()
    tensors["rope_factors_long.weight"] = np.ones(5, np.float32)
    del tensors["rope_factors_short.weight"]
    with pytest.raises(CheckpointError) as caught:
        open_gguf(write(tmp_path / "m.gguf", "phi3", entries_of(case), tensors))
    assert "tensor 'rope_factors_long.weight': expected 6 factors, found 5" in str(caught.value)
    assert "tensor 'rope_factors_short.weight': expected 6 factors, found 0" in str(caught.value)
