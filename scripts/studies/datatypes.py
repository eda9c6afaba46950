"""The QLoRA paper's study of data types on any decoder-only model: perplexity, zero-shot accuracy, errors, normality.

    python scripts/datatypes.py --quick                                       blocks of 64 alone, short texts
    python scripts/datatypes.py --data mine.jsonl --questions mmlu.jsonl      the whole grid: 85 cells
    python scripts/datatypes.py --model FOLDER --data-types nf4 fp4 int4 --block-sizes 64 128
    python scripts/datatypes.py --quick --peer                                beside bitsandbytes' own losses

Method. A cell is a data type, a block size, and double quantisation or none; the first is the dense model. In each cell all
linear layers are quantised as `load_model` does it and the same texts are read; the questions are asked without examples.
The compute dtype is that of the platform (float32 on a CPU). Shapiro and Wilk's test is made of every matrix of the dense
model, which has to fit into memory. Details: scripts/datatype_study/.

Each cell is written to OUTPUT/cells.jsonl when it is done; the same command goes on where it was stopped, and with --minutes
it stops by itself. OUTPUT then has report.md with its plots, and report.json; the last line of the output is JSON too. With
--peer the exit status is 1 where a loss is more than 1e-3 away from that of bitsandbytes.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import default_dtype, load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import PLAIN_ANSWERS
from qlora_jax.evaluate import encode_questions, letter_logits, read_questions
from qlora_jax.export.merge import merge
from qlora_jax.models import causal_family_of, linear_mappings
from qlora_jax.nn import data_mesh
from qlora_jax.quant import BLOCK_SIZES, DATA_TYPES, DataType, Quantization
from scripts.benchmarks.workers import Peer, command, find_python, run_worker, tell
from scripts.studies.datatype_study.journal import Journal
from scripts.studies.datatype_study.normality import MOST, examine
from scripts.studies.datatype_study.report import Study, write
from scripts.studies.datatype_study.summary import DENSE, key_of
from scripts.studies.datatype_study.texts import Texts, read_texts, text_losses
from scripts.studies.datatype_study.weights import quantize_in_place

WHOLE = {"block_sizes": (64, 32, 128, 256, 512, 1024), "texts": 200, "length": 512, "most_questions": 500}
QUICK = {"block_sizes": (64,), "texts": 40, "length": 128, "most_questions": 60}
PEER = Peer("bitsandbytes", ("torch", "transformers", "bitsandbytes", "accelerate"))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare data types of frozen weights."""

    model: str | None = None
    """Folder, .gguf file or hub id; SmolLM2-135M-Instruct if left out."""
    data: tuple[str, ...] = (PLAIN_ANSWERS,)
    """Files or hub ids of the texts, with rows as scripts/train.py takes them; the instructions that ship if left out."""
    split: str | None = None
    """Split of a hub data set."""
    questions: str | None = None
    """File of MMLU questions, or cais/mmlu on the hub; none are asked if left out."""
    quick: bool = False
    """Blocks of 64, and fewer and shorter texts and questions, where they are not given."""
    data_types: tuple[DataType, ...] = DATA_TYPES
    """Which."""
    block_sizes: tuple[int, ...] | None = None
    """Weights that share a scale; 64, 32, 128, 256, 512 and 1024 if left out. The first is the one that is plotted."""
    double_quantization: Literal["both", "yes", "no"] = "both"
    """Whether scales are quantised too."""
    texts: int | None = None
    """How many, drawn at random, as many of each file; 200 if left out."""
    length: int | None = None
    """The most tokens of a text; 512 if left out."""
    most_questions: int | None = None
    """Ask a random sample of so many; 500 if left out."""
    question_block_sizes: tuple[int, ...] = ()
    """Block sizes at which the questions are asked; all if left out."""
    sample: int = 2000
    """Values of a matrix that Shapiro and Wilk's test is made of, at most 5000."""
    units: int = 64
    """Rows of a matrix that are tested each by itself."""
    batch_size: int = 8
    """Texts or questions at a time."""
    seed: int = 0
    """Of everything that is drawn."""
    minutes: float | None = None
    """Stop after the cell that is being measured when so much time has passed; the report is then of what there is."""
    output: Path = Path("runs/datatypes")
    """Folder of cells, plots and reports."""
    page: Path | None = None
    """The Markdown file, with its plots beside it, where it is not to be OUTPUT/report.md."""
    peer: bool = False
    """Measure the losses of transformers with bitsandbytes, too."""
    peer_python: tuple[Path, ...] = (Path(sys.executable),)
    """Interpreters of which one has its packages."""

    def chosen(self, name: str) -> Any:
        """An option as given, or as the grid has it."""
        given = getattr(self, name)
        return (QUICK if self.quick else WHOLE)[name] if given is None else given

    def grid(self) -> tuple[Quantization | None, ...]:
        """The cells in their order."""
        doubles = {"both": (True, False), "yes": (True,), "no": (False,)}[self.double_quantization]
        sizes = self.chosen("block_sizes")
        return (
            None,
            *(Quantization(name, size, double) for size in sizes for double in doubles for name in self.data_types),
        )


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130


