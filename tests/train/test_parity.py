"""The same training as Hugging Face transformers + PEFT + bitsandbytes + torch.optim.AdamW.

Both sides start from the same folder and quantise its weights themselves, to NF4 with double quantisation. PEFT loads the
fresh adapter that we saved, both see the same batches and compute in float32; the losses of the steps have to agree, and
the adapters at the end. Ours cuts each batch into micro-batches of unlike numbers of learned tokens, theirs does not: so the
test also holds that accumulation changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.adapters.bind import save_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import PLAIN_ANSWERS, batches, encode_all, load_records
from qlora_jax.export.merge import merge
from qlora_jax.peft import LoRA
from qlora_jax.train import create_state, jit_train_step, language_model_loss, split
from qlora_jax.train import optimizer as make_optimizer

torch = pytest.importorskip("torch", reason="the peers (torch, PEFT, bitsandbytes) are not installed")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed")
create_loraplus_optimizer = pytest.importorskip("peft.optimizers").create_loraplus_optimizer
transformers = pytest.importorskip("transformers")

# PEFT calls a property of transformers that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS = 10
LORA = LoRA(rank=8, alpha=16)
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    clip: float | None = None
    loraplus_lr_ratio: float | None = None


@dataclass(frozen=True)
class Result:
    losses: np.ndarray
    norms: np.ndarray  # of the gradients before clipping
    adapter: dict[str, np.ndarray]


def train_ours(
    folder: Path,
    work: Path,
    data: list[Batch],
    optimizer: Optimizer,
    micro_batches: int,
    lora: LoRA = LORA,
    *,
    real: bool = False,
) -> Result:
    """Also saves the adapter before the first step under `work`, for the peer to start from."""
    model = load_model(open_checkpoint(str(folder)), method=lora, dtype=jnp.float32, seed=3, progress=False)
    save_adapter(model, work / "fresh", base_model_name_or_path=str(folder))
    graph, adapter, frozen = split(model)
    del model
    tx = make_optimizer(
        "adamw",
        optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.clip,
        loraplus_lr_ratio=optimizer.loraplus_lr_ratio,
    )
    state = create_state(tx, adapter)
    step: Any = jit_train_step(graph, tx, language_model_loss, state)
    cuts = [{name: jnp.asarray(x.reshape(micro_batches, -1, x.shape[-1])) for name, x in batch.items()} for batch in data]
    if real:  # where running takes the time, not compiling
        step = step.lower(state, frozen, cuts[0]).compile({"xla_backend_optimization_level": 3})
    rows: list[dict[str, Any]] = []
    for cut in cuts:
        state, metrics = step(state, frozen, cut)
        rows.append(jax.device_get(metrics))
    save_adapter(nnx.merge(graph, state.adapter, frozen), work / "trained")
    return Result(
        np.array([row["loss"] for row in rows]),
        np.array([row["grad_norm"] for row in rows]),
        dict(read_adapter(work / "trained").tensors),
    )


def train_theirs(folder: Path, fresh: Path, data: list[Batch], optimizer: Optimizer) -> Result:
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={"": "cpu"},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    model = peft.PeftModel.from_pretrained(base, fresh, is_trainable=True).train()
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if optimizer.loraplus_lr_ratio is None:
        update = torch.optim.AdamW(trainable.values(), lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay)
    else:
        update = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=optimizer.learning_rate,
            loraplus_lr_ratio=optimizer.loraplus_lr_ratio,
            loraplus_weight_decay=optimizer.weight_decay,
        )
    losses, norms = [], []
    for batch in data:
        # Ours are pairs (input, target); theirs are tokens, shifted inside.
        tokens = np.concatenate([batch["inputs"], batch["targets"][:, -1:]], 1)
        labels = np.where(batch["loss_mask"] > 0, batch["targets"], -100)
        labels = np.concatenate([np.full_like(labels[:, :1], -100), labels], 1)
        attended = np.concatenate([batch["segment_ids"] > 0, np.zeros_like(batch["segment_ids"][:, :1]) > 0], 1)
        loss = model(
            input_ids=torch.from_numpy(tokens).long(),
            labels=torch.from_numpy(labels).long(),
            attention_mask=torch.from_numpy(attended).long(),
        ).loss
        loss.backward()
        limit = float("inf") if optimizer.clip is None else optimizer.clip
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), limit)))
        update.step()
        update.zero_grad(set_to_none=True)
        losses.append(loss.item())
    adapter = {_in_files(name): p.detach().numpy() for name, p in trainable.items()}
    return Result(np.array(losses), np.array(norms), adapter)


def _in_files(parameter: str) -> str:
    name = parameter.replace(".default.", ".")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def random_batches(vocabulary: int, rows: int, length: int) -> Iterator[Batch]:
    """Rows of random tokens, padded at their ends; of each, another share is learned."""
    generator = np.random.default_rng(0)
    while True:
        batch: Batch = {name: generator.integers(3, vocabulary, (rows, length), np.int32) for name in ("inputs", "targets")}
        batch["targets"][:, :-1] = batch["inputs"][:, 1:]
        used = generator.integers(length // 2, length + 1, (rows, 1))
        start = generator.integers(0, length // 3, (rows, 1))
        column = np.arange(length)[None]
        batch["loss_mask"] = ((column >= start) & (column < used)).astype(np.float32)
        batch["segment_ids"] = (column < used).astype(np.int32)
        batch["positions"] = np.where(column < used, column, 0).astype(np.int32)
        yield batch


def compare(ours: Result, theirs: Result, record: Any) -> dict[str, float]:
    found = {
        "loss": float(np.max(np.abs(ours.losses / theirs.losses - 1))),
        "gradient norm": float(np.max(np.abs(ours.norms / theirs.norms - 1))),
    }
    assert ours.adapter.keys() == theirs.adapter.keys()
    moved = [name for name, tensor in theirs.adapter.items() if np.abs(tensor).max() > 0]
    assert len(moved) == len(theirs.adapter), "B has left zero everywhere"
    found["adapter"] = max(float(np.abs(ours.adapter[name] - theirs.adapter[name]).max()) for name in ours.adapter)
    for name, value in found.items():
        record(f"largest difference, {name}", f"{value:.2e}")
    print(found, ours.losses, theirs.losses)
    return found


@pytest.mark.parametrize(
    ("optimizer", "micro_batches"),
    [
        pytest.param(Optimizer(clip=0.3), 1, marks=pytest.mark.integration),
        (Optimizer(learning_rate=2e-3, weight_decay=0.1), 2),
    ],
    ids=["QLoRA's", "accumulated, decayed, not clipped"],
)
def test_a_tiny_llama(
    tiny_llama: Path, tmp_path: Path, record_property: Any, optimizer: Optimizer, micro_batches: int
) -> None:
    source = random_batches(259, 4, 48)
    data = [next(source) for _ in range(STEPS)]
    learned = data[0]["loss_mask"].reshape(2, -1).sum(1)
    assert learned[0] != learned[1]
    ours = train_ours(tiny_llama, tmp_path, data, optimizer, micro_batches)
    theirs = train_theirs(tiny_llama, tmp_path / "fresh", data, optimizer)
    found = compare(ours, theirs, record_property)
    assert found["loss"] < 1e-5
    assert found["gradient norm"] < 1e-4
    assert found["adapter"] < 0.05 * STEPS * optimizer.learning_rate


@pytest.mark.parametrize(
    ("lora", "optimizer"),
    [
        pytest.param(
            LoRA(rank=8, alpha=16, use_dora=True), Optimizer(learning_rate=2e-3, clip=0.3), marks=pytest.mark.integration
        ),
        pytest.param(
            LORA,
            Optimizer(learning_rate=5e-4, weight_decay=0.1, clip=0.3, loraplus_lr_ratio=16.0),
            marks=pytest.mark.integration,
        ),
        pytest.param(
            LoRA(rank=8, use_dora=True),
            Optimizer(learning_rate=2e-4, loraplus_lr_ratio=4.0),
            marks=pytest.mark.integration,
        ),
    ],
    ids=["DoRA", "LoRA+", "both"],
)
def test_variants(tiny_llama: Path, tmp_path: Path, record_property: Any, lora: LoRA, optimizer: Optimizer) -> None:
    source = random_batches(259, 4, 48)
    data = [next(source) for _ in range(STEPS)]
    ours = train_ours(tiny_llama, tmp_path, data, optimizer, 1, lora)
    theirs = train_theirs(tiny_llama, tmp_path / "fresh", data, optimizer)
    found = compare(ours, theirs, record_property)
    assert found["loss"] < 1e-4
    assert found["gradient norm"] < 1e-3
    assert found["adapter"] < 0.05 * STEPS * optimizer.learning_rate * (optimizer.loraplus_lr_ratio or 1)


@pytest.mark.usefixtures("compiled_as_for_users")
@pytest.mark.integration
def test_smollm2(tmp_path: Path, record_property: Any) -> None:
    """The default model on the instructions that ship with the package, with the QLoRA authors' optimizer."""
    source = fetch_default_model()
    folder = merge(open_checkpoint(str(source)), None, tmp_path / "base", dtype="bfloat16", progress=False)
    records = load_records(PLAIN_ANSWERS).select(range(60))
    examples, _ = encode_all(records, load_tokenizer(source), max_length=65, progress=False)
    iterator = batches(examples, batch_size=2, length=64, pad_id=0)
    data = [next(iterator) for _ in range(4)]
    optimizer = Optimizer(clip=0.3)
    ours = train_ours(folder, tmp_path, data, optimizer, 1, real=True)
    theirs = train_theirs(folder, tmp_path / "fresh", data, optimizer)
    found = compare(ours, theirs, record_property)
    assert found["loss"] < 1e-4
    assert found["gradient norm"] < 1e-3
