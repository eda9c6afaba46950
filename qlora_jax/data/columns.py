"""Names of columns: those that the user gives to a file's columns, and the schema that is nearest to unknown columns.

    --columns question=query answer=reply     the file's `query` is our `question`, its `reply` our `answer`

Only the columns that are given are renamed; all others keep their names. A question and an answer under any two of our names
(`prompt=query answer=reply`) are the schema question/answer where they are no schema of their own.
"""

import difflib
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_jax.errors import DataError, OptionError

__all__ = ["NO_COLUMNS", "ColumnNames", "nearest_schema"]

# Names of questions, of answers and of lists of messages in data sets, to suggest the column that is meant.
QUESTIONS = (
    "question",
    "prompt",
    "instruction",
    "input",
    "query",
    "source",
    "context",
    "user",
    "human",
    "problem",
    "text",
    "article",
    "document",
)
ANSWERS = (
    "answer",
    "completion",
    "output",
    "response",
    "reply",
    "target",
    "label",
    "solution",
    "assistant",
    "gpt",
    "summary",
    "highlight",
)
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns", "history")
_MOST_NEAREST = 2  # how many schemas a message names
_PREFERENCES = {"chosen": ("chosen", "preferred", "accepted", "winner", "better"),
                "rejected": ("rejected", "dispreferred", "refused", "loser", "worse")}  # fmt: skip


@dataclass(frozen=True)
class ColumnNames:
    """Our name and the file's name of each column that is renamed.

    Attributes:
        pairs: (ours, the file's).
        schemas: the columns that a row of each schema has to have.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    schemas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, texts: Sequence[str], known: Collection[str], schemas: Mapping[str, tuple[str, ...]]) -> "ColumnNames":
        """Return the names that texts `ours=theirs` give.

        Args:
            texts: the texts.
            known: every name that a column can have with us.
            schemas: the columns that a row of each schema has to have.

        Raises:
            OptionError: a text of another form, an unknown name, or a column that is given twice.
        """
        pairs = []
        for text in texts:
            ours, equals, theirs = (part.strip() for part in text.partition("="))
            if not (ours and equals and theirs):
                raise OptionError(f"columns: expected OURS=THEIRS, such as answer=reply, found {text!r}")
            if ours not in known:
                near = difflib.get_close_matches(ours, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise OptionError(f"columns: expected one of {', '.join(sorted(known))} before =, found {ours!r}{hint}")
            pairs.append((ours, theirs))
        for place, names in enumerate(zip(*pairs, strict=True)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                side = "ours" if place == 0 else "the file's"
                raise OptionError(f"columns: expected each of {side} once, found {', '.join(twice)} twice")
        return cls(tuple(pairs), schemas)

    @property
    def required(self) -> set[str]:
        """Our names that a row must not lack."""
        return {name for columns in self.schemas.values() for name in columns}

    def rename(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row with our names; a row without any of the file's names, which is of another form, is unchanged.

        Raises:
            DataError: the row has some of the columns, and lacks others that a schema needs.
        """
        found = [(ours, theirs) for ours, theirs in self.pairs if theirs in row]
        if not found:
            return dict(row)
        required = self.required
        for ours, theirs in self.pairs:
            if theirs not in row and ours in required:
                raise DataError(
                    f"expected the column {theirs!r} (--columns {ours}={theirs}), found {sorted(map(str, row))}"
                    f"{_meant(ours, theirs, row)}"
                )
        theirs_names, renamed = {theirs for _, theirs in found}, {ours: row[theirs] for ours, theirs in found}
        for name, value in row.items():
            if name not in theirs_names:
                # A column of the file whose name was given to another one is not used, and is counted as such.
                renamed.setdefault(name if name not in renamed else f"{name} of the file", value)
        if not any(renamed.keys() >= set(columns) for columns in self.schemas.values()):
            given = [ours for ours, _ in found]
            question, answer = (next((name for name in names if name in given), None) for names in (QUESTIONS, ANSWERS))
            question = question or next((name for name in QUESTIONS if name in required and name in renamed), None)
            answer = answer or next((name for name in ANSWERS if name in required and name in renamed), None)
            if question and answer:
                renamed["question"], renamed["answer"] = renamed.pop(question), renamed.pop(answer)
        return renamed

    def check(self, columns: Iterable[str]) -> None:
        """Raise OptionError unless each of the file's names is among the columns of the data."""
        found = set(columns)
        for ours, theirs in self.pairs:
            if theirs not in found:
                hint = _meant(ours, theirs, found)
                raise OptionError(f"columns {ours}={theirs}: expected a column of the data, found {sorted(found)}{hint}")


def _meant(ours: str, theirs: str, columns: Iterable[str]) -> str:
    near = difflib.get_close_matches(theirs, map(str, columns), n=1)
    return f"; did you mean {ours}={near[0]}?" if near else ""


NO_COLUMNS = ColumnNames()


def nearest_schema(found: Collection[str], schemas: Mapping[str, Collection[str]]) -> str:
    """Return the names of the schemas that are nearest to some columns, with the option that would make each of them fit.

    A schema is near if each of its columns is there, or a column whose name means the same is; those with the most columns
    of its own are the nearest. The text is empty if none is near.
    """
    near: dict[str, tuple[int, list[str]]] = {}
    for name, columns in schemas.items():
        given: list[str] = []
        free = [column for column in found if column not in columns]
        for column in columns:
            if column in found:
                continue
            like = next((names for names in _alike(column) if column in names), ())
            plain = {_plain(name): name for name in reversed(free)}
            candidates = [plain[name] for name in like if name in plain] or difflib.get_close_matches(column, free, n=1)
            if candidates:
                free.remove(candidates[0])
            given.append(shlex.quote(f"{column}={candidates[0]}") if candidates else "")
        if given and "" not in given:
            near[name] = len(columns) - len(given), given
    most = max((own for own, _ in near.values()), default=0)
    nearest = [f"{name} (--columns {' '.join(given)})" for name, (own, given) in near.items() if own == most]
    nearest.sort(key=lambda text: not text.startswith("question/answer"))  # the one that fits most data, of several
    return f"the nearest: {', '.join(nearest[:_MOST_NEAREST])}" if nearest else ""


def _plain(name: object) -> str:
    """Return the name of a column in lower case and in the singular, as in the lists of names."""
    name = str(name).lower()
    return name if name in CONVERSATIONS else name.removesuffix("s")


def _alike(column: str) -> list[tuple[str, ...]]:
    return [QUESTIONS, ANSWERS, CONVERSATIONS, *_PREFERENCES.values()] if column != "text" else []
