"""Files of questions and answers, and the command that makes one of the other, on a tiny random model. (About 8 CPU-s.)"""

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.commands.evaluate import main
from qlora_jax.data import DataError
from qlora_jax.errors import OptionError
from qlora_jax.evaluate import AnswerFile, Prompt, read_prompts

QUESTIONS = [{"question_id": number, "text": f"What is {number}?", "category": "numbers"} for number in (7, 3, 5)]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_forms_of_questions(tmp_path: Path) -> None:
    assert [prompt.question_id for prompt in read_prompts(str(written(tmp_path / "a.jsonl", QUESTIONS)))] == [7, 3, 5]
    (tmp_path / "b.txt").write_text("one?\ntwo?\n")
    assert [(prompt.question_id, prompt.text) for prompt in read_prompts(str(tmp_path / "b.txt"))] == [
        (1, "one?"),
        (2, "two?"),
    ]
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    (talk,) = read_prompts(str(written(tmp_path / "c.jsonl", [{"question_id": "x", "messages": turns}])))
    assert talk == Prompt("x", tuple(turns))
    assert talk.text == "user: a\n\nassistant: b\n\nuser: c"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1}, "expected one of the columns messages, prompt, question, text, instruction, found id"),
        ({"prompt": " "}, "expected messages of system, user, assistant with a text"),
        ({"prompt": "a", "question_id": True}, "expected a question_id that is a number or a text, found True"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected messages that end with the user's"),
        ({"messages": []}, r"expected messages, found \[\]"),
    ],
)
def test_rows_that_are_no_questions(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"q.jsonl, row 1 \(counted from 1\): {message}"):
        read_prompts(str(written(tmp_path / "q.jsonl", [row])))
    with pytest.raises(DataError, match=r"row 2 .*expected each question_id once, found 1 twice"):
        read_prompts(str(written(tmp_path / "q.jsonl", [{"prompt": "a", "question_id": 1}] * 2)))


def test_a_file_of_answers_grows_and_is_continued(tmp_path: Path) -> None:
    prompts = [Prompt(number, ({"role": "user", "content": f"{number}?"},)) for number in (1, 2, 3)]
    path, settings = tmp_path / "answers.jsonl", {"temperature": 0.7, "seed": 0}
    AnswerFile(path, "m", prompts, settings).add(3, "drei\u2028", tokens=1)
    whole = path.read_bytes()
    for broken in (b'{"question_id": 1, "ans', b"\xff"):  # what a process that was killed while writing left
        path.write_bytes(whole + broken)
        file = AnswerFile(path, "m", prompts, settings)
        assert file.answered == {3}
        file.add(1, "eins")
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert [(line["question_id"], line["answer"]) for line in lines] == [(3, "drei\u2028"), (1, "eins")]
    assert lines[0] == {
        **{"question_id": 3, "model": "m", "prompt": "3?", "answer": "drei\u2028", "tokens": 1},
        "settings": settings,
    }
    file.finish()
    assert [json.loads(line)["question_id"] for line in path.read_bytes().splitlines()] == [1, 3]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OptionError, match=r"with other settings: temperature 0.7 there, 1.0 here; choose another --output"):
        AnswerFile(path, "m", prompts, settings | {"temperature": 1.0})
    with pytest.raises(OptionError, match=r"with other settings: model 'm' there, 'n' here"):
        AnswerFile(path, "n", prompts, settings)
    with pytest.raises(OptionError, match=r"answers.jsonl:2: holds an answer to question 3, which is no such question here"):
        AnswerFile(path, "m", prompts[:2], settings)
    other = [*prompts[:2], Prompt(3, ({"role": "user", "content": "four?"},))]
    with pytest.raises(OptionError, match="question 3, which is another question here"):
        AnswerFile(path, "m", other, settings)
    for text in ("notes", '{"a": 1}', "[1,\n2]"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"answers.jsonl.*: expected a"):
            AnswerFile(path, "m", prompts, settings)
    path.write_text("no JSON\n")
    with pytest.raises(DataError, match=r"answers.jsonl:1: expected a line of JSON"):
        AnswerFile(path, "m", prompts, settings)
    path.write_text('{"question_id": 1}\n')
    with pytest.raises(DataError, match=r"expected an answer \(question_id, model, prompt, answer, settings\)"):
        AnswerFile(path, "m", prompts, settings)


def test_answers_do_not_depend_on_interruptions(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of which lines are taken away is completed to the same file, and other settings are refused."""
    questions = written(tmp_path / "q.jsonl", QUESTIONS)
    output = tmp_path / "answers.jsonl"
    command = ["generate", "--model", str(tiny_llama), "--questions", str(questions), "--output", str(output)]
    command += ["--max-new-tokens", "6", "--rows", "2", "--name", "tiny"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["generate"]
    assert (found["answers"], found["model"], found["tokens"] <= 18) == (3, "tiny", True)
    whole = output.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["question_id"] for row in rows] == [7, 3, 5]
    assert [row["prompt"] for row in rows] == [row["text"] for row in QUESTIONS]
    assert {(row["settings"]["temperature"], row["settings"]["top_p"]) for row in rows} == {(0.7, 0.9)}
    assert len({row["answer"] for row in rows}) == 3
    lines = whole.splitlines(keepends=True)
    output.write_bytes(lines[1] + lines[0][:40])
    assert main(command) == 0
    assert output.read_bytes() == whole
    assert "3 questions, 2 without an answer" in capsys.readouterr().err
    assert main(command) == 0
    assert output.read_bytes() == whole
    capsys.readouterr()
    assert main([*command, "--temperature", "0.1"]) == 1
    assert "with other settings: temperature 0.7 there, 0.1 here" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --questions: expected a file of questions, found none"),
        (["--questions", "q.jsonl"], "error: --output: expected a file for the answers, found none"),
        (["--questions", "q.jsonl", "--output", "no/a.jsonl"], "expected a file in a folder that exists, found no no"),
        (
            ["--questions", "q.jsonl", "--output", "a.jsonl", "--max-new-tokens", "512"],
            "q.jsonl, question 7: expected at most 512 tokens with the answer, found",
        ),
    ],
)
def test_one_line_for_what_is_wrong(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("q.jsonl"), QUESTIONS)
    assert main(["generate", "--model", str(tiny_llama), *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""
