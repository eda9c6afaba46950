"""Kill `evaluate.py judge` again and again while it works, and check that each restart asks only for what is missing.

    python tests/evaluate/judge_kills.py --kills 20 --seed 1

A server in this process fails in many ways (judge_server.py). Each process of the command is killed at a random moment
after it wrote its first judgement, and the last one runs to its end. Then every comparison has one row, no comparison was
asked again after its row was on the disk, and the key is in no file and in no output.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from judge_server import CHAOS, JudgeServer, judge_server

ROOT = Path(__file__).parents[2]
KEY = "sk-a-key-that-is-in-no-file"


def write_answers(folder: Path, questions: int) -> list[Path]:
    """Write the answers of two models, whose lengths decide who is better."""
    paths = []
    for place, model in enumerate("ab"):
        paths.append(folder / f"{model}.jsonl")
        rows = [
            {"question_id": q, "model": model, "prompt": f"Question {q}?", "answer": model * (q % (3 + place) + 1)}
            for q in range(questions)
        ]
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def start(server: JudgeServer, answers: list[Path], output: Path) -> subprocess.Popen[str]:
    """Start the command."""
    command = [sys.executable, "scripts/evaluate.py", "judge", *map(str, answers), "--output", str(output)]
    command += ["--endpoint", server.url, "--judge-model", "long", "--key-variable", "THE_KEY"]
    command += ["--timeout", "2", "--concurrency", "4", "--attempts", "15"]
    environment = os.environ | {"THE_KEY": KEY, "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def run(folder: Path, *, kills: int, questions: int, seed: int) -> dict[str, Any]:
    """Kill the command so many times, let it end, check what it left and return what happened."""
    draws, output, answers = random.Random(seed), folder / "judgements.jsonl", write_answers(folder, questions)
    chaos = {name: share for name, share in CHAOS.items() if name != "redirect"}  # which is not tried again
    printed, killed, left = "", 0, []
    with judge_server(chaos, seed, pause=0.3) as server:
        while True:
            before = output.read_bytes() if output.exists() else b""
            done = {line for line in before[: before.rfind(b"\n") + 1].splitlines() if b'"failure": "endpoint"' not in line}
            asked = server.asked.copy()
            process = start(server, answers, output)
            if killed < kills:
                while process.poll() is None and (not output.exists() or output.stat().st_size <= len(before)):
                    time.sleep(0.02)
                time.sleep(draws.uniform(0, 0.6))
                process.kill()
                killed += 1
            printed += process.communicate()[0]
            prompts = [json.loads(line)["request"] for line in done]
            assert len(set(prompts)) == len(done)
            again = [one for one in server.asked if server.asked[one] > asked[one] and asked_before(one, done)]
            assert not again, again
            left.append(2 * questions - len(done))
            if killed == kills and process.returncode == 0:
                break
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    keys = {(row["question_id"], row["model_a"]) for row in rows}
    assert len(rows) == len(keys) == 2 * questions, (len(rows), len(keys))
    assert KEY not in printed + output.read_text(encoding="utf-8")
    assert server.keys == {f"Bearer {KEY}"}
    for row in rows:
        first, second = (
            row[name] * (row["question_id"] % (3 + "ab".index(row[name])) + 1) for name in ("model_a", "model_b")
        )
        right = 3 if len(first) == len(second) else 1 if len(first) > len(second) else 2
        assert row["verdict"] in (-1, right), row
    failed = sum(row["verdict"] == -1 for row in rows)
    return {"kills": killed, "left": left, "rows": len(rows), "without": failed, "replies": dict(server.replies)}


def asked_before(prompt: str, done: set[bytes]) -> bool:
    """Return whether the judgement of a prompt is among rows."""
    return any(
        f"Question {row['question_id']}?" in prompt and f"{row['model_a']}\n[end of answer 1" in prompt
        for row in map(json.loads, done)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--questions", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(run(Path(name), kills=given.kills, questions=given.questions, seed=given.seed)))
