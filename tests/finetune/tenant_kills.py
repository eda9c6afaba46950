"""Kills `train_many.py` at random operations on files and at random times, and looks at what every tenant then becomes.

    python tests/finetune/tenant_kills.py --kills 50

Three tenants with two slots, so that one of them waits; with `--turns` they take turns. Whatever is killed, and however
often, the same command afterwards gives each tenant the adapter of an uninterrupted run, bit for bit. See kills.py, whose
processes these are.
"""

import argparse
import json
import random
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kills import FOLDER, Kill, Process
from tiny_models import write_tiny_llama

from qlora_jax.commands import train_many

TENANTS = ("first", "second", "third")
SHARE_OF_RERUNS = 0.25


def write_file(root: Path, place: Path, *, turns: bool) -> Path:
    """Write a file of tenants whose folders are in a place."""
    path = place.with_suffix(".toml")
    path.write_text(f"""output = "{place}"
slots = 2
rows = 2
host_states = {str(turns).lower()}
[model]
model = "{root / "model"}"
[data]
data = "{root / "rows.jsonl"}"
max_length = 64
held_out = 0.0
[run]
max_steps = 4
save_every = 2
eval_every = 0
[lora]
rank = 4
[tenants.first]
[tenants.second.run]
max_steps = 3
seed = 2
[tenants.third.optimizer]
weight_decay = 0.5
""")
    return path


def adapters(place: Path) -> dict[str, bytes]:
    """Return the bytes of the adapter of each tenant that has one."""
    files = {name: place / name / "adapter" / "adapter_model.safetensors" for name in TENANTS}
    return {name: file.read_bytes() for name, file in files.items() if file.exists()}


def run(root: Path, place: Path, kill: Kill, *, turns: bool) -> Process:
    place.mkdir(exist_ok=True)
    return Process(train_many.main, [str(write_file(root, place, turns=turns))], place, kill)


def kill_all(kills: int, seed: int, root: Path, *, turns: bool) -> list[str]:
    """Kill so many processes and return what was wrong."""
    write_tiny_llama(root / "model", num_hidden_layers=1)
    rows = (f'{{"question": "{number}?", "answer": "{"red " * (number % 3 + 1)}"}}\n' for number in range(9))
    (root / "rows.jsonl").write_text("".join(rows))
    whole = root / "whole"
    code, log = run(root, whole, Kill(), turns=turns).wait()
    assert code == 0, log
    expected, operations = adapters(whole), json.loads(whole.with_suffix(".count").read_text())["file"]
    assert len(expected) == len(TENANTS)
    draws, wrong, killed, place = random.Random(seed), list[str](), 0, root / "place-0"
    for number in range(kills):
        if number % 5 == 4:
            kill = Kill(kind="time", seconds=draws.uniform(0.0, 10.0))
        else:
            kill = Kill(kind="file", at=draws.randint(1, operations))
        code, log = run(root, place, kill, turns=turns).wait()
        killed += code == -signal.SIGKILL
        ended = "killed" if code == -signal.SIGKILL else f"ended with {code}"
        problem = None if code in (0, -signal.SIGKILL) or "all tenants are finished" in log else log[-2000:]
        if any(found != expected[name] for name, found in adapters(place).items()):
            problem = f"{place}: another adapter right after the kill"
        last = code != -signal.SIGKILL or draws.random() < SHARE_OF_RERUNS or number == kills - 1
        if last and not problem:
            code, log = run(root, place, Kill(), turns=turns).wait()
            if code != 0 and "all tenants are finished" not in log:
                problem = log[-2000:]
            elif adapters(place) != expected:
                problem = f"{place}: {sorted(adapters(place))} are not those of an uninterrupted run"
        if last or problem:
            shutil.rmtree(place)
            place = root / f"place-{number + 1}"
        print(f"{number + 1}: {kill}: {ended}{', run again' if last else ''}, {problem or 'well'}", flush=True)
        wrong += [problem] if problem else []
    print(f"{killed} of {kills} were killed in time; {len(wrong)} were wrong")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turns", action="store_true")
    chosen = parser.parse_args()
    try:
        problems = kill_all(chosen.kills, chosen.seed, FOLDER, turns=chosen.turns)
    finally:
        shutil.rmtree(FOLDER)
    sys.exit(bool(problems))
