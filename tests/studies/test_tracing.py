"""keeptune trace, from models and a file to a table, two figures and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.models import counted_passes, llama
from tests.pipeline.support import MODEL, keeptune, write_jsonl

import keeptune as library
from keeptune.adapter.install import install
from keeptune.core.artefact import read_json
from keeptune.methods.lora import Lora
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.statistics.layer_effect import LayerEffect
from keeptune.studies.trace import TraceOptions, trace_models

STORIES = [
    {"start": "Once upon a time, there was a little girl named", "end": " Lily. She"},
    {"start": "Tom and his dog were best", "end": " friends."},
    {"start": "One day, the little boy went to the park with his", "end": " mom."},
]
OPTIONS = library.PlanOptions(targets=["q_proj", "down_proj"])
WORDS = ("--prompt", "{start}", "--completion", "{end}")


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "stories.jsonl", STORIES)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes the model."""
    folder = tmp_path_factory.mktemp("adapter")
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    tuned = install(model, library.plan(model, tokenizer, Lora(rank=2), options=OPTIONS))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(weight.numel()))
    tuned.save_pretrained(folder)
    return folder


def test_a_model_and_its_adapter(
    stories: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "trace"
    words = ("trace", MODEL, "--adapter", adapter, "--data", stories, *WORDS, "--store", tmp_path / "store")
    said = keeptune(*words, "--output", output, capsys=capsys)
    assert said.code == 0, said.err
    record = read_json(output / "trace.json")
    base, tuned = record["models"]
    assert (base["name"], tuned["name"]) == (MODEL.name, f"{MODEL.name} + {adapter.name}")
    assert base["clean"] > base["corrupted"] > 0
    assert all(len(model[key]) == 5 for model in (base, tuned) for key in ("AIE", "AIE_error", "heat"))
    assert base["AIE"] != tuned["AIE"]
    for model in (base, tuned):
        effects = [text["effect"] for text in model["texts"]]
        assert model["AIE"] == pytest.approx([sum(layer) / 3 for layer in zip(*effects, strict=True)])
        assert max(model["NAIE_max"]) == pytest.approx(1)
        assert sum(model["NAIE_sum"]) == pytest.approx(1)
    example = record["example"]
    assert (
        "".join(example["prompt"]).replace(" ", "").endswith(STORIES[example["number"] - 1]["start"].replace(" ", ""))
    )
    assert len(base["heat"][0]) == len(example["prompt"])
    text = base["texts"][example["number"] - 1]
    assert [sum(row) for row in base["heat"]] == pytest.approx(text["effect"])
    assert f"{base['AIE'][2]:.4f}" in said.out
    assert (output / "layers.png").stat().st_size > 10_000
    assert (output / "heat.png").stat().st_size > 10_000

    again = keeptune(*words, "--output", tmp_path / "again", "--norm", "sum", capsys=capsys)
    assert again.code == 0
    other = read_json(tmp_path / "again" / "trace.json")
    assert [model["AIE"] for model in other["models"]] == [base["AIE"], tuned["AIE"]]


def test_two_models_by_the_other_reading(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--reading", "diagonal", "--examples", 2, "--output", tmp_path / "t")
    words = (*words, "--store", tmp_path / "store", "--adapter", MODEL)
    said = keeptune("trace", MODEL, "--data", stories, *WORDS, *words, capsys=capsys)
    assert said.code == 0, said.err
    record = read_json(tmp_path / "t" / "trace.json")
    assert (record["reading"], record["data"]["examples"]) == ("diagonal", 2)
    assert record["models"][0]["AIE"] == record["models"][1]["AIE"]
    assert len(record["models"][0]["heat"][0]) == len(record["example"]["prompt"])


def test_atlas_has_data_of_its_own_and_a_line_end_is_typed_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    templates = ("--prompt", r"{question}\nAnswer:", "--completion", " {answer}", "--examples", "1")
    words = ("--data", "atlas:facts.jsonl", *templates, "--store", tmp_path / "store", "--output", tmp_path / "t")
    assert keeptune("trace", "atlas", *words, capsys=capsys).code == 0
    record = read_json(tmp_path / "t" / "trace.json")
    assert "".join(record["example"]["prompt"]).endswith("?\nAnswer:")
    assert record["models"][0]["AIE_error"] == [None] * 4


def test_from_python(stories: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    pairs = [(row["start"], row["end"]) for row in STORIES]
    record = library.trace(model, tokenizer, pairs, LayerEffect("knowledge", fraction=0.4, seed=3))
    words = ("--fraction", 0.4, "--seed", 3, "--store", tmp_path / "store", "--output", tmp_path / "t")
    keeptune("trace", MODEL, "--data", stories, *WORDS, *words, "--adapter", adapter, capsys=capsys)
    base, tuned = read_json(tmp_path / "t" / "trace.json")["models"]
    assert record.average.tolist() == pytest.approx(base["AIE"], abs=1e-6)
    assert record.error.tolist() == pytest.approx(base["AIE_error"], abs=1e-6)
    assert record.normalised("sum").tolist() == pytest.approx(base["NAIE_sum"], abs=1e-5)
    assert record.summary()["clean"] == pytest.approx(base["clean"], abs=1e-6)

    wrapped = PeftModel.from_pretrained(model, str(adapter))
    with_adapter = library.trace(wrapped, tokenizer, pairs, LayerEffect("knowledge", fraction=0.4, seed=3))
    assert with_adapter.average.tolist() == pytest.approx(tuned["AIE"], abs=1e-6)


def test_clean_and_corrupted_are_the_same_in_both_readings() -> None:
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    pairs = [(row["start"], row["end"]) for row in STORIES]
    readings = [LayerEffect("knowledge"), LayerEffect("knowledge", reading="diagonal")]
    first, second = (library.trace(model, tokenizer, pairs, request).summary() for request in readings)
    for key in ("clean", "corrupted"):
        assert first[key] == pytest.approx(second[key], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "mark"),
    [
        (["--reading", "diagonl"], '"diagonal"'),
        (["--norm", "mean"], "max or sum"),
        (["--fraction", "1.5"], "above 0 and at most 1"),
        (["--scale", "-1"], "0 or more"),
        (["--adapter", "./nowhere"], "no such folder"),
        (["--prompt", "{question}"], '"question"'),
        (["--prompt", ""], "an empty prompt"),
        (["--completion", ""], "empty completion"),
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--output", f"{__file__}/t"], "wanted a folder"),
    ],
)
def test_wrong_words(
    words: list[str], mark: str, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, store = tmp_path / "t", tmp_path / "store"
    given = ("trace", MODEL, "--data", stories, *WORDS, "--output", output, "--store", store, *words)
    said = keeptune(*given, capsys=capsys)
    assert said.code == 2
    assert mark in said.err
    assert not output.exists()


def test_an_adapter_of_another_base_is_refused_before_anything_is_traced(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = llama(), load_tokenizer(str(MODEL))
    model.save_pretrained(tmp_path / "base")
    plan = library.plan(model, tokenizer, Lora(rank=2))
    tuned = install(model, plan)
    library.export(tuned, plan, tmp_path / "adapter", base=str(tmp_path / "base"))
    words = ("--adapter", tmp_path / "adapter", "--output", tmp_path / "t", "--store", tmp_path / "store")
    said = keeptune("trace", MODEL, "--data", stories, *WORDS, *words, capsys=capsys)
    assert said.code == 2
    assert "weights are not the ones it was made for" in said.err
    assert not (tmp_path / "store").exists()


def test_a_stored_trace_costs_no_pass(stories: Path, tmp_path: Path) -> None:
    options = TraceOptions(str(MODEL), stories, "{start}", "{end}", tmp_path / "t", store=tmp_path / "store")
    request = LayerEffect("knowledge")
    first = trace_models(options, request)
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Any] = []

        def loaded(*words: Any, **options: Any) -> Any:
            model = load_model(*words, **options)
            counting = counted_passes(model)
            seen.append((counting, counting.__enter__()))
            return model

        patch.setattr("keeptune.studies.trace.load_model", loaded)
        assert trace_models(options, request)["models"][0]["texts"] == first["models"][0]["texts"]
        ((counting, count),) = seen
        counting.__exit__(None, None, None)
    assert count[0] == 1  # the spread of the embeddings
