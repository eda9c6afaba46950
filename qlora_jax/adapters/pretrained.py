"""The one road from names to a model: base, adapter, tokenizer, and what was recorded beside them.

    open_pretrained    resolves each name once, opens all small files, and makes every check that needs no weights
    Pretrained.load    reads the weights

The base is stored as it was when the adapter was trained, and the tokenizer is the adapter's own where it has one. Commands
whose options name a model (`PretrainedOptions`) go this way. So does the training job: it begins with `open_unchecked`, adds
what the run brings (`with_scaling`, `with_method`, `with_special_tokens`, each of which returns a changed value), and then
calls `check`.
"""

import dataclasses
import logging
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from jax.sharding import Mesh
from jax.typing import DTypeLike

from qlora_jax.adapters.bind import load_adapter
from qlora_jax.adapters.files import Adapter, read_adapter
from qlora_jax.adapters.fit import check_all, check_family
from qlora_jax.adapters.metadata import METADATA, AdapterMetadata, QuantizationChoice, read_adapter_metadata, with_scaling
from qlora_jax.adapters.peft_config import resolve_adapter
from qlora_jax.adapters.special_tokens import (
    add_special_tokens,
    resized_for_adapter,
    train_token_rows,
    with_token_rows,
)
from qlora_jax.adapters.weight_init import split_initialization
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.hub import Snapshot, resolve
from qlora_jax.checkpoint.load import checked_rewrite, default_dtype, load, storage_of
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer, stated_ends, stop_ids, warn_of_unknown_ends
from qlora_jax.checkpoint.tokenizer_files import add_from_folder
from qlora_jax.errors import OptionError
from qlora_jax.models import Model, ModelSpec, Origin, Remat, ResizedEmbeddings, RopeScaling
from qlora_jax.peft import LoRA, Method, Subtracted
from qlora_jax.quant import DataType, EmbeddingStorage, Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_logger = logging.getLogger(__name__)

__all__ = ["AS_TRAINED", "Pretrained", "PretrainedOptions", "open_pretrained", "open_unchecked"]

AS_TRAINED = QuantizationChoice()  # the storage that the adapter's metadata name, else the default


