"""OASST1's message trees → conversations, by following the reply that people ranked first, as in Guanaco's data.

    message_id  parent_id  role       rank      a (question)
    a           –          prompter   –         ├─ b  rank 1
    b           a          assistant  1         └─ c  rank 0
    c           a          assistant  0              └─ d (question)
    d           c          prompter   –                   └─ e  rank 0
    e           d          assistant  0         the conversation: a c d e

A conversation starts at a root and follows the reply with the lowest rank; if no reply has a rank, or several have the same,
it follows the first one in the file. Deleted messages are ignored, and a question without an answer at the end is removed. A
tree without an answer, or with a state other than `ready_for_export`, is skipped and counted. Messages that do not form
trees (a missing parent, a loop, a repeated id) are an error that names the message.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from qlora_jax.data.messages import checked_text
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = frozenset(("message_id", "parent_id", "role", "text"))
_ROLES = {"prompter": "user", "assistant": "assistant"}
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class Trees:
    """The conversations, as records with `messages`, and the numbers of trees without one."""

    conversations: list[dict[str, Any]]
    without_answer: int
    not_ready: int

    def __str__(self) -> str:
        total = len(self.conversations) + self.without_answer + self.not_ready
        parts = [f"{len(self.conversations):,} of {total:,} message trees give a conversation"]
        if self.without_answer:
            parts.append(f"{self.without_answer:,} left out: no answer")
        if self.not_ready:
            parts.append(f"{self.not_ready:,} left out: tree_state is not ready_for_export")
        return "; ".join(parts)


def read_trees(rows: "Iterable[_Row] | Dataset") -> Trees:
    """Return the conversation of each tree, in the order of the roots.

    Raises:
        DataError: the messages do not form trees, or no tree has an answer.
    """
    messages: dict[str, _Row] = {}
    for index, row in enumerate(cast(Iterable[_Row], rows)):
        name = checked_text(row.get("message_id"), f"row {index} (counted from 0), column 'message_id'")
        if name in messages:
            raise DataError(f"row {index} (counted from 0): expected a message_id of its own, found {name} again")
        if row.get("role") not in _ROLES:
            raise DataError(f"message {name}, role: expected one of {', '.join(_ROLES)}, found {row['role']!r}")
        checked_text(row.get("text"), f"message {name}, text")
        messages[name] = row
    replies = _replies(messages)
    roots = [name for name, row in messages.items() if not row.get("parent_id")]
    _check_no_loop(messages, roots, replies)
    conversations, without_answer, not_ready = [], 0, 0
    for root in roots:
        path = _best_path(root, messages, replies)
        if messages[root].get("tree_state") not in (None, "", "ready_for_export"):
            not_ready += 1
        elif not path:
            without_answer += 1
        else:
            turns = [{"role": _ROLES[messages[name]["role"]], "content": messages[name]["text"]} for name in path]
            conversations.append({"messages": turns})
    trees = Trees(conversations, without_answer, not_ready)
    if not conversations:
        raise DataError(f"message trees: expected at least one with an answer, found none: {trees}")
    return trees


def _replies(messages: Mapping[str, _Row]) -> dict[str, list[str]]:
    replies: dict[str, list[str]] = {name: [] for name in messages}
    for name, row in messages.items():
        parent = row.get("parent_id")
        if not parent:  # None, or in a CSV file an empty text
            continue
        if parent not in messages:
            raise DataError(f"message {name}: expected its parent among the messages, found no {parent}")
        if messages[parent]["role"] == row.get("role"):
            raise DataError(f"message {name}: expected another role than its parent {parent}, found {row['role']!r} twice")
        replies[parent].append(name)
    return replies


def _check_no_loop(messages: Mapping[str, _Row], roots: list[str], replies: Mapping[str, list[str]]) -> None:
    reached, ahead = set(roots), list(roots)
    while ahead:
        following = replies[ahead.pop()]
        reached.update(following)
        ahead.extend(following)
    for name, row in messages.items():
        if name not in reached:
            raise DataError(f"message {name}: expected parents up to a root, found a loop over {row['parent_id']}")


def _best_path(root: str, messages: Mapping[str, _Row], replies: Mapping[str, list[str]]) -> list[str]:
    """Return the messages from the root to the path's last answer; none if the root is no question or has no answer."""
    if messages[root]["role"] != "prompter" or _is_deleted(messages[root]):
        return []
    path = [root]
    while following := [name for name in replies[path[-1]] if not _is_deleted(messages[name])]:
        path.append(min(following, key=lambda name: _rank(messages[name])))
    if messages[path[-1]]["role"] == "prompter":
        path.pop()
    return path


def _is_deleted(row: _Row) -> bool:
    return str(row.get("deleted")).lower() in ("true", "1")  # a CSV file has text


def _rank(row: _Row) -> float:
    # In a CSV file ranks are text, empty if missing; in Arrow they are numbers, null or NaN if missing.
    rank = row.get("rank")
    try:
        value = math.inf if rank is None or rank == "" else float(rank)
    except (TypeError, ValueError) as error:
        raise DataError(f"message {row['message_id']}, rank: expected a number, found {rank!r:.60}") from error
    return math.inf if math.isnan(value) else value
