"""Tasks of lm_eval: our model against lm_eval's own `hf` model with the same weights. (Integration: 15 CPU-s.)"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.commands.evaluate import main
from qlora_jax.commands.evaluations import task as command
from qlora_jax.errors import OptionError

HEAD = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {}\ntest_split: test\n"
CHOICE = """task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
GENERATE = """task: tiny_generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs:
  until: ["e", "zz"]
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: exact_match
"""
NAMES = ["tiny_choice", "tiny_rolling", "tiny_generate"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    words = ["red", "green", "a blue one", "ünd", "nine", "tree trunk"]
    rows = [
        {
            "question": " ".join(draws.choice(words, 3 + 20 * (number == 5))),
            "choices": [f" {word}" for word in draws.permutation(words)[:3]],
            "label": int(draws.integers(3)),
        }
        for number in range(8)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in zip(NAMES, (CHOICE, ROLLING, GENERATE), strict=True):
        (tmp_path / f"{name}.yaml").write_text(text + HEAD.format(data))
    return tmp_path


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # of lm_eval and what it imports
def test_results_are_those_of_the_hf_model(tiny_llama: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each document's log-likelihoods and answers, with windows that are shorter than the longest document."""
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    pytest.importorskip("torch", reason="the peers (torch, transformers' models) are not installed")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaForCausalLM

    from qlora_jax.adapters.pretrained import open_pretrained
    from qlora_jax.models import CausalLM

    options = command.TaskOptions(names=tuple(NAMES), tasks_folder=tasks, max_length=100, batch_size=3)
    manager = command.open_tasks(options)
    pretrained = open_pretrained(tiny_llama, quantization=None, dtype="float32")
    model = pretrained.load(progress=False)
    assert isinstance(model, CausalLM)
    ours = command.run_tasks(command.harness_model(pretrained, model, options), options, manager)
    peer: Any = HFLM(
        pretrained=LlamaForCausalLM.from_pretrained(tiny_llama).eval(),
        tokenizer=pretrained.tokenizer,
        batch_size=3,
        max_length=100,
        device="cpu",
    )
    theirs: Any = simple_evaluate(peer, tasks=NAMES, task_manager=manager)
    for name in NAMES:
        assert len(ours["samples"][name]) == len(theirs["samples"][name]) == 8
        for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            found, expected = one["resps"], other["resps"]
            if name == "tiny_generate":
                assert found == expected
            elif name == "tiny_choice":
                for (mine,), (yours,) in zip(found, expected, strict=True):
                    assert mine[0] == pytest.approx(yours[0], abs=1e-3)
                    assert mine[1] == yours[1]
            else:
                assert np.ravel(found) == pytest.approx(np.ravel(expected), abs=1e-2)
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)
    assert any(len(row["resps"][0][0]) for row in ours["samples"]["tiny_generate"]), "answers that are not empty"
    arguments = ["task", *NAMES, "--tasks-folder", str(tasks), "--model", str(tiny_llama), "--data-type", "none"]
    capsys.readouterr()
    assert main([*arguments, "--max-length", "100", "--limit", "3"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert set(printed) == set(NAMES)
    assert printed["tiny_choice"]["documents"] == 3


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_tasks_that_are_none(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    with pytest.raises(OptionError, match=r"task arc_eesy: expected one of the .* tasks .*; did you mean"):
        command.open_tasks(command.TaskOptions(names=("arc_eesy",)))
    with pytest.raises(OptionError, match=r"none\.yaml: expected a YAML file, found none"):
        command.open_tasks(command.TaskOptions(names=("none.yaml",)))


def test_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["task"]) == 1
    assert capsys.readouterr().err == "error: task: expected names of tasks, found none\n"
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main(["task", "arc_easy"]) == 1
    assert 'is not installed: pip install "qlora-jax[eval]"' in capsys.readouterr().err
