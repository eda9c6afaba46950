"""Adapters in PEFT's format: to PEFT and back over the same base, and everything that can be wrong with a
folder."""

import errno
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from qlora_jax.adapters.bind import adapter_tensors, load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter, write_adapter
from qlora_jax.adapters.metadata import AdapterMetadata, read_adapter_metadata
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.models import CausalLM, linear_modules
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA, module_matches

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TOLERANCE = 1e-3  # on logits whose standard deviation is about 8
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

# PEFT calls a property of transformers that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def tiny(lora: LoRA | None = None, **config: Any) -> CausalLM:
    """An abstract model: slots, but no values."""
    return nnx.eval_shape(lambda: CausalLM(llama_config(TINY | config), method=lora, rngs=nnx.Rngs(0)))


def with_random_adapter(model: CausalLM, scale: float = 0.1) -> CausalLM:
    graph, adapter, frozen = nnx.split(model, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [scale * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved), frozen)


@partial(jax.jit, static_argnums=0)
def forward(graph: Any, state: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(tokens)


def run(model: CausalLM, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(forward(*nnx.split(model), tokens))


def largest(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def random_tokens(length: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, length), np.int32)


class Peer:
    """A random transformers model in a folder, for PEFT to put adapters on."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
        self.peft = pytest.importorskip("peft", reason="PEFT, to compare with, is not installed")
        self.transformers = pytest.importorskip("transformers")
        self.folder = folder
        self.torch.manual_seed(0)
        model = self.transformers.LlamaForCausalLM(self.transformers.LlamaConfig(**(TINY | config)))
        with self.torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2:
                    scale = 1.0 if "embed" in name or "lm_head" in name else parameter.shape[1] ** -0.5
                    parameter.normal_(0.0, scale)
                else:
                    parameter.add_(0.2 * self.torch.randn(parameter.shape))
        model.save_pretrained(folder)

    def base(self) -> Any:
        return self.transformers.LlamaForCausalLM.from_pretrained(self.folder, dtype=self.torch.float32).eval()

    def ours(self, lora: LoRA | None) -> CausalLM:
        checkpoint = open_checkpoint(str(self.folder))
        return load_model(checkpoint, quantization=None, method=lora, dtype=jnp.float32, progress=False)

    def logits(self, model: Any, tokens: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return model.eval()(self.torch.from_numpy(tokens).long()).logits.numpy()

    def random_adapter(self, folder: Path, **fields: Any) -> Any:
        """PEFT's model with an adapter of random A and B, which it saves."""
        config = self.peft.LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | fields))
        model = self.peft.get_peft_model(self.base(), config)
        with self.torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0.0, 0.1)
        model.save_pretrained(folder)
        return model


@pytest.fixture
def make_peer(tmp_path: Path) -> Callable[..., Peer]:
    return lambda **config: Peer(tmp_path / "peer", **config)


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        ({}, LoRA(rank=4, alpha=6)),
        ({"tie_word_embeddings": True}, LoRA(rank=4, use_rslora=True, target_modules=("q_proj", "v_proj"))),
        ({"attention_bias": True, "mlp_bias": True}, LoRA(rank=2, target_modules=r".*\.mlp\.(up|down)_proj")),
        ({}, LoRA(rank=3, alpha=2.5, target_modules=("self_attn.k_proj",))),
    ],
    ids=["all-linear", "tied-rslora-list", "biases-regex", "suffix"],
)
def test_peft_computes_the_same_with_an_adapter_from_here(
    make_peer: Callable[..., Peer], tmp_path: Path, config: dict[str, Any], lora: LoRA
) -> None:
    peer, tokens = make_peer(**config), random_tokens()
    model = with_random_adapter(peer.ours(lora))
    save_adapter(model, tmp_path / "adapter", base_model_name_or_path=str(peer.folder))
    theirs = peer.peft.PeftModel.from_pretrained(peer.base(), tmp_path / "adapter")
    expected = peer.logits(theirs, tokens)
    assert largest(expected, peer.logits(peer.base(), tokens)) > 100 * TOLERANCE, "the adapter has to be seen"
    assert largest(run(model, tokens), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {"target_modules": "all-linear"}),
        ({"tie_word_embeddings": True}, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ({"attention_bias": True}, {"target_modules": r"model\.layers\.\d+\.(self_attn\.o|mlp\.gate)_proj"}),
    ],
    ids=["all-linear", "tied-rslora-list", "biases-regex"],
)
def test_an_adapter_from_peft_computes_the_same_here(
    make_peer: Callable[..., Peer], tmp_path: Path, config: dict[str, Any], fields: dict[str, Any]
) -> None:
    peer, tokens = make_peer(**config), random_tokens()
    expected = peer.logits(peer.random_adapter(tmp_path / "adapter", **fields), tokens)
    empty = peer.ours(read_adapter_method(tmp_path / "adapter"))
    before = run(empty, tokens)
    model = load_adapter(empty, tmp_path / "adapter")
    assert largest(run(model, tokens), expected) < TOLERANCE
    np.testing.assert_array_equal(run(empty, tokens), before, "the model that was given must not change")
    assert largest(before, expected) > 100 * TOLERANCE


