"""The main job with a sequence classifier: from labelled sentences to an adapter that holds its head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.encoder import FACTS, make_encoder
from peft import PeftModel
from safetensors.torch import load_file
from sklearn.metrics import matthews_corrcoef
from tests.pipeline.support import read_jsonl, recipe_of, write_jsonl
from tests.pipeline.test_resume import killed_after
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from keeptune.core.artefact import read_json
from keeptune.core.errors import DataError, KeeptuneError, ModelError, RecipeError
from keeptune.pipeline.job import Job
from keeptune.pipeline.merge import merge_adapter
from keeptune.pipeline.run import export_stage, plan_stage, run, start, train_stage
from keeptune.pipeline.scoring import evaluate_stage
from keeptune.pipeline.training import load_trained
from keeptune.posthoc.repair import Repair, repair
from keeptune.studies.change import weight_changes

LORA, FULL = {"name": "lora", "rank": 4, "dropout": 0.1}, {"name": "full"}
NULL = {"name": "lora-null", "rank": 4}
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    rows = read_jsonl(FACTS, 180)
    for row in rows:
        row["length"] = len(row["sentence"])
    make_encoder(folder / "encoder", [row["sentence"] for row in rows])
    for name, part in (("train", rows[:120]), ("test", rows[120:160]), ("knowledge", rows[160:])):
        write_jsonl(folder / f"{name}.jsonl", part)
    return folder


@pytest.fixture
def make(data: Path, tmp_path: Path) -> Make:
    """The values of a recipe whose output is in this test's folder."""

    def values(**changes: Any) -> dict[str, Any]:
        task = {"train": str(data / "train.jsonl"), "kind": "classification", "text": "{sentence}"}
        scored = {"role": "task", "file": str(data / "test.jsonl"), "text": "{sentence}", "answer": "{relation}"}
        recipe: dict[str, Any] = {
            "model": str(data / "encoder"),
            "method": LORA,
            "task": task | {"label": "{relation}"},
            "knowledge": {"file": str(data / "knowledge.jsonl"), "text": "{sentence}", "max_length": 64},
            "train": {"learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 8, "save_steps": 2},
            "evaluate": [scored | {"name": metric, "metric": metric} for metric in ("accuracy", "f1", "matthews")],
            "output": str(tmp_path / "out"),
            "store": str(tmp_path / "store"),
            "device": "cpu",
        }
        return recipe | changes

    return values


def regression(given: dict[str, Any]) -> dict[str, Any]:
    task = {key: value for key, value in given["task"].items() if key != "kind"} | {"kind": "regression"}
    scored = given["evaluate"][0] | {"answer": "{length}"}
    metrics = [scored | {"name": metric, "metric": metric} for metric in ("pearson", "spearman")]
    return given | {"task": task | {"label": "{length}"}, "evaluate": metrics}


def stock(given: dict[str, Any], outputs: int, seed: int) -> Any:
    """What a user has: the encoder with a head of any draw, and the adapter on it."""
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(given["model"], num_labels=outputs)
    return PeftModel.from_pretrained(base, str(Path(given["output"]) / "adapter")).eval()


def trained(output: Path) -> dict[str, torch.Tensor]:
    one = output / "trained" / "factors.safetensors"
    return load_file(one if one.is_file() else output / "trained" / "model" / "model.safetensors")


@pytest.mark.parametrize("method", [LORA, NULL, FULL], ids=lambda method: method["name"])
def test_the_whole_job(make: Make, method: dict[str, Any], tmp_path: Path) -> None:
    given = make(method=method)
    (entry,) = run(recipe_of(given))["methods"]
    rows = read_jsonl(Path(given["evaluate"][0]["file"]), 40)
    labels = sorted({row["relation"] for row in read_jsonl(Path(given["task"]["train"]), 120)})
    benchmarks = {b["name"]: b for b in entry["benchmarks"]}
    items = read_jsonl(tmp_path / "out" / "evaluation" / "matthews.items.jsonl", 40)
    assert [item["answer"] for item in items] == [row["relation"] for row in rows]
    for side in ("before", "after"):
        said = [item[f"label_{side}"] for item in items]
        right = [item["answer"] == label for item, label in zip(items, said, strict=True)]
        assert [item[side] for item in items] == right
        assert benchmarks["accuracy"][side] == sum(right) / 40
        assert benchmarks["matthews"][side] == pytest.approx(matthews_corrcoef([i["answer"] for i in items], said))
    assert benchmarks["accuracy"]["groups"].keys() == {row["relation"] for row in rows}
    assert entry["K"] is None
    assert read_json(tmp_path / "out" / "trained" / "train.json")["labels"] == labels
    folder = tmp_path / "out" / ("merged" if method is FULL else "adapter")
    assert read_json(folder / "keeptune.json")["labels"] == labels
    if method is FULL:
        assert list(read_json(folder / "config.json")["id2label"].values()) == labels
    # The adapter says what the record says, on any fresh head and without keeptune.
    model = (
        AutoModelForSequenceClassification.from_pretrained(folder) if method is FULL else stock(given, len(labels), 7)
    )
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    with torch.no_grad():
        logits = model.eval()(**tokenizer([row["sentence"] for row in rows], padding=True, return_tensors="pt")).logits
    assert [labels[place] for place in logits.argmax(-1)] == [item["label_after"] for item in items]


@pytest.mark.parametrize(
    ("method", "format", "result"),
    [
        ({"name": "dora", "rank": 4}, "portable", "merged"),
        ({"name": "dora", "rank": 4}, "peft", "adapter"),
        ({"name": "lora-fa", "rank": 4}, "portable", "adapter"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else value,
)
def test_what_is_more_than_two_factors_is_trained_with_the_head_and_exported_with_it(
    make: Make, method: dict[str, Any], format: str, result: str, tmp_path: Path
) -> None:
    """Every export is checked on a freshly loaded base, its head included."""
    (entry,) = run(recipe_of(make(method=method, export={"format": format})))["methods"]
    assert Path(entry["adapter"]) == tmp_path / "out" / result
    assert entry["export_relative_gap"] < 1e-4
    accuracy = next(b for b in entry["benchmarks"] if b["name"] == "accuracy")
    assert accuracy["after"] != accuracy["before"]


def test_farss_takes_gradients_of_the_classifiers_loss(make: Make, data: Path, tmp_path: Path) -> None:
    given = make(method={"name": "farss", "rank": 4})
    rows = read_jsonl(data / "train.jsonl", 120)
    turned = [row | {"relation": other["relation"]} for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
    task = given["task"] | {"train": str(write_jsonl(tmp_path / "turned.jsonl", turned))}
    plans = [plan_stage(Job(recipe_of(one))) for one in (given, given | {"task": task, "output": str(tmp_path / "b")})]
    for plan in plans:
        assert len({t.decision.rank for t in plan.targets}) > 1
    own, other = ([float(t.evidence["importance"]) for t in p.targets if "importance" in t.evidence] for p in plans)
    assert min(abs(a / b - 1) for a, b in zip(own, other, strict=True)) > 1e-3  # the same texts, other labels


def test_the_task_is_learned(make: Make) -> None:
    given = make(train={"learning_rate": 1e-2, "num_train_epochs": 12, "per_device_train_batch_size": 16})
    (entry,) = run(recipe_of(given))["methods"]
    first, last = entry["loss"][0]["loss"], entry["loss"][-1]["loss"]
    assert last < 0.5 * first
    assert first == pytest.approx(torch.log(torch.tensor(6.0)).item(), abs=0.5)
    accuracy = entry["benchmarks"][0]
    assert accuracy["after"] > accuracy["before"] + 0.1


def test_scores_are_learned_and_correlated(make: Make, tmp_path: Path) -> None:
    given = regression(make(train={"learning_rate": 1e-2, "max_steps": 30, "per_device_train_batch_size": 16}))
    (entry,) = run(recipe_of(given))["methods"]
    assert {b["metric"] for b in entry["benchmarks"]} == {"pearson", "spearman"}
    assert entry["loss"][-1]["loss"] < entry["loss"][0]["loss"]
    items = read_jsonl(tmp_path / "out" / "evaluation" / "pearson.items.jsonl", 40)
    tokenizer, model = AutoTokenizer.from_pretrained(given["model"]), stock(given, 1, 5)
    rows = read_jsonl(Path(given["evaluate"][0]["file"]), 3)
    for row, item in zip(rows, items, strict=False):
        with torch.no_grad():
            logits = model(**tokenizer(row["sentence"], return_tensors="pt")).logits
        assert item["after"] == pytest.approx(float(logits), abs=1e-4)
        assert item["answer"] == row["length"]


def test_pairs_of_texts_and_given_labels(make: Make) -> None:
    given = make()
    pair = {"text_pair": "{relation}"}  # gives the answer away
    names = sorted({row["relation"] for row in read_jsonl(Path(given["task"]["train"]), 120)}, reverse=True)
    given["task"] |= pair | {"labels": names}
    given["evaluate"] = [given["evaluate"][0] | pair]
    given["train"] = {"learning_rate": 1e-2, "num_train_epochs": 12, "per_device_train_batch_size": 16}
    (entry,) = run(recipe_of(given))["methods"]
    assert entry["benchmarks"][0]["after"] > 0.9
    assert read_json(Path(given["output"]) / "adapter" / "keeptune.json")["labels"] == names


@pytest.mark.parametrize(
    "change", [{}, {"method": NULL, "anchor": "twin"}, {"method": NULL, "anchor": "residual"}, {"method": FULL}]
)
def test_resumed_training_equals_uninterrupted_training(
    make: Make, change: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train_in(output: Path) -> dict[str, torch.Tensor]:
        job = Job(recipe_of(make(**change, output=str(output))))
        train_stage(job, plan_stage(job))
        return trained(output)

    wanted = train_in(tmp_path / "whole")
    with killed_after(1):
        train_in(tmp_path / "killed")
    with caplog.at_level("INFO", logger="keeptune"):
        weights = train_in(tmp_path / "killed")
    assert "checkpoint-2" in caplog.text
    assert weights.keys() == wanted.keys()
    assert any(name.startswith("classifier.") for name in wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


def test_the_trained_model_is_loaded_with_its_head(make: Make) -> None:
    job = Job(recipe_of(make()))
    plan = plan_stage(job)
    train_stage(job, plan)
    record = read_json(job.output / "trained" / "train.json")
    model = load_trained(job, plan)
    kept, drawn = trained(job.output), job.base().state_dict()
    for name in ("dense.weight", "out_proj.bias"):
        now = model.get_parameter(f"base_model.model.classifier.modules_to_save.default.{name}")
        assert torch.equal(now, kept[f"classifier.{name}"])
        assert not torch.equal(now, drawn[f"classifier.{name}"])
    export_stage(job, plan)
    assert record["trained_parameters"] == sum(t.trained_parameters for t in plan.targets) + sum(
        value.numel() for name, value in kept.items() if name.startswith("classifier.")
    )


def test_a_base_has_the_same_head_each_time_and_another_with_another_seed(make: Make) -> None:
    plain = make(method=NULL)  # a method without a seed of its own
    first, again = (Job(recipe_of(plain)).base().classifier.out_proj.weight for _ in range(2))
    other = Job(recipe_of(plain | {"train": {"seed": 1}}))
    assert torch.equal(first, again)
    assert not torch.equal(first, other.base().classifier.out_proj.weight)
    assert other.base_fingerprint == Job(recipe_of(plain)).base_fingerprint
    assert other.plan_inputs != Job(recipe_of(plain)).plan_inputs


def test_a_repaired_classifier_keeps_its_head(make: Make, data: Path, tmp_path: Path) -> None:
    values = make()
    run(recipe_of(values))
    texts = [row["sentence"] for row in read_jsonl(data / "knowledge.jsonl", 20)]
    task = [row["sentence"] for row in read_jsonl(data / "train.jsonl", 40)]
    given: dict[str, Any] = {"knowledge": texts, "task": task}
    own = {"store": tmp_path / "store", "device": "cpu"}
    record = repair(tmp_path / "out", tmp_path / "same", Repair(mu=0.0, **own), **given)
    assert record["dropped"] == []
    repair(tmp_path / "out", tmp_path / "repaired", Repair(mu=1.0, **own), **given)
    before, same, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "out" / "adapter", tmp_path / "same", tmp_path / "repaired")
    )
    heads = [key for key in before if "lora" not in key]
    assert heads
    assert all(torch.equal(before[key], same[key]) for key in before)
    assert all(torch.equal(before[key], after[key]) for key in heads)
    assert any(not torch.equal(before[key], after[key]) for key in before if "lora_A" in key)
    assert read_json(tmp_path / "repaired" / "keeptune.json")["labels"] is not None


def test_an_adapter_is_checked_against_encoder_and_labels(make: Make, data: Path, tmp_path: Path) -> None:
    given = make()
    run(recipe_of(given))
    adapter = tmp_path / "out" / "adapter"
    same = Job(recipe_of(make(output=str(tmp_path / "same"), train={"seed": 3})))
    evaluate_stage(same, adapter)  # another head is drawn, the adapter brings its own
    make_encoder(tmp_path / "other", ["other words"])
    with pytest.raises(ModelError, match="made for"):
        evaluate_stage(Job(recipe_of(make(model=str(tmp_path / "other"), output=str(tmp_path / "o")))), adapter)
    labels = read_json(adapter / "keeptune.json")["labels"]
    turned = make(output=str(tmp_path / "turned"))
    turned["task"] |= {"labels": labels[::-1]}
    with pytest.raises(ModelError, match=r"classifier of .*task\.labels"):
        evaluate_stage(Job(recipe_of(turned)), adapter)


def test_an_adapter_is_merged_with_its_head(make: Make, tmp_path: Path) -> None:
    given = make()
    run(recipe_of(given))
    assert merge_adapter(tmp_path / "out" / "adapter", tmp_path / "merged").gap < 1e-5
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    labels = read_json(tmp_path / "out" / "adapter" / "keeptune.json")["labels"]
    assert list(merged.config.id2label.values()) == labels
    ids = torch.randint(3, 100, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, stock(given, 6, 1)(input_ids=ids).logits)


# What is told apart from what cannot be


def refused(given: dict[str, Any], error: type[KeeptuneError], *words: str) -> None:
    with pytest.raises(error) as caught:
        start(recipe_of(given))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"prompt": "{sentence}"}, ["task.prompt", "kind classification does not use", "text, label"]),
        ({"completion": "x"}, ["task.completion"]),
        ({"label": None}, ["task.label", "nothing"]),
        ({"text": None}, ["task.text", "nothing"]),
        ({"kind": "completion"}, ["task.label", "kind completion does not use"]),
        ({"kind": "classify"}, ["task.kind", "classification"]),
        ({"kind": "regression", "labels": ["a", "b"]}, ["task.labels", "kind regression does not use"]),
        ({"labels": ["a"]}, ["task.labels"]),
        ({"labels": ["a", "a"]}, ["task.labels", "different"]),
    ],
)
def test_keys_of_another_kind(make: Make, task: dict[str, Any], words: list[str]) -> None:
    given = make()
    given["task"] = {key: value for key, value in (given["task"] | task).items() if value is not None}
    refused(given, RecipeError, *words)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"answer": "{sentence}"}, DataError, ["evaluate.accuracy row 1", "wanted a label", "person plays instrument"]),
        ({"metric": "pearson"}, DataError, ["row 1", "the score"]),
        ({"metric": "pearson", "answer": "{length}"}, RecipeError, ["pearson for task.kind classification", "f1"]),
        ({"role": "knowledge"}, RecipeError, ["evaluate.accuracy.role", "wanted task", "not measured"]),
        ({"prompt": "{sentence}"}, RecipeError, ["evaluate.accuracy", "prompt"]),
        ({"metric": "cross_entropy", "answer": None}, RecipeError, ["cross_entropy for task.kind classification"]),
        ({"metric": "accurate"}, RecipeError, ["accuracy"]),
        ({"answer": "{nothing}"}, DataError, ["evaluate.accuracy", '"nothing"']),
    ],
)
def test_benchmarks_that_do_not_fit(
    make: Make, change: dict[str, Any], error: type[KeeptuneError], words: list[str]
) -> None:
    given = make()
    entry = given["evaluate"][0] | change
    refused(given | {"evaluate": [{k: v for k, v in entry.items() if v is not None}]}, error, *words)


