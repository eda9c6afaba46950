"""EVA: the directions of layers' inputs against principal components by NumPy, of inputs that torch's hooks saw, and against
what PEFT finds on the same batches."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft_peer import VOCABULARY, Peer, largest, run

from qlora_jax.finetune.eva import start_from_inputs
from qlora_jax.models import CausalLM
from qlora_jax.peft import LoRA
from qlora_jax.peft.eva import update_statistics
from qlora_jax.train import language_model_loss

RANK = 4
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def explained(x: np.ndarray, directions: np.ndarray) -> float:
    """The variance of x `[n, in]` along orthonormal directions `[r, in]`, as a share of the most that r of them can hold."""
    x = x - x.mean(0)
    best = (np.linalg.svd(x, compute_uv=False)[: len(directions)] ** 2).sum()
    return float(((x @ directions.T) ** 2).sum() / best)


def test_batch_by_batch_against_all_at_once() -> None:
    """Rows that do not count change nothing, and the mean moves from batch to batch."""
    draws = np.random.default_rng(0)
    spread = np.diag(0.8 ** np.arange(24)) @ np.linalg.qr(draws.standard_normal((24, 24)))[0]
    x = draws.standard_normal((5, 60, 24)) @ spread + draws.standard_normal((5, 1, 24))
    counts = draws.random((5, 60)) < 0.8
    statistics: Any = (jnp.zeros((RANK, 24)), jnp.zeros(24), jnp.zeros(()), jnp.zeros(()))
    for batch, rows in zip(x, counts, strict=True):
        noisy = np.where(rows[:, None], batch, 1e3 * draws.standard_normal(batch.shape))
        statistics = jax.jit(update_statistics)(statistics, jnp.asarray(noisy, jnp.float32), jnp.asarray(rows))
    seen = x[counts]
    directions, mean, count, cosine = map(np.asarray, statistics)
    assert count == len(seen)
    assert 0 <= cosine <= 1 + 1e-5
    np.testing.assert_allclose(mean, seen.mean(0), atol=1e-4)
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    np.testing.assert_allclose(units @ units.T, np.eye(RANK), atol=1e-4)
    assert explained(seen, units) > 0.99
    exact = np.linalg.svd(seen - seen.mean(0), compute_uv=False)[:RANK]
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), exact, rtol=0.05)


def batches(count: int, padded: int) -> list[dict[str, np.ndarray]]:
    draws = np.random.default_rng(1)
    made = []
    for _ in range(count):
        tokens = draws.integers(0, VOCABULARY, (8, 24), np.int32)
        mask = np.ones((8, 24), np.float32)
        mask[:4, 24 - padded :] = 0
        made.append({"inputs": tokens, "targets": np.roll(tokens, -1, 1), "loss_mask": mask})
    return made


def inputs_of(peer: Peer, data: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What each linear layer of torch's model is given at the tokens that are no padding."""
    seen: dict[str, list[np.ndarray]] = {}
    model = peer.base()

    def hook(name: str, module: Any, given: Any, _: Any) -> None:
        seen.setdefault(name, []).append(given[0].numpy())

    for name, module in model.named_modules():
        if isinstance(module, peer.torch.nn.Linear) and "lm_head" not in name:
            module.register_forward_hook(partial(hook, name))
    with peer.torch.no_grad():
        for batch in data:
            model(peer.torch.from_numpy(batch["inputs"]).long())
    masks = [batch["loss_mask"] > 0 for batch in data]
    return {
        name: np.concatenate([x[mask] for x, mask in zip(of_layer, masks, strict=True)]) for name, of_layer in seen.items()
    }


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return Peer(tmp_path_factory.mktemp("llama"), "llama")


def ours(peer: Peer, lora: LoRA, data: list[dict[str, np.ndarray]]) -> CausalLM:
    model = peer.ours(lora)
    assert isinstance(model, CausalLM)

    def build(method: Any) -> CausalLM:
        return CausalLM(model.config, method=method, dtype=jnp.float32, remat="full", rngs=nnx.Rngs(0))

    return start_from_inputs(model, build, lora, language_model_loss, iter(data), most=len(data), progress=False)


@pytest.mark.parametrize("use_dora", [False, pytest.param(True, marks=pytest.mark.integration)])
def test_directions_of_a_models_inputs(peer: Peer, use_dora: bool) -> None:
    """One batch with padding, ranks that differ, a layer without an adapter."""
    lora = LoRA(
        rank=RANK,
        use_dora=use_dora,
        rank_pattern=((r"layers\.1\.self_attn\.q_proj", 6),),
        exclude_modules=("layers.2.mlp.down_proj",),
    )
    data = batches(1, 9)
    model, seen = ours(peer, lora, data), inputs_of(peer, data)
    assert largest(run(model), peer.logits(peer.base())) < 1e-4, "B is zero"
    for layer in range(3):
        for path in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            part: Any = model.layers
            for name in path.split("."):
                part = getattr(part, name)
            a, name = np.asarray(part.adapter.lora_a[...])[layer], f"model.layers.{layer}.{path}"
            rank = part.adapter.spec.ranks[layer]
            assert rank == (0 if name.endswith("2.mlp.down_proj") else 6 if name.endswith("1.self_attn.q_proj") else RANK)
            assert np.all(a[:, rank:] == 0)
            if rank:
                np.testing.assert_allclose(a[:, :rank].T @ a[:, :rank], np.eye(rank), atol=1e-4)
                assert explained(seen[name], a[:, :rank].T) > 0.99, name


@pytest.mark.integration
def test_as_good_as_pefts(peer: Peer) -> None:
    """The variance that the directions of either explain of all batches."""
    data = batches(4, 0)
    config = peer.peft.LoraConfig(
        r=RANK,
        target_modules=["q_proj", "o_proj", "up_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=peer.peft.EvaConfig(rho=1.0, tau=0.8, use_label_mask=False),
    )
    loader = [{"input_ids": peer.torch.from_numpy(batch["inputs"]).long()} for batch in data]
    theirs = peer.peft.get_eva_state_dict(peer.base(), loader, config, show_progress_bar=False)
    model, seen = ours(peer, LoRA(rank=RANK), data), inputs_of(peer, data)
    shares = []
    for name, directions in theirs.items():
        part: Any = model.layers
        for attribute in name.split(".")[3:]:
            part = getattr(part, attribute)
        a = np.asarray(part.adapter.lora_a[...])[int(name.split(".")[2])]
        shares.append((explained(seen[name], a.T), explained(seen[name], directions.numpy())))
    assert len(shares) == 12
    assert min(share for share, _ in shares) > 0.9
    assert np.mean([one - other for one, other in shares]) > -0.01


def test_too_few_tokens_and_too_few_inputs(peer: Peer, tmp_path: Path) -> None:
    data = batches(1, 0)
    few = [{name: x[:1, :3] for name, x in data[0].items()}]
    with pytest.raises(ValueError, match="eva: expected at least 4 tokens of training data, found 3"):
        ours(peer, LoRA(rank=RANK), few)
    with pytest.raises(ValueError, match="eva: expected a rank of at most 32, found 33"):
        ours(peer, LoRA(rank=33), data)
