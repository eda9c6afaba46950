"""Ranks, scalings and layers that differ within a stack, against PEFT in both directions, on three families."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from peft_peer import Peer, largest, randomised, run
from tiers import tiered

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.models import FAMILIES, families_with, family_of, linear_modules
from qlora_jax.peft import LoRA, module_matches

TOLERANCE = 1e-4  # on logits whose standard deviation is about 3
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT calls a property of transformers that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Patterns that overlap stand in the order of the alphabet, in which PEFT writes them.
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # (family, fields of PEFT's LoraConfig)
    "patterns": (
        "llama",
        {
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7, r"layers\.2\.mlp\..*": 5, "q_proj": 2},
            "alpha_pattern": {r"layers\.0\..*": 11, "o_proj": 3, "v_proj": 2.5},
        },
    ),
    "patterns-rslora": (
        "llama",
        {"use_rslora": True, "rank_pattern": {r"^model\.layers\.2\.mlp\.up_proj": 9}, "alpha_pattern": {"k_proj": 1}},
    ),
    "layers": ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    "one-layer-of-a-list": (
        "llama",
        {"target_modules": ["v_proj"], "layers_to_transform": 2, "layers_pattern": "layers"},
    ),
    "a-whole-name-in-any-layer": (
        "llama",
        {"target_modules": ["q_proj", "model.layers.2.mlp.up_proj"], "layers_to_transform": [0]},
    ),
    "some-layers-by-regex": ("llama", {"target_modules": r"model\.layers\.(0|2)\..*_proj|.*\.1\.self_attn\.k_proj"}),
    "excluded": ("llama", {"exclude_modules": ["layers.1.self_attn.q_proj", "gate_proj"]}),
    "excluded-by-regex": ("llama", {"exclude_modules": r".*\.2\..*", "rank_pattern": {"down_proj": 1}}),
    "gpt-neox": (
        "gpt_neox",
        {
            "rank_pattern": {"query_key_value": 6, r"layers\.2\.mlp\.dense_h_to_4h": 1},
            "alpha_pattern": {r"layers\.1\.attention\.dense": 9},
            "exclude_modules": r"gpt_neox\.layers\.0\.mlp\..*",
        },
    ),
    "t5": (
        "t5",
        {
            "target_modules": ["q", "v", "wi_0", "wo"],
            "rank_pattern": {r"decoder\.block\.1\.layer\.1\.EncDecAttention\.q": 8, r"encoder\..*\.wo": 2},
            "alpha_pattern": {r"encoder\.block\.0\.layer\.0\.SelfAttention\.v": 20},
        },
    ),
    "t5-layers": ("t5", {"target_modules": ["k", "o"], "layers_to_transform": [0, 2], "layers_pattern": ["block"]}),
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Peer]:
    made: dict[str, Peer] = {}

    def peer(family: str) -> Peer:
        if family not in made:
            made[family] = Peer(tmp_path_factory.mktemp(family), family)
        return made[family]

    return peer


@pytest.mark.parametrize("case", tiered(CASES, quick=["patterns", "gpt-neox"]))
def test_there_and_back(peers: Callable[[str], Peer], tmp_path: Path, case: str) -> None:
    """An adapter of PEFT's computes the same here; noise on it, saved from here, the same there."""
    family, fields = CASES[case]
    peer = peers(family)
    expected = peer.logits(peer.random_adapter(tmp_path / "theirs", **fields))
    lora = read_adapter_method(tmp_path / "theirs")
    model = load_adapter(peer.ours(lora), tmp_path / "theirs")
    assert largest(run(model), expected) < TOLERANCE
    assert largest(peer.logits(peer.base()), expected) > 1000 * TOLERANCE, "the adapter has to be seen"

    moved = randomised(model)
    save_adapter(moved, tmp_path / "ours", base_model_name_or_path=str(peer.folder))
    theirs = peer.logits(peer.peft.PeftModel.from_pretrained(peer.base(), tmp_path / "ours"))
    assert largest(theirs, expected) > 1000 * TOLERANCE
    assert largest(run(moved), theirs) < TOLERANCE
    files = [safetensors.numpy.load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours")]
    assert {name: tensor.shape for name, tensor in files[0].items()} == {n: t.shape for n, t in files[1].items()}
    configs = [json.loads((tmp_path / name / CONFIG).read_text()) for name in ("theirs", "ours")]
    for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "r", "lora_alpha"):
        assert configs[0][name] == configs[1][name]


