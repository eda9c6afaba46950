"""The pages of README.md and docs/: their blocks of code, and the options of the programs that they name."""

import dataclasses
import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

from qlora_jax.commands import COMMANDS
from qlora_jax.commands.evaluate import EVALUATIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# The dataclasses of qlora.py, and what its scripts set beside them.
_ARGUMENTS = """
    model_name_or_path trust_remote_code use_auth_token eval_dataset_size max_train_samples max_eval_samples
    source_max_len target_max_len dataset dataset_format cache_dir train_on_source mmlu_split mmlu_dataset
    do_mmlu_eval max_mmlu_samples mmlu_source_max_len full_finetune adam8bit double_quant quant_type bits lora_r
    lora_alpha lora_dropout max_memory_MB report_to output_dir optim per_device_train_batch_size
    gradient_accumulation_steps max_steps weight_decay learning_rate remove_unused_columns max_grad_norm
    gradient_checkpointing do_train lr_scheduler_type warmup_ratio logging_steps group_by_length save_strategy
    save_steps save_total_limit max_new_tokens min_new_tokens do_sample num_beams num_beam_groups penalty_alpha
    use_cache temperature top_k top_p typical_p diversity_penalty repetition_penalty length_penalty
    no_repeat_ngram_size lora_modules adam_beta2 bf16 data_seed seed eval_steps evaluation_strategy logging_strategy
    do_eval per_device_eval_batch_size dataloader_num_workers
"""
QLORA_ARGUMENTS = frozenset(_ARGUMENTS.split())


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code between two fences.

    Attributes:
        page: its page, relative to the root.
        language: what the fence says, such as "python"; "" for command lines and what they print.
        text: the lines between the fences.
    """

    page: str
    language: str
    text: str

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]

    def commands(self) -> list[str]:
        """Return the command lines of the block, those with several lines as one and those joined by && apart."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page, which is named relative to the root.

    Raises:
        ValueError: a fence that is indented, or has no end.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    if 2 * len(found) != text.count("```"):
        raise ValueError(f"{page}: expected fences at the start of a line, each block with an end, found others")
    return [Block(page, language, code) for language, code in found]


def python_of(page: str) -> list[str]:
    """Return the Python code of a page, block by block."""
    return [block.text for block in blocks(page) if block.language == "python"]


@cache
def options_of(script: str) -> type[Any]:
    """Return the options of a program by its path below scripts/, and the name of its sub-command if it has any."""
    script, _, name = script.partition(" ")
    parts = ("evaluations", name) if name else Path(script).with_suffix("").parts
    module = importlib.import_module(".".join(("qlora_jax.commands" if name or parts[0] in COMMANDS else "scripts", *parts)))
    return next(getattr(module, name) for name in ("PlanCommandOptions", "Arguments", "Options") if hasattr(module, name))


def program_of(arguments: list[str]) -> tuple[str, list[str]]:
    """Return (the program as `options_of` takes it, its own arguments) of `python scripts/… ARGUMENTS`."""
    script, *rest = arguments[1:]
    program = str(Path(script).relative_to("scripts"))
    if program == "evaluate.py":
        program += f" {rest.pop(0) if rest[0] in EVALUATIONS else 'mmlu'}"
    return program, rest
