"""Model cards are what the hub reads, and say what was kept and lost."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown import markdown
from tests.report.conftest import run

from keeptune.report.pages.card import model_card, same_but_versions

EXPORT = {
    "folder": "runs/one/adapter",
    "format": "portable",
    "rank": 8,
    "gap": 1.5e-5,
    "relative_gap": 2e-6,
    "serve": "vllm serve org/tiny --enable-lora --max-lora-rank 8 --lora-modules tuned=runs/one/adapter",
    "note": "",
    "error": 0.0,
}
RECIPE = {"model": "org/tiny", "method": {"name": "lora-null"}, "task": {"prompt": "```{question}```\nAnswer:"}}


def sidecar(**changes: Any) -> dict[str, Any]:
    export = EXPORT | changes.pop("export", {})
    return {"base": "org/tiny", "labels": None, "method": "lora-null", "options": {}, "export": export} | changes


def entry(**changes: Any) -> dict[str, Any]:
    more = {"options": {"rank": 8, "train.learning_rate": 2e-4, "x": None}, "trained_parameters": 123456,
            "seconds": {"train": 125.0}, "notes": ["half <of> it"]}  # fmt: skip
    return run("lora-null-v1", 0, 0.73, 0.83) | more | changes


def read(text: str) -> ModelCard:
    card = ModelCard(text)
    assert "license" not in card.data.to_dict()
    return card


def test_the_hub_reads_the_front_matter() -> None:
    data = read(model_card(entry(), sidecar(), RECIPE)).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/tiny", "peft", "text-generation")
    assert data.tags == ["keeptune", "lora-null", "lora"]
    assert data.model_name == "lora-null-v1 on tiny"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found == {("facts", "exact_match"): 0.73, ("wiki", "cross_entropy"): 2.535, ("tools", "exact_match"): 0.83}


def test_the_card_can_be_pushed_as_it_is() -> None:
    """What the front matter is written back as equals what was read: nothing in it is lost on the hub."""
    card = read(model_card(entry(), sidecar(), RECIPE))
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_the_table_has_before_after_and_interval_of_every_benchmark() -> None:
    lines = read(model_card(entry(), sidecar(), RECIPE)).text.splitlines()
    assert "| facts | knowledge | 320 | 1.000 | 0.730 | −27.0 points | [−30.0, −24.0] |" in lines
    assert "| wiki | knowledge | 320 | 2.400 | 2.535 | +0.135 nats/token | [+0.115, +0.155] |" in lines
    assert "| tools | task | 320 | 0.050 | 0.830 | +78.0 points | [+74.0, +82.0] |" in lines
    assert "It learned the task (tools 0.050 → 0.830) and lost 27 points of facts" in "\n".join(lines)
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {8}


def test_an_adapter_for_a_quantised_base_is_loaded_on_that() -> None:
    text = model_card(entry(), sidecar(quantization={"load_in_4bit": True}), RECIPE)
    assert "from_pretrained('org/tiny', quantization_config={'load_in_4bit': True})" in text


def test_method_recipe_and_how_to_load() -> None:
    text = model_card(entry(), sidecar(), RECIPE)
    for words in (
        "- rank: `8`",
        "- train.learning\\_rate: `0.0002`".replace("\\", ""),
        "- trained parameters: 123 k",
        "relative 2.0e-06",
        "half &lt;of> it",
        "model = AutoModelForCausalLM.from_pretrained('org/tiny')",
        "PeftModel.from_pretrained(model, 'runs/one/adapter')",
        EXPORT["serve"],
        "````yaml\nmodel: org/tiny",
    ):
        assert str(words) in text
    assert "- x:" not in text
    assert "## Recipe" not in model_card(entry(), sidecar())


def test_merged_models_classifiers_and_cut_ranks() -> None:
    merged = sidecar(export={"format": "merged", "rank": 0, "note": "It has no adapter form"})
    text = model_card(entry(), merged)
    assert read(text).data.library_name == "transformers"
    assert "A merged model. It has no adapter form." in text
    assert "PeftModel" not in text and "AutoModelForCausalLM.from_pretrained('runs/one/adapter')" in text
    text = model_card(entry(), sidecar(labels=["bad", "good"]))
    assert read(text).data.pipeline_tag == "text-classification"
    assert "num_labels=2" in text and "Labels, in the order of the outputs: bad, good." in text
    assert "vllm" not in text
    assert "Cut to a smaller rank: 12.50%" in model_card(entry(), sidecar(export={"error": 0.125}))


@pytest.mark.parametrize("after", [None, float("nan")])
def test_what_was_not_measured_is_not_claimed(after: float | None) -> None:
    rows = entry()["benchmarks"]
    rows[0] |= {"after": after, "interval": None}
    found = read(model_card(entry(benchmarks=rows), sidecar())).data.eval_results
    assert [result.dataset_name for result in found] == ["wiki", "tools"]
    text = model_card(entry(benchmarks=[]), sidecar())
    assert "Nothing was measured" in text
    assert read(text).data.eval_results is None


def test_new_versions_alone_make_no_new_card() -> None:
    text = model_card(entry(), sidecar())
    head, words, _ = text.rpartition("Versions when this card was written: ")
    assert words
    assert same_but_versions(text, f"{head}{words}torch 99.\n")
    assert not same_but_versions(text, text.replace("0.730", "0.731"))
    assert not same_but_versions("", "")


def test_the_base_of_an_adapter_is_loaded_as_it_was_quantised_and_the_gap_on_its_original_is_told() -> None:
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    apart = {"original": "org/tiny", "original_gap": 12.0, "original_relative_gap": 0.31}
    text = read(model_card(entry(), sidecar(quantization=fields, export=apart), RECIPE)).text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert f"quantization_config={fields!r}" in code
    assert "those of org/tiny differ by 1.2e+01, relative 3.1e-01" in text
    merged = read(model_card(entry(), sidecar(export=apart | {"format": "merged"}), RECIPE)).text
    assert "quantization_config" not in merged and "against the adapter on the original" in merged


@pytest.mark.parametrize("name", ["<img src=x onerror=a()>", "[a](javascript:a())", "a`<b>`", "a|b"])
def test_names_are_shown_as_they_are_and_are_no_markup(name: str) -> None:
    rows = entry()["benchmarks"]
    rows[0] |= {"name": name}
    named = entry(name=name, benchmarks=rows)
    text = model_card(named, sidecar(base=f"models/{name}"), RECIPE).partition("\n---\n")[2]
    shown = markdown(text, extensions=["tables", "fenced_code"])
    assert not any(mark in shown for mark in ("<img", "href", "<b>"))
    heading, cell = (re.search(rf"<{tag}[^>]*>(.*?)</{tag}>", shown) for tag in ("h1", "td"))
    assert heading is not None and unescape(heading[1]) == f"{name} on {name}"
    assert cell is not None and unescape(cell[1]) == name
