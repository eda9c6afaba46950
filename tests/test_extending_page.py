"""docs/extending.md: its family, schemas and objective work as written (tests/peft/test_methods_page.py has the method)."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.data import schemas
from qlora_jax.models import FAMILIES
from qlora_jax.models.families import Family
from qlora_jax.peft import LoRA
from qlora_jax.train import split

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


def code_of(heading: str) -> str:
    """Return the Python code below a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return "\n\n".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))


@pytest.mark.integration
def test_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    transformers: Any = pytest.importorskip("transformers")
    names: dict[str, Any] = {}
    exec(code_of("A model family"), names)
    monkeypatch.setitem(FAMILIES, "seed_oss", Family(names["seed_oss_config"]))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.SeedOssConfig(**sizes, vocab_size=101, num_key_value_heads=2, head_dim=16, attention_bias=True)
    model = transformers.SeedOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))  # biases and norms too
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(1, 101, (2, 12), np.int32)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).logits.numpy()
    ours = load_model(open_checkpoint(str(tmp_path)), quantization=None, dtype=jnp.float32, progress=False)
    graph, state = nnx.split(ours)
    found = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens)
    assert expected.std() > 0.5
    assert float(np.abs(np.asarray(found) - expected).max()) < 1e-3


def test_the_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    names = vars(schemas).copy()
    exec(code_of("A data schema"), names)
    for name in ("QUERY_REPLY", "DIALOGUE"):
        monkeypatch.setitem(schemas.SCHEMAS, names[name].name, names[name])
    user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    assert schemas.parse({"query": "Q", "reply": "A"}).messages == (user, assistant)
    assert schemas.parse({"dialogue": "Q\nA\nQ"}).messages == (user, assistant, user)


def test_the_objective(tiny_llama: Path) -> None:
    names: dict[str, Any] = {}
    exec(code_of("An objective"), names)
    options: Any = SimpleNamespace(
        data=SimpleNamespace(packs=True),
        optimizer=SimpleNamespace(neftune_alpha=0.0),
        context=SimpleNamespace(groups=1),
        objective=SimpleNamespace(focal_gamma=2.0),
    )
    loss = names["FOCAL"].step(options).loss
    model = load_model(
        open_checkpoint(str(tiny_llama)), quantization=None, method=LoRA(rank=2), dtype=jnp.float32, progress=False
    )
    tokens = np.random.default_rng(0).integers(3, 35, (2, 9), np.int32)
    mask = np.asarray([[0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0]], np.float32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}
    graph, adapter, frozen = split(model)

    def compute(adapter: Any, frozen: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, adapter, frozen)
        return loss(model, batch, None), model(batch["inputs"])

    (found, logits), gradient = jax.jit(jax.value_and_grad(compute, has_aux=True))(adapter, frozen)
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits), np.float64), batch["targets"][..., None], 2)[..., 0]
    np.testing.assert_allclose(found, (mask * -((1 - np.exp(log_p)) ** 2) * log_p).sum(), rtol=1e-5)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
