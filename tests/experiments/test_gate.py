"""keeptune check: any adapter against its base, and the exit code that a CI reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models import llama
from tests.pipeline.support import MODEL, Said, keeptune, write_data
from transformers import AutoModelForCausalLM

from keeptune.core.errors import KeeptuneError
from keeptune.experiments.gate import check

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SUITE = """
evaluate:
  - {name: stories, role: knowledge, file: stories.jsonl, text: "{text}", metric: cross_entropy, max_length: 64}
  - {name: pets, role: task, file: choices.jsonl, prompt: "{question}", choices: "{choices}", answer: "{label}",
     metric: multiple_choice}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a suite, and adapters that PEFT alone wrote: of no effect, of much effect, with biases, of another base."""
    root = write_data(tmp_path_factory.mktemp("gate"))
    (root / "suite.yaml").write_text(SUITE, "utf-8")
    wild = {"init_lora_weights": False}
    for name, more in (("idle", {}), ("wild", wild), ("biased", wild | {"bias": "all"})):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **more)
        get_peft_model(model, config).save_pretrained(str(root / name))
    other = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(str(root / "other"))
    return root


def test_the_exit_code_is_3_where_more_was_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def asked(adapter: str, *more: str) -> Said:
        return keeptune("check", folder / adapter, "--suite", folder / "suite.yaml", *more, capsys=capsys)

    kept, lost = asked("idle"), asked("wild", "--json")
    assert (kept.code, lost.code) == (0, 3)
    assert "nothing lost more than it may" in kept.out
    record = json.loads(lost.out)
    stories, pets = record["benchmarks"]
    assert (record["passed"], stories["lost"], stories["limit"]) == (False, True, 0.01)
    loss = stories["loss"]
    assert loss == pytest.approx(stories["after"] - stories["before"])
    assert pets["loss"] == pytest.approx(pets["before"] - pets["after"])
    low, high = stories["loss_interval"]
    assert low < loss < high
    assert [low, high] == stories["interval"]
    limits = {"mean": loss, "lower": low, "upper": high}
    for estimate, number in limits.items():
        for step, code in ((1e-6, 0), (-1e-6, 3)):
            said = asked("wild", "--max-loss", f"stories={number + step!r}", "--estimate", estimate)
            assert said.code == code, (estimate, step)
    assert "LOST" in said.out
    assert "lost more than it may: stories (by the upper of the loss)" in said.out


def test_biases_are_compared_with_a_base_of_their_own(folder: Path) -> None:
    """The factors are those of "wild", which is switched off instead."""
    biased, wild = (check(str(folder / name), folder / "suite.yaml")["benchmarks"] for name in ("biased", "wild"))
    for side in ("before", "after"):
        assert [row[side] for row in biased] == pytest.approx([row[side] for row in wild], abs=1e-6)
    assert biased[0]["before"] != pytest.approx(biased[0]["after"], abs=1e-3)


WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    ("nowhere", SUITE, {}, "nowhere"),
    ("other", SUITE, {"base": str(MODEL)}, "wanted a PEFT adapter for this base"),
    ("idle", "", {}, "wanted keys and values"),
    ("idle", "evaluate: []", {}, "key evaluate: got nothing, wanted a list of benchmarks"),
    ("idle", "evaluations: [mmlu]", {}, "key evaluate: got nothing"),
    ("idle", SUITE.replace("stories, role", "pets, role"), {}, '"pets" twice'),
    ("idle", SUITE.replace("stories.jsonl", "none.jsonl"), {}, "none.jsonl"),
    ("idle", SUITE.replace("max_length", "max_lenth"), {}, "max_lenth: got an unknown key"),
    ("idle", SUITE.replace("{label}", "{lable}"), {}, "lable"),
    ("idle", SUITE, {"max_loss": {"storys": 1}}, '--max-loss: got "storys".*stories'),
    ("idle", SUITE, {"estimate": "median"}, '--estimate: got "median"'),
]


@pytest.mark.parametrize(("adapter", "suite", "more", "words"), WRONG)
def test_wrong_input(folder: Path, adapter: str, suite: str, more: dict[str, Any], words: str) -> None:
    path = folder / "wrong.yaml"
    path.write_text(suite, "utf-8")
    with pytest.raises(KeeptuneError, match=words):
        check(str(folder / adapter), path, **more)


def test_a_suite_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("check", folder / "idle", "--suite", "gone.yaml", capsys=capsys)
    assert said.code == 2
    assert "gone.yaml" in said.err
