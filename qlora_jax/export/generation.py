"""generation_config.json of a merged folder: when and how programs that serve it generate, as the base said.

    eos_token_id        all tokens at which generation with the adapter on its base stops: those of the base's
                        generation_config.json and config.json, the end of a turn of a GGUF file, and EOS of the tokenizer;
                        an id that is no token of the model is left out
    everything else     as in the base's generation_config.json; where it has none, the fields of generation that config.json
                        holds (transformers then reads them from there, and no longer once there is a file)

transformers, vLLM and others read this file rather than config.json. Without it a model whose turns end with a token of
their own would not stop.
"""

import logging
from typing import TYPE_CHECKING, Any

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.files import read_object
from qlora_jax.checkpoint.gguf.header import read_header
from qlora_jax.checkpoint.tokenizer import stop_ids
from qlora_jax.errors import list_names
from qlora_jax.models.bounds import check_generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["GENERATION", "generation_config"]

GENERATION = "generation_config.json"
_logger = logging.getLogger(__name__)
# The fields of generation that a config.json may hold; transformers reads them where there is no file of their own.
_IN_CONFIG = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "do_sample", "temperature", "top_k", "top_p"),
    *("min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "length_penalty", "early_stopping"),
    *("max_length", "min_length"),
)
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}  # of GGUF: general.sampling.*


def generation_config(checkpoint: Checkpoint, tokenizer: "PreTrainedTokenizerFast | None") -> dict[str, Any] | None:
    """Return the generation_config.json for a merged checkpoint; None where nothing is known of its generation.

    Args:
        checkpoint: the base. One that was made in memory has only its config.
        tokenizer: the tokenizer that is written beside it, whose EOS ends a text too.

    Raises:
        CheckpointError: a file of the base is damaged.
    """
    snapshot, config = checkpoint.snapshot, checkpoint.config
    result = {name: config[name] for name in _IN_CONFIG if config.get(name) is not None}
    if snapshot is not None and snapshot.path.is_file():
        result |= _sampling_of_gguf(read_header(snapshot.path).metadata)
    elif snapshot is not None and (stored := read_object(snapshot.path / GENERATION)) is not None:
        result = stored
        check_generation(snapshot.path / GENERATION, stored)
        result.pop("_from_model_config", None)  # transformers' mark of a file that repeats config.json; this one does not
    stated = result.get("eos_token_id")
    ids = [*stated] if isinstance(stated, list) else [stated]
    if tokenizer is not None:
        if snapshot is not None:
            ids += sorted(stop_ids(snapshot, tokenizer))
        ids.append(tokenizer.eos_token_id)
        if result.get("bos_token_id") is None and tokenizer.bos_token_id is not None:
            result["bos_token_id"] = tokenizer.bos_token_id
    ids = _known([index for index in dict.fromkeys(ids) if index is not None], checkpoint, tokenizer)
    result.pop("eos_token_id", None)
    if ids:
        result["eos_token_id"] = ids if len(ids) > 1 or isinstance(stated, list) else ids[0]
    return result or None


def _known(ids: list[int], checkpoint: Checkpoint, tokenizer: "PreTrainedTokenizerFast | None") -> list[int]:
    """Return the ids that are tokens or rows of the embedding; warn of others, which no model can generate."""
    rows = checkpoint.config.get("vocab_size")
    size = max(rows if type(rows) is int else 0, 0 if tokenizer is None else len(tokenizer))
    beyond = [index for index in ids if index >= size] if size else []
    if beyond:
        _logger.warning(
            "%s is written without the stop id %s of %s, which is no token of this model (ids are below %d)",
            GENERATION,
            list_names([str(index) for index in beyond]),
            checkpoint.name,
            size,
        )
    return [index for index in ids if index not in beyond]


def _sampling_of_gguf(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return how a GGUF file recommends to sample, in transformers' names."""
    found = {ours: metadata.get(f"general.sampling.{theirs}") for theirs, ours in _SAMPLING.items()}
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return numbers | ({"do_sample": True} if numbers else {})
