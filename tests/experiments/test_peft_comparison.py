"""PEFT's method comparison as a recipe: it loads, its numbers stand beside ours, and answers count as theirs do."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from keeptune.data import hub
from keeptune.evaluation.standard.protocols import PROTOCOLS, peft_answer
from keeptune.experiments.plan_runs import load_comparison

RECIPE = Path(__file__).parents[2] / "recipes/peft-metamathqa.yaml"


def test_the_recipe_loads_and_holds_the_published_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    loaded = load_comparison(RECIPE, {}, fetch=hub.cached)
    rows = yaml.safe_load(RECIPE.read_text("utf-8"))["published"]["rows"]
    found = {row["method"]: (row["scores"]["gsm8k"], row["others"]["forgetting, nats"]) for row in rows}
    # The figures of the issue, to its digits.
    for method, score, nats in (("LoRA, r 32", 47.8, 0.050), ("OSF, r 128", 42.7, 0.017), ("MiCA, r 32", 43.1, 0.079)):
        assert found[method] == (pytest.approx(score, abs=0.05), pytest.approx(nats, abs=6e-4))
    assert found["full, rate 1e-5"] == (pytest.approx(47.2, abs=0.05), pytest.approx(0.030, abs=5e-4))
    assert {entry.label for entry in loaded.entries} == {row["label"] for row in rows if "label" in row}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 7. The answer is: 7.", Fraction(7)),
        ("The answer is: 3\nThe answer is: 7/2", Fraction(7, 2)),
        ("The final answer is: 50%", Fraction(50)),
        ("#### 12\n\nQuestion: 5", Fraction(12)),
        ("The answer is: seven", "seven"),
        ("The answer is: 1/0", "1/0"),
        ("it is 7", None),
    ],
)
def test_what_follows_the_last_announcement_counts(text: str, answer: Fraction | str | None) -> None:
    assert peft_answer(text) == answer
    protocol = PROTOCOLS["peft", "gsm8k"]
    assert protocol.right is not None
    assert protocol.right({"answer": "6+1\n#### 7"}, text) == float(answer == 7)
