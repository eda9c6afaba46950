"""Adapters that start from the original weights: PiSSA's against PEFT's, LoftQ's against NumPy; that files give the trained
model back, here to the bit and in PEFT as a plain LoRA; that both start closer to the weights than 4 bits alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft_peer import Peer, largest, randomised, run

from qlora_jax.adapters.bind import adapter_tensors, load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter, write_adapter
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.adapters.weight_init import converted_from, split_initialization, to_plain_lora
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.models import Model
from qlora_jax.nn import Linear
from qlora_jax.peft import LoRA, Subtracted
from qlora_jax.peft.loftq import loftq
from qlora_jax.peft.lora_linear import LoRASpec, initialize_lora
from qlora_jax.peft.pissa import best_update, subtract_update
from qlora_jax.quant import Quantization, dequantize, quantize

TOLERANCE = 1e-4
PATTERNS: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": ((r"layers\.1\..*_proj", 3),),
    "alpha_pattern": (("q_proj", 3.0),),
    "exclude_modules": ("layers.0.self_attn.v_proj",),
}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Peer]:
    made: dict[str, Peer] = {}

    def peer(family: str) -> Peer:
        if family not in made:
            made[family] = Peer(tmp_path_factory.mktemp(family), family)
        return made[family]

    return peer


def load(peer: Peer, lora: LoRA | None, quantization: Quantization | None, subtracted: Subtracted | None = None) -> Model:
    return load_model(
        open_checkpoint(str(peer.folder)),
        quantization=quantization,
        method=lora,
        dtype=jnp.float32,
        progress=False,
        subtracted=subtracted,
    )


def moved(model: Any, peer: Peer, scale: float) -> None:
    """Adds noise to what PEFT trains."""
    with peer.torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * peer.torch.randn(parameter.shape))


def test_pissa_is_pefts(peers: Callable[[str], Peer], tmp_path: Path) -> None:
    """The same product A B, on a dense base the same model as before, and files that PEFT did not convert."""
    peer, scaling = peers("llama"), 6 / 4
    theirs = peer.adapted(init_lora_weights="pissa")
    model = load(peer, LoRA(rank=4, alpha=6.0, init_lora_weights="pissa"), None)
    initial = adapter_tensors(model)
    assert largest(run(model), peer.logits(peer.base())) < TOLERANCE
    state = theirs.state_dict()
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        module = f"base_model.model.model.layers.1.{name}"
        a, b = (state[f"{module}.lora_{x}.default.weight"].numpy() for x in "AB")
        ours = [initial[f"{module}.lora_{x}.weight"] for x in "AB"]
        np.testing.assert_allclose(ours[1] @ ours[0], b @ a, atol=1e-5)
        assert np.abs(scaling * b @ a).max() > 0.01

    moved(theirs, peer, 0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = peer.logits(theirs)
    assert largest(peer.logits(peer.base()), expected) > 1000 * TOLERANCE
    adapter = read_adapter(tmp_path / "theirs")
    again = load(peer, adapter.method, None)  # type: ignore[arg-type]
    # Farther off than where both sides have the same base: each finds its own by singular values in float32.
    assert largest(run(load_adapter(again, adapter)), expected) < 4 * TOLERANCE
    merge(open_checkpoint(str(peer.folder)), adapter, tmp_path / "merged", dtype="float32", progress=False)
    merged = load_model(open_checkpoint(str(tmp_path / "merged")), quantization=None, progress=False)
    assert largest(run(merged), expected) < 4 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        pytest.param("llama", {"init_lora_weights": "pissa", **PATTERNS}, marks=pytest.mark.integration),
        ("llama", {"init_lora_weights": "loftq"}),
        pytest.param(
            "llama",
            {"init_lora_weights": "loftq", "loftq_iter": 3, "modules_to_save": ("norm",)},
            marks=pytest.mark.integration,
        ),
        pytest.param("t5", {"init_lora_weights": "pissa_niter_4"}, marks=pytest.mark.integration),
    ],
    ids=["pissa", "loftq", "loftq 3", "pissa_niter, t5"],
)
def test_files_give_the_trained_model_back(
    peers: Callable[[str], Peer], tmp_path: Path, family: str, fields: dict[str, Any]
) -> None:
    peer, quantization = peers(family), Quantization()
    lora = LoRA(rank=4, alpha=6.0, **fields)
    trained = randomised(load(peer, lora, quantization))
    expected = run(trained)
    save_adapter(trained, tmp_path / "files", base_model_name_or_path=str(peer.folder))
    record = AdapterMetadata(quantization, None, converted_from=converted_from(lora))

    adapter, taken = split_initialization(read_adapter(tmp_path / "files"), record)
    assert (taken is None) == (fields == {"init_lora_weights": "loftq"})
    again = load_adapter(load(peer, adapter.method, quantization, taken), adapter)  # type: ignore[arg-type]
    np.testing.assert_allclose(run(again), expected, atol=1e-5)

    # In PEFT they are a LoRA for the original weights; so they are merged here, from either form.
    theirs = peer.logits(peer.peft.PeftModel.from_pretrained(peer.base(), tmp_path / "files"))
    for name, (one, taken_off) in {"split": (adapter, taken), "whole": (read_adapter(tmp_path / "files"), None)}.items():
        checkpoint = open_checkpoint(str(peer.folder))
        merge(checkpoint, one, tmp_path / name, dtype="float32", subtracted=taken_off, progress=False)
        merged = load_model(open_checkpoint(str(tmp_path / name)), quantization=None, progress=False)
        assert largest(run(merged), theirs) < TOLERANCE
    merge(
        open_checkpoint(str(peer.folder)),
        adapter,
        tmp_path / "dequantized",
        dtype="float32",
        subtracted=taken,
        from_dequantized=quantization,
        progress=False,
    )
    merged = load_model(open_checkpoint(str(tmp_path / "dequantized")), quantization=None, progress=False)
    assert largest(run(merged), expected) < TOLERANCE


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_conversion_is_pefts(peers: Callable[[str], Peer], tmp_path: Path) -> None:
    """`path_initial_model_for_weight_conversion` on a dense base: the same logits, and the same configuration."""
    peer, fields = peers("llama"), {"init_lora_weights": "pissa", "r": 4, "lora_alpha": 6}
    theirs = peer.adapted(**fields)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    first = read_adapter(tmp_path / "start")
    moved(theirs, peer, 0.2)
    theirs.save_pretrained(tmp_path / "trained")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    trained, expected = read_adapter(tmp_path / "trained"), read_adapter(tmp_path / "converted")
    assert isinstance(trained.method, LoRA)
    initial = {module: tuple(first.of_module(module)[f"lora_{x}.weight"].T for x in "AB") for module in trained.modules}
    tensors, lora = to_plain_lora(trained.tensors, trained.method, Subtracted(trained.method, "pissa", initial))  # type: ignore[arg-type]
    assert isinstance(expected.method, LoRA)
    assert isinstance(lora, LoRA)
    assert (lora.rank, lora.alpha) == (expected.method.rank, expected.method.alpha) == (8, 12)
    assert tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(tensors[name], tensor, atol=1e-6)


def test_turns_of_loftq_against_numpy() -> None:
    w = np.random.default_rng(0).standard_normal((128, 40)).astype(np.float32)
    rounded = lambda matrix: dequantize(quantize(jnp.asarray(matrix)), jnp.float32)  # noqa: E731
    taken, rest = np.zeros_like(w), w
    for turns in (1, 2, 3):
        off, (a, b) = loftq(jnp.asarray(w), 1.5, rank=6, iterations=turns, rounded=rounded)
        assert (off is None) == (turns == 1)
        if off is not None:
            np.testing.assert_allclose(1.5 * np.asarray(off[0]) @ np.asarray(off[1]), taken, atol=1e-4)
        u, s, vt = np.linalg.svd(w - np.asarray(rounded(rest)), full_matrices=False)
        taken = (u[:, :6] * s[:6]) @ vt[:6]
        np.testing.assert_allclose(1.5 * np.asarray(a) @ np.asarray(b), taken, atol=1e-4)
        rest = w - taken


def test_subspace_iteration_comes_close_to_the_exact_values() -> None:
    w = jnp.asarray(np.random.default_rng(1).standard_normal((96, 60)) @ np.diag(0.9 ** np.arange(60)), jnp.float32)
    exact = subtract_update(w, *best_update(w, 2.0, rank=10), 2.0)
    for iterations, worse in ((1, 1.05), (4, 1.001)):
        close = subtract_update(w, *best_update(w, 2.0, rank=10, iterations=iterations), 2.0)
        assert 0.9999 < float(jnp.linalg.norm(close) / jnp.linalg.norm(exact)) < worse


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"init_lora_weights": "pissa"}, marks=pytest.mark.integration),
        {"init_lora_weights": "loftq", "loftq_iter": 4},
    ],
)
def test_they_start_closer_to_the_weights(peers: Callable[[str], Peer], fields: dict[str, Any]) -> None:
    """Each layer's matrix, with adapter, and the logits, against 4 bits alone."""
    peer, lora = peers("llama"), LoRA(rank=8, alpha=4.0, **fields)
    model = load(peer, lora, Quantization())
    plain = load(peer, None, Quantization())
    for found, before in zip(linear_layers(model), linear_layers(plain), strict=True):
        name, layer = found
        original = np.stack([open_checkpoint(str(peer.folder)).read(name.format(layer=n)).T for n in range(3)])
        assert layer.adapter is not None
        merged = dequantize(layer.weight.get_value()) + 0.5 * layer.adapter.lora_a[...] @ layer.adapter.lora_b[...]  # type: ignore[attr-defined]
        errors = [
            np.linalg.norm(original - np.asarray(m), axis=(1, 2)) for m in (merged, dequantize(before[1].weight.get_value()))
        ]
        assert (errors[0] < 0.95 * errors[1]).all(), name
    exact = peer.logits(peer.base())
    assert np.abs(run(model) - exact).mean() < 0.9 * np.abs(run(plain) - exact).mean()


