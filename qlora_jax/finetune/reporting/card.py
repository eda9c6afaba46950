"""The model card beside an adapter, README.md, with the metadata for the hub and the way to load the adapter.

    base_model, library_name: peft (where PEFT has the method), pipeline_tag, tags (base_model:adapter:…, lora), datasets
    how to use it · results · options of the run

The card has no folders of this machine: it shows the last part of the name of a local file. A base that is a local folder is
not named as base_model, which is a repository id.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import ModelCard, ModelCardData

from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.cli import to_dict
from qlora_jax.data import NAMED
from qlora_jax.finetune.options.options import Options
from qlora_jax.models import DecoderConfig, ModelConfig
from qlora_jax.peft import LoRA, Method
from qlora_jax.quant import EmbeddingStorage, Quantization
from qlora_jax.train import TOKENS, Unit, perplexity

CARD = "README.md"
DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the default model on the hub
_TAG = "qlora_jax"
_CONVERTED = (
    "It was initialized from the base's weights (`{initialization}`), which were changed for that, and is converted to a"
    " LoRA for the original weights. With PEFT it belongs on these, unquantised; qlora_jax makes the base of the training"
    " again."
)


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card describes.

    Attributes:
        options: the options of the run.
        config: the config of the base.
        method: the method of fine-tuning.
        metadata: how the base was stored, and the initialization that the adapter was converted from.
        rows: the rows of the run.
        chosen_step: the step whose adapter is saved.
        unit: the unit over which the losses are means.
    """

    options: Options
    config: ModelConfig
    method: Method
    metadata: AdapterMetadata
    rows: list[dict[str, Any]]
    chosen_step: int
    unit: Unit = TOKENS


def write_card(folder: Path, card: Card) -> None:
    """Write the card into the folder of the adapter, or of the model."""
    options, method, metadata = card.options, card.method, card.metadata
    base = _hub_id(options.model.model) if options.model.model else DEFAULT_BASE
    name = options.watch.push_to_hub or options.run.output.name
    shown = base or Path(options.model.model or "").name
    if method.is_full:
        usage, command = _with_transformers(name), f"--model {name}"
    else:
        # A converted adapter belongs on the original weights.
        quantization = None if metadata.converted_from else metadata.quantization
        own_tokenizer = (folder / "tokenizer.json").is_file()
        usage = ""
        if method.in_peft:
            usage = _with_peft(shown, name, card.config, quantization, own_tokenizer=own_tokenizer)
        command = f"--model {shown} --adapter {name}"
    stored = _stored(metadata.quantization, metadata.embedding_storage)
    text = "\n\n".join(
        [
            f"# {name.rpartition('/')[2]}",
            f"{method.title} of {f'[{base}](https://huggingface.co/{base})' if base else f'`{shown}`'}, trained with "
            f"qlora_jax on the base's weights {stored}, in {card.chosen_step} steps on {_data(options)}.",
            "## Use",
            *([_CONVERTED.format(initialization=metadata.converted_from)] if metadata.converted_from else []),
            *([usage] if usage else []),
            f'```\npython scripts/generate.py {command} --prompt "…"  # of qlora_jax\n```',
            *(["## Results", table] if (table := _results(card.rows, card.chosen_step, card.unit)) else []),
            "## Training procedure",
            f"The options that are not the defaults:\n\n```json\n{json.dumps(_chosen(options), indent=2)}\n```",
            f"### Framework versions\n\n- JAX {jax.__version__}",
        ]
    )
    ModelCard(f"---\n{_hub_data(card, base).to_yaml()}\n---\n\n{text}\n").save(folder / CARD)


def _hub_data(card: Card, base: str | None) -> ModelCardData:
    """Return the metadata for the hub."""
    is_full, library = card.method.is_full, "peft" if card.method.in_peft else None
    sources = [_hub_id(source) for source in card.options.data.sources]
    relation = [f"base_model:{'finetune' if is_full else 'adapter'}:{base}"] if base else []
    return ModelCardData(
        base_model=base,
        library_name="transformers" if is_full else library,
        pipeline_tag="text-generation" if isinstance(card.config, DecoderConfig) else "text2text-generation",
        tags=[*relation, *_tags(card.method, card.metadata.quantization), _TAG],
        datasets=[source for source in sources if source] or None,
    )


