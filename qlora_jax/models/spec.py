"""One description of a model: its architecture, how its weights are stored, and what trains in it.

The loader, the training step, the planner and the precompiled programs all build the model from this value, so
that they agree on every shape.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qlora_jax.models.families import FAMILIES, Model, ModelConfig
from qlora_jax.models.stack import Remat
from qlora_jax.nn import AttentionTarget, abstract_module, attention_target
from qlora_jax.peft import LoRA, Method
from qlora_jax.quant import EmbeddingStorage, Quantization

__all__ = ["ModelSpec"]


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model without its values.

    Attributes:
        config: the parsed config.json.
        quantization: storage of the linear layers; None: dense.
        embedding_storage: storage of the embedding and the output head.
        method: the method of fine-tuning; None: a model without an adapter.
        dtype: dtype of activations and dense weights.
        remat: which residuals the backward pass saves; see `CausalLM`.
        dense_modules: the full names of linear layers that stay dense although the others are quantised.
    """

    config: ModelConfig
    quantization: Quantization | None = Quantization()
    embedding_storage: EmbeddingStorage = "none"
    method: Method | None = LoRA()
    dtype: DTypeLike = "bfloat16"
    remat: Remat = "full"
    dense_modules: frozenset[str] = frozenset()

    @property
    def residuals_on_host(self) -> bool:
        """Whether the layers save their residuals in host memory."""
        return self.remat == "offload"

    def build(self, rngs: nnx.Rngs, attention: AttentionTarget | None = None) -> Model:
        """Return the model with random weights.

        Args:
            attention: the device whose kernel computes causal attention; the default one if None.

        Raises:
            OptionError: the method does not fit the model.
        """
        return FAMILIES[self.config.family].model(
            self.config,
            quantization=self.quantization,
            embedding_storage=self.embedding_storage,
            method=self.method,
            dtype=jnp.dtype(self.dtype),
            attention=attention or attention_target(),
            remat=self.remat,
            dense_modules=self.dense_modules,
            rngs=rngs,
        )

    def abstract(self, platform: str | AttentionTarget | None = None) -> Model:
        """Return the model with shapes in place of arrays (`nnx.eval_shape`).

        Args:
            platform: the platform ("cpu", "gpu" or "tpu") or the device whose kernel computes causal attention; the default
                device if None.

        Raises:
            OptionError: the method does not fit the model.
        """
        return abstract_module(lambda: self.build(nnx.Rngs(0), attention_target(platform)))