def linear_layers(model: Model) -> list[tuple[str, Linear]]:
    found = []
    for key in (key for key in model.config.parameter_mappings if key.linear):
        layer: Any = model
        for part in key.path[:-1]:
            layer = getattr(layer, part)
        found.append((key.name, layer))
    return found


def test_starts_from_a_random_key_alone() -> None:
    """Ranks that differ within a stack, with zeros beyond them."""
    ranks = (4, 0, 2)
    for name in ("gaussian", "orthogonal"):
        slot = LoRASpec(ranks, (1.0, 0.0, 2.0), 0.0, name)
        for layer, rank in enumerate(ranks):
            a, b, _ = jax.jit(lambda layer, slot=slot: initialize_lora(slot, 400, 300, layer=layer, rngs=nnx.Rngs(3)))(layer)
            a, b = np.asarray(a), np.asarray(b)
            assert np.all(a[:, rank:] == 0)
            if rank and name == "gaussian":
                assert np.all(b == 0)
                assert a[:, :rank].std() == pytest.approx(1 / rank, rel=0.1)
            elif rank:
                assert np.all(b[rank:] == 0)
                assert min(np.abs(a[:, :rank]).mean(), np.abs(b[:rank]).mean()) > 0.01
                assert np.abs(a @ b).max() < 1e-6


