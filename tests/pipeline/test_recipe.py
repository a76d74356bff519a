"""Every key of a recipe is read with its meaning, and what is wrong is said where it stands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.pipeline.support import recipe_of

from keeptune import atlas
from keeptune.core.errors import DataError, PlanError, RecipeError
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.methods.keep import Keep
from keeptune.methods.lora import Lora
from keeptune.methods.lora_null import LoraNull
from keeptune.pipeline.demo import LEARNING_RATE, WAYS, demo_recipe
from keeptune.pipeline.job import Job
from keeptune.recipe.schema import ExportSpec, Knowledge, Task, load_recipe, make_method, make_recipe, parse_overrides

Values = Callable[..., dict[str, Any]]

EXAMPLE = r"""
model: path/or/hub-id
method: {name: lora-null, rank: 8, variant: v1}
targets: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
knowledge: {file: calibration.jsonl, text: "{question}\nAnswer: {answer}", examples: 256, max_length: 1024}
task: {train: train.jsonl, prompt: "{text}\nTopic:", completion: " {topic}"}
train: {learning_rate: 5.0e-4, max_steps: 150, per_device_train_batch_size: 32, seed: 0}
evaluate:
  - {name: facts, role: knowledge, file: facts.jsonl, prompt: "{question}\nAnswer:", answer: "{answer}",
     metric: exact_match}
  - {name: topics, role: task, file: test.jsonl, prompt: "{text}\nTopic:", answer: "{topic}", metric: exact_match}
  - {name: stories, role: knowledge, file: stories.jsonl, text: "{text}", metric: cross_entropy}
  - {name: arc, role: knowledge, file: arc.jsonl, prompt: "{question}\nAnswer:", choices: "{choices}",
     answer: "{label}", metric: multiple_choice}