def _hub_id(source: str) -> str | None:
    """Return the repository id that names a model or data set; None for a local one."""
    if os.path.exists(os.path.expanduser(source)):
        return None
    return NAMED[source].hub if source in NAMED else source


def _stored(quantization: Quantization | None, embedding_storage: EmbeddingStorage) -> str:
    packed = "" if embedding_storage == "none" else f", its token table and head in {embedding_storage.upper()}"
    if quantization is None:
        return f"as they are{packed}"
    double = " with double quantisation" if quantization.double_quantization else ""
    return f"in {quantization.data_type.upper()} (blocks of {quantization.block_size}){double}{packed}"


def _data(options: Options) -> str:
    if not options.data.sources:
        return "the instructions that qlora_jax ships with"
    return ", ".join(f"`{_hub_id(source) or Path(source).name}`" for source in options.data.sources)


def _tags(method: Method, quantization: Quantization | None) -> list[str]:
    if method.is_full:
        return ["full-fine-tuning"]
    return [method.name, *(["qlora"] if method.name == LoRA.name and quantization is not None else [])]


def _with_transformers(model: str) -> str:
    return "\n".join(
        [
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{model}")',
            f'model = AutoModelForCausalLM.from_pretrained("{model}")',
            "```",
        ]
    )


def _with_peft(
    base: str, adapter: str, config: ModelConfig, quantization: Quantization | None, *, own_tokenizer: bool
) -> str:
    model = "AutoModelForCausalLM" if isinstance(config, DecoderConfig) else "AutoModelForSeq2SeqLM"
    names, stored = [model, "AutoTokenizer"], ""
    if quantization is not None and quantization.data_type in ("nf4", "fp4"):
        names.append("BitsAndBytesConfig")
        stored = (
            f', quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{quantization.data_type}", '
            f"bnb_4bit_use_double_quant={quantization.double_quantization})"
        )
    return "\n".join(
        [
            "```python",
            "from peft import PeftModel",
            f"from transformers import {', '.join(names)}",
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{adapter if own_tokenizer else base}")',
            f'model = {model}.from_pretrained("{base}"{stored})',
            # Never fewer rows than the base's, which may have spare ones.
            *(["model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))"] if own_tokenizer else []),
            f'model = PeftModel.from_pretrained(model, "{adapter}")',
            "```",
        ]
    )


def _results(rows: list[dict[str, Any]], chosen_step: int, unit: Unit) -> str:
    """Return a table of the metrics before training and of the saved adapter; "" where nothing was measured."""
    at: Mapping[int, dict[str, Any]] = {row["step"]: row for row in rows}
    before, after = at.get(0, {}), at.get(chosen_step, {})
    lines = []
    titles = {key: f"held-out {key.removeprefix('eval_')}" for key in after if key.startswith("eval_")}
    for key, title in (titles | {"mmlu_accuracy": "MMLU, mean over subjects"}).items():
        if key in after:
            lines.append(f"| {title} | {f'{before[key]:.3f}' if key in before else ''} | {after[key]:.3f} |")
    if "eval_loss" in after and unit == TOKENS:
        first = f"{perplexity(before['eval_loss']):.2f}" if "eval_loss" in before else ""
        lines.insert(1, f"| held-out perplexity | {first} | {perplexity(after['eval_loss']):.2f} |")
    return "\n".join(["| | before | after |", "| --- | --- | --- |", *lines]) if lines else ""


def _chosen(options: Options) -> dict[str, Any]:
    """Return the options that differ from their defaults, without folders of this machine."""
    chosen: dict[str, Any] = {}
    defaults, values = to_dict(Options()), to_dict(options)
    for group in (field.name for field in dataclasses.fields(options)):
        different = {name: value for name, value in values[group].items() if value != defaults[group][name]}
        different.pop("output", None)
        if different:
            chosen[group] = {name: _without_folder(value) for name, value in different.items()}
    return chosen


def _without_folder(value: Any) -> Any:
    match value:
        case str() if os.path.exists(os.path.expanduser(value)):
            return Path(value).name
        case list():
            return [_without_folder(item) for item in value]
        case _:
            return value
