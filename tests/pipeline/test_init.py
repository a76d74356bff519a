"""init: a first recipe runs as it was written, fits the card that is named, and overwrites nothing in silence."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import MODEL, keeptune

from keeptune.pipeline.first_recipe import first_recipe
from keeptune.recipe.reading import parse_yaml
from keeptune.recipe.schema import load_recipe

TEMPLATES = ("--task.prompt", "{question}", "--task.completion", "{answer}")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def words(data: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """Returns the words that write a recipe for the tiny model."""

    def make(*more: object) -> list[Any]:
        place, out = tmp_path / "recipe.yaml", tmp_path / "out"
        own = ["--model", MODEL, "--data", data / "task.jsonl", "--output", out, *TEMPLATES]
        return ["init", place, *own, "--store", tmp_path / "store", *more]

    return make


def test_a_first_recipe_runs_as_it_is_and_is_overwritten_only_by_force(
    words: Callable[..., list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    said = keeptune(*words("--keep", "general", "--knowledge.generate", 4), capsys=capsys)
    assert (said.code, recipe.exists()) == (2, False)  # what is wrong is said before anything is written
    said = keeptune(*words("--keep", "general", "--train.max_steps", 1, "--card", "24GB"), capsys=capsys)
    assert said.code == 0, said.err  # of a card that need not be here
    assert said.out.startswith(f"{recipe} written: ")
    text = recipe.read_text(encoding="utf-8")
    assert parse_yaml(text)["knowledge"] == "general" and "# What should stay" in text

    assert keeptune("run", recipe, capsys=capsys).code == 0
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()

    said = keeptune(*words(), capsys=capsys)
    assert (said.code, "--force" in said.err, recipe.read_text(encoding="utf-8")) == (2, True, text)
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert keeptune(*words(), capsys=capsys).code == 2
    assert recipe.read_text(encoding="utf-8") == text
    said = keeptune(*words("--force", "--keep", "own", "--card", "auto"), capsys=capsys)
    assert f"{recipe} overwritten: " in said.out
    own = load_recipe(recipe)
    assert (own.knowledge, own.method) == (None, {"name": "keep", "rank": 8, "nats": 0.01})


def test_what_is_not_given_is_asked_at_a_terminal_and_named_without_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    said = keeptune("init", recipe, "--model", MODEL, capsys=capsys)
    assert (said.code, "init --data: got nothing" in said.err, recipe.exists()) == (2, True, False)
    answers = [MODEL, data / "task.jsonl", data / "knowledge.jsonl", "", tmp_path / "out"]
    monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{answer}\n" for answer in answers)))
    said = keeptune("init", recipe, *TEMPLATES, "--knowledge.text", "{text}", capsys=capsys)
    assert said.code == 0, said.err
    assert "what to keep" in said.err
    own = load_recipe(recipe)
    assert (own.model, own.knowledge_files, own.output) == (str(MODEL), [str(answers[2])], tmp_path / "out")


def on_card(card: str) -> dict[str, Any]:
    given = {
        "model": "meta-llama/Llama-3.1-8B",
        "task.train": "hf://datasets/org/name/train.jsonl",
        "task.prompt": "{question}",
        "task.completion": "{answer}",
        "task.examples": 1000,
        "output": "runs/first",
    }
    return dict(parse_yaml(first_recipe(given, keep="general", card=card)[0]))


def test_a_smaller_card_gets_a_thriftier_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    large, middle, small = map(on_card, ("140GB", "30GB", "16GB"))
    assert ["quantization" in recipe for recipe in (large, middle, small)] == [False, False, True]
    assert [recipe["train"].get("activation_checkpointing", False) for recipe in (large, middle, small)] == [
        False,
        True,
        True,
    ]
    for recipe in (large, middle, small):
        train = recipe["train"]
        assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 16
        assert "device" not in recipe
    for card, wanted in (("2GB", "memory for the model"), ("soon", "a size such as 24GB")):
        words = ["--model", "meta-llama/Llama-3.1-8B", "--data", "hf://datasets/o/n/t.jsonl", "--task.examples", 1000]
        said = keeptune("init", "x.yaml", *words, *TEMPLATES, "--keep", "general", "--card", card, capsys=capsys)
        assert (said.code, wanted in said.err) == (2, True), said.err