@dataclasses.dataclass(frozen=True)
class PretrainedOptions:
    """Which model."""

    model: str | None = None
    """Folder, .gguf file or hub id; SmolLM2-135M-Instruct, fetched once (98 MB), if left out."""
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter in PEFT's format."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    data_type: DataType | Literal["none"] | None = None
    """Storage of the linear layers, as the adapter was trained (else nf4) if left out; none keeps them dense, which is
    faster on a CPU and takes more memory."""
    block_size: int | None = None
    """Weights that share a scale; as the adapter was trained, else 64, if left out."""
    double_quantization: bool | None = None
    """Whether the scales are quantised as well; as the adapter was trained, else yes, if left out."""
    embedding_storage: EmbeddingStorage | None = None
    """Storage of the embedding and the output head; as the adapter was trained, else none (dense), if left out."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto: bfloat16 on GPU and TPU, float32 on CPU."""

    def open(self) -> "Pretrained":
        """Open what the options name; see `open_pretrained`."""
        return open_pretrained(
            self.model,
            self.adapter,
            revision=self.revision,
            quantization=QuantizationChoice(self.data_type, self.block_size, self.double_quantization),
            embedding_storage=self.embedding_storage,
            dtype=None if self.dtype == "auto" else self.dtype,
        )


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model whose small files are read and checked, and whose weights are not read yet.

    Attributes:
        base: the files of the base model, of one commit.
        checkpoint: the opened base, with the embeddings that the adapter or new special tokens need, and scaled positions.
        tokenizer: the adapter's own where it has one, else that of the base.
        adapter: the adapter that `load` puts into the model; None: it makes a new adapter, where there is a method.
        adapter_metadata: what was recorded when the adapter was trained; None: nothing.
        subtracted: what the adapter had subtracted from the weights of the base before these were stored; None: nothing.
        method: the method of fine-tuning that the model is made with: the adapter's own, or one for a new adapter.
        quantization: storage of the linear layers; None: dense.
        embedding_storage: storage of the token embedding and the head.
        scaling: the scaling of positions that `checkpoint` has; None: the positions of the base.
        dtype: of activations and dense weights.
        remat: what the backward pass recomputes.
    """

    base: Snapshot
    checkpoint: Checkpoint
    tokenizer: "PreTrainedTokenizerFast"
    adapter: Adapter | None = None
    adapter_metadata: AdapterMetadata | None = None
    subtracted: Subtracted | None = None
    method: Method | None = None
    quantization: Quantization | None = Quantization()
    embedding_storage: EmbeddingStorage = "none"
    scaling: RopeScaling | None = None
    dtype: DTypeLike = "float32"
    remat: Remat = "full"

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids of the tokens that end an answer."""
        return stop_ids(self.base, self.tokenizer)

    @cached_property
    def spec(self) -> ModelSpec:
        """The description of the model that `load` makes."""
        return ModelSpec(
            self.checkpoint.model_config,
            self.quantization,
            self.embedding_storage,
            self.method,
            self.dtype,
            self.remat,
            frozenset() if self.quantization is None else self.checkpoint.dense_modules,
        )

    @cached_property
    def abstract(self) -> Model:
        """The model with shapes in place of arrays, traced once.

        Raises:
            QLoRAError: the method does not fit the model.
        """
        return self.spec.abstract()

    def check(self) -> None:
        """Raise QLoRAError where base, adapter and method do not fit each other, as far as names and shapes show."""
        check_all(self.checkpoint, self.adapter, self.abstract)
        checked_rewrite(self.checkpoint, self.spec, self.subtracted)

    def with_scaling(self, scaling: RopeScaling | None) -> "Pretrained":
        """Return the same with scaled positions of the base; None leaves them as they are.

        Raises:
            QLoRAError: the positions cannot be scaled, or are scaled already.
        """
        if scaling is None:
            return self
        return dataclasses.replace(self, checkpoint=with_scaling(self.checkpoint, scaling), scaling=scaling)

    def with_method(self, method: Method | None) -> "Pretrained":
        """Return the same with another method of fine-tuning, for a new adapter, or like the adapter's own."""
        return dataclasses.replace(self, method=method)

    def with_special_tokens(self, tokens: tuple[str, ...]) -> "Pretrained":
        """Return the same with new special tokens, whose embeddings the method trains too.

        The tokens are added to `tokenizer` in place. Without tokens, or with a method other than LoRA, nothing changes.

        Raises:
            OptionError: the vocabulary has a token already, or the rows cannot be trained.
            UnsupportedError: the model is not decoder-only.
        """
        if not tokens or self.method is None or not self.method.rank:
            return self
        ids = add_special_tokens(self.tokenizer, tokens)
        checkpoint = with_token_rows(self.checkpoint, ids)
        return dataclasses.replace(
            self, checkpoint=checkpoint, method=train_token_rows(cast(LoRA, self.method), checkpoint, ids)
        )

    def load(self, *, mesh: Mesh | None = None, seed: int = 0, progress: bool = True) -> Model:
        """Return the model with its adapter.

        Args:
            mesh: devices over which the frozen weights are sharded; None for the default device.
            seed: seed of the random initial values of a new adapter.
            progress: whether to show a progress bar.

        Raises:
            CheckpointError: weights that are NaN or infinite.
        """
        model, subtracted = self.load_base(mesh=mesh, seed=seed, progress=progress)
        resized = None if self.adapter is None else self.adapter.resized_embeddings
        model.origin = Origin(
            self.base.name,
            scaling=self.scaling,
            subtracted=subtracted,
            text_prefix=self.checkpoint.text_prefix,
            template=None if self.adapter_metadata is None else self.adapter_metadata.template,
            resized_embeddings=ResizedEmbeddings(resized) if resized else None,
        )
        return model if self.adapter is None else load_adapter(model, self.adapter)

    def load_base(
        self, *, mesh: Mesh | None = None, seed: int = 0, progress: bool = True
    ) -> tuple[Model, Subtracted | None]:
        """Return (the model with a new adapter, what was subtracted from its weights), for the training job.

        The job compiles its programs for `abstract` while the weights are loaded. This model has the same graph definition,
        because it has no `origin`.
        """
        return load(
            self.checkpoint,
            self.spec,
            abstract=self.abstract,
            subtracted=self.subtracted,
            mesh=mesh,
            seed=seed,
            progress=progress,
        )


