"""A judge at an endpoint that fails in every way, its limits, and the file that a stopped run goes on with (5 seconds)."""

import email.message
import io
import json
import time
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from judge_server import CHAOS, JudgeServer, judge_server

from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate import Kind, read_judgements
from qlora_jax.evaluate.judge import (
    Comparison,
    Endpoint,
    EndpointError,
    EndpointFailure,
    Judging,
    Limits,
    Meter,
    Patience,
    Tally,
    ask_all,
    endpoint_url,
    judge_messages,
    open_journal,
)

KEY = "sk-a-key-that-is-in-no-file"
QUICK = Patience(first_pause=0.001, longest_pause=0.01)


def pairs(count: int) -> list[Comparison]:
    """Return so many comparisons of answers whose lengths decide who is better."""
    texts = {(q, model): model * ((q // 2) % (3 + place) + 1) for q in range(count) for place, model in enumerate("ab")}
    orders = [(q, ("a", "b") if q % 2 == 0 else ("b", "a")) for q in range(count)]
    return [Comparison(q // 2, f"Q{q // 2}?", order, (texts[q, order[0]], texts[q, order[1]])) for q, order in orders]


def judging(server: JudgeServer, kind: Kind = "verdicts", **options: Any) -> Judging:
    endpoint = Endpoint(server.url, "long", KEY, timeout=options.pop("timeout", 5.0))
    limits = options.pop("limits", Limits())
    return Judging(endpoint, kind, options.pop("patience", QUICK), options.pop("meter", Meter(limits)))


def run(work: Judging, asked: Sequence[Comparison], path: Path) -> Tally:
    """Ask for what is missing, as the command does."""
    with open_journal(path, work.kind) as journal:
        return ask_all(work, [one for one in asked if not journal.has(one, work.request(one))], journal)


def right(one: Comparison) -> float:
    first, second = map(len, one.answers)
    return 0.5 if first == second else float(first > second)


def test_every_comparison_ends_whatever_the_endpoint_does(tmp_path: Path) -> None:
    path, asked = tmp_path / "judgements.jsonl", pairs(60)
    with judge_server(CHAOS, seed=2) as server:
        tally = run(judging(server, timeout=0.4), asked, path)
        assert tally.judged + tally.unread + tally.failed == 60
        assert tally.judged > 40
        assert len(server.replies) > 8  # of the ways to fail
        assert sum(server.asked.values()) >= tally.judged  # more on a slow machine, where a proper reply may come too late
        judgements = read_judgements(path, "verdicts")
        assert (len(judgements), judgements.left_out) == (60, tally.unread + tally.failed)
        again = run(judging(server, timeout=0.4), asked, path)  # asks only for what the endpoint failed
        assert again.judged + again.unread + again.failed == tally.failed
        assert server.keys == {f"Bearer {KEY}"}
    text = path.read_text(encoding="utf-8")
    assert KEY not in text
    rows = {(row["question_id"], row["model_a"]): row for row in map(json.loads, text.splitlines())}
    assert len(rows) == len(text.splitlines()) == 60
    points = {1: 1.0, 2: 0.0, 3: 0.5}
    for one in asked:
        row = rows[one.question_id, one.models[0]]
        assert row["verdict"] == -1 or points[row["verdict"]] == right(one)


def test_scores_and_a_file_that_was_cut(tmp_path: Path) -> None:
    path, asked = tmp_path / "judgements.jsonl", pairs(8)
    with judge_server() as server:
        assert run(judging(server, "scores"), asked, path).judged == 8
        whole = path.read_bytes()
        for cut in (1, 30, len(whole) // 2):
            path.write_bytes(whole[:-cut])
            before = sum(server.asked.values())
            missing = 8 - whole[:-cut].count(b"\n")
            assert run(judging(server, "scores"), asked, path).judged == missing
            assert sum(server.asked.values()) == before + missing
            assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
        other = [
            Comparison(one.question_id, one.prompt, one.models, (one.answers[0] + "!", one.answers[1])) for one in asked
        ]
        with pytest.raises(DataError, match=r"expected judgements of these answers by this judge, found one of question 0"):
            run(judging(server, "scores"), other, path)
        with pytest.raises(DataError, match="expected verdicts"):
            run(judging(server, "verdicts"), asked, path)
        with (
            open_journal(path, "scores"),
            pytest.raises(OptionError, match="that another judge writes"),
            open_journal(path, "scores"),
        ):
            pass


def test_limits_of_tokens_and_cost(tmp_path: Path) -> None:
    asked, longest = pairs(40), 512
    with judge_server() as server:
        most = max(len(judging(server).endpoint.body(judge_messages(one, "verdicts"))) for one in asked) + longest
        limit = most + 5 * 110  # the server counts 110 tokens for each reply
        meter = Meter(Limits(tokens=limit))
        tally = run(judging(server, meter=meter), asked, tmp_path / "tokens.jsonl")
        assert tally.stopped is not None
        assert f"of {limit:,} tokens" in tally.stopped
        assert 1 <= tally.judged <= 6
        assert meter.read + meter.written == 110 * tally.judged <= limit
        assert len((tmp_path / "tokens.jsonl").read_text().splitlines()) == tally.judged
        meter = Meter(Limits(cost=1e-3, prices=(0.0, 10.0)))  # 10 tokens of a reply cost 1e-4; the longest reply, 5.12e-3
        assert run(judging(server, meter=meter), asked, tmp_path / "cost.jsonl").judged == 0
        meter = Meter(Limits(cost=6e-3, prices=(0.0, 10.0)))
        assert 1 <= run(judging(server, meter=meter), asked, tmp_path / "cost.jsonl").judged <= 9
        assert meter.cost <= 6e-3


def test_requests_are_spread_over_a_minute(tmp_path: Path) -> None:
    with judge_server() as server:
        run(judging(server, limits=Limits(requests_per_minute=600)), pairs(6), tmp_path / "judgements.jsonl")
        starts = sorted(server.starts)
        assert starts[-1] - starts[0] >= 5 * 0.1 - 0.05


def test_retry_after_holds_all_requests_back(tmp_path: Path) -> None:
    """One thread is told to wait; no request of any thread starts before."""
    with judge_server({"status 429, Retry-After": 50}, seed=3, pause=0.0) as server:
        work = judging(server, patience=Patience(concurrency=1, first_pause=0.001))
        start = time.monotonic()
        tally = run(work, pairs(6), tmp_path / "judgements.jsonl")
        refused = server.replies["status 429, Retry-After"]
        assert (tally.judged, refused > 0) == (6, True)
        assert time.monotonic() - start >= 0.05 * refused


def test_a_dead_endpoint_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "judgements.jsonl"
    with judge_server({"the key": 100}) as server:
        patience = Patience(attempts=2, first_pause=0.001, concurrency=2)
        with pytest.raises(EndpointError, match=r"found none for 10 comparisons in a row, .*do not send Bearer \[the key\]"):
            run(judging(server, patience=patience), pairs(40), path)
        assert path.read_text() == ""
    closed = Endpoint(server.url, "long", timeout=1.0)
    with pytest.raises(EndpointFailure, match="no connection"):
        closed.ask([{"role": "user", "content": "?"}])


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1"])
def test_addresses(url: str) -> None:
    with pytest.raises(OptionError, match="expected an address like"):
        endpoint_url(url, None)


def test_secrets_stay_out_of_addresses() -> None:
    assert endpoint_url("http://localhost:8000/v1/", None) == "http://localhost:8000/v1"
    for url in ("https://me:secret@host/v1", "https://host/v1?key=secret"):
        with pytest.raises(OptionError) as error:
            endpoint_url(url, None)
        assert "secret" not in str(error.value)
    with pytest.raises(OptionError) as error:
        endpoint_url("https://host/v1", "secret\n")
    assert "secret" not in str(error.value)
    assert KEY not in repr(Endpoint("http://localhost", "m", KEY))


@pytest.mark.parametrize("before", [0, 30, 60, 70, 285, 299])
def test_no_part_of_a_key_is_shown(before: int) -> None:
    """Not where a message is cut in the middle of it."""
    endpoint, repeated = Endpoint("http://localhost/v1", "m", KEY), "x" * before + KEY + "y" * 300
    answers = (repeated, json.dumps(repeated), json.dumps({"choices": [{"message": {"content": [repeated]}}]}))
    for answer in answers:
        with pytest.raises(EndpointFailure) as caught:
            endpoint._reply(answer.encode())
        assert KEY[:4] not in str(caught.value)
    body = io.BytesIO(json.dumps({"error": {"message": repeated}}).encode())
    error = urllib.error.HTTPError("http://localhost/v1", 401, "", email.message.Message(), body)
    assert KEY[:4] not in str(endpoint._failure_of_status(error))


@pytest.mark.parametrize(
    "text", ["notes", "notes\nmore", '{"question_id": 1, "model": "m", "prompt": "q", "answer": "a"}', "[1,\n2]", "{}"]
)
def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(DataError, match="file"), open_journal(path, "verdicts"):
        pass
    assert path.read_text() == text


@pytest.mark.integration
def test_killed_processes_lose_nothing(tmp_path: Path) -> None:
    """Two kills; `python tests/evaluate/judge_kills.py` does more of them. (Each process imports JAX.)"""
    pytest.importorskip("judge_kills").run(tmp_path, kills=2, questions=20, seed=1)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from judge_kills import write_answers

    from qlora_jax.commands.evaluate import main

    answers = [str(path) for path in write_answers(tmp_path, 4)]
    output = tmp_path / "judgements.jsonl"
    command = ["judge", *answers, "--output", str(output), "--judge-model", "long", "--key-variable", "THE_KEY"]
    monkeypatch.delenv("THE_KEY", raising=False)
    with judge_server() as server:
        assert main([*command, "--endpoint", server.url]) == 1
        assert "expected the name of an environment variable" in capsys.readouterr().err
        monkeypatch.setenv("THE_KEY", KEY)
        assert main([*command, "--endpoint", server.url, "--token-limit", "1"]) == 1
        captured = capsys.readouterr()
        assert json.loads(captured.out.splitlines()[-1])["judge"]["not_asked"] == 8
        assert "a limit was reached" in captured.err
        for judged, kept in ((8, 0), (0, 8)):
            assert main([*command, "--endpoint", server.url, "--prompt-price", "1", "--reply-price", "2"]) == 0
            captured = capsys.readouterr()
            found = json.loads(captured.out.splitlines()[-1])["judge"]
            assert (found["judged"], found["kept"], found["not_asked"]) == (judged, kept, 0)
            assert found["cost"] == pytest.approx(8 * (100 * 1 + 10 * 2) / 1e6)
            assert KEY not in captured.out + captured.err
    assert main([*command]) == 1
    assert main([*command, "--local", "--ask", "scores"]) == 1
    assert main([*command, "--endpoint", "http://localhost", "--cost-limit", "1"]) == 1
    messages = capsys.readouterr().err.splitlines()
    for line, start in zip(
        messages, ("judge: expected either", "--local: expected --ask", "--cost-limit: expected"), strict=True
    ):
        assert line.startswith(f"error: {start}")
