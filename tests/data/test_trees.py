"""OASST1's message trees: the path that people ranked first, found anew by recursion; and what is no tree."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import DataError, open_source, read_trees


def message(name: str, parent: str | None, role: str, rank: float | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "message_id": name,
        "parent_id": parent,
        "text": f"text of {name}",
        "role": role,
        "rank": rank,
        "lang": "en",
        "tree_state": "ready_for_export",
        "deleted": False,
    } | fields


TREE = [
    message("e", "d", "assistant", 0),  # a child before its parent
    message("a", None, "prompter"),
    message("b", "a", "assistant", 1),
    message("c", "a", "assistant", 0),
    message("d", "c", "prompter"),
    message("f", "b", "prompter"),
    message("g", "e", "prompter"),
]


def path(names: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": f"text of {name}"} for i, name in enumerate(names)]}


def test_a_tree_by_hand() -> None:
    # g asks and gets no answer; b is ranked second.
    assert read_trees(TREE).conversations == [path("acde")]


def test_ranks_decide_and_without_ranks_the_file_s_order() -> None:
    root, rows = message("a", None, "prompter"), [message("b", "a", "assistant", 2), message("c", "a", "assistant")]
    assert read_trees([root, rows[1], rows[0]]).conversations == [path("ab")]
    assert read_trees([root, rows[1], message("d", "a", "assistant")]).conversations == [path("ac")]
    assert read_trees([root, message("b", "a", "assistant", 0, deleted=True), rows[1]]).conversations == [path("ac")]


def test_trees_without_an_answer_are_counted() -> None:
    more = [
        message("q", None, "prompter"),
        message("r", None, "prompter", tree_state="aborted_low_grade"),
        message("s", "r", "assistant", 0),
        message("t", None, "prompter", deleted=True),
        message("u", "t", "assistant", 0),
    ]
    trees = read_trees([*TREE, *more])
    assert (len(trees.conversations), trees.without_answer, trees.not_ready) == (1, 2, 1)
    assert str(trees) == (
        "1 of 4 message trees give a conversation; 2 left out: no answer; 1 left out: tree_state is not ready_for_export"
    )
    with pytest.raises(DataError, match="expected at least one with an answer, found none: 0 of 1 message trees"):
        read_trees(more[:1])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (message("x", "nowhere", "assistant"), "message x: expected its parent among the messages, found no nowhere"),
        (message("x", "x", "assistant"), "message x: expected another role than its parent x"),
        (message("x", "b", "assistant"), "message x: expected another role than its parent b, found 'assistant' twice"),
        (message("b", "a", "assistant"), "row 7 .*: expected a message_id of its own, found b again"),
        (message("x", "a", "moderator"), "message x, role: expected one of prompter, assistant, found 'moderator'"),
        (message("x", "a", "assistant", rank="high"), "message x, rank: expected a number, found 'high'"),
        (message("x", "a", "assistant", text=None), "message x, text: expected text, found null"),
    ],
)
def test_what_is_no_tree_names_its_message(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        read_trees([*TREE, row])


def test_a_loop_is_no_tree() -> None:
    loop = [message("x", "y", "assistant"), message("y", "x", "prompter")]
    with pytest.raises(DataError, match="message x: expected parents up to a root, found a loop over y"):
        read_trees([*TREE, *loop])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(1, 25))
def test_any_trees(data: st.DataObject, size: int) -> None:
    rows: list[dict[str, Any]] = [message("0", None, "prompter"), message("1", "0", "assistant", 5)]
    for number in range(2, size + 2):
        parent = data.draw(st.one_of(st.none(), st.integers(0, number - 1)))
        role = "prompter" if parent is None or rows[parent]["role"] == "assistant" else "assistant"
        rank = data.draw(st.one_of(st.none(), st.integers(0, 3))) if role == "assistant" else None
        rows.append(message(str(number), None if parent is None else str(parent), role, rank))

    def follow(row: dict[str, Any]) -> list[dict[str, Any]]:
        replies = [reply for reply in rows if reply["parent_id"] == row["message_id"]]
        ranked = sorted(replies, key=lambda reply: 9 if reply["rank"] is None else reply["rank"])
        return [row, *(follow(ranked[0]) if ranked else [])]

    expected = []
    for root in (row for row in rows if row["parent_id"] is None):
        chain = follow(root)
        chain = chain[: len(chain) - len(chain) % 2]
        if chain:
            expected.append([row["text"] for row in chain])
    shuffled = data.draw(st.permutations(rows))
    assert [[turn["content"] for turn in row["messages"]] for row in read_trees(rows).conversations] == expected
    # Equal ranks fall to the first in the file; where all differ, its order means nothing but that of the roots.
    for index, row in enumerate(shuffled):
        row["rank"] = index
    chains = {row["messages"][0]["content"]: row["messages"] for row in read_trees(shuffled).conversations}
    assert chains == {row["messages"][0]["content"]: row["messages"] for row in read_trees(rows).conversations}


@pytest.mark.parametrize("name", ["trees.jsonl", "trees.csv", "trees.parquet"])
def test_a_file_of_trees_becomes_conversations(tmp_path: Path, name: str) -> None:
    table = datasets.Dataset.from_list([*TREE, message("z", None, "prompter"), message("y", "z", "assistant", deleted=True)])
    getattr(table, {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[name.split(".")[1]])(tmp_path / name)
    source = open_source(str(tmp_path / name))
    assert source.records == [path("acde")]
    assert source.note == "1 of 2 message trees give a conversation; 1 left out: no answer"


def test_a_broken_file_of_trees_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list(TREE[:1]).to_json(tmp_path / "trees.jsonl")
    with pytest.raises(DataError, match=r"trees\.jsonl: message e: expected its parent among the messages, found no d"):
        open_source(str(tmp_path / "trees.jsonl"))
