"""Every linear weight of a real model: our codes and values against bitsandbytes' CPU path, bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.quant import dequantize, quantize
from qlora_jax.quant.tensor import unpack

torch = pytest.importorskip("torch", reason="the peers (torch, bitsandbytes) are not installed")
functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


@pytest.mark.optimised
@pytest.mark.parametrize("layers", [[0], pytest.param([9, 19, 29], marks=pytest.mark.integration)])
def test_every_linear_weight(layers: list[int]) -> None:
    try:
        checkpoint = open_checkpoint(str(fetch_default_model()))
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")
    every = [name for name in checkpoint.shapes if "_proj" in name]
    assert len(every) == 210
    names = [name for name in every if int(name.split(".")[2]) in layers]
    assert len(names) == 7 * len(layers)
    counts = {"nf4": np.zeros(2, int), "fp4": np.zeros(2, int)}  # of scales: that differ, all
    for name in names:
        # As 16-bit checkpoints hold it: bitsandbytes' mean of the scales is exact on such values.
        w = np.array(jnp.asarray(checkpoint.read(name), jnp.bfloat16).astype(jnp.float32))
        for data_type, count in counts.items():
            count += compare(w, data_type, name)
    assert all(different < scales / 10_000 for different, scales in counts.values()), counts


def compare(w: np.ndarray, data_type: str, name: str) -> tuple[int, int]:
    """All is the same but ties in the rounding of a scale; how many scales differ by one, of how many."""
    packed, state = functional.quantize_4bit(
        torch.from_numpy(w), blocksize=64, quant_type=data_type, compress_statistics=True
    )
    q = quantize(jnp.asarray(w).T, data_type)
    theirs = packed.numpy().reshape(-1)
    theirs = np.stack([theirs >> 4, theirs & 15], 1).reshape(w.shape)
    where = f"{name}, {data_type}"
    np.testing.assert_array_equal(np.asarray(unpack(q)).T, theirs, err_msg=where)
    np.testing.assert_array_equal(q.scale_offset, state.offset.numpy(), err_msg=where)
    np.testing.assert_array_equal(q.scale_absmax, state.state2.absmax.numpy(), err_msg=where)
    ties = np.asarray(q.scales).T.reshape(-1) != state.absmax.numpy()
    values = functional.dequantize_4bit(packed, state).numpy()
    tied = np.repeat(ties, 64).reshape(w.shape)
    np.testing.assert_array_equal(np.asarray(dequantize(q)).T[~tied], values[~tied], err_msg=where)
    return int(ties.sum()), ties.size