def check(arguments: Arguments) -> None:
    """Raises ValueError for what could only fail later."""
    sizes = arguments.chosen("block_sizes")
    wrong = [size for size in (*sizes, *arguments.question_block_sizes) if size not in BLOCK_SIZES]
    if wrong or not sizes:
        known = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"--block-sizes: expected one or more of {known}, found {wrong[0] if wrong else 'none'}")
    if not arguments.data_types:
        raise ValueError(f"--data-types: expected one or more of {', '.join(DATA_TYPES)}, found none")
    if not arguments.data:
        raise ValueError("--data: expected one or more sources of texts, found none")
    least = {"texts": 2 * len(arguments.data), "length": 16, "most_questions": 2, "units": 1, "batch_size": 1}
    for name, smallest in least.items():
        value = arguments.chosen(name) if name in WHOLE else getattr(arguments, name)
        if value < smallest:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {smallest}, found {value}")
    if not 3 <= arguments.sample <= MOST:
        raise ValueError(f"--sample: expected 3 to {MOST}, found {arguments.sample}")
    if arguments.page is not None and not arguments.page.absolute().parent.is_dir():
        raise ValueError(f"--page: expected a folder that exists, found {arguments.page.absolute().parent}")


def run(arguments: Arguments) -> int:
    check(arguments)
    start = time.perf_counter()
    python, reason = find_python(PEER, arguments.peer_python) if arguments.peer else (None, "")
    if arguments.peer and python is None:
        raise ValueError(f"--peer: {reason}; --peer-python names interpreters")
    with tempfile.TemporaryDirectory(prefix="datatypes-") as temporary:
        source = arguments.model or str(fetch_default_model())
        if arguments.peer and not Path(source).is_dir():  # both sides read the same bfloat16 weights
            source = str(
                merge(
                    open_checkpoint(source), None, Path(temporary) / "model", dtype="bfloat16", progress=sys.stderr.isatty()
                )
            )
        study = open_study(arguments, source)
        measure(arguments, study, start)
        if python is not None and "peer" not in study.journal.rows:
            study.journal.add("peer", measure_peer(study.texts, source, python, Path(temporary)))
    report = write(
        study,
        arguments.grid(),
        block_sizes=arguments.chosen("block_sizes"),
        folder=arguments.output,
        target=arguments.page or arguments.output / "report.md",
        peer=arguments.peer,
    )
    print(json.dumps(report))
    return 0 if report["peer"] is None or all(kind["equal"] for kind in report["peer"]["kinds"].values()) else 1


