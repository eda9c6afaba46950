"""The model card, read by the hub's own library."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer, save_tokenizer
from qlora_jax.finetune import DataOptions, LoRAOptions, ModelOptions, Options, RunOptions, WatchOptions
from qlora_jax.finetune.reporting.card import Card, write_card
from qlora_jax.models import causal_family_of
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization
from qlora_jax.train import PAIRS

ROWS = [
    {"step": 0, "eval_loss": 2.0, "mmlu_accuracy": 0.25},
    {"step": 1, "loss": 1.5},
    {"step": 2, "loss": 1.0, "eval_loss": 0.5, "mmlu_accuracy": 0.3125},
    {"step": 3, "loss": 0.5, "eval_loss": 0.75},
]


@pytest.fixture
def config(tiny_llama: Path) -> Any:
    checkpoint = open_checkpoint(str(tiny_llama))
    return causal_family_of(checkpoint.config).config(checkpoint.config)


def card_of(folder: Path, options: Options, config: Any, **arguments: Any) -> ModelCard:
    quantization = arguments.pop("quantization", Quantization())
    values = {
        "method": LoRA(),
        "metadata": AdapterMetadata(quantization, "chat"),
        "rows": ROWS,
        "chosen_step": 2,
    } | arguments
    write_card(folder, Card(options, config, **values))
    return ModelCard.load(folder / "README.md")


def test_a_card_of_hub_names(tmp_path: Path, config: Any) -> None:
    options = Options(
        ModelOptions(model="meta-llama/Llama-3.2-1B"),
        LoRAOptions(rank=8),
        DataOptions(data=("oasst1", "owner/more", str(tmp_path / "own.jsonl"))),
        watch=WatchOptions(push_to_hub="me/mine"),
    )
    (tmp_path / "own.jsonl").touch()
    card = card_of(tmp_path, options, config)
    assert card.data.to_dict() == {
        "base_model": "meta-llama/Llama-3.2-1B",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:meta-llama/Llama-3.2-1B", "lora", "qlora", "qlora_jax"],
        "datasets": ["timdettmers/openassistant-guanaco", "owner/more"],
    }
    assert card.text.strip().startswith("# mine\n")
    assert "in NF4 (blocks of 64) with double quantisation, in 2 steps on `timdettmers/openassistant-guanaco`" in card.text
    assert "| held-out loss | 2.000 | 0.500 |" in card.text
    assert "| held-out perplexity | 7.39 | 1.65 |" in card.text
    assert "| MMLU, mean over subjects | 0.250 | 0.312 |" in card.text
    assert '"rank": 8' in card.text
    assert '"own.jsonl"' in card.text
    assert str(tmp_path) not in card.text, "where it lay is nobody's business"
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert "PeftModel.from_pretrained(model, 'me/mine')" in calls
    assert "AutoTokenizer.from_pretrained('meta-llama/Llama-3.2-1B')" in calls
    assert "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)" in calls
    assert "generate.py --model meta-llama/Llama-3.2-1B --adapter me/mine" in card.text


def test_a_tokenizer_of_the_adapters_own(tmp_path: Path, tiny_llama: Path, config: Any) -> None:
    options = Options(ModelOptions(model="owner/base"), watch=WatchOptions(push_to_hub="me/mine"))
    save_tokenizer(load_tokenizer(tiny_llama), tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path, options, config).text, re.DOTALL)
    lines = [ast.unparse(node) for node in ast.parse(code).body]
    assert lines[2] == "tokenizer = AutoTokenizer.from_pretrained('me/mine')"
    assert lines[4:] == [
        "model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))",
        "model = PeftModel.from_pretrained(model, 'me/mine')",
    ]


def test_a_card_of_local_names(tmp_path: Path, tiny_llama: Path, config: Any) -> None:
    options = Options(ModelOptions(model=str(tiny_llama)), run=RunOptions(output=tmp_path / "run"))
    card = card_of(tmp_path, options, config, quantization=None, rows=[{"step": 1, "loss": 1.0}], chosen_step=1)
    assert "base_model" not in card.data.to_dict()
    assert "datasets" not in card.data.to_dict()
    assert card.data.tags == ["lora", "qlora_jax"]
    assert f"`{tiny_llama.name}`" in card.text
    assert str(tiny_llama) not in card.text
    assert "## Results" not in card.text
    assert "BitsAndBytes" not in card.text
    assert card_of(tmp_path, Options(), config).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_loss_over_pairs_has_no_perplexity(tmp_path: Path, config: Any) -> None:
    rows = [{"step": 0, "eval_loss": 0.7}, {"step": 2, "eval_loss": 0.5, "eval_rewards/accuracies": 0.75}]
    text = card_of(tmp_path, Options(), config, rows=rows, unit=PAIRS).text
    assert "| held-out loss | 0.700 | 0.500 |" in text
    assert "| held-out rewards/accuracies |  | 0.750 |" in text
    assert "perplexity" not in text


def test_a_method_that_peft_does_not_have(tmp_path: Path, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card does not say that PEFT loads the adapter."""
    monkeypatch.setattr(LoRA, "in_peft", False)
    card = card_of(tmp_path, Options(), config)
    assert "library_name" not in card.data.to_dict()
    assert "python\n" not in card.text
    assert "PeftModel" not in card.text
    assert "python scripts/generate.py" in card.text
