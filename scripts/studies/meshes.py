"""Compare training on meshes of several devices with training on one device: losses, adapters, memory, collectives.

    python -m scripts.studies.meshes --steps 50                        8 virtual devices of a CPU, a small Llama
    python -m scripts.studies.meshes --family t5 --meshes tensor=4,data=2
    python -m scripts.studies.meshes --decode                          also the tokens of greedy answers

Method. A checkpoint with random weights is written to a temporary folder and loaded as a run loads it: NF4 with double
quantisation, LoRA on all linear layers, float32. The same batches of 8 rows are learned with AdamW on one device and on
every mesh of 8 devices. Reported are, for each mesh:

    start       whether the initial adapter and the 4-bit codes equal those of one device, bit for bit
    loss        the largest relative difference of a loss from that of one device, over all steps
    adapter     the norm of the difference of the adapters after the last step, divided by the norm of the adapter
    bytes       the bytes of the frozen weights on each device, and the share of those of one device
    gathered    the dtypes of the weights that the layers gather, from the compiled program

Adam divides each gradient by its own size. A tiny gradient, of which rounding is a large part, therefore moves a parameter
as far as a large one does, and another order of a sum shows there first. `--eps` sets the number that Adam adds to the
divisor. The last line is JSON. The exit code is 1 if a value, a loss (1e-5) or a norm (--tolerance) differs.
"""

import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from safetensors.numpy import save_file

from qlora_jax import cli
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.models import FAMILIES, ModelSpec, family_of
from qlora_jax.nn import MeshShape, data_mesh, mesh_context, put_rows
from qlora_jax.peft import LoRA
from qlora_jax.quant import PackedEmbedding, QuantizedTensor, with_parts
from qlora_jax.serve import generate
from qlora_jax.train import adamw, create_state, jit_train_step, language_model_objective, seq2seq_objective, split