output: runs/null-v1
"""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of the issue in a folder of its own, read from another folder."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    path = tmp_path / "recipes" / "recipe.yaml"
    path.write_text(EXAMPLE, encoding="utf-8")
    return path


def test_the_example_of_the_issue(example: Path, tmp_path: Path) -> None:
    recipe = load_recipe(example)
    work = tmp_path / "work"
    assert recipe.model == "path/or/hub-id"
    assert make_method(recipe.method, seed=0) == LoraNull(rank=8, variant="v1")
    assert recipe.targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert recipe.knowledge == Knowledge(
        file=str(work / "calibration.jsonl"), text="{question}\nAnswer: {answer}", examples=256, max_length=1024
    )
    assert recipe.task == Task(train=str(work / "train.jsonl"), prompt="{text}\nTopic:", completion=" {topic}")
    assert recipe.train == {
        "learning_rate": 5e-4,
        "max_steps": 150,
        "per_device_train_batch_size": 32,
        "seed": 0,
    }
    assert [(b.name, b.role, b.metric) for b in recipe.evaluate] == [
        ("facts", "knowledge", "exact_match"),
        ("topics", "task", "exact_match"),
        ("stories", "knowledge", "cross_entropy"),
        ("arc", "knowledge", "multiple_choice"),
    ]
    assert recipe.evaluate[3] == FileBenchmark(
        name="arc",
        role="knowledge",
        file=str(work / "arc.jsonl"),
        prompt="{question}\nAnswer:",
        choices="{choices}",
        answer="{label}",
        metric="multiple_choice",
    )
    assert recipe.output == Path("runs/null-v1")
    assert recipe.export == ExportSpec(format="portable", max_gap=None)
    assert (recipe.anchor, recipe.dtype, recipe.device) == ("auto", "auto", "auto")
    assert not recipe.trust_remote_code
    assert not recipe.allow_pickle


def test_plain_lora_of_the_issue() -> None:
    assert make_method({"name": "lora", "rank": 8, "alpha": 16}, seed=3) == Lora(rank=8, alpha=16, seed=3)
    assert make_method({"name": "lora", "seed": 5}, seed=3) == Lora(seed=5)


def test_what_is_written_is_read_again_the_same(recipe_values: Values) -> None:
    recipe = recipe_of(recipe_values())
    assert recipe_of(recipe.written()) == recipe


def test_files_are_sought_in_the_current_folder_and_then_beside_the_recipe(example: Path, tmp_path: Path) -> None:
    beside, here = tmp_path / "recipes", tmp_path / "work"
    (beside / "train.jsonl").write_text("{}\n", encoding="utf-8")
    (beside / "facts.jsonl").write_text("{}\n", encoding="utf-8")
    (here / "facts.jsonl").write_text("{}\n", encoding="utf-8")
    (beside / "path" / "or" / "hub-id").mkdir(parents=True)
    recipe = load_recipe(example)
    assert recipe.task.train == str(beside / "train.jsonl")
    assert recipe.evaluate[0].file == str(here / "facts.jsonl")
    assert recipe.model == str(beside / "path/or/hub-id")
    (here / "path" / "or" / "hub-id").mkdir(parents=True)
    assert load_recipe(example).model == "path/or/hub-id"


def test_atlas_names(example: Path) -> None:
    recipe = load_recipe(example, {"model": "atlas", "knowledge.file": "atlas:calibration.jsonl"})
    assert recipe.model == str(atlas.model_path())
    assert recipe.knowledge is not None
    assert recipe.knowledge.file == str(atlas.data_path("calibration.jsonl"))
    with pytest.raises(RecipeError, match=r"atlas:nothing\.jsonl.*calibration\.jsonl"):
        load_recipe(example, {"task.train": "atlas:nothing.jsonl"})


def test_home_folders(example: Path) -> None:
    recipe = load_recipe(example, {"output": "~/run", "store": "~/store"})
    assert recipe.output == Path("~/run").expanduser()
    assert recipe.store == Path("~/store").expanduser()


@pytest.mark.parametrize("way", WAYS)
def test_demo_recipes_are_right(tmp_path: Path, way: str) -> None:
    values = demo_recipe(WAYS[way]["method"], LEARNING_RATE, tmp_path / "out", seed=1, store=tmp_path / "store")
    recipe = recipe_of(values | WAYS[way])
    assert recipe.train["seed"] == 1
    Job(recipe).check()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("modle", "model"),
        ("knowledge.exmples", "examples"),
        ("task.promt", "prompt"),
        ("method.rnak", "rank"),
        ("train.learning_rat", "learning_rate"),
        ("evaluate.0.metrik", "metric"),
        ("export.fromat", "format"),
    ],
)
def test_unknown_keys_show_the_nearest(example: Path, key: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f'Did you mean "{nearest}"') as raised:
        load_recipe(example, {key: 1})
    assert key.rpartition(".")[2] in raised.value.where


def test_unknown_method_shows_the_nearest(example: Path) -> None:
    with pytest.raises(RecipeError, match='Did you mean "lora-null"'):
        load_recipe(example, {"method.name": "lora-nul"})
    with pytest.raises(RecipeError, match="rank"):
        load_recipe(example, {"method": {"name": "full", "rank": 4}})


def test_a_recipe_without_a_method_takes_keep(recipe_values: Values) -> None:
    values = recipe_values()
    del values["method"]
    assert make_method(recipe_of(values).method, seed=0) == Keep()


def test_a_method_in_short(example: Path) -> None:
    assert load_recipe(example, {"method": "lora"}).method == {"name": "lora"}
    assert load_recipe(example, {"method": "lora", "method.rank": 3}).method == {"name": "lora", "rank": 3}
    assert load_recipe(example, {"method.rank": 3, "method": "lora"}).method == {"name": "lora", "rank": 3}
    example.write_text(EXAMPLE.replace("{name: lora-null, rank: 8, variant: v1}", "lora-null"), encoding="utf-8")
    assert load_recipe(example).method == {"name": "lora-null"}
    assert load_recipe(example, {"method.variant": "v2"}).method == {"name": "lora-null", "variant": "v2"}
    with pytest.raises(RecipeError, match='Did you mean "lora"'):
        load_recipe(example, {"method": "loar"})
    example.write_text(EXAMPLE.replace("method: {name: lora-null, rank: 8, variant: v1}\n", ""), encoding="utf-8")
    assert load_recipe(example, {"method.nats": 0.02}).method == {"name": "keep", "nats": 0.02}


def test_layers(recipe_values: Values) -> None:
    assert recipe_of(recipe_values()).layers is None
    one, other, rest = (Job(recipe_of(recipe_values(layers=layers))) for layers in ([3, 1, 3], [1, 3], [1, 2]))
    assert one.recipe.layers == [3, 1, 3]
    assert one.plan_inputs == other.plan_inputs != rest.plan_inputs
    assert Job(recipe_of(recipe_values())).plan_inputs not in (one.plan_inputs, rest.plan_inputs)


def test_full_fine_tuning_has_no_layers(recipe_values: Values) -> None:
    with pytest.raises(PlanError, match="every weight"):
        Job(recipe_of(recipe_values(method="full", layers=[0]))).check()
    Job(recipe_of(recipe_values(method="full", layers=None))).check()


def test_a_key_that_is_no_text(example: Path) -> None:
    example.write_text(EXAMPLE + "1: 2\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="1"):
        load_recipe(example)
    example.write_text(EXAMPLE, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"train\.1"):
        load_recipe(example, {"train": {1: 2}})


@pytest.mark.parametrize("key", ["model", "task", "output", "task.train", "task.prompt", "method.name"])
def test_missing_keys_are_named(example: Path, key: str) -> None:
    values = yaml.safe_load(EXAMPLE)
    *path, last = key.split(".")
    place = values
    for part in path:
        place = place[part]
    del place[last]
    example.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"got no(thing| name)") as raised:
        load_recipe(example)
    assert last in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 3),
        ("method", 3),
        ("method", ["lora"]),
        ("method", []),
        ("method.rank", "many"),
        ("method.rank", 2.5),
        ("method.variant", "v3"),
        ("targets", "q_proj"),
        ("targets", [1]),
        ("layers", "0-3"),
        ("layers", []),
        ("layers", ["0"]),
        ("layers", [1.0]),
        ("layers", [True]),
        ("layers", [-1]),
        ("knowledge", "file.jsonl"),
        ("knowledge.examples", 0),
        ("knowledge.max_length", 0),
        ("knowledge.file", ["a"]),
        ("task", []),
        ("train", [1]),
        ("train.learning_rate", "fast"),
        ("train.learning_rate", -1),
        ("train.learning_rate", float("nan")),
        ("train.max_steps", "all"),
        ("train.per_device_train_batch_size", 0),
        ("train.seed", "abc"),
        ("train.seed", None),
        ("train.seed", -1),
        ("evaluate", {"a": 1}),
        ("evaluate.0", "facts"),
        ("evaluate.0.examples", "few"),
        ("evaluate.0.role", "both"),
        ("evaluate.0.name", "a/b"),
        ("evaluate.0.answer", None),
        ("export.format", "gguf"),
        ("export.max_gap", 0),
        ("anchor", "rope"),
        ("dtype", "int8"),
        ("memory", "perhaps"),
        ("store_limit", "20 apples"),
        ("store_limit", "-5GB"),
        ("store_limit", 0),
        ("output", 5),
    ],
)
def test_wrong_values_are_refused_with_their_key(example: Path, key: str, value: object) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(example, {key: value})
    # A benchmark's own checks name it by its name, and a bad element stands below its list.
    section, _, last = re.sub(r"^evaluate\.0\b", "evaluate", key).rpartition(".")
    assert f"{raised.value.where} ".replace(", ", " ").split("key ")[-1].split()[-1].startswith(section or last)
    assert last in str(raised.value)


@pytest.mark.parametrize(("given", "limit"), [("500MB", 5 * 10**8), (1234, 1234), ("2GiB", 2**31), (None, 2 * 10**10)])
def test_the_limit_of_the_store(example: Path, given: object, limit: int) -> None:
    recipe = load_recipe(example, {} if given is None else {"store_limit": given})
    assert Job(recipe).store.limit == limit
    assert recipe.written()["store_limit"] == limit


@pytest.mark.parametrize("key", ["output_dir", "resume_from_checkpoint", "completion_only_loss", "chat_template_path"])
def test_arguments_that_are_keeptunes_own(example: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=r"keeptune sets itself.*Use `(output|task)"):
        load_recipe(example, {f"train.{key}": "x"})


@pytest.mark.parametrize("option", [{"dropout": -0.1}, {"dropout": 1.0}, {"alpha": 0.0}, {"alpha": float("inf")}])
def test_options_out_of_range(option: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=next(iter(option))):
        make_method({"name": "lora"} | option, seed=0)


def test_two_benchmarks_of_one_name(example: Path) -> None:
    with pytest.raises(RecipeError, match='"facts" twice'):
        load_recipe(example, {"evaluate.1.name": "facts"})


def test_a_recipe_that_is_not_yaml(example: Path, tmp_path: Path) -> None:
    for text, message in (("a: [1", "wanted YAML"), ("- 1\n", "got a list"), ("", "got a NoneType")):
        example.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError, match=message):
            load_recipe(example)
    example.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="wanted a YAML file"):
        load_recipe(example)
    with pytest.raises(RecipeError, match="wanted a YAML file"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match="wanted a YAML file"):
        load_recipe(tmp_path)


def test_overrides_are_yaml() -> None:
    words = ["--train.learning_rate", "1e-4", "--method.rank=4", "--evaluate.0.examples", "10"]
    words += ["--targets", "[q_proj, v_proj]", "--train.max_steps", "-1", "--task.prompt", '"{a}\\nB:"']
    words += ["--knowledge.text={q}: x = {a}", "--memory", "blockwise", "--export.max_gap", "null", "--output=a=b"]
    with pytest.raises(RecipeError, match=r"knowledge\.text.*Quote it"):
        parse_overrides(words)
    assert parse_overrides(["--evaluate.0.answer", "{answer}"]) == {"evaluate.0.answer": "{answer}"}
    assert parse_overrides(["--knowledge", "{file: a, text: b}"]) == {"knowledge": {"file": "a", "text": "b"}}
    words[words.index("--knowledge.text={q}: x = {a}")] = '--knowledge.text="{q}: x = {a}"'
    assert parse_overrides(words) == {
        "train.learning_rate": 1e-4,
        "method.rank": 4,
        "evaluate.0.examples": 10,
        "targets": ["q_proj", "v_proj"],
        "train.max_steps": -1,
        "task.prompt": "{a}\nB:",
        "knowledge.text": "{q}: x = {a}",
        "memory": "blockwise",
        "export.max_gap": None,
        "output": "a=b",
    }
    assert isinstance(parse_overrides(["--a", "5E3"])["a"], float)
    assert parse_overrides(["--a", "1e"]) == {"a": "1e"}


@pytest.mark.parametrize("words", [["train.max_steps", "3"], ["--train.max_steps"], ["--", "1"], ["--=3"], ["-x", "1"]])
def test_unreadable_overrides(words: list[str]) -> None:
    with pytest.raises(RecipeError, match="command line"):
        parse_overrides(words)


def test_overrides_reach_into_the_recipe(example: Path) -> None:
    changes = {"evaluate.2.examples": 7, "train.weight_decay": 0.1, "export.format": "peft", "knowledge": None}
    recipe = load_recipe(example, changes)
    assert recipe.evaluate[2].examples == 7
    assert recipe.train["weight_decay"] == 0.1
    assert recipe.train["max_steps"] == 150
    assert recipe.export.format == "peft"
    assert recipe.knowledge is None


def test_an_override_fills_an_empty_section(example: Path) -> None:
    example.write_text(re.sub("train: {.*", "train:", EXAMPLE), encoding="utf-8")
    assert load_recipe(example, {"train.max_steps": 2}).train == {"max_steps": 2}


@pytest.mark.parametrize("key", ["model.rank", "evaluate.9.examples", "evaluate.x.examples", "targets.q_proj"])
def test_overrides_of_parts_that_are_not_there(example: Path, key: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"command line --{key}")):
        load_recipe(example, {key: 1})


def test_knowledge_of_several_sets(recipe_values: Values) -> None:
    """One section or a list; texts, or prompts with completions; each file takes part in the overlap check."""
    given = recipe_values()
    section, stories, sums = given["knowledge"], given["evaluate"][0], given["task"]
    pairs = {"file": sums["train"], "prompt": "{question}\nAnswer:", "completion": " {answer}", "examples": 5}
    one, listed = (Job(recipe_of(recipe_values(knowledge=value))) for value in (section, [section]))
    both = Job(recipe_of(recipe_values(knowledge=[section, pairs])))
    assert recipe_of(both.recipe.written()) == both.recipe
    assert one.calibration == listed.calibration
    assert one.plan_inputs == listed.plan_inputs != both.plan_inputs
    assert one.calibration is not None
    assert one.calibration.prompts is None
    assert both.calibration is not None
    assert both.calibration.sets == (8, 5)
    assert both.calibration.sequences[:8] == one.calibration.sequences
    assert both.calibration.prompts is not None
    assert both.calibration.prompts[:8] == (0,) * 8
    assert min(both.calibration.prompts[8:]) > 5
    both.check()
    overlapping = section | {"file": stories["file"]}
    with pytest.raises(DataError, match=r"evaluate\.stories.*knowledge\.1\.file too"):
        Job(recipe_of(recipe_values(knowledge=[section, overlapping]))).check()
    with pytest.raises(DataError, match=r"knowledge\.1 row 1.*nothing"):
        Job(recipe_of(recipe_values(knowledge=[section, pairs | {"prompt": "{nothing}"}]))).check()


@pytest.mark.parametrize(
    "form",
    [{"prompt": "{q}"}, {"completion": "{a}"}, {"text": "{q}", "prompt": "{q}", "completion": "{a}"}],
    ids=" and ".join,
)
def test_knowledge_has_one_of_two_forms(recipe_values: Values, form: dict[str, str]) -> None:
    for knowledge in ({"file": "a.jsonl"} | form, [{"file": "b.jsonl"}, {"file": "a.jsonl"} | form]):
        with pytest.raises(RecipeError, match=rf"a\.jsonl: got {' and '.join(form)}, wanted either text, or"):
            recipe_of(recipe_values(knowledge=knowledge))


@pytest.mark.parametrize(
    ("knowledge", "told"),
    [
        ([{"file": "a", "exmples": 3}], r"knowledge\.0\.exmples: .*examples"),
        ([{"file": "a"}, {"text": "b"}], r"knowledge\.1\.file: got nothing"),
        ([], r"key knowledge: got \[\]"),
        ([{"file": "a", "examples": 0}], r"knowledge\.0\.examples: got 0"),
        ({"file": "a", "examples": 0}, r"key knowledge\.examples: got 0"),
        ({"file": "a", "exmples": 1}, r"key knowledge\.exmples: .*examples"),
    ],
    ids=str,
)
def test_what_is_wrong_with_knowledge_is_told_with_its_place(
    recipe_values: Values, knowledge: object, told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe_of(recipe_values(knowledge=knowledge))


def test_data_errors_keep_their_kind(recipe_values: Values) -> None:
    with pytest.raises(DataError, match=r"knowledge\.file"):
        Job(recipe_of(recipe_values(knowledge={"file": "nowhere.jsonl"}))).check()


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["--allow-pickle"], {"allow_pickle": True}),
        (["--allow-pickle", "--method.rank", "4"], {"allow_pickle": True, "method.rank": 4}),
        (["--allow_pickle", "false"], {"allow_pickle": False}),
        (["--trust-remote-code=true"], {"trust_remote_code": True}),
    ],
)
def test_a_switch_may_stand_alone_and_dashes_are_underscores(words: list[str], overrides: dict[str, object]) -> None:
    assert parse_overrides(words) == overrides


@pytest.mark.parametrize("value", ["a" * 300, "~no-such-user/x"])
@pytest.mark.parametrize("key", ["model", "output", "store", "task.train"])
def test_paths_that_no_system_takes_are_recipe_errors(key: str, value: str, tmp_path: Path) -> None:
    given = {"model": "atlas", "task": {"train": "t.jsonl", "prompt": "{q}", "completion": "{a}"}, "output": "out"}
    place = given["task"] if key == "task.train" else given
    place[key.rpartition(".")[2]] = value  # type: ignore[index]
    with pytest.raises(RecipeError):
        make_recipe(given, folder=tmp_path, where="recipe")
