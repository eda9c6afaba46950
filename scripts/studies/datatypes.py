"""Study data types as the QLoRA paper does, for any decoder-only model: perplexity, zero-shot accuracy, errors, normality.

    python scripts/studies/datatypes.py --quick                                       blocks of 64 only, short texts
    python scripts/studies/datatypes.py --data mine.jsonl --questions mmlu.jsonl      the whole grid: 85 cells
    python scripts/studies/datatypes.py --model FOLDER --data-types nf4 fp4 int4 --block-sizes 64 128
    python scripts/studies/datatypes.py --quick --peer                                also the losses of bitsandbytes

Method. A cell of the grid is a data type, a block size, and double quantisation or none; the first cell is the dense model.
In each cell, all linear layers are quantised as `load_model` does it and the same texts are read; the questions are asked
without solved examples. The compute dtype is that of the platform (float32 on a CPU). The test of Shapiro and Wilk is
applied to every matrix of the dense model, which has to fit into memory. The details are in scripts/studies/datatype_study/.

Each cell is written to OUTPUT/cells.jsonl when it is finished. The same command continues an interrupted study, and with
--minutes the study stops by itself. OUTPUT then contains report.md with its plots, and report.json; the last line of the
output is JSON too. With --peer, the exit code is 1 if a loss differs from that of bitsandbytes by more than 1e-3.
"""