@pytest.mark.integration
def test_starts_in_files(peers: Callable[[str], Peer], tmp_path: Path) -> None:
    peer = peers("llama")
    for name in ("gaussian", "orthogonal"):
        lora = LoRA(rank=4, init_lora_weights=name)
        write_adapter(adapter_tensors(load(peer, lora, None)), tmp_path / name, method=lora)
        assert read_adapter_method(tmp_path / name) == LoRA(
            rank=4,
            init_lora_weights=name,
            target_modules=read_adapter_method(tmp_path / name).target_modules,  # type: ignore[attr-defined]
        )
        base = peer.logits(peer.base())
        assert largest(peer.logits(peer.peft.PeftModel.from_pretrained(peer.base(), tmp_path / name)), base) < TOLERANCE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights: expected true, gaussian, .*found 'corda'"),
        ({"init_lora_weights": "pissa_niter_0"}, "found 'pissa_niter_0'"),
        ({"init_lora_weights": "orthogonal", "rank": 3}, "orthogonal: expected even ranks, found 3"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora: expected no init_lora_weights that changes the base"),
        ({"loftq_iter": 2}, "loftq_iter: expected at least 1, and 1 without loftq, found 2"),
        ({"init_lora_weights": "loftq", "loftq_iter": 0}, "loftq_iter: .*found 0"),
    ],
)
def test_refused_starts(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**fields)


def test_what_does_not_fit_is_refused(peers: Callable[[str], Peer], tmp_path: Path) -> None:
    peer = peers("llama")
    with pytest.raises(ValueError, match="loftq: expected linear layers in 4 bits, found dense ones"):
        load(peer, LoRA(init_lora_weights="loftq"), None)
    large = LoRA(rank=33, init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj: expected a rank of at most 32 .*found 33"):
        load(peer, large, None)
    unknown = load(peer, LoRA(rank=2, init_lora_weights="pissa"), None)
    unknown.origin = None
    with pytest.raises(ValueError, match="pissa: expected a model that was loaded from a checkpoint, found one of which"):
        save_adapter(unknown, tmp_path / "a")
    lora = LoRA(rank=3)
    merge(open_checkpoint(str(peer.folder)), None, tmp_path / "4", quantization=Quantization(), progress=False)
    with pytest.raises(
        CheckpointError, match="expected the original weights, from which a part is subtracted, found quantised"
    ):
        load_model(
            open_checkpoint(str(tmp_path / "4")), method=lora, subtracted=Subtracted(lora, "pissa", {}), progress=False
        )
    write_adapter(adapter_tensors(load(peer, lora, None)), tmp_path / "odd", method=lora)
    with pytest.raises(CheckpointError, match=r"expected an even rank, found \(3, 48\)"):
        split_initialization(read_adapter(tmp_path / "odd"), AdapterMetadata(None, None, converted_from="pissa"))
