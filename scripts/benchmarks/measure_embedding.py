"""Measure quantised embeddings: the held-out loss of a base model with each storage of its embedding, and the bytes.

    python scripts/benchmarks/measure_embedding.py                                SmolLM2-135M on its default data
    python scripts/benchmarks/measure_embedding.py --data mine.jsonl --rows 100   on the last 100 rows of a file

The base model, with linear layers in NF4, reads the last rows of each file: the texts of each row, joined, up to 256 tokens.
The last line is JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax import cli
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import PLAIN_ANSWERS
from qlora_jax.errors import UnsupportedError
from qlora_jax.models import CausalLM
from qlora_jax.quant import EMBEDDING_STORAGES
from qlora_jax.train.loss import row_losses

LENGTH = 256


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare storages of the embedding."""

    data: tuple[Path, ...] = (Path(PLAIN_ANSWERS),)
    """Files of JSON lines with texts or messages."""
    model: str | None = None
    """Folder, .gguf file or hub id of the model; SmolLM2-135M-Instruct if left out."""
    rows: int = 48
    """Number of rows, from the end of each file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(measure, Arguments, __doc__, arguments)


def measure(arguments: Arguments) -> None:
    """Print the loss and the size of the embedding and the output head for each storage."""
    source = arguments.model or str(fetch_default_model())
    tokenizer = load_tokenizer(source)
    texts = [
        text_of(json.loads(line))
        for path in arguments.data
        for line in path.read_text(encoding="utf-8").splitlines()[-arguments.rows :]
    ]
    tokens, mask = np.zeros((len(texts), LENGTH + 1), np.int32), np.zeros((len(texts), LENGTH), np.float32)
    for row, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"][: LENGTH + 1]
        tokens[row, : len(ids)], mask[row, : len(ids) - 1] = ids, 1
    found = []
    for storage in EMBEDDING_STORAGES:
        model = load_model(open_checkpoint(source), embedding_storage=storage, progress=False)
        if not isinstance(model, CausalLM):
            raise UnsupportedError(f"{source}: expected a decoder-only model, found {type(model).__name__}")
        graph, state = nnx.split(model)

        @jax.jit
        def losses(state: nnx.State, tokens: jax.Array, mask: jax.Array, graph: nnx.GraphDef = graph) -> jax.Array:
            model = nnx.merge(graph, state)
            return row_losses(model, model.hidden(tokens[:, :-1]), tokens[:, 1:], mask)

        rows = zip(jnp.asarray(tokens)[:, None], jnp.asarray(mask)[:, None], strict=True)
        total = sum(float(losses(state, *row)[0]) for row in rows)
        embeddings = [module for module in (model.embed_tokens, model.lm_head) if module is not None]
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves([nnx.state(module) for module in embeddings]))
        found.append({"embedding_storage": storage, "loss": total / float(mask.sum()), "embedding_bytes": size})
        print(f"{storage:5s} loss {found[-1]['loss']:.4f}  embedding {size / 2**20:.1f} MiB", flush=True)
    print(json.dumps({"tokens": int(mask.sum()), "model": source, "rows": found}))


def text_of(row: dict[str, Any]) -> str:
    """Return the texts of a row and of its messages, joined by line ends."""
    values = [row, *(row.get("messages") or ())]
    return "\n".join(text for value in values for name, text in value.items() if isinstance(text, str) and name != "role")


if __name__ == "__main__":
    sys.exit(main())
