"""The forms in which new tokens are written into the cache of keys and values; one CPU second."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models import kv_cache

LAYERS, ROWS, HEADS, CAPACITY, SIZE = 2, 3, 2, 8, 4
FORMS = (kv_cache._write_rows, kv_cache._write_row_by_row, kv_cache._write_tokens)


@pytest.mark.parametrize(("form", "count"), [(form, 1) for form in FORMS] + [(form, 3) for form in FORMS[:2]])
def test_every_form_writes_the_same(form: Callable[..., jax.Array], count: int) -> None:
    """Each platform has its own form, and several GPUs have another than one."""
    generator = np.random.default_rng(0)
    past = generator.normal(size=(LAYERS, ROWS, HEADS, CAPACITY, SIZE)).astype(np.float32)
    new = generator.normal(size=(ROWS, HEADS, count, SIZE)).astype(np.float32)
    first, layer = np.asarray([0, 5, 3], np.int32), 1
    expected = past.copy()
    for row in range(ROWS):
        for token in range(count):
            expected[layer, row, :, first[row] + token] = new[row, :, token]
    found = jax.jit(form)(past, new, jnp.int32(layer), first, jnp.arange(ROWS))
    np.testing.assert_array_equal(found, expected)
