"""The model card beside an adapter, README.md, as PEFT's users expect it: metadata for the hub, and how to load the adapter.

    base_model, library_name: peft, pipeline_tag, tags (base_model:adapter:…, lora), datasets
    how to use it · results · options of the run

Names of this machine's folders stay out of it: of local files only the last part is told, and a base that is a local folder
is no base_model, which is a hub id.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import ModelCard, ModelCardData

from qlora_jax.cli import to_dict
from qlora_jax.data import NAMED
from qlora_jax.finetune.options.options import Options
from qlora_jax.models import DecoderConfig, ModelConfig
from qlora_jax.peft import LoRA, Method
from qlora_jax.quant import EmbeddingStorage, Quantization
from qlora_jax.train import TOKENS, Unit, perplexity

CARD = "README.md"
DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the default model is on the hub
_TAG = "qlora_jax"
_CONVERTED = (
    "It started from the base's weights (`{start}`), which were changed for that, and is converted to a LoRA for the"
    " original ones. With PEFT it belongs on these, unquantised; qlora_jax makes the base that it was trained on anew."
)


def write_card(
    folder: Path,
    options: Options,
    *,
    config: ModelConfig,
    quantization: Quantization | None,
    embedding_storage: EmbeddingStorage = "none",
    rows: list[dict[str, Any]],
    kept: int,
    unit: Unit = TOKENS,
    converted_from: str | None = None,
    method: Method | None = None,
) -> None:
    """Writes the card into the adapter's folder.

    Args:
        config: of the base.
        quantization: of the base's linear layers; None: they were dense.
        embedding_storage: storage of its token table and head.
        rows: the records of the run.
        kept: the step whose adapter it is.
        unit: what the losses are means over.
        converted_from: that of `AdapterMetadata`: other programs need the base's original weights then.
        method: of the adapter; None: LoRA.
    """
    kind = LoRA if method is None else type(method)
    base = _hub_id(options.model.model) if options.model.model else DEFAULT_BASE
    sources = [_hub_id(source) for source in options.data.sources]
    whole = kind.is_full
    data = ModelCardData(
        base_model=base,
        library_name="transformers" if whole else "peft",
        pipeline_tag="text-generation" if isinstance(config, DecoderConfig) else "text2text-generation",
        tags=[
            *([f"base_model:{'finetune' if whole else 'adapter'}:{base}"] if base else []),
            *_tags(quantization, kind),
            _TAG,
        ],
        datasets=[source for source in sources if source] or None,
    )
    name = options.watch.push_to_hub or options.run.output.name
    shown = base or Path(options.model.model or "").name
    text = "\n\n".join(
        [
            f"# {name.rpartition('/')[2]}",
            f"{kind.title} of "
            f"{f'[{base}](https://huggingface.co/{base})' if base else f'`{shown}`'}, trained with "
            f"qlora_jax on the base's weights "
            f"{_stored(quantization, embedding_storage)}, in {kept} steps on {_data(options)}.",
            "## Use",
            *([_CONVERTED.format(start=converted_from)] if converted_from else []),
            _with_transformers(name)
            if whole
            else _with_peft(
                shown,
                name,
                config,
                None if converted_from else quantization,
                own_tokenizer=(folder / "tokenizer.json").is_file(),
            ),
            f"```\npython scripts/generate.py {f'--model {name}' if whole else f'--model {shown} --adapter {name}'} "
            '--prompt "…"  # of qlora_jax\n```',
            *(["## Results", table] if (table := _results(rows, kept, unit)) else []),
            "## Training procedure",
            f"The options that are not the defaults:\n\n```json\n{json.dumps(_chosen(options), indent=2)}\n```",
            f"### Framework versions\n\n- JAX {jax.__version__}",
        ]
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / CARD)


def _hub_id(source: str) -> str | None:
    """The hub id that a model or data set is named by; None for local ones."""
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


def _tags(quantization: Quantization | None, method: type[Method]) -> list[str]:
    if method.is_full:
        return ["full-fine-tuning"]
    return [method.name, *(["qlora"] if method is LoRA and quantization is not None else [])]


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


def _results(rows: list[dict[str, Any]], kept: int, unit: Unit) -> str:
    """A table of what was measured before and of the adapter that is kept; "" where nothing was."""
    at: Mapping[int, dict[str, Any]] = {row["step"]: row for row in rows}
    before, after = at.get(0, {}), at.get(kept, {})
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
    """The options that differ from their defaults, without folders of this machine."""
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
