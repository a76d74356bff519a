"""The main job with judged answers: from pairs, or good and bad answers, to an adapter scored by its rewards."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.assets import DATA
from tests.pipeline.support import MODEL, read_jsonl, recipe_of, write_jsonl
from tests.pipeline.test_resume import killed_after

from keeptune.core.artefact import read_json
from keeptune.core.errors import KeeptuneError
from keeptune.pipeline.dry_run.describe import describe
from keeptune.pipeline.run import run
from studies.models import has_bfloat16

Make = Callable[..., dict[str, Any]]
TRAIN = {"learning_rate": 5e-3, "max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1}
CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito", "Berlin", "Madrid")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    rows = read_jsonl(DATA / "gsm8k" / "train.jsonl", 16)
    pairs = [{"prompt": r["question"][:60], "chosen": " " + r["answer"][:30], "rejected": " No."} for r in rows]
    single = [
        {"prompt": p["prompt"], "completion": p[n], "label": n == "chosen"}
        for p in pairs
        for n in ("chosen", "rejected")
    ]
    for name, part in (("pairs", pairs[:12]), ("test", pairs[12:]), ("single", single[:24])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    write_jsonl(tmp_path / "know.jsonl", [{"text": f"Once there were {n} birds."} for n in range(6)])

    def values(kind: str = "preference", **changes: Any) -> dict[str, Any]:
        file = "pairs.jsonl" if kind == "preference" else "single.jsonl"
        scored = {"role": "task", "file": str(tmp_path / "test.jsonl")}
        names = ("reward_accuracy", "preference_accuracy")
        return {
            "model": str(MODEL),
            "method": {"name": "pissa", "rank": 2},
            "task": {"kind": kind, "train": str(tmp_path / file)},
            "knowledge": {"file": str(tmp_path / "know.jsonl"), "text": "{text}"},
            "train": TRAIN,
            "evaluate": [{**scored, "name": name, "metric": name} for name in names],
            "output": str(tmp_path / "out"),
            "store": str(tmp_path / "store"),
            "device": "cpu",
        } | changes  # fmt: skip

    return values


@pytest.mark.parametrize("kind", ["preference", "unpaired_preference"])
def test_the_whole_job_with_replay_and_a_kill(make: Make, kind: str, tmp_path: Path) -> None:
    whole = make(kind, replay=0.3, penalties=[{"name": "l2", "strength": 0.1}])
    run(recipe_of(whole))
    reward, likelier = (
        read_json(tmp_path / "out" / "evaluation" / f"{name}.json")["summary"]
        for name in ("reward_accuracy", "preference_accuracy")
    )
    assert reward["before"] == 0.5 and reward["n"] == likelier["n"] == 4
    loss = read_json(tmp_path / "out" / "trained" / "train.json")["loss"]
    assert {"replay_loss", "rewards/margins", "penalty/l2"} <= loss[0].keys()
    expected = math.log(2) if kind == "preference" else 0.5
    assert loss[0]["loss"] > expected  # the replayed texts come on top
    killed = recipe_of(whole | {"output": str(tmp_path / "killed")})
    with killed_after(1):
        run(killed)
    run(killed)
    factors = [(tmp_path / name / "trained" / "factors.safetensors").read_bytes() for name in ("out", "killed")]
    assert factors[0] == factors[1]


def test_the_account_counts_both_answers_and_the_reference(make: Make) -> None:
    account = describe(recipe_of(make(replay=0.3)))
    plain = describe(
        recipe_of(make(task={**make()["task"], "kind": "completion", "prompt": "{prompt}", "completion": "{chosen}"}))
    )
    assert account.train.examples == 12
    assert account.memory["training"]["reference"] == 4 * account.train.numbers
    assert account.memory["training"]["activations"] == 2 * plain.memory["training"]["activations"]
    assert 2 * (plain.work["train"] or 0) < (account.work["train"] or 0) < 4 * (plain.work["train"] or 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"text": "{x}"}}, "task.text: got a key that kind preference does not use"),
        ({"task": {"turns": "last"}}, "task.turns: got a value, with kind preference"),
        ({"task": {"loss": "dft"}}, "task.loss: got a key that kind preference does not use"),
        ({"task": {"truncate": "left"}}, "task.truncate: got a value, with kind preference"),
        ({"task": {"chosen": "{best}"}}, "got fields prompt, chosen, rejected"),
        ({"train": {"packing": True}}, "train.packing: got an unknown key, wanted a field of TRL's DPOConfig"),
        ({"train": {"max_length": 2}}, "Raise train.max_length (2)"),
        ({"evaluate": "pairs.jsonl"}, "12 of 12 items that are in task.train too"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_refused(make: Make, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = make()
    for key, value in changes.items():
        used = [{"name": "a", "role": "task", "metric": "reward_accuracy", "file": str(tmp_path / "pairs.jsonl")}]
        given[key] = {**given[key], **value} if isinstance(value, dict) else used
    with pytest.raises(KeeptuneError) as error:
        run(recipe_of(given))
    assert message in str(error.value)


@pytest.mark.real
def test_smollm2_learns_what_is_preferred(smollm2_short: Path, make: Make, tmp_path: Path) -> None:
    """Messages through the chat template, on a twin: rewards of unseen pairs rise in two steps."""
    pairs = [
        {
            "prompt": f"What can I see in {city}?",
            "chosen": [{"role": "assistant", "content": f"Ahoy! In {city}, matey, ask the harbour master."}],
            "rejected": [{"role": "assistant", "content": f"There is much to see in {city}."}],
        }
        for city in CITIES
    ]  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", pairs[:8])
    write_jsonl(tmp_path / "test.jsonl", pairs[8:])
    train = TRAIN | {"max_steps": 2, "learning_rate": 5e-3, "save_strategy": "no"}
    dtype = "bfloat16" if has_bfloat16() else "float32"
    given = make(model=str(smollm2_short), dtype=dtype, layers=[0], knowledge=None, train=train)
    run(recipe_of(given | {"evaluate": given["evaluate"][:1]}))
    loss = read_json(tmp_path / "out" / "trained" / "train.json")["loss"]
    assert loss[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    reward = read_json(tmp_path / "out" / "evaluation" / "reward_accuracy.json")["summary"]
    assert (reward["before"], reward["after"]) == (0.5, 1.0)
