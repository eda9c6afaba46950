"""The models of a comparison: a base, its quantised form, adapters on it, and the merged models.

    base                    in its own precision
    base, nf4+dq            as it was stored in the training of the adapters      drift against the base
    NAME                    an adapter on the base as it was stored               gain against that
    NAME, merged            added to the original weights                         drift against the adapter

Everything small is read first, so that what does not fit is found before any weights are. The weights of one model at a time
are in memory.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jax.typing import DTypeLike

from qlora_jax.adapters.peft_config import CONFIG
from qlora_jax.adapters.pretrained import Pretrained, open_pretrained
from qlora_jax.checkpoint.whole_folder import temporary_folder
from qlora_jax.errors import OptionError
from qlora_jax.export.merge import own_dtype
from qlora_jax.export.pretrained import merge_pretrained
from qlora_jax.finetune.held_out import recorded_options, run_of
from qlora_jax.models import Model, causal_family_of
from qlora_jax.nn import data_mesh
from qlora_jax.quant import Quantization

__all__ = ["Contestant", "contestants"]


@dataclass(frozen=True)
class Contestant:
    """A model of the comparison.

    Attributes:
        name: its name in the table.
        description: what is loaded, in words.
        pretrained: the opened model; of a merged one, what it is merged from.
        adapter: the folder or id of the adapter; None: a base.
        merged: whether the adapter is merged into the original weights.
        against: the name of the model that it is compared with; None: none.
        kind: whether a change is a drift or a gain.
        dtype: of activations and dense weights.
        judged_as: its name in files of judgements.
    """

    name: str
    description: str
    pretrained: Pretrained
    adapter: str | None = None
    merged: bool = False
    against: str | None = None
    kind: Literal["drift", "gain"] = "drift"
    dtype: DTypeLike | None = None
    judged_as: str = ""

    @contextmanager
    def loaded(self, *, progress: bool) -> Iterator[Model]:
        """Yield the model with its weights; a merged one is written to a temporary folder and read from there."""
        if not self.merged:
            yield self.pretrained.load(mesh=data_mesh(), progress=progress)
            return
        with temporary_folder(Path(tempfile.gettempdir()), "qlora-jax-merged-") as folder:
            output = folder / "model"
            merge_pretrained(self.pretrained, output, dtype=own_dtype(self.pretrained.checkpoint), progress=progress)
            yield open_pretrained(output, quantization=None, dtype=self.dtype).load(mesh=data_mesh(), progress=progress)


def contestants(
    names: Sequence[str], *, revision: str | None = None, dtype: DTypeLike | None = None, merged: bool = True
) -> list[Contestant]:
    """Return the models of a comparison, the base first.

    Args:
        names: the base and at least one adapter; the base may be left out before an adapter that is part of a run.
        revision: branch, tag or commit of the base on the hub.
        dtype: of activations and dense weights; that of the platform if None.
        merged: whether the merged models take part.

    Raises:
        OptionError: no adapter, or one that is named twice.
        QLoRAError: a model that cannot be opened, or is an encoder-decoder.
    """
    base, adapters = _split_names(names)
    opened = open_pretrained(base, revision=revision, quantization=None, dtype=dtype)
    causal_family_of(opened.checkpoint.config)
    found = [Contestant("base", f"{opened.base.name}, dense", opened, dtype=dtype, judged_as="base")]
    taken = {"base"}
    for adapter, name in zip(adapters, _names(adapters), strict=True):
        pretrained = open_pretrained(base, adapter, revision=revision, dtype=dtype)
        against = found[0].name
        if pretrained.quantization is not None or pretrained.embedding_storage != "none":
            against = f"base, {_storage(pretrained)}"
            if against not in taken:
                taken.add(against)
                found.append(_stored(against, base, pretrained, revision, dtype))
        storage = "dense weights" if pretrained.quantization is None else _storage(pretrained)
        found.append(
            Contestant(name, f"{adapter} on {storage}", pretrained, adapter, against=against, kind="gain", judged_as=name)
        )
        if merged and _merges(pretrained):
            text = f"{adapter} added to the original weights"
            merging = Contestant(f"{name}, merged", text, pretrained, adapter, merged=True, against=name, dtype=dtype)
            found.append(replace(merging, judged_as=merging.name))
    return found


def _split_names(names: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return (the base, the folders of the adapters)."""
    if not names:
        raise OptionError("compare: expected a base and adapters, or adapters of runs, found none")
    adapters = [_adapter_folder(name) for name in names]
    base: str | None = names[0]
    if adapters[0] is None:
        adapters = [adapters[0], *(found or name for found, name in zip(adapters[1:], names[1:], strict=True))][1:]
        if not adapters:
            raise OptionError(f"compare: expected an adapter after the base {base}, found none")
    else:
        adapters = [found or name for found, name in zip(adapters, names, strict=True)]
        run = run_of(adapters[0])
        if run is None:
            raise OptionError(f"compare: expected a base before {names[0]}, which is not part of a run, found none")
        base = recorded_options(run).model.model
    chosen = [str(adapter) for adapter in adapters]
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise OptionError(f"compare: expected each adapter once, found {twice[0]} twice")
    return base, chosen


def _adapter_folder(name: str) -> str | None:
    """Return the folder of an adapter that is named itself or by its run; None for anything else."""
    path = Path(name).expanduser()
    return next((str(folder) for folder in (path, path / "adapter") if (folder / CONFIG).is_file()), None)


def _names(adapters: Sequence[str]) -> list[str]:
    """Return short names: those of the runs or folders, or the whole paths where these are not different."""
    short = []
    for adapter in adapters:
        path = Path(adapter).expanduser()
        path = path.resolve() if path.exists() else path
        short.append(path.parent.name if path.name == "adapter" else path.name)
    return short if len(set(short)) == len(short) and "base" not in short else list(adapters)


def _stored(name: str, base: str | None, like: Pretrained, revision: str | None, dtype: DTypeLike | None) -> Contestant:
    pretrained = open_pretrained(
        base, revision=revision, quantization=like.quantization, embedding_storage=like.embedding_storage, dtype=dtype
    )
    # `evaluate.py generate` stores a base in 4 bits unless it is told otherwise, and names it after its folder.
    judged_as = Path(pretrained.base.name).name
    text = f"{pretrained.base.name} in {_storage(like)}"
    return Contestant(name, text, pretrained, against="base", dtype=dtype, judged_as=judged_as)


def _storage(pretrained: Pretrained) -> str:
    """Return the storage of a base in words."""
    stored: Quantization | None = pretrained.quantization
    parts = [] if stored is None else [stored.data_type + ("+dq" if stored.double_quantization else "")]
    if stored is not None and stored.block_size != Quantization().block_size:
        parts.append(f"blocks of {stored.block_size}")
    embedding = pretrained.embedding_storage
    return ", ".join([*parts, *([] if embedding == "none" else [f"embedding {embedding}"])])


def _merges(pretrained: Pretrained) -> bool:
    """Return whether an adapter can be merged: virtual tokens cannot."""
    return pretrained.method is not None and not pretrained.method.virtual_tokens
