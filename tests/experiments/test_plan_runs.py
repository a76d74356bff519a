"""From the `compare:` section to its runs: what each changes, the baselines, and what is refused where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import values, write_recipe

from keeptune.core.errors import KeeptuneError, RecipeError
from keeptune.experiments.plan_runs import Comparison, RunSpec, check_runs, list_runs, load_comparison
from keeptune.recipe.schema import load_recipe, make_recipe, parse_overrides

Load = Callable[..., Comparison]


@pytest.fixture
def load(data: Path, tmp_path: Path) -> Load:
    """Load a comparison; recipe keys by name, keys of the section in `compare`."""

    def make(overrides: list[str] | None = None, *, without: tuple[str, ...] = (), **section: Any) -> Comparison:
        given = values(data, tmp_path / "out", tmp_path / "store", **section.pop("recipe", {}))
        del given["method"], given["train"]["seed"], given["train"]["learning_rate"]
        for key in without:
            del given[key]
        given["compare"] = {"methods": ["lora"], "learning_rate": [1e-3], "seeds": [0], **section}
        return load_comparison(write_recipe(tmp_path / "compare.yaml", given), parse_overrides(overrides or []))

    return make


def runs_of(comparison: Comparison) -> dict[str, RunSpec]:
    return {run.name: run for run in list_runs(comparison)}


def test_a_run_is_what_its_settings_make_of_the_recipe(load: Load, data: Path, tmp_path: Path) -> None:
    entry = {"label": "LoRA & KL", "method": {"name": "lora", "rank": 2}, "penalties": ["kl"], "replay": 0.2}
    found = runs_of(load(methods=[entry], learning_rate=[1e-3, 2e-2], seeds=[0, 7], baselines=False))
    assert list(found) == [f"lora-kl-lr{rate}-seed{seed}" for rate in ("0.001", "0.02") for seed in (0, 7)]
    run = found["lora-kl-lr0.02-seed7"]
    given = values(data, tmp_path / "out/runs/lora-kl-lr0.02-seed7", tmp_path / "store")
    given |= {"method": {"name": "lora", "rank": 2}, "penalties": [{"name": "kl"}], "replay": 0.2}
    given["train"] |= {"learning_rate": 2e-2, "seed": 7}
    assert run.recipe == make_recipe(given, folder=tmp_path, where="recipe")
    assert (run.label, run.method, run.strength, run.seed) == ("LoRA & KL", "lora", None, 7)
    assert run.settings == {
        "method": {"name": "lora", "rank": 2},
        "penalties": [{"name": "kl"}],
        "replay": 0.2,
        "train.learning_rate": 2e-2,
    }


def test_losses_are_entries_beside_methods(load: Load) -> None:
    losses: list[Any] = ["dft", {"name": "eaft", "alpha": 0.5}, "asft", {"name": "sdft", "max_completion_length": 8}]
    entries: list[Any] = [{"method": "lora", "task.loss": loss} for loss in losses]
    entries.append({"method": "lora", "task.loss": {"name": "asft"}, "strength": {"task.loss.kl_weight": [0.2]}})
    comparison = load(methods=[*entries, {"label": "stm", "method": "lora", "task.stm_threshold": 2.5}, "keep"])
    specs = list_runs(comparison)
    check_runs(comparison, specs)
    found = {run.label: run.recipe.task for run in specs}
    assert {"keep", "lora", "lora, task.loss dft", "lora, task.loss asft"} < set(found)  # the baseline is nll
    assert found["lora, task.loss name eaft alpha 0.5"].loss == losses[1]
    assert found["lora, task.loss name sdft max_completion_length 8"].loss == losses[3]
    assert found["lora, task.loss name asft"].loss == {"name": "asft", "kl_weight": 0.2}
    assert (found["stm"].stm_threshold, found["stm"].loss, found["lora"].loss) == (2.5, None, None)


def test_factors_move_the_methods_own_strength_and_methods_without_one_run_once(load: Load) -> None:
    methods = ["pissa", {"name": "keep", "nats": 0.001}, {"name": "lalora", "strength": 50}]
    found = runs_of(load(methods=methods, strength=[0.5, 1, 2], baselines=False))
    options = {name: run.recipe.method for name, run in found.items()}
    assert options == {
        "pissa-lr0.001-seed0": {"name": "pissa"},
        "keep-lr0.001-x0.5-seed0": {"name": "keep", "nats": 0.002},
        "keep-lr0.001-seed0": {"name": "keep", "nats": 0.001},
        "keep-lr0.001-x2-seed0": {"name": "keep", "nats": 0.0005},
        "lalora-lr0.001-x0.5-seed0": {"name": "lalora", "strength": 25},
        "lalora-lr0.001-seed0": {"name": "lalora", "strength": 50},
        "lalora-lr0.001-x2-seed0": {"name": "lalora", "strength": 100},
    }
    assert [run.strength for run in found.values()] == [None, 0.5, 1, 2, 0.5, 1, 2]


def test_an_entry_may_have_its_own_rates_and_strengths_or_vary_a_key(load: Load) -> None:
    methods = [
        {"name": "keep", "learning_rate": [0.5], "strength": [3]},
        {"label": "kl", "method": "lora", "penalties": ["kl"], "strength": {"penalties.0.strength": [3, 30]}},
        {"label": "rank", "method": "lora", "strength": {"method.rank": [2, 4]}, "learning_rate": [0.25]},
    ]
    found = runs_of(load(methods=methods, strength=[1, 5], baselines=False))
    assert list(found) == [
        "keep-lr0.5-x3-seed0",
        "kl-lr0.001-x3-seed0",
        "kl-lr0.001-x30-seed0",
        "rank-lr0.25-x2-seed0",
        "rank-lr0.25-x4-seed0",
    ]
    assert found["keep-lr0.5-x3-seed0"].recipe.method == {"name": "keep", "nats": 0.003333333333}
    assert found["kl-lr0.001-x30-seed0"].recipe.penalties == [{"name": "kl", "strength": 30}]
    assert found["rank-lr0.25-x4-seed0"].recipe.method == {"name": "lora", "rank": 4}
    assert [run.strength for run in found.values()] == [3, None, None, None, None]


def test_the_baselines_are_added_where_they_are_absent(load: Load) -> None:
    comparison = load(methods=[{"name": "pissa", "rank": 4}], learning_rate=[1e-3, 4e-3])
    assert comparison.plain == "lora"
    assert {entry.label: (entry.settings, entry.rates) for entry in comparison.entries} == {
        "lora": ({"method": {"name": "lora", "rank": 4}}, (2.5e-4, 1e-3, 4e-3)),
        "pissa": ({"method": {"name": "pissa", "rank": 4}}, (1e-3, 4e-3)),
        "lora + 10% replay": ({"method": {"name": "lora", "rank": 4}, "replay": 0.1}, (1e-3, 4e-3)),
    }


def test_baselines_that_are_there_are_not_added(load: Load) -> None:
    mine = {"label": "mine", "method": {"name": "lora", "rank": 2}, "learning_rate": [8e-3]}
    replay = {"label": "with facts", "method": "lora", "strength": {"replay": [0.3]}}
    comparison = load(methods=[mine, replay])
    assert [(entry.label, entry.rates) for entry in comparison.entries] == [
        ("mine", (2e-3, 8e-3)),
        ("with facts", (1e-3,)),
    ]
    assert comparison.plain == "mine"


def test_baselines_leave_out_what_the_recipe_has_for_all(load: Load) -> None:
    comparison = load(methods=["pissa"], recipe={"replay": 0.5, "penalties": [{"name": "kl"}]})
    assert comparison.entries[0].settings == {"method": {"name": "lora"}, "replay": 0.0, "penalties": []}
    assert comparison.plain == "lora"
    taken = load(methods=["lora"], recipe={"replay": 0.5})
    assert [entry.label for entry in taken.entries] == ["plain lora", "lora"]


def test_no_replay_without_knowledge_and_no_baselines_if_not_wanted(load: Load) -> None:
    assert [entry.label for entry in load(methods=["pissa"], without=("knowledge",)).entries] == ["lora", "pissa"]
    comparison = load(["--compare.baselines", "false"], methods=["pissa"])
    assert [entry.label for entry in comparison.entries] == ["pissa"]
    assert comparison.plain is None


def test_keys_of_recipe_and_section_can_be_set_on_the_command_line(load: Load) -> None:
    given = [
        "--compare.seeds",
        "[3, 4]",
        "--compare.resources.cpus",
        "2",
        "--train.max_steps",
        "9",
        "--targets",
        "[q_proj]",
    ]
    comparison = load(given, baselines=False)
    assert comparison.section.resources.cpus == 2
    assert [run.seed for run in list_runs(comparison)] == [3, 4]
    assert all(run.recipe.train["max_steps"] == 9 and run.recipe.targets == ["q_proj"] for run in list_runs(comparison))


def test_the_recipes_own_rate_is_the_one_rate_where_none_are_listed(load: Load) -> None:
    comparison = load(["--train.learning_rate", "3e-3"], learning_rate=None, baselines=False)
    assert [run.learning_rate for run in list_runs(comparison)] == [3e-3]
    with pytest.raises(RecipeError, match=r"key compare.learning_rate: got nothing.*Example"):
        load(learning_rate=None)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"methds": ["lora"]}, r'key compare\.methds: got an unknown key.*Did you mean "methods"'),
        ({"methods": []}, r"key compare\.methods: got \[\]"),
        ({"resources": {"cpu": 3}}, r'key compare\.resources\.cpu: got an unknown key.*Did you mean "cpus"'),
        ({"resources": {"cpu": 3}}, r'key compare\.resources\.cpu: got an unknown key.*Did you mean "cpus"'),
        ({"seeds": [0, 0]}, r"key compare\.seeds: got \[0, 0\], wanted different values"),
        (
            {"learning_rate": [1e-3, 0.001]},
            r"key compare\.learning_rate: got \[0\.001, 0\.001\], wanted different values",
        ),
        ({"learning_rate": [-1.0]}, r"key compare\.learning_rate\.0: got -1"),
        ({"seeds": [0.5]}, r"key compare\.seeds\.0: got 0\.5"),
        ({"methods": ["lora-nul"]}, r'compare\.methods\.0.*got "lora-nul".*Did you mean "lora-null"'),
        ({"methods": [{"name": "keep", "nat": 1}]}, r'compare\.methods\.0, method\.nat.*Did you mean "nats"'),
        ({"methods": [{"rank": 3}]}, r"compare\.methods\.0: got the keys rank, wanted a method's name"),
        ({"methods": ["lora", "lora"]}, r'got two entries called "lora" and "lora".*label'),
        ({"methods": [{"method": "lora", "label": "A b"}, {"name": "keep", "label": "a-B"}]}, 'entries called "A b"'),
        ({"methods": [{"method": "lora", "label": "+"}]}, r"methods\.0\.label: got '\+'"),
        ({"methods": [{"method": "lora", "evaluate": []}]}, r"methods\.0\.evaluate: got a change of evaluate"),
        ({"methods": [{"method": "lora", "train.seed": 1}]}, r"methods\.0\.train\.seed.*`seeds`"),
        ({"methods": [{"method": "lora", "train.learning_rate": 1}]}, r"\.train\.learning_rate.*`learning_rate`"),
        ({"methods": [{"method": "lora", "strength": [3]}]}, r"methods\.0, method lora, strength: got the factor 3"),
        ({"methods": [{"method": "keep", "strength": {"a": [1], "b": [2]}}]}, r"0\.strength: got .*one dotted key"),
        ({"methods": [{"method": "keep", "strength": [0]}]}, r"methods\.0\.strength: got \[0\]"),
        ({"methods": [{"method": "keep", "learning_rate": 1e-3}]}, r"methods\.0\.learning_rate: got 0\.001.*Example"),
        ({"methods": [{"method": "loki", "strength": [0.01]}]}, r'entry "loki".*method'),
        ({"methods": [{"method": "lora", "trian.max_steps": 3}]}, r'entry "lora, trian.*Did you mean "train"'),
    ],
)
def test_what_is_wrong_is_told_with_its_place(load: Load, section: dict[str, Any], told: str) -> None:
    with pytest.raises(KeeptuneError, match=told) as caught:
        list_runs(load(**{"baselines": False, **section}))
    assert "compare.yaml" in str(caught.value)


def test_a_missing_section_and_a_method_beside_it_are_refused(load: Load, data: Path, tmp_path: Path) -> None:
    plain = write_recipe(tmp_path / "plain.yaml", values(data, tmp_path / "out", tmp_path / "store"))
    with pytest.raises(RecipeError, match=r"key compare\.methods: got nothing, wanted the methods to compare"):
        load_comparison(plain)
    with pytest.raises(RecipeError, match=r"key method: got a method beside compare\.methods"):
        load(["--method", "keep"])
    with pytest.raises(RecipeError, match=r"key compare\.methods: got nothing.*Known: .*lora-null"):
        load_comparison(plain, {"compare.seeds": [0]})


def test_a_run_refuses_a_comparison(load: Load, tmp_path: Path) -> None:
    load()
    with pytest.raises(RecipeError, match=r"key compare: .*Run `keeptune compare` with it"):
        load_recipe(tmp_path / "compare.yaml")


@pytest.mark.parametrize(
    "second",
    [
        {"label": "again", "method": {"name": "lora"}},
        {"label": "again", "method": {"name": "lora", "rank": 8}},
        {"label": "again", "method": "lora", "replay": 0.0},
        {"label": "again", "method": {"name": "lora", "seed": 0}},
    ],
)
def test_two_entries_that_mean_the_same_run_are_refused_by_name(load: Load, second: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="lora-lr0.001-seed0 and again-lr0.001-seed0, which mean the same run"):
        list_runs(load(methods=["lora", second], baselines=False))


def test_runs_are_checked_with_data_and_targets_before_anything_is_written(load: Load, tmp_path: Path) -> None:
    wrong = load(methods=[{"label": "other", "method": "lora", "targets": ["q_prj"]}], baselines=False)
    with pytest.raises(KeeptuneError, match=r'entry "other".*q_prj'):
        check_runs(wrong, list_runs(wrong))
    needy = load(methods=["lora-null"], without=("knowledge",), baselines=False)
    check_runs(needy, list_runs(needy))  # which writes no texts yet
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.yaml"]


def test_axes_are_checked_before_anything_is_run(load: Load) -> None:
    with pytest.raises(RecipeError, match=r'compare\.forgotten: got "storis".*Did you mean "stories"'):
        load(forgotten=["storis"])
    assert load(forgotten=["stories"]).section.forgotten == ["stories"]
    assert list_runs(load(["--evaluate.1.role", "knowledge"])), (
        "without a task there is no trade-off, but there are runs"
    )