import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from qlora_jax import cli
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import default_dtype, load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import PLAIN_ANSWERS
from qlora_jax.errors import OptionError
from qlora_jax.evaluate import encode_questions, letter_logits, read_questions
from qlora_jax.export.merge import merge
from qlora_jax.models import causal_family_of, linear_mappings
from qlora_jax.nn import data_mesh
from qlora_jax.quant import BLOCK_SIZES, DATA_TYPES, DataType, Quantization
from scripts.benchmarks.workers import Peer, command, find_python, log, run_worker
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
    """Options of the study."""

    model: str | None = None
    """Folder, .gguf file or hub id of the model; SmolLM2-135M-Instruct if left out."""
    data: tuple[str, ...] = (PLAIN_ANSWERS,)
    """Files or hub ids of the texts, with rows as for scripts/train.py; the default data of the package if left out."""
    split: str | None = None
    """Split of a hub data set."""
    questions: str | None = None
    """File of MMLU questions, or cais/mmlu on the hub; no questions are asked if left out."""
    quick: bool = False
    """Use blocks of 64, and fewer and shorter texts and questions, unless other options are given."""
    data_types: tuple[DataType, ...] = DATA_TYPES
    """Data types to compare."""
    block_sizes: tuple[int, ...] | None = None
    """Numbers of weights that share a scale; 64, 32, 128, 256, 512 and 1024 if left out. The first of them is plotted."""
    double_quantization: Literal["both", "yes", "no"] = "both"
    """Whether scales are quantised too."""
    texts: int | None = None
    """Number of texts, drawn at random, equally many from each file; 200 if left out."""
    length: int | None = None
    """Maximum number of tokens in a text; 512 if left out."""
    most_questions: int | None = None
    """Number of questions, drawn at random; 500 if left out."""
    question_block_sizes: tuple[int, ...] = ()
    """Block sizes at which questions are asked; all if left out."""
    sample: int = 2000
    """Number of values of a matrix for the test of Shapiro and Wilk, at most 5000."""
    units: int = 64
    """Number of rows of a matrix that are tested separately."""
    batch_size: int = 8
    """Texts or questions in a batch."""
    seed: int = 0
    """Seed of all random choices."""
    minutes: float | None = None
    """Stop after the current cell when so many minutes have passed; the report then has the finished cells."""
    output: Path = Path("runs/datatypes")
    """Folder of cells, plots and reports."""
    page: Path | None = None
    """Markdown file to write, with its plots in the same folder; OUTPUT/report.md if left out."""
    peer: bool = False
    """Also measure the losses of transformers with bitsandbytes."""
    peer_python: tuple[Path, ...] = (Path(sys.executable),)
    """Python interpreters for bitsandbytes; the first that has its packages is used."""

    def chosen(self, name: str) -> Any:
        """Return an option as given, or its default for the whole or the quick grid."""
        given = getattr(self, name)
        return (QUICK if self.quick else WHOLE)[name] if given is None else given

    def grid(self) -> tuple[Quantization | None, ...]:
        """Return the cells of the grid in their order."""
        doubles = {"both": (True, False), "yes": (True,), "no": (False,)}[self.double_quantization]
        sizes = self.chosen("block_sizes")
        return (
            None,
            *(Quantization(name, size, double) for size in sizes for double in doubles for name in self.data_types),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(run, Arguments, __doc__, arguments)


def check(arguments: Arguments) -> None:
    """Raise OptionError for options that would fail only later."""
    sizes = arguments.chosen("block_sizes")
    wrong = [size for size in (*sizes, *arguments.question_block_sizes) if size not in BLOCK_SIZES]
    if wrong or not sizes:
        known = ", ".join(map(str, BLOCK_SIZES))
        raise OptionError(f"--block-sizes: expected one or more of {known}, found {wrong[0] if wrong else 'none'}")
    if not arguments.data_types:
        raise OptionError(f"--data-types: expected one or more of {', '.join(DATA_TYPES)}, found none")
    if not arguments.data:
        raise OptionError("--data: expected one or more sources of texts, found none")
    least = {"texts": 2 * len(arguments.data), "length": 16, "most_questions": 2, "units": 1, "batch_size": 1}
    for name, smallest in least.items():
        value = arguments.chosen(name) if name in WHOLE else getattr(arguments, name)
        if value < smallest:
            raise OptionError(f"--{name.replace('_', '-')}: expected at least {smallest}, found {value}")
    if not 3 <= arguments.sample <= MOST:
        raise OptionError(f"--sample: expected 3 to {MOST}, found {arguments.sample}")
    if arguments.page is not None and not arguments.page.absolute().parent.is_dir():
        raise OptionError(f"--page: expected a folder that exists, found {arguments.page.absolute().parent}")


def run(arguments: Arguments) -> int:
    """Run the study and return 0, or 1 where the losses of bitsandbytes differ too much."""
    check(arguments)
    try:
        report = run_study(arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues the study") from None
    print(json.dumps(report))
    return 0 if report["peer"] is None or all(kind["equal"] for kind in report["peer"]["kinds"].values()) else 1


def run_study(arguments: Arguments) -> dict[str, Any]:
    """Measure what is missing, write the report and return its summary."""
    start = time.perf_counter()
    python, reason = find_python(PEER, arguments.peer_python) if arguments.peer else (None, "")
    if arguments.peer and python is None:
        raise OptionError(f"--peer: {reason}; --peer-python names interpreters")
    with tempfile.TemporaryDirectory(prefix="datatypes-") as temporary:
        source = arguments.model or str(fetch_default_model())
        if arguments.peer and not Path(source).is_dir():  # both programs read the same bfloat16 weights
            source = str(
                merge(
                    open_checkpoint(source), None, Path(temporary) / "model", dtype="bfloat16", progress=sys.stderr.isatty()
                )
            )
        study = open_study(arguments, source)
        measure(arguments, study, start)
        if python is not None and "peer" not in study.journal.rows:
            study.journal.add("peer", measure_peer(study.texts, source, python, Path(temporary)))
    return write(
        study,
        arguments.grid(),
        block_sizes=arguments.chosen("block_sizes"),
        folder=arguments.output,
        target=arguments.page or arguments.output / "report.md",
        peer=arguments.peer,
    )


def open_study(arguments: Arguments, source: str) -> Study:
    """Read all small files and open the journal."""
    checkpoint = open_checkpoint(source)
    causal_family_of(checkpoint.config)  # raises for an encoder-decoder
    config = checkpoint.model_config
    if checkpoint.quantization is not None:
        raise OptionError(f"{source}: expected weights in 16 or 32 bits, found {checkpoint.quantization}")
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
    """Return a hash of all tokens that are read, which differs for other texts or questions."""
    hashed = hashlib.sha256()
    for tokens in (row for group in groups for row in group):
        hashed.update(np.asarray(tokens, np.int32).tobytes() + b".")
    return hashed.hexdigest()[:16]


def measure(arguments: Arguments, study: Study, start: float) -> None:
    """Measure the missing cells until the time is over."""
    journal, mesh, shown = study.journal, data_mesh(), sys.stderr.isatty()
    if journal.found:
        log(f"{arguments.output}: {journal.found} cells are finished already")
    if "normality" not in journal.rows:
        names = [name for key in study.parameter_mappings for name in key.names()]
        measured = examine(
            study.checkpoint, names, sample=arguments.sample, units=arguments.units, seed=arguments.seed, progress=shown
        )
        journal.add("normality", measured)
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
    """Return the losses of the texts and the answers to the questions in one cell."""
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
    """Return the losses of transformers with bitsandbytes on the same tokens."""
    tokens = temporary / "tokens.json"
    tokens.write_text(json.dumps([row.tolist() for row in texts.tokens]), encoding="utf-8")
    kinds = (DENSE, *(f"{name}{double}" for name in ("nf4", "fp4") for double in ("", "-double")))
    words = [*command(python, "hf_nll.py", model=folder, tokens=tokens), "--kinds", *kinds]
    log("bitsandbytes reads the texts")
    found = run_worker(words)
    return {name: found[name] for name in ("losses", "losses_in_eval", "versions")}


if __name__ == "__main__":
    sys.exit(main())
