"""Packing changes how fast a model learns, not what: each document's loss in a packed row is its loss alone in a row."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.data import BatchIterator, Example, batches, encode_all, load_records, padding_share

LENGTH = 512
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "oasst_guanaco.jsonl"


def rows() -> list[dict[str, Any]]:
    """Real conversations where they are at hand, else some of like lengths."""
    if SHARED.is_file():
        return load_records(str(SHARED), "train[:60]").to_list()
    random = np.random.default_rng(0)
    words = [
        " ".join("abcdefghij"[digit] * 3 for digit in random.integers(0, 10, size)) for size in random.integers(3, 60, 60)
    ]
    return [
        {"text": f"### Human: {question} ### Assistant: {answer}"}
        for question, answer in zip(words, words[::-1], strict=True)
    ]


@pytest.fixture(scope="module")
def examples(tiny_llama: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    kept, _ = encode_all(rows(), tokenizer, max_length=LENGTH // 2, progress=False)
    return kept


def losses_of_documents(model: Any, source: BatchIterator) -> dict[bytes, float]:
    """The summed loss of each document, by its inputs."""
    losses = {}
    for batch in source:
        tokens, positions, segments = (jnp.asarray(batch[name]) for name in ("inputs", "positions", "segment_ids"))
        logits = model(tokens, positions=positions, segment_ids=segments)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]) * batch["loss_mask"]
        for row, ids in enumerate(batch["segment_ids"]):
            for segment in range(1, ids.max() + 1):
                losses[batch["inputs"][row][ids == segment].tobytes()] = float(np.asarray(each)[row][ids == segment].sum())
    return losses


def test_losses_of_documents_are_unchanged(tiny_llama: Path, examples: list[Example]) -> None:
    model = load_model(open_checkpoint(str(tiny_llama)), quantization=None, method=None, dtype="float32", remat="none")
    options: dict[str, Any] = {"batch_size": 4, "length": LENGTH, "pad_id": 2, "epochs": 1}
    alone = losses_of_documents(model, batches(examples, packing=False, **options))
    packed_source = batches(examples, packing=True, **options)
    packed = losses_of_documents(model, packed_source)
    assert len(alone) > 30
    assert packed.keys() == alone.keys()
    assert packed_source.batches_in_epoch() < batches(examples, packing=False, **options).batches_in_epoch()
    worst = max(abs(packed[name] - loss) / abs(loss) for name, loss in alone.items())
    assert worst < 1e-4, worst


def test_the_share_of_padding_that_packing_removes(examples: list[Example]) -> None:
    """Against a count over the batches themselves; only rows that fill up the last batch are not counted."""
    shares = {packing: padding_share(examples, LENGTH, packing=packing) for packing in (False, True)}
    for packing, share in shares.items():
        source = batches(examples, batch_size=1, length=LENGTH, pad_id=2, packing=packing, epochs=1)
        padding = np.concatenate([batch["segment_ids"] == 0 for batch in source])
        assert share == pytest.approx(padding.mean(), abs=1e-12)
    assert shares[True] < 0.15
    assert shares[False] - shares[True] > 0.3
