"""A model as the judge of the answers of others.

answers.py reads the answers and pairs them, prompts.py asks and reads the replies, and journal.py is the file of
judgements. asking.py asks an endpoint (endpoint.py) within limits (limits.py); local.py takes the probabilities of the
verdicts of a model that is loaded here.
"""

from qlora_jax.evaluate.judge.answers import Answers, Comparison, comparisons, read_answers
from qlora_jax.evaluate.judge.asking import EndpointError, Judging, Patience, Tally, ask_all
from qlora_jax.evaluate.judge.endpoint import Endpoint, EndpointFailure, Reply, endpoint_url
from qlora_jax.evaluate.judge.journal import Journal, key_of, open_journal, request_hash
from qlora_jax.evaluate.judge.limits import LimitReached, Limits, Meter
from qlora_jax.evaluate.judge.local import VerdictPrompts, encode_comparisons, verdict_log_probabilities
from qlora_jax.evaluate.judge.prompts import judge_messages, read_reply

__all__ = [
    "Answers",
    "Comparison",
    "Endpoint",
    "EndpointError",
    "EndpointFailure",
    "Journal",
    "Judging",
    "LimitReached",
    "Limits",
    "Meter",
    "Patience",
    "Reply",
    "Tally",
    "VerdictPrompts",
    "ask_all",
    "comparisons",
    "encode_comparisons",
    "endpoint_url",
    "judge_messages",
    "key_of",
    "open_journal",
    "read_answers",
    "read_reply",
    "request_hash",
    "verdict_log_probabilities",
]
