"""Stacks of mixed storage (4-bit layers and dense ones) on several devices: loaded, trained and decoded as on one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file
from virtual_devices import virtual_devices

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.export.merge import merge
from qlora_jax.nn import data_mesh, mesh_context, put_on_mesh, put_rows
from qlora_jax.peft import LoRA
from qlora_jax.quant import MixedStack, Quantization, QuantizedTensor
from qlora_jax.serve import generate
from qlora_jax.train import adamw, create_state, jit_train_step, language_model_loss, split

DENSE = ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj", "model.layers.0.self_attn.q_proj")


def mixed_folder(make_tiny_llama: Callable[..., Path], folder: Path) -> Path:
    """A folder in bitsandbytes' 4 bits of which some layers stay dense."""
    base = make_tiny_llama(num_hidden_layers=4)
    merge(open_checkpoint(str(base)), None, folder, quantization=Quantization(), progress=False)
    original, tensors = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in (f"{module}.weight" for module in DENSE):
        tensors = {key: value for key, value in tensors.items() if not key.startswith(name)} | {name: original[name]}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def results(folder: Path) -> dict[str, Any]:
    """Losses and gradient norms of two steps on all devices, and greedy answers after them."""
    mesh = data_mesh()
    with mesh_context(mesh):
        checkpoint = open_checkpoint(str(folder))
        model: Any = load_model(checkpoint, quantization=Quantization(), method=LoRA(rank=4), mesh=mesh, progress=False)
        assert isinstance(model.layers.mlp.down_proj.weight.get_value(), MixedStack), "also in the context of a mesh"
        assert isinstance(model.layers.mlp.up_proj.weight.get_value(), QuantizedTensor)
        graph, adapter, frozen = split(model)
        draws = np.random.default_rng(0)
        batch: Any = {name: draws.integers(0, 259, (1, 4, 24), np.int32) for name in ("inputs", "targets")}
        batch |= {"loss_mask": np.ones((1, 4, 24), np.float32), "segment_ids": np.ones((1, 4, 24), np.int32)}
        batch["positions"] = np.broadcast_to(np.arange(24, dtype=np.int32), (1, 4, 24))
        tx = adamw(1e-2)
        state, rows = create_state(tx, put_on_mesh(mesh, adapter, P())), []
        step = jit_train_step(graph, tx, language_model_loss, state)
        for _ in range(2):
            state, metrics = step(state, frozen, put_rows(mesh, jax.tree.map(jnp.asarray, batch), 1))
            rows.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        weights = nnx.state(nnx.merge(graph, state.adapter, frozen))
        answers = generate(graph, weights, [[5, 17, 200], [33]], max_new_tokens=8)
    return {"devices": jax.device_count(), "rows": rows, "answers": answers}


@pytest.mark.integration
def test_four_devices_do_what_one_does(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """About 30 CPU seconds: four virtual devices, in a process of their own."""
    folder = mixed_folder(make_tiny_llama, tmp_path / "mixed")
    one = results(folder)
    code = "import json, sys, pathlib; sys.path[:0] = sys.argv[2:]; import test_mixed_devices as test; "
    code += "print(json.dumps(test.results(pathlib.Path(sys.argv[1]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), *(str(parent) for parent in Path(__file__).parents[:3])],
        capture_output=True,
        text=True,
        check=False,
        env=virtual_devices(4),
    )
    assert done.returncode == 0, done.stderr
    four = json.loads(done.stdout.splitlines()[-1])
    assert (one["devices"], four["devices"]) == (1, 4)
    np.testing.assert_allclose(four["rows"], one["rows"], rtol=1e-5)
    assert four["answers"] == one["answers"]
