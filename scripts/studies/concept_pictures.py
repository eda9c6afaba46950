"""Draw the pictures of docs/concepts.md from real weights, plans and data.

    python scripts/studies/concept_pictures.py                            into docs/
    python scripts/studies/concept_pictures.py --output pictures --data conversations.jsonl

Method. The weights are those of a feed-forward matrix of SmolLM2-135M-Instruct, which is downloaded once. The memory is the
quick plan of Llama-3-8B with a LoRA of rank 16 and 4 x 2048 tokens on one H100. The lengths of packed rows are those of the
instruction data that the package includes, or of --data. The merge and the tenants are drawn from small random matrices.
"""

import dataclasses
import sys
from pathlib import Path

import matplotlib

from qlora_jax import cli
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import PLAIN_ANSWERS, encode_all, open_source
from scripts.studies.concepts.machine import draw_memory, draw_packing, draw_tenants
from scripts.studies.concepts.weights import draw_codebook, draw_double_quantisation, draw_merge

MATRIX = "model.layers.10.mlp.gate_proj.weight"  # of the default model


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw the pictures of docs/concepts.md."""

    output: Path = Path("docs")
    """Folder of the pictures."""
    data: str | None = None
    """Records whose lengths are packed; the instruction data of the package if left out."""
    length: int = 256
    """Tokens of a packed row."""


def main(arguments: Arguments) -> None:
    """Write the six pictures."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "qlora_jax", "svg.fonttype": "none", "font.size": 9})
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = fetch_default_model()
    w = open_checkpoint(folder).read(MATRIX).astype("float32")  # [out, in]
    records = open_source(arguments.data or str(PLAIN_ANSWERS), None).records
    examples, _ = encode_all(records, load_tokenizer(folder), max_length=arguments.length)
    draw_codebook(w, arguments.output / "concepts-codebook.svg")
    draw_double_quantisation(w, arguments.output / "concepts-double-quantisation.svg")
    draw_memory(arguments.output / "concepts-memory.svg")
    draw_merge(arguments.output / "concepts-merge.svg")
    draw_packing([len(example) for example in examples], arguments.length, arguments.output / "concepts-packing.svg")
    draw_tenants(arguments.output / "concepts-tenants.svg")
    print(f"drawn: {arguments.output}/concepts-*.svg", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(cli.run(main, Arguments, __doc__))
