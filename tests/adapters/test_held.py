"""Files of adapters as other programs write them: names of tensors, adapter_model.bin without running it, folders within."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.files import read_adapter, write_adapter
from qlora_jax.adapters.held import our_name
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.hub import HUB_ID
from qlora_jax.errors import CheckpointError
from qlora_jax.peft import LoRA, module_matches

Q = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS, CONFIG, BIN = "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin"


@pytest.mark.parametrize(
    "stored",
    [
        f"{Q}.lora_A.weight",
        f"{Q}.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.my-name.weight",
        "base_model.model.module.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight",
        "_fsdp_wrapped_module.base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_names_of_other_programs(stored: str) -> None:
    assert our_name(stored) == f"{Q}.lora_A.weight"


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (f"{Q}.lora_magnitude_vector.default.weight", f"{Q}.lora_magnitude_vector"),
        (f"{Q}.base_layer.bias", f"{Q}.bias"),
        (f"{Q}.lora_B.default.bias", f"{Q}.lora_B.bias"),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A.default",
            "base_model.model.model.embed_tokens.lora_embedding_A",
        ),
        ("base_model.model.language_model.lm_head.lora_A.weight", "base_model.model.lm_head.lora_A.weight"),
        (
            "base_model.model.model.embed_tokens.token_adapter.base_layer.weight",
            "base_model.model.model.embed_tokens.token_adapter.base_layer.weight",
        ),
        ("prompt_embeddings", "prompt_embeddings"),
        ("base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight", None),
        ("base_model.model.visual.blocks.0.attn.qkv.lora_A.weight", None),
    ],
)
def test_names_of_other_parts(stored: str, expected: str | None) -> None:
    assert our_name(stored) == expected


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    shapes = {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4)}
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.{suffix}": draws.standard_normal(shape, np.float32)
        for layer in range(2)
        for suffix, shape in shapes.items()
    }
    return write_adapter(tensors, tmp_path / "adapter", method=LoRA(rank=4, alpha=8, target_modules=("q_proj",)))


def rewrite(folder: Path, names: dict[str, str], **fields: object) -> None:
    tensors = load_file(folder / WEIGHTS)
    for old, new in names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def test_targets_of_a_larger_model_select_its_text_part(saved: Path) -> None:
    expected = read_adapter(saved)
    regex = r"model\.language_model\.layers\.\d+\..*q_proj"
    alphas = {r"^model.language_model.layers.1.self_attn.q_proj": 3}
    rewrite(saved, {"model.model.layers": "model.model.language_model.layers"}, target_modules=regex, alpha_pattern=alphas)
    found = read_adapter(saved)
    assert found.tensors.keys() == expected.tensors.keys()
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    method = found.method
    assert isinstance(method, LoRA)
    assert [module_matches(method, name) for name in (*modules, "model.layers.0.mlp.up_proj")] == [True, True, False]
    assert [method.scaling_of(name) for name in modules] == [2, 0.75]


def test_targets_that_are_left_out_are_those_of_the_tensors(saved: Path) -> None:
    rewrite(saved, {}, target_modules=None)
    assert read_adapter_method(saved).target_modules == tuple(  # type: ignore[attr-defined]
        f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["c_attn", "c_proj"]},
        {"target_modules": r".*\.h\.\d+\.attn"},
        {"layers_to_transform": [9]},
        {"exclude_modules": ["q_proj"]},
        {"target_modules": ["nothing"], "exclude_modules": ".*"},
    ],
)
def test_targets_that_select_nothing_are_those_of_the_tensors(
    saved: Path, fields: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(saved, {}, **fields)
    method = read_adapter(saved).method
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    assert isinstance(method, LoRA)
    assert method.target_modules == tuple(modules)
    assert all(module_matches(method, name) for name in modules)
    assert "selects none of the modules with tensors: taken for an adapter of these 2, such as model.layers.0" in caplog.text


def test_targets_that_select_some_are_as_they_are(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(saved, {}, layers_to_transform=[0])
    assert read_adapter(saved).method.layers_to_transform == (0,)  # type: ignore[attr-defined]
    assert not caplog.text


def test_towers_are_left_out_and_said(saved: Path) -> None:
    rewrite(saved, {"model.model.layers.1": "model.model.vision_tower.layers.1"})
    with pytest.warns(UserWarning, match=r"2 tensors of parts that are no language model are left out: .*vision_tower"):
        assert len(read_adapter(saved).tensors) == 2


def test_one_name_twice_is_an_error(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    save_file(tensors | {f"{Q}.lora_A.default.weight": tensors[f"{Q}.lora_A.weight"]}, saved / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds .*q_proj\.lora_A\.weight twice"):
        read_adapter(saved)


def test_folders_within_are_named(saved: Path) -> None:
    shutil.copytree(saved, saved.parent / "all" / "checkpoint-7")
    with pytest.raises(CheckpointError, match="Its folders checkpoint-7 hold adapters: give one of them"):
        read_adapter(saved.parent / "all")
    assert HUB_ID.fullmatch("owner/name:checkpoint-7/inner")
    assert not HUB_ID.fullmatch("runs/some/adapter")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pickled_tensors_are_those_of_torch(saved: Path, dtype: str) -> None:
    """Also views: transposed, and two of one storage."""
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    kind = getattr(torch, dtype)
    tensors = {name: torch.from_numpy(tensor).to(kind) for name, tensor in load_file(saved / WEIGHTS).items()}
    name = f"{Q}.lora_A.weight"
    tensors[name] = torch.nn.Parameter(torch.randn(8, 6, dtype=kind)[:, 1:5].T)
    torch.save(tensors, saved / BIN)
    (saved / WEIGHTS).unlink()
    found = read_adapter(saved).tensors
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(found[key].astype(np.float32), tensor.detach().float().numpy())
        assert str(found[key].dtype) == dtype


class Evil:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def write_archive(path: Path, text: bytes, **entries: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text)
        for name, data in entries.items():
            archive.writestr(f"archive/data/{name}", data)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_is_not_run(saved: Path, tmp_path: Path, protocol: int) -> None:
    (saved / WEIGHTS).unlink()
    write_archive(saved / BIN, pickle.dumps({"x": Evil(tmp_path / "evil")}, protocol))
    with pytest.raises(CheckpointError, match=r"bin is damaged: (refers to (posix|nt)\.mkdir|expected a pickle)"):
        read_adapter(saved)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is damaged"),
        (b"\x80\x02}q\xff.", "is damaged"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "as many remembered values"),
        (pickle.dumps({"x": 1}, 2), "expected tensors, found other values: x"),
        (pickle.dumps([1], 2), "expected tensors by name, found list"),
        (b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_numpy\n.", "which is no part of a tensor and is not run"),
    ],
)
def test_damaged_pickles(saved: Path, text: bytes, message: str) -> None:
    (saved / WEIGHTS).unlink()
    write_archive(saved / BIN, text)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(saved)


def test_a_view_beyond_its_storage(saved: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    torch.save({f"{Q}.lora_A.weight": torch.zeros(4, 8)}, saved / BIN)
    (saved / WEIGHTS).unlink()
    with zipfile.ZipFile(saved / BIN) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    write_archive(saved / BIN, text, **{"0": b"\0" * 64})
    with pytest.raises(CheckpointError, match="expected a storage of 32 values or more, found 16"):
        read_adapter(saved)