def test_the_files_equal_those_that_peft_writes(make_peer: Callable[..., Peer], tmp_path: Path) -> None:
    """The tensors bit for bit after a round trip; the configuration but for fields that only new versions of
    PEFT have."""
    peer = make_peer()
    peer.random_adapter(tmp_path / "theirs", target_modules="all-linear", lora_dropout=0.05)
    adapter = read_adapter(tmp_path / "theirs")
    model = load_adapter(peer.ours(adapter.method), adapter)
    save_adapter(model, tmp_path / "ours", base_model_name_or_path=adapter.base)

    theirs, ours = (safetensors.numpy.load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
        assert ours[name].dtype == theirs[name].dtype
    theirs, ours = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours"))
    assert ours["target_modules"] == sorted(theirs["target_modules"])
    defaults = json.loads(json.dumps(peer.peft.LoraConfig(task_type="CAUSAL_LM", r=1).to_dict(), default=str))
    for name in theirs.keys() - {"target_modules", "peft_version", "inference_mode"}:
        assert ours.get(name, defaults[name]) == theirs[name], name
    assert ours["inference_mode"] is True


@pytest.mark.integration
def test_real_model_with_an_adapter_from_here_in_peft(tmp_path: Path) -> None:
    """SmolLM2-135M, r 8 on all linear layers, over the base that `merge` exports."""
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    peft = pytest.importorskip("peft", reason="PEFT, to compare with, is not installed")
    transformers = pytest.importorskip("transformers")
    checkpoint = open_checkpoint(str(fetch_default_model()))
    merge(checkpoint, None, tmp_path / "base", dtype="float32", progress=False)
    lora = LoRA(rank=8)
    fresh = load_model(checkpoint, quantization=None, method=lora, dtype=jnp.float32, progress=False)
    model = with_random_adapter(fresh, scale=0.01)
    save_adapter(model, tmp_path / "adapter")

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 49152, (1, 24), np.int32)
    with torch.no_grad():
        before = base.eval()(torch.from_numpy(tokens).long()).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    found = run(model, tokens)
    assert largest(before, expected) > 1
    assert largest(found, expected) < TOLERANCE


