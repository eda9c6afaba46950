"""What packed token tables cost: the held-out loss of a base model with each storage, and the bytes of its tables.

    python scripts/measure_tables.py                                    SmolLM2-135M on rows of the instructions that ship
    python scripts/measure_tables.py --data mine.jsonl --rows 100       on the last 100 rows of a file

Each of the last rows of each file, its texts joined, is read by the base model, linear layers in NF4, up to 256 tokens. The
last line is JSON.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import PLAIN_ANSWERS
from qlora_jax.models import CausalLM
from qlora_jax.quant import EMBEDDING_STORAGES
from qlora_jax.train.loss import row_losses

LENGTH = 256


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure on what."""

    data: tuple[Path, ...] = (Path(PLAIN_ANSWERS),)
    """JSON lines, of texts or of messages."""
    model: str | None = None
    """Folder, .gguf file or hub id; SmolLM2-135M-Instruct if left out."""
    rows: int = 48
    """Of each file, the last ones."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
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
            raise SystemExit(f"error: {source}: expected a decoder-only model, found {type(model).__name__}")
        graph, state = nnx.split(model)

        @jax.jit
        def losses(state: nnx.State, tokens: jax.Array, mask: jax.Array, graph: nnx.GraphDef = graph) -> jax.Array:
            model = nnx.merge(graph, state)
            return row_losses(model, model.hidden(tokens[:, :-1]), tokens[:, 1:], mask)

        rows = zip(jnp.asarray(tokens)[:, None], jnp.asarray(mask)[:, None], strict=True)
        total = sum(float(losses(state, *row)[0]) for row in rows)
        tables = [module for module in (model.embed_tokens, model.lm_head) if module is not None]
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves([nnx.state(table) for table in tables]))
        found.append({"tables": storage, "loss": total / float(mask.sum()), "table_bytes": size})
        print(f"{storage:5s} loss {found[-1]['loss']:.4f}  tables {size / 2**20:.1f} MiB", flush=True)
    print(json.dumps({"tokens": int(mask.sum()), "model": source, "rows": found}))


def text_of(row: dict[str, Any]) -> str:
    """The texts of a row, those of its messages too, one below the other."""
    values = [row, *(row.get("messages") or ())]
    return "\n".join(text for value in values for name, text in value.items() if isinstance(text, str) and name != "role")


if __name__ == "__main__":
    main()
