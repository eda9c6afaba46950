"""What tests of several packages share: a checkpoint of a tiny random Llama, made anew, and what has been compiled.

Every run of a job makes its programs anew, and so does every process that a test starts. JAX's cache of compiled programs,
in a folder of each test process of this session, compiles each once there; the environment brings it to the processes that
its tests start.
"""

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Where the plugins for GPU and TPU are installed, as compilers, and no such device is, JAX would look for one, in vain: on a
# GPU's machine for a driver, on a TPU's for a metadata server. With a device, JAX chooses as it always does.
if not any(any(Path("/dev").glob(pattern)) for pattern in ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*")):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # as a compiler alone it is of use to several processes

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Most of the suite's time is compiling for the CPU, and most of that LLVM's: tests have it optimise nothing, on which no
# result depends. Where they have the choice, they take XLA's older code generator, too, which has less to do. Processes that
# set XLA_FLAGS themselves, for several devices, compile as users do; so do all with `XLA_FLAGS= python -m pytest`.
_LIGHT = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _LIGHT += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _LIGHT)

# Before JAX and `datasets` are imported, which read them then.
COMPILED = tempfile.TemporaryDirectory(prefix="compiled-")
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # `datasets` reports each local file that it opens to the hub
}


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_module() -> Iterator[None]:
    """Else a process that runs all modules holds gigabytes of them."""
    import jax  # which reads the environment

    yield
    jax.clear_caches()


SPECIAL = ("<|im_start|>", "<|im_end|>", "<pad>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Byte-level BPE without merges, a token a byte, which knows ChatML; returns the size of its vocabulary."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2], chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    return len(tokens)


def write_tiny_llama(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """A Hugging Face folder; `fields` overrule its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": write_tokenizer(folder),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "dtype": "float32",
    } | fields
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, pairs = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    matrices = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (pairs, hidden),
        "self_attn.v_proj": (pairs, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    draws = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return scale * draws.standard_normal(shape, np.float32)

    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden, scale=0.3),
        "model.norm.weight": 1 + normal(hidden, scale=0.1),
    }
    for layer in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = 1 + normal(hidden, scale=0.1)
        for name, shape in matrices.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape, scale=shape[1] ** -0.5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of 2 layers of 64 features, with a tokenizer whose tokens are bytes."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def make_tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Such folders with other seeds and other fields of config.json."""

    def make(**options: Any) -> Path:
        return write_tiny_llama(tmp_path_factory.mktemp("llama"), **options)

    return make