TARGETS: list[Any] = [
    ["q_proj", "v_proj"],
    ["proj"],
    ["self_attn.q_proj"],
    ["model.layers.1.mlp.up_proj"],
    ["layers.11.mlp.up_proj", "k_proj"],
    [".q_proj", "q_pro"],
    "all-linear",
    r".*\.(q|k)_proj",
    r".*q_proj|.*mlp.*_proj",
    "q_proj",
    r"model\.layers\.1\..*_proj",
    r"model\.layers\.\d\.self_attn\.q_proj",
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_select_what_peft_selects(targets: Any) -> None:
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    peft = pytest.importorskip("peft", reason="PEFT, to compare with, is not installed")
    transformers = pytest.importorskip("transformers")
    layers = 12
    config = transformers.LlamaConfig(**(TINY | {"num_hidden_layers": layers}))
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    names = linear_modules(llama_config(config.to_dict()).parameter_mappings)
    described = LoRA(target_modules=targets if isinstance(targets, str) else tuple(targets))
    ours = {name for stacked in names.values() for name in stacked if module_matches(described, name)}
    lora = peft.LoraConfig(target_modules=targets, r=2, task_type="CAUSAL_LM")
    try:
        adapted = peft.get_peft_model(model, lora)
    except ValueError as error:
        if ours or "not found" not in str(error):
            raise
        return  # neither finds anything
    theirs = {name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert ours == theirs


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lora = LoRA(rank=4, alpha=16, target_modules=("q_proj", "down_proj"))
    return save_adapter(with_random_adapter(tiny(lora)), tmp_path / "saved")


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_files_of_other_float_types_are_read(saved: Path, dtype: Any) -> None:
    expected = read_adapter(saved).tensors[Q_A].astype(dtype).astype(np.float32)
    change_tensors(saved, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    model = load_adapter(tiny(read_adapter_method(saved)), saved)
    slot = model.layers.self_attn.q_proj.adapter.lora_a[...]
    assert slot.dtype == jnp.float32
    np.testing.assert_array_equal(slot[0].T, expected)


def test_names_shapes_and_orientation(saved: Path) -> None:
    tensors = read_adapter(saved).tensors
    assert len(tensors) == 2 * 2 * 2
    shapes = {
        name: tensors[f"base_model.model.model.layers.1.{name}.weight"].shape
        for name in (
            "self_attn.q_proj.lora_A",
            "self_attn.q_proj.lora_B",
            "mlp.down_proj.lora_A",
            "mlp.down_proj.lora_B",
        )
    }
    assert list(shapes.values()) == [(4, 64), (64, 4), (4, 96), (64, 4)]


def test_the_tensors_of_a_model(saved: Path) -> None:
    lora = read_adapter_method(saved)
    model = load_adapter(tiny(lora), saved)
    np.testing.assert_array_equal(adapter_tensors(model)[Q_A], read_adapter(saved).tensors[Q_A])
    with pytest.raises(ValueError, match="found none: was it made with method=None"):
        adapter_tensors(tiny())


def test_missing_extra_and_misshapen_tensors_come_in_one_message(saved: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors[Q_A]
        tensors[Q_A.replace("q_proj", "k_proj")] = np.zeros((4, 64), np.float32)
        tensors[Q_A.replace("lora_A", "lora_B")] = np.zeros((65, 4), np.float32)

    change_tensors(saved, change)
    base = "/models" + "/a-long-name" * 10  # a path is shown as a whole
    change_config(saved, base_model_name_or_path=base)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(tiny(read_adapter_method(saved)), saved)
    for part in (
        "does not fit this model",
        f"names the base {base!r}",
        "3 problems",
        f"lacks (1): {Q_A}",
        f"no place for (1): {Q_A.replace('q_proj', 'k_proj')}",
        f"{Q_A.replace('lora_A', 'lora_B')}: expected [64, 4], found [65, 4]",
    ):
        assert part in str(caught.value)


def test_an_adapter_of_a_larger_base_does_not_fit(saved: Path) -> None:
    lora = read_adapter_method(saved)
    with pytest.raises(CheckpointError, match=r"expected \[4, 80\], found \[4, 64\]"):
        load_adapter(tiny(lora, hidden_size=80), saved)
    with pytest.raises(CheckpointError, match=r"lacks \(4\): .*layers\.2\."):
        load_adapter(tiny(lora, num_hidden_layers=3), saved)


def test_a_long_list_of_names_is_cut(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks \(20\): .* and 12 more"):
        load_adapter(tiny(LoRA(rank=4)), saved)


def test_a_model_with_another_scaling_is_refused(saved: Path) -> None:
    other = LoRA(rank=4, alpha=32, target_modules=("q_proj", "down_proj"))
    with pytest.raises(CheckpointError, match=r"scaling is 4 at \S+q_proj \(alpha 16, r 4, rsLoRA off\), found 8"):
        load_adapter(tiny(other), saved)
    with pytest.raises(CheckpointError, match="the model has no adapter"):
        load_adapter(tiny(), saved)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(saved: Path, tmp_path: Path, value: float) -> None:
    tensors = dict(read_adapter(saved).tensors)
    tensors[Q_A] = np.full_like(tensors[Q_A], value)
    with pytest.raises(CheckpointError, match=rf"adapter not saved: .*infinite values \(1\): {Q_A}"):
        write_adapter(tensors, tmp_path / "new", method=read_adapter_method(saved))
    assert not (tmp_path / "new").exists()
    change_tensors(saved, lambda all_: all_.update(tensors))
    with pytest.raises(CheckpointError, match=rf"NaN or infinite values \(1\): {Q_A}"):
        read_adapter(saved)


UNSUPPORTED: dict[str, Any] = {
    "init_lora_weights": "corda",
    "target_parameters": ["experts"],
    "alora_invocation_tokens": [3],
    "use_something_new": True,
}


def test_every_field_that_would_change_the_mathematics_is_named(saved: Path) -> None:
    change_config(saved, **UNSUPPORTED)
    with pytest.raises(CheckpointError) as caught:
        read_adapter_method(saved)
    assert f"{len(UNSUPPORTED)} problems" in str(caught.value)
    for name in UNSUPPORTED:
        assert f"{name} = " in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type: expected one of LORA"),
        ({"peft_type": "LOHA", "lora_alpha": None, "init_weights": True}, "PREFIX_TUNING, found 'LOHA'."),
        ({"lora_alpha": 1e308}, "LoRA alpha: expected a number above 0, at most 1e+06, found 1e+308"),
        ({"alpha_pattern": {"q_proj": 1e9}}, "LoRA alpha_pattern 'q_proj': expected a number above 0, at most 1e+06"),
        ({"r": "8"}, "r: expected a whole number, found '8'"),
        ({"r": 0}, "LoRA rank: expected at least 1, found 0"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, found None"),
        ({"target_modules": 3}, "target_modules: expected names or one regular expression, found 3"),
        ({"target_modules": "([a-z_.0-9]+)+!"}, "expected a regular expression whose match ends"),
        ({"bias": "some"}, "bias: expected one of none, lora_only, all, found 'some'"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias: expected none beside use_dora"),
        ({"layer_replication": [[0, 2.0]]}, "layer_replication: expected pairs of layers"),
        ({"layer_replication": [[2, 1]]}, "layer_replication: expected pairs 0 <= start < end"),
        ({"target_modules": []}, "LoRA target_modules"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false"),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern: expected whole numbers by pattern, found {'q_proj': '8'}"),
        ({"alpha_pattern": [8]}, "alpha_pattern: expected numbers by pattern, found [8]"),
        ({"layers_to_transform": "1"}, "layers_to_transform: expected numbers of layers, found '1'"),
        ({"exclude_modules": 3}, "exclude_modules: expected names or one regular expression, found 3"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: expected names of modules, found 'lm_head'"),
        ({"trainable_token_indices": {"lm_head": 3}}, "trainable_token_indices: expected token ids, or token ids by name"),
    ],
    ids=str,
)
def test_fields_of_a_wrong_kind(saved: Path, fields: dict[str, Any], message: str) -> None:
    change_config(saved, **fields)
    with pytest.raises(CheckpointError) as caught:
        read_adapter_method(saved)
    assert message in str(caught.value)


def test_fields_without_consequence_are_tolerated(saved: Path) -> None:
    expected = read_adapter_method(saved)
    change_config(
        saved,
        revision="main",
        peft_version="99",
        some_new_switch=False,
        some_new_size=16,
        some_new_list=[],
        init_lora_weights=False,
        loftq_config={"loftq_bits": 4},
        modules_to_save=[],
        layers_to_transform=None,
    )
    assert read_adapter_method(saved) == expected
    (saved / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": "All-Linear"}')
    assert read_adapter_method(saved) == LoRA(rank=4, alpha=16)


def test_folders_that_hold_no_adapter(saved: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"is no adapter: it has no adapter_config\.json"):
        read_adapter_method(empty)
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: expected an archive as torch\.save writes it"):
        read_adapter(saved)
    with pytest.raises(CheckpointError, match="Its folders saved hold adapters: give one of them"):
        read_adapter(saved.parent)
    (saved / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
        read_adapter(saved)
    safetensors.numpy.save_file({}, saved / WEIGHTS)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_adapter(saved)
    (saved / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, found a list"):
        read_adapter(saved)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def another(saved: Path) -> dict[str, np.ndarray]:
    return {name: tensor + 1 for name, tensor in read_adapter(saved).tensors.items()}


@pytest.mark.parametrize("failure", ["full disk", "written as zeros", "cut off", "nothing written"])
def test_what_does_not_reach_the_disk_is_an_error_and_keeps_the_old_adapter(
    saved: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    whole = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if failure == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if failure == "written as zeros":  # the header is right, the data is not
            content = content[:-256] + bytes(256)
        elif failure == "cut off":
            content = content[: len(content) // 2]
        else:
            content = safetensors.numpy.save({})
        return whole(path, content)

    before, tensors = contents(saved), another(saved)
    monkeypatch.setattr(Path, "write_bytes", write)
    with pytest.raises(CheckpointError, match=r"not saved: (No space left|what was written)"):
        write_adapter(tensors, saved, method=read_adapter_method(saved))
    assert contents(saved) == before
    with pytest.raises(CheckpointError, match="not saved"):
        write_adapter(tensors, saved / "new", method=read_adapter_method(saved))
    assert contents(saved) == before, "nothing is left"


def test_the_record_says_how_the_base_is_stored(saved: Path, tmp_path: Path) -> None:
    """The model knows it; other files of the adapter are written before the folder has its name."""
    model = with_random_adapter(tiny(LoRA(rank=4)))
    folder = save_adapter(model, tmp_path / "new", beside=[lambda new: (new / "README.md").write_text(new.name)])
    assert read_adapter_metadata(folder) == AdapterMetadata(model.quantization, None, model.embedding_storage)
    assert contents(folder).keys() == {CONFIG, WEIGHTS, "qlora_jax.json", "README.md"}
    with pytest.raises(CheckpointError, match="not saved: No space left"):
        save_adapter(model, tmp_path / "more", beside=[full_disk])
    assert not (tmp_path / "more").exists()


def full_disk(folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_adapter_replaces_another(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    lora, tensors = read_adapter_method(saved), another(saved)
    write_adapter(tensors, saved, method=LoRA(rank=4, alpha=1, target_modules=lora.target_modules))
    assert contents(saved).keys() == {CONFIG, WEIGHTS, "README.md"}
    assert read_adapter(saved).method.alpha == 1
    np.testing.assert_array_equal(read_adapter(saved).tensors[Q_A], tensors[Q_A])


def test_new_weights_are_never_paired_with_an_old_configuration(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files of other origin are beside the adapter, so that it is replaced file by file."""
    (saved / "notes.txt").write_text("mine")
    rename, lora, tensors = os.rename, read_adapter_method(saved), another(saved)

    def fail_for_config(source: Path, target: Path) -> None:
        if Path(target).name == CONFIG:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_config)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_adapter(tensors, saved, method=LoRA(rank=4, alpha=1, target_modules=lora.target_modules))
    with pytest.raises(CheckpointError, match="is no adapter"):
        read_adapter(saved)


def test_tensors_of_another_rank_are_not_saved(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected r = 8"):
        write_adapter(read_adapter(saved).tensors, tmp_path / "new", method=LoRA(rank=8))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        write_adapter({}, tmp_path / "new", method=LoRA(rank=8))
