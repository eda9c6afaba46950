"""The value tables against independent derivations of them."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy.stats import norm

from qlora_jax.quant import BLOCK_SIZES, DATA_TYPES, Quantization, code_bits, codebook, dynamic_map
from qlora_jax.quant.codebooks import borders

NORMAL_FLOATS: dict[Any, int] = {"nf4": 4, "nf3": 3, "nf2": 2}
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def test_nf4_is_the_published_table() -> None:
    """To the last bit, though it is made from quantiles."""
    np.testing.assert_array_equal(codebook("nf4"), np.asarray(NF4, np.float32))


@pytest.mark.parametrize(("data_type", "bits", "end"), [("nf4", 4, 0.9677083), ("nf3", 3, 0.9330357), ("nf2", 2, 0.8541667)])
def test_normal_floats_are_quantiles_of_the_normal_distribution(data_type: Any, bits: int, end: float) -> None:
    """Half of the values positive, one less negative, evenly spaced in probability; zero; over the largest. The outermost
    probability lies half a step from 1, in the mean of both sides' steps."""
    half = 2 ** (bits - 1)
    assert end == pytest.approx(1 - np.mean([1 / (4 * half), 1 / (4 * half - 2)]), abs=1e-7)
    positive = norm.ppf(np.linspace(end, 0.5, half + 1)[:-1])
    negative = -norm.ppf(np.linspace(end, 0.5, half)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]])) / positive.max()
    np.testing.assert_allclose(codebook(data_type)[: 2 * half], values, rtol=0, atol=2e-7)
    assert (code_bits(data_type), np.unique(codebook(data_type)).size) == (bits, 2**bits)


def test_normal_floats_meet_normal_weights_more_closely_the_more_bits_they_have() -> None:
    """With the outermost quantile of four bits, three would meet them less closely, and two about as well."""
    w = np.random.default_rng(0).standard_normal((4000, 64))
    scaled = w / np.abs(w).max(1, keepdims=True)

    def error(values: np.ndarray) -> float:
        nearest = np.abs(scaled[..., None] - values).min(-1) * np.abs(w).max(1, keepdims=True)
        return float(np.sqrt((nearest**2).mean()))

    found = {bits: error(np.unique(codebook(name)).astype(np.float64)) for name, bits in NORMAL_FLOATS.items()}
    assert found[4] < 0.6 * found[3] < 0.36 * found[2]
    of_four_bits = {}
    for bits in (2, 3):
        half = 2 ** (bits - 1)
        sides = [sign * norm.ppf(np.linspace(0.9677083, 0.5, half + 2 - n)[:-1]) for n, sign in ((1, 1), (2, -1))]
        of_four_bits[bits] = error(np.concatenate([*sides, [0.0]]) / norm.ppf(0.9677083))
    assert of_four_bits[3] > 1.01 * found[3]
    assert of_four_bits[2] == pytest.approx(found[2], rel=0.01)


def test_fp4_values_are_those_of_its_bits() -> None:
    """Sign, two bits of exponent, one of mantissa; the two subnormals are 0 and 1/16, and 12 is the
    largest."""
    for code, value in enumerate(codebook("fp4")):
        exponent, mantissa = (code >> 1) & 3, code & 1
        # bitsandbytes' exponents 0, 1, 2, 3 stand for a subnormal, 8, 4 and 2.
        magnitude = 0.0625 * mantissa if exponent == 0 else {1: 8.0, 2: 4.0, 3: 2.0}[exponent] * (1 + mantissa / 2)
        assert value == np.float32((-1 if code & 8 else 1) * magnitude) / np.float32(12)


def test_ocp_fp4_is_that_of_bitsandbytes_but_for_its_smallest_value() -> None:
    """Sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    for code, value in enumerate(codebook("fp4-e2m1")):
        exponent, mantissa = (code >> 1) & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
        assert value == np.float32((-1 if code & 8 else 1) * magnitude) / np.float32(6)
    magnitudes = [np.unique(np.abs(codebook(name))) for name in ("fp4", "fp4-e2m1")]
    np.testing.assert_array_equal(np.delete(magnitudes[0], 1), np.delete(magnitudes[1], 1))
    assert (magnitudes[0][1], magnitudes[1][1]) == (np.float32(1 / 192), np.float32(1 / 12))


def test_ocp_fp4_is_that_of_ml_dtypes() -> None:
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(codebook("fp4-e2m1"), codes.astype(np.float32) / np.float32(6))


def test_fp4_of_three_bits_of_exponent_has_powers_of_two() -> None:
    values = [0.0, *(2.0 ** (exponent - 7) for exponent in range(1, 8))]
    np.testing.assert_array_equal(codebook("fp4-e3m0"), [*values, *(-value for value in values)])


def test_int4_is_symmetric_and_even() -> None:
    np.testing.assert_array_equal(codebook("int4")[:15], np.arange(-7, 8, dtype=np.float32) / np.float32(7))
    assert 15 not in borders("int4")[1][:15]


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_tables_cover_the_range_and_cannot_be_written(data_type: str) -> None:
    values = codebook(data_type)
    assert (values.min(), values.max()) == (-1, 1)
    assert 0 in values
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 3
    edges, codes = borders(data_type)
    assert np.all(np.diff(edges) >= 0)
    assert np.all(np.diff(values[codes]) >= 0)


def test_dynamic_map_is_its_closed_form() -> None:
    values = dynamic_map()
    assert values.dtype == np.float32
    assert (len(values), values[127], values[255]) == (256, 0, 1)
    assert values[0] == pytest.approx(-0.99296874, abs=1e-7)
    np.testing.assert_array_equal(values[:127], -values[128:255][::-1])
    for code, value in enumerate(values):
        number = code - 127
        magnitude = abs(number)
        if magnitude in (0, 128):
            assert value == number / 128
            continue
        exponent = magnitude.bit_length() - 1
        expected = (0.1 + 0.9 * (magnitude - 2**exponent + 0.5) / 2**exponent) * 10.0 ** (exponent - 6)
        assert abs(value - np.sign(number) * expected) < 2e-7


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    np.testing.assert_array_equal(dynamic_map(), functional.create_dynamic_map(signed=True).numpy())


@pytest.mark.parametrize("data_type", ["nf4", "fp4"])
def test_codebooks_are_those_of_bitsandbytes(data_type: str) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    np.testing.assert_array_equal(codebook(data_type), functional.get_4bit_type(data_type, device="cpu").numpy())


def test_fp4_of_three_bits_of_exponent_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    theirs = functional.create_fp8_map(signed=True, exponent_bits=3, precision_bits=0, total_bits=4).numpy()
    np.testing.assert_array_equal(np.unique(codebook("fp4-e3m0")), np.unique(theirs))


def test_unknown_choices_name_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown data type 'nf5'; expected one of nf4, fp4, int4, fp4-e2m1, fp4-e3m0, nf3, nf2"
    ):
        codebook("nf5")
    with pytest.raises(ValueError, match="unknown data type 'nf5'"):
        Quantization("nf5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown block size 48; expected one of 32, 64"):
        Quantization(block_size=48)
    assert Quantization().block_size in BLOCK_SIZES
