"""Data: records → conversations → tokens with a loss mask → batches.

    files.py, json_files.py   local files → rows, with the types that the files have
    records.py, folders.py    rows of files, folders and hub data sets; streams.py: the same as a stream
    sources.py                opens what `--data` names: files, hub data sets, and also
        named.py              the QLoRA authors' data sets by name
        trees.py              OASST1's message trees
    columns.py                columns by the names that the user gives
    schemas.py, messages.py   columns → schema → conversation
    render.py                 conversation → text and the character ranges of the answers
    chat.py, chat_*.py        the same with a chat template; chat_templates/ holds those that have a name
    format.py                 text → tokens and loss mask (Example)
    odd_rows.py               rows that cannot be used, and columns that are not
    corpus.py                 all records → examples, with a report; held-out split
    pairs.py, preferences.py  preference pairs: chosen and rejected answers
    mixture.py                mixes several data sets by weight
    show.py                   prints examples with the learned text in colour
    questions.py              the question within a prompt, without its template
    batch.py                  pads or packs, shards and shuffles: an iterator whose position can be saved
    stream_batches.py         batches of data sets larger than memory, one buffer at a time
    seq2seq.py                source and target texts → tokens → batches for an encoder-decoder
    plain_answers.jsonl       the instruction data set that the package includes

Of the rest of qlora_jax, these modules import only the errors.
"""

from pathlib import Path

from qlora_jax.data.batch import Batch, BatchIterator, batches, bucket_length, checksum, pack, padding_share
from qlora_jax.data.chat import chat_prompt
from qlora_jax.data.chat_templates import CHAT_TEMPLATES, read_chat_template, unknown_markers
from qlora_jax.data.columns import ColumnNames
from qlora_jax.data.corpus import NothingToLearn, OnLong, Report, encode_all, train_eval_split
from qlora_jax.data.format import Example, Limits, encode, encode_prompt
from qlora_jax.data.messages import Message
from qlora_jax.data.mixture import check_weights, mix
from qlora_jax.data.named import NAMED
from qlora_jax.data.odd_rows import OnBadRow
from qlora_jax.data.preferences import (
    PreferenceBatches,
    PreferenceExample,
    PreferenceReport,
    encode_preferences,
    preference_batches,
)
from qlora_jax.data.records import Rows, check_local, load_records, stream_records
from qlora_jax.data.render import Template
from qlora_jax.data.schemas import detect_schema
from qlora_jax.data.seq2seq import (
    Seq2SeqBatches,
    Seq2SeqExample,
    Seq2SeqReport,
    encode_all_seq2seq,
    encode_seq2seq,
    seq2seq_batches,
)
from qlora_jax.data.show import show_examples
from qlora_jax.data.sources import Source, column_names, open_source, stream_source
from qlora_jax.data.stream_batches import StreamBatches, read_rows
from qlora_jax.data.streams import RowStream
from qlora_jax.data.token_ids import NAME_EOS, check_ids
from qlora_jax.data.trees import COLUMNS as TREE_COLUMNS
from qlora_jax.data.trees import Trees, read_trees
from qlora_jax.errors import DataError

PLAIN_ANSWERS = str(Path(__file__).with_name("plain_answers.jsonl"))

__all__ = [
    "CHAT_TEMPLATES",
    "NAMED",
    "NAME_EOS",
    "PLAIN_ANSWERS",
    "TREE_COLUMNS",
    "Batch",
    "BatchIterator",
    "ColumnNames",
    "DataError",
    "Example",
    "Limits",
    "Message",
    "NothingToLearn",
    "OnBadRow",
    "OnLong",
    "PreferenceBatches",
    "PreferenceExample",
    "PreferenceReport",
    "Report",
    "RowStream",
    "Rows",
    "Seq2SeqBatches",
    "Seq2SeqExample",
    "Seq2SeqReport",
    "Source",
    "StreamBatches",
    "Template",
    "Trees",
    "batches",
    "bucket_length",
    "chat_prompt",
    "check_ids",
    "check_local",
    "check_weights",
    "checksum",
    "column_names",
    "detect_schema",
    "encode",
    "encode_all",
    "encode_all_seq2seq",
    "encode_preferences",
    "encode_prompt",
    "encode_seq2seq",
    "load_records",
    "mix",
    "open_source",
    "pack",
    "padding_share",
    "preference_batches",
    "read_chat_template",
    "read_rows",
    "read_trees",
    "seq2seq_batches",
    "show_examples",
    "stream_records",
    "stream_source",
    "train_eval_split",
    "unknown_markers",
]
