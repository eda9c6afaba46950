"""Generation: sampling, batched generation with a key-value cache, and streaming of text."""

from qlora_jax.serve.generate import Decoder, generate
from qlora_jax.serve.sampling import Sampling, sample, warp
from qlora_jax.serve.seq2seq import Seq2SeqModel, generate_seq2seq
from qlora_jax.serve.text_stream import TextStream, stream_text

__all__ = [
    "Decoder",
    "Sampling",
    "Seq2SeqModel",
    "TextStream",
    "generate",
    "generate_seq2seq",
    "sample",
    "stream_text",
    "warp",
]
