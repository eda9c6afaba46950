"""The text of a mesh, and its errors."""

import jax
import pytest

from qlora_jax.errors import OptionError
from qlora_jax.nn import MeshShape, shape_on
from qlora_jax.nn.mesh import check_axes


def test_a_text_names_sizes() -> None:
    shape = MeshShape.parse("tensor=4, data=2")
    assert shape == MeshShape(data=2, fsdp=1, tensor=4)
    assert (shape.size, shape.row_shards, shape.weight_shards, str(shape)) == (8, 2, 4, "data=2,fsdp=1,tensor=4")
    assert MeshShape.parse(str(shape)) == shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2,model=4", "expected axes among data, fsdp, tensor, found 'model'"),
        ("", "found ''"),
        ("data=2,data=4", "expected each axis once, found data twice"),
        ("tensor", "expected tensor=N with a whole number N above 0, found 'tensor'"),
        ("tensor=0", "found 'tensor=0'"),
        ("tensor=-2", "found 'tensor=-2'"),
        ("tensor=²", "found 'tensor=²'"),
    ],
)
def test_what_is_not_a_mesh(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        MeshShape.parse(text)


def test_the_product_is_the_number_of_devices() -> None:
    assert shape_on(None, 8) == MeshShape(fsdp=8)
    assert shape_on(MeshShape(2, 2, 2), 8) == MeshShape(2, 2, 2)
    with pytest.raises(OptionError, match="tensor=2: expected as many devices as there are, 8, found 2 x 1 x 2 = 4"):
        shape_on(MeshShape(data=2, tensor=2), 8)


def test_other_axes_are_an_error() -> None:
    mesh = jax.make_mesh((1,), ("batch",))
    with pytest.raises(OptionError, match=r"expected the axes data, fsdp, tensor \(as nn.data_mesh has\), found batch"):
        check_axes(mesh)
