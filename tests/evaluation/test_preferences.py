"""Pairs of answers scored: which one is likelier, and which one's likelihood training raised by more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.assets import STORIES

from keeptune.core.errors import DataError, RecipeError
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import TwoModels
from keeptune.model.pretrained import load_model, load_tokenizer

TOKENIZER = load_tokenizer(str(STORIES))
WORDS = ("a dog", "the big red ball", "Lily", "to the park", "his mom", "one day")
ROWS = [{"prompt": f"Once {word}", "chosen": f" {word} was", "rejected": f" {word} 7"} for word in WORDS]


def scored(folder: Path, metric: Any, rows: list[dict[str, Any]], after: Any, **own: Any) -> Any:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = FileBenchmark(name="pairs", role="task", file=str(path), metric=metric, **own)
    return evaluate(TwoModels(load_model(str(STORIES)), after), TOKENIZER, benchmark, Path())


def test_rewards_are_relative_to_the_base_and_likelihoods_are_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, tuned = load_model(str(STORIES)), load_model(str(STORIES))
    with torch.no_grad():
        tuned.lm_head.weight += 0.02 * torch.randn_like(tuned.lm_head.weight)
    sums: dict[str, list[float]] = {}
    for side, model in (("before", base), ("after", tuned)):
        for row in ROWS:
            for name in ("chosen", "rejected"):
                start = len(TOKENIZER(row["prompt"])["input_ids"])
                ids = torch.tensor(TOKENIZER(row["prompt"] + row[name] + TOKENIZER.eos_token)["input_ids"])
                with torch.no_grad():
                    found = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
                sums.setdefault(f"{side} {name}", []).append(
                    float(sum(found[at - 1, ids[at]] for at in range(start, len(ids))))
                )
    margins = {
        s: [c - r for c, r in zip(sums[f"{s} chosen"], sums[f"{s} rejected"], strict=True)] for s in ("before", "after")
    }
    rewards = [after - before for before, after in zip(margins["before"], margins["after"], strict=True)]
    reward = scored(tmp_path, "reward_accuracy", ROWS, tuned)
    likelier = scored(tmp_path, "preference_accuracy", ROWS, tuned)
    assert reward.before == 0.5 and reward.after == pytest.approx(sum(r > 0 for r in rewards) / 6)
    assert 0 < reward.after < 1  # or the test could not tell the two apart
    for side in ("before", "after"):
        assert getattr(likelier, side) == pytest.approx(sum(m > 0 for m in margins[side]) / 6)
        assert [item[f"preference_accuracy_{side}"] for item in reward.items] == [i[side] for i in likelier.items]
        for row, item in enumerate(reward.items):
            assert item[f"loglikelihoods_{side}"] == pytest.approx(
                [sums[f"{side} chosen"][row], sums[f"{side} rejected"][row]], abs=1e-3
            )
    low, high = reward.interval
    assert low <= reward.after - 0.5 <= high
    mirrored = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    assert scored(tmp_path, "reward_accuracy", mirrored, tuned).after == pytest.approx(1 - reward.after)
    same = scored(tmp_path, "reward_accuracy", ROWS, load_model(str(STORIES)))
    assert same.after == 0.5 and same.interval == (0.0, 0.0)


def test_fields_have_the_names_that_templates_give_them(tmp_path: Path) -> None:
    rows = [{"q": row["prompt"], "a": row["chosen"], "b": row["rejected"]} for row in ROWS]
    model = load_model(str(STORIES))
    named = scored(tmp_path, "preference_accuracy", rows, model, prompt="{q}", chosen="{a}", rejected="{b}")
    assert named.items == scored(tmp_path, "preference_accuracy", ROWS, model).items


@pytest.mark.parametrize(
    ("rows", "own", "message"),
    [
        ([ROWS[0] | {"rejected": ROWS[0]["chosen"]}, ROWS[1]], {}, "1 pairs with equal answers"),
        (ROWS, {"max_length": 4}, "got an answer of"),
        ([{"prompt": "a", "chosen": "b"}], {}, "got fields prompt, chosen"),
    ],
)
def test_pairs_that_cannot_be_scored_are_named(tmp_path: Path, rows: Any, own: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        scored(tmp_path, "reward_accuracy", rows, load_model(str(STORIES)), **own)


def test_a_reward_is_no_knowledge() -> None:
    with pytest.raises(RecipeError, match="take preference_accuracy"):
        FileBenchmark(name="x", role="knowledge", file="x.jsonl", metric="reward_accuracy")
    FileBenchmark(name="x", role="knowledge", file="x.jsonl", metric="preference_accuracy")
