"""Every recipe is a config of the main job; and the figures of Guanaco are those of the paper."""

from pathlib import Path

import pytest

from qlora_jax.cli import parse
from qlora_jax.finetune import Options

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))


def read(path: Path, *flags: str) -> Options:
    return parse(Options, description=None, arguments=["--config", str(path), *flags])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_a_config(path: Path) -> None:
    options = read(path)
    options.method()
    options.model.quantization()
    assert options.model.model is not None
    assert options.run.output == Path("runs") / path.stem
    assert f"recipes/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("size", "learning_rate", "dropout"), [("7b", 2e-4, 0.1), ("13b", 2e-4, 0.05), ("33b", 1e-4, 0.05), ("65b", 1e-4, 0.05)]
)
def test_guanaco(size: str, learning_rate: float, dropout: float) -> None:
    options = read(next(path for path in RECIPES if path.stem == f"guanaco-{size}"))
    assert (options.lora.rank, options.lora.alpha, options.lora.dropout) == (64, 16, dropout)
    assert options.optimizer.learning_rate == learning_rate
    assert (options.optimizer.schedule, options.optimizer.beta2, options.optimizer.max_grad_norm) == ("constant", 0.999, 0.3)
    assert options.run.batch_size * options.run.accumulation_steps == 16
    assert options.run.max_steps == 1875
    assert (options.model.data_type, options.model.double_quantization) == ("nf4", True)
