"""The folders that fuzz.py damages files of: models, adapters, a run that goes on, and data, all tiny."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import binaries
import jax
import numpy as np
from family_configs import CONFIGS
from safetensors.numpy import load_file, save_file
from tiny_models import write_tiny_llama, write_tokenizer
from tokenizers import pre_tokenizers

from qlora_jax.adapters.bind import save_adapter
from qlora_jax.adapters.files import write_adapter
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.adapters.names import tensor_name
from qlora_jax.adapters.places import variable_at
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.export.merge import merge
from qlora_jax.finetune import DataOptions, LoRAOptions, ModelOptions, Options, RunOptions
from qlora_jax.finetune.folder import start
from qlora_jax.finetune.prepare import prepare
from qlora_jax.models import family_of
from qlora_jax.models.spec import ModelSpec
from qlora_jax.peft import LoRA
from qlora_jax.peft.p_tuning import PTuning
from qlora_jax.quant import Quantization
from qlora_jax.train.state_store import StateStore

LAYERS = 2


def run_options(folder: Path, data: str, **groups: Any) -> Options:
    model = ModelOptions(model=str(folder.parent / "llama"))
    options = Options(
        model=model,
        data=DataOptions(data=str(folder / data), max_length=256, held_out=0.0),
        lora=LoRAOptions(rank=4),
        run=RunOptions(output=folder / "run", max_steps=4, samples=0, memory_check=False),
    )
    return dataclasses.replace(options, **groups)


def state_of_run() -> Any:
    return {
        "step": jax.numpy.int32(2),
        "adapter": {"lora_a": jax.numpy.arange(12.0).reshape(3, 4), "lora_b": jax.numpy.ones((4, 3))},
    }


def write_family(folder: Path, kind: str, **fields: Any) -> None:
    """Write a folder of a family with random weights."""
    folder.mkdir()
    config = {"model_type": kind} | CONFIGS[kind] | {"vocab_size": write_tokenizer(folder), "eos_token_id": [1, 0]} | fields
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 0], "pad_token_id": 2, "temperature": 0.7})
    )
    spec = ModelSpec(family_of(config).config(config), None, method=None)
    model, draws, tensors = spec.abstract(), np.random.default_rng(0), {}
    for mapping in spec.config.parameter_mappings:
        shape = variable_at(model, mapping.path).shape[mapping.stacked :]
        for name in mapping.names():
            tensors[name] = draws.standard_normal(shape[::-1] if mapping.linear else shape, np.float32)
    save_file(tensors, folder / "model.safetensors")


def write_folders(root: Path) -> None:
    """Write all folders that `TARGETS` names."""
    llama = write_tiny_llama(root / "llama", num_hidden_layers=LAYERS, hidden_size=32, intermediate_size=64, head_dim=8)
    (llama / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}})
    )
    (llama / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 0], "pad_token_id": 2, "temperature": 0.7, "top_k": 5})
    )
    for kind in ("gemma3_text", "phi3", "t5", "gpt_neox"):
        write_family(root / kind, kind)
    _write_sharded(llama, root / "sharded")
    packed = merge(
        open_checkpoint(llama),
        None,
        root / "packed",
        quantization=Quantization(),
        tokenizer=load_tokenizer(llama),
        progress=False,
    )
    assert packed.is_dir()
    _write_gguf(root / "gguf")
    _write_adapters(llama, root)
    _write_run(root / "run")
    _write_data(root)


def _write_sharded(llama: Path, folder: Path) -> None:
    shutil.copytree(llama, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: shard for shard, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def gguf_file() -> binaries.Gguf:
    """Return a Llama with YaRN and a byte-level vocabulary."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|endoftext|>", "<|im_end|>"]
    entries: list[tuple[str, int, Any]] = [("general.architecture", 8, "llama"), ("general.alignment", 4, 32)]
    sizes = {"block_count": LAYERS, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
    sizes |= {
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 8,
        "rope.scaling.original_context_length": 16,
    }
    entries += [(f"llama.{key}", 4, value) for key, value in sizes.items()]
    entries += [
        (f"llama.{key}", 6, value)
        for key, value in {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 1e4,
            "rope.scaling.factor": 4.0,
        }.items()
    ]
    entries += [
        ("llama.rope.scaling.type", 8, "yarn"),
        ("general.sampling.temp", 6, 0.5),
        ("tokenizer.chat_template", 8, "{{ messages[0].content }}"),
    ]
    entries += [(f"tokenizer.ggml.{key}", 8, text) for key, text in {"model": "gpt2", "pre": "llama-bpe"}.items()]
    entries += [("tokenizer.ggml.tokens", 9, (8, tokens)), ("tokenizer.ggml.merges", 9, (8, ["a b"]))]
    entries += [
        ("tokenizer.ggml.token_type", 9, (5, [1] * (len(tokens) - 2) + [3, 3])),
        ("tokenizer.ggml.add_bos_token", 7, False),
    ]
    entries += [
        (f"tokenizer.ggml.{key}_token_id", 4, len(tokens) - at) for key, at in {"eos": 1, "bos": 2, "padding": 3}.items()
    ]
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    parts = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    parts |= {"ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes |= {f"blk.{layer}.{part}": shape for layer in range(LAYERS) for part, shape in parts.items()}
    tensors, data = [], b""
    for name, shape in shapes.items():
        tensors.append((f"{name}.weight", list(shape[::-1]), 0, len(data)))
        data += np.random.default_rng(len(data)).standard_normal(shape, np.float32).tobytes()
        data += b"\0" * (-len(data) % 32)
    return binaries.Gguf(entries, tensors, data)


def _write_gguf(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.gguf").write_bytes(gguf_file().content())


def _write_adapters(llama: Path, root: Path) -> None:
    draws = np.random.default_rng(1)
    tensors = {"base_model.model.model.norm.weight": np.ones(32, np.float32)}
    for layer in range(LAYERS):
        for module, features in (("q_proj", 32), ("v_proj", 16)):
            name = f"model.layers.{layer}.self_attn.{module}"
            tensors[tensor_name(name, "lora_A.weight")] = draws.standard_normal((4, 32), np.float32)
            tensors[tensor_name(name, "lora_B.weight")] = draws.standard_normal((features, 4), np.float32)
    method = LoRA(
        rank=4, target_modules=("q_proj", "v_proj"), modules_to_save=("model.norm",), rank_pattern=(("q_proj", 4),)
    )
    metadata = AdapterMetadata(Quantization(), "chat")
    write_adapter(tensors, root / "adapter", method=method, base_model_name_or_path=str(llama), beside=[metadata.save])
    shutil.copytree(root / "adapter", root / "pickled")
    (root / "pickled" / "adapter_model.safetensors").unlink()
    text = binaries.pickled_tensors({name: tensor.shape for name, tensor in tensors.items()})
    storages = {str(key): tensor.tobytes() for key, tensor in enumerate(tensors.values())}
    (root / "pickled" / "adapter_model.bin").write_bytes(binaries.archive(text, storages))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(llama / name, root / "pickled" / name)
    model = open_pretrained(llama, method=PTuning(virtual_tokens=3, hidden_size=8)).load(progress=False)
    save_adapter(model, root / "prompt")


def _write_run(folder: Path) -> None:
    folder.mkdir()
    rows = [{"question": f"{number}?", "answer": "red " * (1 + number % 3)} for number in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = run_options(folder, "data.jsonl")
    run = prepare(options, progress=False)
    start(options, run.objective.held_out_checksum)
    for _ in range(2):
        next(run.batches)
    store = StateStore(options.run.output / "checkpoints", keep=3)
    store.save(2, state_of_run(), run.batches.get_state())
    store.close()
    log = [{"step": step, "loss": 2.0 / (1 + step), "tokens": 10, "learning_rate": 1e-4} for step in range(3)]
    (options.run.output / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*log, {"step": 2, "eval_loss": 0.5}])
    )
    (options.run.output / "samples.jsonl").write_text(json.dumps({"step": 0, "prompt": "1?", "answer": "red"}) + "\n")


def _write_data(root: Path) -> None:
    (root / "data").mkdir()
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    rows: list[Any] = []
    for number in range(40):
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{number}?"}]
        turns += [
            {"role": "assistant", "content": "Wait.", "weight": 0},
            {"role": "user", "content": [{"type": "text", "text": "Well?"}]},
        ]
        rows.append({"messages": [*turns, {"role": "assistant", "content": "red"}], "id": number})
    rows[3]["messages"].insert(2, {"role": "assistant", "content": None, "tool_calls": [call]})
    (root / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"{n}?", "chosen": "please " * (1 + n % 3), "rejected": "no! " * (1 + n % 2)} for n in range(30)]
    (root / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (root / "data" / "data.jsonl").write_text(
        "".join(json.dumps({"question": f"{n}?", "answer": "red"}) + "\n" for n in range(20))
    )
    (root / "data" / "run.toml").write_text(
        '[model]\ndata_type = "nf4"\nblock_size = 64\nremat = "auto"\n[lora]\nrank = 4\nalpha = 8.0\ndropout = 0.0\n'
        'target_modules = ["q_proj"]\n[data]\nmax_length = 64\nheld_out = 0.1\npacking = false\ntemplate = "auto"\n'
        "[optimizer]\nlearning_rate = 1e-4\nweight_decay = 0.0\n[run]\nepochs = 1.0\nbatch_size = 2\nseed = 0\nsamples = 0\n"
        "keep = 3\neval_every = 2\n[context]\nattention_groups = 1\n"
    )