def test_accuracy_needs_a_classifier(make: Make) -> None:
    given = make()
    given["task"] = {"train": given["task"]["train"], "prompt": "{sentence}", "completion": "{relation}"}
    refused(given, RecipeError, "accuracy for task.kind completion", "exact_match")


def test_labels_of_words_are_no_scores(make: Make) -> None:
    given = regression(make())
    given["task"] |= {"label": "{relation}"}
    refused(given, DataError, "task.train row 1", "the score", "kind: classification")


@pytest.mark.parametrize("key", ["packing", "completion_only_loss", "assistant_only_loss"])
def test_arguments_of_completions_are_refused(make: Make, key: str) -> None:
    refused(make(train={key: True}), RecipeError, f"train.{key}")


def test_max_length_and_transformers_own_arguments_are_taken(make: Make, tmp_path: Path) -> None:
    job = start(recipe_of(make(train={"max_length": 20, "label_smoothing_factor": 0.1})))
    assert job.config(tmp_path, torch.float32).max_length == 20
    assert (
        start(recipe_of(make())).config(tmp_path, torch.float32).max_length == 64
    )  # 66 less the two RoBERTa leaves out


@pytest.mark.parametrize("part", ["train", "knowledge"])
def test_what_was_used_may_not_be_scored(make: Make, data: Path, tmp_path: Path, part: str) -> None:
    row = read_jsonl(data / f"{part}.jsonl", 1)[0]
    file = write_jsonl(tmp_path / "again.jsonl", [{"sentence": row["sentence"], "relation": row["relation"]}])
    given = make()
    refused(
        given | {"evaluate": [given["evaluate"][0] | {"file": str(file)}]},
        DataError,
        "evaluate.accuracy",
        row["sentence"][:40],
    )
    longer = row["sentence"].rpartition(" ")[0]  # the start of a used sentence is another sentence
    write_jsonl(file, [{"sentence": longer, "relation": row["relation"]}])
    start(recipe_of(given | {"evaluate": [given["evaluate"][0] | {"file": str(file)}]}))


def test_a_base_that_brings_a_head_keeps_it_and_its_order(make: Make, tmp_path: Path) -> None:
    given = make(method=FULL)
    run(recipe_of(given))
    merged = tmp_path / "out" / "merged"
    again = make(model=str(merged), output=str(tmp_path / "again"))
    kept = Job(recipe_of(again)).base().classifier.out_proj.weight
    assert torch.equal(kept, load_file(merged / "model.safetensors")["classifier.out_proj.weight"])
    labels = json.loads((merged / "config.json").read_text())["id2label"]
    again["task"] |= {"labels": list(labels.values())[::-1]}
    with pytest.raises(ModelError, match=r"Set task\.labels"):
        Job(recipe_of(again)).base()


@pytest.mark.parametrize("format", ["portable", "merged"])
def test_the_change_of_a_classifiers_weights_is_measured(make: Make, format: str) -> None:
    given = make(evaluate=[], export={"format": format}, targets=["query"])
    run(recipe_of(given))
    base, rows = weight_changes(given["output"])
    assert base == given["model"]
    moved = [row["norm"] > 0 for row in rows]
    assert moved == [row["role"] == "query" for row in rows]
    assert weight_changes(given["output"], roles=["query"])[1] == [row for row in rows if row["role"] == "query"]