@pytest.mark.parametrize("case", tiered(["patterns", "layers", "gpt-neox", "t5"], quick=["layers", "gpt-neox"]))
def test_merged(peers: Callable[[str], Peer], tmp_path: Path, case: str) -> None:
    family, fields = CASES[case]
    peer = peers(family)
    expected = peer.logits(peer.random_adapter(tmp_path / "adapter", **fields))
    adapter = read_adapter(tmp_path / "adapter")
    merge(open_checkpoint(str(peer.folder)), adapter, tmp_path / "merged", dtype="float32", progress=False)
    merged = load_model(open_checkpoint(str(tmp_path / "merged")), quantization=None, progress=False)
    assert largest(run(merged), expected) < TOLERANCE


def test_the_order_of_patterns_decides_and_is_kept(peers: Callable[[str], Peer], tmp_path: Path) -> None:
    lora = LoRA(rank=4, rank_pattern=(("up_proj", 2), (r"mlp\..*", 6), ("down_proj", 3)))
    peer = peers("llama")
    save_adapter(randomised(peer.ours(lora)), tmp_path)
    tensors = read_adapter(tmp_path).tensors
    ranks = {name.split(".")[-3]: tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {
        **{f"{name}_proj": 4 for name in "qkvo"},
        "up_proj": 2,
        "gate_proj": 6,
        "down_proj": 6,
    }
    assert read_adapter_method(tmp_path).rank_pattern == lora.rank_pattern
    peer.peft.PeftModel.from_pretrained(peer.base(), tmp_path)  # PEFT finds the same ranks, or raises


FIELDS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": r".*_proj", "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layer"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["model.layers.2.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_modules_are_selected_as_peft_does(fields: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    peft = pytest.importorskip("peft", reason="PEFT, to compare with, is not installed")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=12, num_attention_heads=2
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    described = {
        name: (value,) if isinstance(value, int) or (name == "layers_pattern" and isinstance(value, str)) else value
        for name, value in fields.items()
    }
    lora = LoRA(**{name: tuple(value) if isinstance(value, list) else value for name, value in described.items()})
    values = config.to_dict()
    modules = linear_modules(family_of(values).config(values).parameter_mappings)
    ours = {name for stacked in modules.values() for name in stacked if module_matches(lora, name)}
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", **fields))
    except ValueError as error:
        if ours or ("excluded" not in str(error) and "not found" not in str(error)):
            raise
        return  # neither finds anything
    theirs = {name.removeprefix("base_model.model.") for name, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert ours == theirs


@pytest.mark.parametrize(
    ("adapter_of", "base_of"), [("qwen2", "llama"), ("t5", "llama"), ("llama", "gpt_neox"), ("llama", "t5")]
)
@pytest.mark.parametrize("known", [True, False], ids=["base-known", "base-unknown"])
def test_an_adapter_of_another_family_names_both(
    peers: Callable[[str], Peer], tmp_path: Path, adapter_of: str, base_of: str, known: bool
) -> None:
    peers(adapter_of).random_adapter(tmp_path / "adapter")
    if not known:
        if adapter_of == "qwen2":
            return  # its modules are named like those of a Llama
        config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
        (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "somebody/something"}))
    adapter = read_adapter(tmp_path / "adapter")
    checkpoint = open_checkpoint(str(peers(base_of).folder))
    with pytest.raises(CheckpointError, match=rf"expected an adapter of a {base_of} model, found .*{adapter_of}"):
        merge(checkpoint, adapter, tmp_path / "merged", progress=False)


def test_families_are_told_by_the_names_of_their_modules(peers: Callable[[str], Peer]) -> None:
    for family in ("llama", "gpt_neox", "t5"):
        config = open_checkpoint(str(peers(family).folder)).config
        modules = [
            name
            for stacked in linear_modules(FAMILIES[family].config(config).parameter_mappings).values()
            for name in stacked
        ]
        assert family in families_with(modules)
        assert (len(families_with(modules)) == 1) == (family != "llama")
