"""What fuzz.py damages: a folder of each kind with tiny real files, the files in it, and how a command opens them.

An opening returns a digest of everything that it read, so that a mutation without any effect is known from one that makes
another, legal value.
"""

import dataclasses
import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import binaries
import jax
import mutations
import numpy as np
from family_configs import LONGROPE
from fuzz_folders import gguf_file, run_options, state_of_run

from qlora_jax.adapters.pretrained import Pretrained, open_pretrained
from qlora_jax.config_file import from_toml
from qlora_jax.data import check_ids, encode_prompt
from qlora_jax.export.pretrained import merge_pretrained
from qlora_jax.finetune import ObjectiveOptions, Options
from qlora_jax.finetune.prepare import prepare
from qlora_jax.models.bounds import BOUNDS, TOKEN_IDS
from qlora_jax.train.log import MetricsLog
from qlora_jax.train.state_store import StateStore

TEXTS = ("The capital of France is Paris.", " a  b\n12<|im_end|> é", "")
# Names that a format knows, which a mutation may put in.
CONFIG_KEYS = (
    *(*BOUNDS, *TOKEN_IDS, "model_type", "architectures", "text_config", "quantization_config", "dtype", "torch_dtype"),
)
ADAPTER_KEYS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "use_rslora", "use_dora", "bias"),
    *("lora_bias", "ensure_weight_tying", "layer_replication", "init_lora_weights", "peft_type", "task_type", "token_dim"),
    *("num_virtual_tokens", "base_model_name_or_path", "revision", "target_parameters", "num_layers"),
    *("encoder_hidden_size",),
)
TOKENIZER_KEYS = (
    *("bos_token", "eos_token", "pad_token", "unk_token", "added_tokens_decoder", "chat_template", "tokenizer_class"),
    *("auto_map", "extra_special_tokens", "additional_special_tokens", "model_max_length", "padding_side", "image_token"),
    *(
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
        "truncation",
        "padding",
        "version",
    ),
)
GENERATION_KEYS = (
    *(*TOKEN_IDS, "temperature", "top_k", "top_p", "do_sample", "suppress_tokens", "max_length", "stop_strings"),
)
ROW_KEYS = (
    *("messages", "role", "content", "tool_calls", "tools", "weight", "question", "answer", "text", "prompt", "system"),
    *("history", "chosen", "rejected"),
)
RECORD_KEYS = (
    *("quantization", "template", "tables", "converted_from", "rope_scaling", "data_type", "block_size", "kind", "factor"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        folder: the name of the folder that it is in.
        files: patterns of the files that are damaged, one at a time.
        mutate: damages the bytes of one.
        open: opens the folder; returns what `digest` is made of.
    """

    folder: str
    files: tuple[str, ...]
    mutate: mutations.Mutation
    open: Callable[[Path], Any]


def digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()


def described(opened: Pretrained) -> Any:
    """Return everything that a command reads before the weights, and a checksum of these."""
    checkpoint, tokenizer = opened.checkpoint, opened.tokenizer
    named = sorted(tokenizer.special_tokens_map.items(), key=str), sorted(opened.stop_ids)
    prompts = [encode_prompt(text or "?", tokenizer, template="auto") for text in TEXTS]
    for ids in prompts:
        check_ids(ids, tokenizer, checkpoint.model_config.vocab_size)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    read = {name: checkpoint.read(name) for name in checkpoint.shapes if name not in checkpoint.quantized}
    packed = {name: checkpoint.read_quantized(name) for name in checkpoint.quantized if checkpoint.read_quantized}
    tensors = {} if opened.adapter is None else opened.adapter.tensors
    sums = [
        (name, tensor.shape, tensor.dtype, hashlib.md5(tensor.tobytes()).hexdigest())
        for name, tensor in (*read.items(), *tensors.items())
    ]
    sums += [
        (name, [hashlib.md5(np.asarray(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(q)])
        for name, q in packed.items()
    ]
    return opened.spec, opened.adapter_metadata, named, [p.tolist() for p in prompts], ids, sums


def open_model(folder: Path) -> Any:
    return described(open_pretrained(folder / "model.gguf" if (folder / "model.gguf").exists() else folder))


def open_adapter(folder: Path) -> Any:
    return described(open_pretrained(folder.parent / "llama", folder))


def merge_both(folder: Path) -> Any:
    opened = (
        open_pretrained(folder) if (folder / "config.json").exists() else open_pretrained(folder.parent / "llama", folder)
    )
    with tempfile.TemporaryDirectory() as temporary:
        merged = merge_pretrained(opened, Path(temporary) / "merged", progress=False)
        return [(path.name, digest(path.read_bytes())) for path in sorted(merged.iterdir())]


def adapter_or_merged(folder: Path) -> Any:
    """Open an adapter, and write the merged model, which reads more of its files."""
    return open_adapter(folder), merge_both(folder)


def prepare_run(options: Options) -> Any:
    """Return what a run knows before the weights, and its first batches."""
    run = prepare(options, progress=False)
    batches = [[np.asarray(leaf).tolist() for leaf in jax.tree.leaves(next(run.batches))] for _ in range(min(run.steps, 3))]
    return run.spec, run.steps, run.adapter_metadata, batches


def read_rows(folder: Path) -> Any:
    return prepare_run(run_options(folder, "rows.jsonl"))


def read_pairs(folder: Path) -> Any:
    return prepare_run(run_options(folder, "pairs.jsonl", objective=ObjectiveOptions(objective="dpo")))


def resume(folder: Path) -> Any:
    """Return what a run that goes on reads of its folder."""
    options = run_options(folder, "data.jsonl")
    prepared = prepare_run(options)
    store = StateStore(folder / "run" / "checkpoints", keep=3, create=False)
    try:
        state, position = store.restore(state_of_run())
    finally:
        store.close()
    with tempfile.TemporaryDirectory() as temporary:
        logs = []
        for name in ("metrics.jsonl", "samples.jsonl"):
            shutil.copy(folder / "run" / name, temporary)
            log = MetricsLog(Path(temporary) / name, resume_at=2)
            logs.append((log.rows, log.reached))
            log.close()
    return prepared, jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), state), position, logs


def read_options(folder: Path) -> Any:
    options = from_toml(Options, folder / "run.toml")
    own = run_options(folder, "data.jsonl")
    run = dataclasses.replace(options.run, output=own.run.output, max_steps=options.run.max_steps or 4)
    data = dataclasses.replace(options.data, data=own.data.data)
    return prepare_run(
        dataclasses.replace(options, model=dataclasses.replace(options.model, model=own.model.model), run=run, data=data)
    )


def _mutate_gguf(content: bytes, draws: random.Random) -> tuple[bytes, str]:
    return mutations.mutate_bytes(content, draws, last=8000) if draws.random() < 0.2 else gguf_file().mutated(draws)


def _mutate_state(content: bytes, draws: random.Random) -> tuple[bytes, str]:
    """Change a file of a checkpoint, of which some are JSON."""
    if content.lstrip().startswith(b"{") and draws.random() < 0.7:
        return mutations.mutate_json("data", "state", "shape", "seed", "next_index")(content, draws)
    return mutations.mutate_bytes(content, draws)


CONFIG = mutations.mutate_json(*CONFIG_KEYS)
TOKENIZER = mutations.mutate_json(*TOKENIZER_KEYS)
TARGETS = {
    "config": Target("llama", ("config.json",), CONFIG, open_model),
    "config-gemma3": Target("gemma3_text", ("config.json",), CONFIG, open_model),
    "config-phi3": Target("phi3", ("config.json",), mutations.mutate_json(*CONFIG_KEYS, *LONGROPE), open_model),
    "config-t5": Target("t5", ("config.json",), CONFIG, open_model),
    "config-gpt_neox": Target("gpt_neox", ("config.json",), CONFIG, open_model),
    "config-packed": Target("packed", ("config.json",), CONFIG, open_model),
    "packed-tensors": Target("packed", ("model.safetensors",), binaries.mutate_safetensors, open_model),
    "gguf": Target("gguf", ("model.gguf",), _mutate_gguf, open_model),
    "index": Target(
        "sharded", ("model.safetensors.index.json",), mutations.mutate_json("weight_map", "metadata"), open_model
    ),
    "safetensors": Target("sharded", ("*.safetensors",), binaries.mutate_safetensors, open_model),
    "tokenizer": Target("llama", ("tokenizer.json",), TOKENIZER, open_model),
    "tokenizer-config": Target("llama", ("tokenizer_config.json", "special_tokens_map.json"), TOKENIZER, open_model),
    "template": Target("llama", ("chat_template.jinja",), mutations.mutate_template, open_model),
    "generation": Target("llama", ("generation_config.json",), mutations.mutate_json(*GENERATION_KEYS), merge_both),
    "adapter-config": Target("adapter", ("adapter_config.json",), mutations.mutate_json(*ADAPTER_KEYS), adapter_or_merged),
    "adapter-tensors": Target("adapter", ("adapter_model.safetensors",), binaries.mutate_safetensors, adapter_or_merged),
    "adapter-record": Target("adapter", ("qlora_jax.json",), mutations.mutate_json(*RECORD_KEYS), adapter_or_merged),
    "adapter-bin": Target("pickled", ("adapter_model.bin",), binaries.mutate_archive, open_adapter),
    "adapter-tokenizer": Target("pickled", ("tokenizer*.json",), TOKENIZER, open_adapter),
    "prompt-config": Target("prompt", ("adapter_config.json",), mutations.mutate_json(*ADAPTER_KEYS), open_adapter),
    "prompt-tensors": Target("prompt", ("*.safetensors",), binaries.mutate_safetensors, open_adapter),
    "run-record": Target(
        "run", ("run/options.json",), mutations.mutate_json("model", "run", "data", "lora", "epochs"), resume
    ),
    "run-logs": Target("run", ("run/*.jsonl",), mutations.mutate_lines("step", "loss", "eval_loss"), resume),
    "run-state": Target("run", ("run/checkpoints/2/**/*",), _mutate_state, resume),
    "rows": Target("data", ("rows.jsonl",), mutations.mutate_lines(*ROW_KEYS), read_rows),
    "pairs": Target("data", ("pairs.jsonl",), mutations.mutate_lines(*ROW_KEYS), read_pairs),
    "toml": Target("data", ("run.toml",), mutations.mutate_toml, read_options),
}