def open_study(arguments: Arguments, source: str) -> Study:
    """Reads all small files."""
    checkpoint = open_checkpoint(source)
    causal_family_of(checkpoint.config)  # raises for an encoder-decoder
    config = checkpoint.model_config
    if checkpoint.quantization is not None:
        raise ValueError(f"{source}: expected weights in 16 or 32 bits, found {checkpoint.quantization}")
    tokenizer = load_tokenizer(arguments.model or str(fetch_default_model()))
    texts = read_texts(
        arguments.data,
        arguments.split,
        tokenizer,
        count=arguments.chosen("texts"),
        length=arguments.chosen("length"),
        seed=arguments.seed,
    )
    prompts, asked = None, ""
    if arguments.questions is not None:
        most = arguments.chosen("most_questions")
        drawn = read_questions(arguments.questions, shots=0, limit=most, seed=arguments.seed)
        prompts = encode_questions(drawn.questions, tokenizer, 2048)
        asked = f"{Path(arguments.questions).name}: {len(prompts.tokens)} questions"
    method = {
        "model": "SmolLM2-135M-Instruct" if arguments.model is None else Path(arguments.model).name,
        "texts": {Path(name).name: count for name, count in texts.sources.items()},
        "tokens": int(texts.predicted.sum()),
        "length": arguments.chosen("length"),
        "questions": None if prompts is None else len(prompts.tokens),
        "question_block_sizes": list(arguments.question_block_sizes),
        "sample": arguments.sample,
        "units": arguments.units,
        "seed": arguments.seed,
        "dtype": str(np.dtype(default_dtype())),
        "platform": jax.default_backend(),
        "digest": digest(texts.tokens, () if prompts is None else prompts.tokens),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    journal = Journal(arguments.output / "cells.jsonl", method)
    return Study(checkpoint, tuple(linear_mappings(config.parameter_mappings)), texts, prompts, asked, method, journal)


def digest(*groups: Any) -> str:
    """Of all tokens that are read: what other texts or questions change."""
    hashed = hashlib.sha256()
    for tokens in (row for group in groups for row in group):
        hashed.update(np.asarray(tokens, np.int32).tobytes() + b".")
    return hashed.hexdigest()[:16]


def measure(arguments: Arguments, study: Study, start: float) -> None:
    """Measures the cells that are missing, until the time is over."""
    journal, mesh, shown = study.journal, data_mesh(), sys.stderr.isatty()
    if journal.found:
        tell(f"{arguments.output}: {journal.found} cells are there already")
    if "normality" not in journal.rows:
        names = [name for key in study.parameter_mappings for name in key.names()]
        figures = examine(
            study.checkpoint, names, sample=arguments.sample, units=arguments.units, seed=arguments.seed, progress=shown
        )
        journal.add("normality", figures)
    missing = [how for how in arguments.grid() if key_of(how) not in journal.rows]
    if not missing:
        return
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        model = load_model(study.checkpoint, quantization=None, mesh=mesh, progress=shown)
        graphdef, state = nnx.split(model)
        del model
        with tqdm(missing, desc="cells", unit="cell") as bar:
            for how in bar:
                bar.set_postfix_str(key_of(how))
                began = time.perf_counter()
                errors = (
                    {}
                    if how is None
                    else quantize_in_place(state, study.checkpoint, study.parameter_mappings, how, progress=shown)
                )
                row = {"errors": errors, **ask(arguments, study, graphdef, state, how)}
                journal.add(key_of(how), {**row, "seconds": time.perf_counter() - began})
                if arguments.minutes is not None and time.perf_counter() - start > 60 * arguments.minutes:
                    break


def ask(arguments: Arguments, study: Study, graphdef: Any, state: Any, how: Quantization | None) -> dict[str, Any]:
    """What a model says to the texts and questions of a cell."""
    shown, size = sys.stderr.isatty(), arguments.batch_size
    row: dict[str, Any] = {"losses": text_losses(graphdef, state, study.texts, batch_size=size, progress=shown).tolist()}
    sizes = arguments.question_block_sizes
    if study.prompts is None or (how is not None and sizes and how.block_size not in sizes):
        return row
    logits = letter_logits(graphdef, state, study.prompts, batch_size=size, progress=shown).astype(np.float64)
    answers = np.asarray(study.prompts.answers)
    right = logits[np.arange(len(answers)), answers]
    row["right"] = (logits.argmax(1) == answers).tolist()
    row["letter_losses"] = (np.log(np.exp(logits - right[:, None]).sum(1))).tolist()
    return row


def measure_peer(texts: Texts, folder: str, python: Path, temporary: Path) -> dict[str, Any]:
    """The losses of transformers with bitsandbytes on the same tokens."""
    tokens = temporary / "tokens.json"
    tokens.write_text(json.dumps([row.tolist() for row in texts.tokens]), encoding="utf-8")
    kinds = (DENSE, *(f"{name}{double}" for name in ("nf4", "fp4") for double in ("", "-double")))
    words = [*command(python, "hf_nll.py", model=folder, tokens=tokens), "--kinds", *kinds]
    tell("bitsandbytes reads the texts")
    found = run_worker(words)
    return {name: found[name] for name in ("losses", "losses_in_eval", "versions")}


if __name__ == "__main__":
    sys.exit(main())