def open_pretrained(
    model: str | Path | Snapshot | None = None,
    adapter: str | Path | Snapshot | None = None,
    *,
    revision: str | None = None,
    quantization: Quantization | QuantizationChoice | None = AS_TRAINED,
    embedding_storage: EmbeddingStorage | None = None,
    method: Method | None = None,
    dtype: DTypeLike | None = None,
    remat: Remat = "full",
) -> Pretrained:
    """Open a base model, with an adapter or without, and check that they fit. No weights of the base are read.

    Args:
        model: a folder, a .gguf file or a repository id; SmolLM2-135M-Instruct if None.
        adapter: a folder or a repository id of an adapter in PEFT's format; None: no adapter.
        revision: branch, tag or commit of the base's repository.
        quantization: storage of the linear layers; None stores them dense. The fields that a `QuantizationChoice` leaves
            open are as the adapter was trained.
        embedding_storage: storage of the token embedding and the head; as the adapter was trained, else "none", if None.
        method: the method of fine-tuning of a new adapter; None: a model without one. An adapter has its own method.
        dtype: of activations and dense weights; that of the platform if None.
        remat: what the backward pass recomputes.

    Raises:
        QLoRAError: files that are missing, damaged, or do not fit each other; or both an adapter and a method.
        OSError: files that cannot be read.
    """
    if adapter is not None and method is not None:
        raise OptionError(f"method: expected none beside the adapter {adapter}, which has its own, found {method}")
    opened = open_unchecked(
        model, adapter, revision=revision, quantization=quantization, embedding_storage=embedding_storage
    )
    metadata, method = opened.adapter_metadata, method if opened.adapter is None else opened.method
    opened = opened.with_scaling(None if metadata is None else metadata.scaling)
    opened = dataclasses.replace(opened, method=method, dtype=default_dtype() if dtype is None else dtype, remat=remat)
    opened.check()
    return opened


def open_unchecked(
    model: str | Path | Snapshot | None,
    adapter: str | Path | Snapshot | None,
    *,
    revision: str | None,
    quantization: Quantization | QuantizationChoice | None,
    embedding_storage: EmbeddingStorage | None,
) -> Pretrained:
    """Return the same as `open_pretrained`, with the base's own positions, and without `check`, which the caller calls.

    Raises:
        QLoRAError: files that are missing or damaged, or an adapter or tokenizer that was made for another base.
    """
    snapshot = None if adapter is None else resolve_adapter(adapter)
    metadata = None if snapshot is None else read_adapter_metadata(snapshot)
    if snapshot is not None and metadata is None:
        _logger.warning("%s", _without_record(snapshot.name, quantization))
    if isinstance(quantization, QuantizationChoice):
        quantization = quantization.complete(metadata)
    if embedding_storage is None:
        embedding_storage = "none" if metadata is None else metadata.embedding_storage
    base = resolve(fetch_default_model() if model is None else model, revision)
    checkpoint = open_checkpoint(base)
    _ = checkpoint.model_config  # all its fields are checked before any of them is used
    opened, subtracted = None, None
    if snapshot is not None:
        opened, subtracted = split_initialization(read_adapter(snapshot), metadata)
        check_family(opened, checkpoint.config["model_type"])  # before parameters of another family are looked for
        checkpoint = resized_for_adapter(checkpoint, opened)
    own = opened is not None and opened.has_tokenizer
    tokenizer = load_tokenizer(snapshot if own and snapshot is not None else base, model=base)
    if not own and snapshot is not None:
        add_from_folder(tokenizer, snapshot.path)
    check_tokenizer(tokenizer, checkpoint.config, stated_ends(base.path, tokenizer))
    warn_of_unknown_ends(base, tokenizer)
    return Pretrained(
        base,
        checkpoint,
        tokenizer,
        opened,
        metadata,
        subtracted,
        method=None if opened is None else opened.method,
        quantization=storage_of(checkpoint, quantization),
        embedding_storage=embedding_storage,
    )


def _without_record(adapter: str, quantization: Quantization | QuantizationChoice | None) -> str:
    """Return the warning for an adapter of which nothing but PEFT's files is there."""
    stored = quantization.complete(None) if isinstance(quantization, QuantizationChoice) else quantization
    storage = "dense" if stored is None else stored.data_type
    return (
        f"{adapter}: has no {METADATA}, so that it is unknown how its base was stored in training and how prompts were "
        f"written: taken for an adapter on {storage} weights (data_type chooses others) and the model's own chat template."
    )