Family = Literal["llama", "gpt_neox", "gemma2", "phi3", "t5"]
DEVICES, ROWS, LENGTH, VOCABULARY = 8, 8, 32, 260
MESHES = ("data=8", "fsdp=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "dtype": "float32",
}
CONFIGS: dict[Family, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "gpt_neox": {"model_type": "gpt_neox", "tie_word_embeddings": False},
    "gemma2": {"model_type": "gemma2", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "phi3": {"model_type": "phi3", "pad_token_id": 0, "sliding_window": None, "tie_word_embeddings": False},
    "t5": {"model_type": "t5", "d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 8}
    | {"feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
    | {"decoder_start_token_id": 0, "pad_token_id": 0},
}


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """What to compare."""

    family: Family = "llama"
    """Family of the model."""
    meshes: tuple[str, ...] = MESHES
    """Meshes of 8 devices to compare with one device."""
    steps: int = 50
    """Number of steps."""
    eps: float | None = None
    """Number that Adam adds to the divisor; its own default if not given."""
    tolerance: float = 1e-5
    """Largest relative difference of the adapters' norm."""
    decode: bool = False
    """Generate answers as well, and compare their tokens."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the program."""

    run: MeshOptions = dataclasses.field(default_factory=MeshOptions)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run on one mesh leaves, on the host.

    Attributes:
        start: the leaves of the initial adapter, and of the 4-bit matrices in one part.
        losses: the loss of each step.
        adapter: the leaves of the adapter after the last step.
        bytes: the bytes of the frozen weights on the first device.
        gathered: the dtypes that the layers gather of their weights.
        answers: the tokens of greedy answers.
    """

    start: list[np.ndarray]
    losses: np.ndarray
    adapter: list[np.ndarray]
    bytes: int
    gathered: tuple[str, ...]
    answers: list[list[int]]


def write_checkpoint(folder: Path, family: Family) -> Path:
    """Write a checkpoint with random weights and return its folder."""
    config = SIZES | CONFIGS[family]
    config["architectures"] = [FAMILIES[config["model_type"]].architecture]
    spec = ModelSpec(family_of(config).config(config), None, "none", None, "float32")
    state, draws, tensors = nnx.state(spec.abstract("cpu")), np.random.default_rng(0), {}
    for mapping in spec.config.parameter_mappings:
        variable: Any = state
        for name in mapping.path:
            variable = variable[name]
        shape = variable.get_value().shape
        shape = shape[1:] if mapping.stacked else shape
        for name in mapping.names():
            if len(shape) == 1:
                tensors[name] = (name.endswith("weight") + 0.1 * draws.standard_normal(shape)).astype(np.float32)
            else:
                values = draws.standard_normal(shape, np.float32) * (shape[0] ** -0.5 if mapping.linear else 0.3)
                tensors[name] = np.ascontiguousarray(values.T if mapping.linear else values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def train(folder: Path, family: Family, mesh_text: str | None, options: MeshOptions) -> Trained:
    """Train on a mesh; None: on one device."""
    mesh = None if mesh_text is None else data_mesh(MeshShape.parse(mesh_text))
    objective = seq2seq_objective() if family == "t5" else language_model_objective()
    with mesh_context(mesh):
        model = load_model(open_checkpoint(str(folder)), method=LoRA(rank=4), dtype="float32", mesh=mesh, progress=False)
        graph, adapter, frozen = split(model)
        del model
        start = [*_on_host(adapter), *_on_host(jax.tree.map(_in_one_part, frozen, is_leaf=_is_packed))]
        size = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(frozen))
        tx: Any = adamw(1e-3) if options.eps is None else optax.adamw(1e-3, eps=options.eps, weight_decay=0)
        state, losses, gathered = create_state(tx, adapter), [], ()
        step: Any = jit_train_step(graph, tx, objective.loss, state)
        for number in range(options.steps):
            batch = put_rows(mesh, batch_of(family, number), 1)
            if number == 0:
                step = step.lower(state, frozen, batch).compile()
                gathered = gathered_dtypes(step.as_text())
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        answers: list[list[int]] = []
        if options.decode and family != "t5":
            weights = nnx.state(nnx.merge(graph, state.adapter, frozen))
            answers = generate(graph, weights, [[5, 17, 200, 41], [33], [7, 8]], max_new_tokens=16)
        return Trained(start, np.asarray(losses), _on_host(state.adapter), size, gathered, answers)


def batch_of(family: Family, number: int) -> dict[str, Array]:
    """Return a batch of random tokens, `[1, rows, tokens]`; each step has another one."""
    draws, shape = np.random.default_rng(number), (1, ROWS, LENGTH)
    batch: dict[str, np.ndarray] = {name: draws.integers(2, VOCABULARY, shape, np.int32) for name in ("inputs", "targets")}
    batch["loss_mask"] = (draws.random(shape) < 0.8).astype(np.float32)
    if family == "t5":
        batch |= {"sources": draws.integers(2, VOCABULARY, shape, np.int32), "source_mask": np.ones(shape, bool)}
        batch["source_mask"][:, ::2, LENGTH // 2 :] = False
    else:
        batch["segment_ids"] = np.broadcast_to(1 + (np.arange(LENGTH) >= LENGTH // 2), shape).astype(np.int32)
        batch["positions"] = np.broadcast_to(np.arange(LENGTH) % (LENGTH // 2), shape).astype(np.int32)
    return {name: jnp.asarray(array) for name, array in batch.items()}


def gathered_dtypes(text: str) -> tuple[str, ...]:
    """Return the dtypes of all arrays of more than 1024 values that a compiled step gathers inside its loops over layers.

    What the loss gathers in `jax.shard_map`, the hidden states, is not counted.
    """
    found: set[str] = set()
    for line in text.splitlines():
        match = re.search(r"= (.*) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", line)
        if match and "while/body" in line and "shard_map" not in line:
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            found |= {dtype for dtype, shape in arrays if np.prod([int(n) for n in shape.split(",") if n]) > 1024}
    return tuple(sorted(found))


def differences(one: Trained, other: Trained) -> dict[str, Any]:
    """Return how a run differs from that on one device, in the words of the module's docstring."""
    equal = len(one.start) == len(other.start)
    equal = equal and all(np.array_equal(a, b) for a, b in zip(one.start, other.start, strict=True))
    distance = sum(np.square(a - b, dtype=np.float64).sum() for a, b in zip(one.adapter, other.adapter, strict=True))
    norm = sum(np.square(a, dtype=np.float64).sum() for a in one.adapter)
    return {
        "start": equal,
        "loss": float(np.abs(other.losses / one.losses - 1).max()),
        "adapter": float(np.sqrt(distance / norm)),
        "bytes": other.bytes,
        "share": other.bytes / one.bytes,
        "gathered": list(other.gathered),
        "answers": one.answers == other.answers,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return its exit code."""
    return cli.run(compare, Options, __doc__, arguments)


def compare(options: Options) -> int:
    """Print the differences of each mesh from one device."""
    chosen, found, right = options.run, {}, True
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(Path(folder), chosen.family)
        one = train(path, chosen.family, None, chosen)
        print(f"{chosen.family}: one device, {chosen.steps} steps, loss {one.losses[0]:.4f} to {one.losses[-1]:.4f}")
        for text in chosen.meshes:
            row = found[text] = differences(one, train(path, chosen.family, text, chosen))
            right &= row["start"] and row["loss"] <= 1e-5 and row["adapter"] <= chosen.tolerance and row["answers"]
            print(f"{text:24} " + "  ".join(f"{name} {_short(value)}" for name, value in row.items()), flush=True)
    print(json.dumps({"family": chosen.family, "steps": chosen.steps, "meshes": found}))
    return 0 if right else 1


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedEmbedding)


def _in_one_part(value: Any) -> Any:
    return jax.jit(with_parts, static_argnames="parts")(value, 1) if isinstance(value, QuantizedTensor) else value


def _on_host(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main())
