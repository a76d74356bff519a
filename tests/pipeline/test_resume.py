"""Killed at any moment and started again, a run ends as if it had never been killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.forks import Forks
from tests.pipeline.support import METHODS, recipe_of, values, write_recipe
from torch import Tensor
from transformers import Trainer

from keeptune.adapter import install as installing
from keeptune.adapter.anchor import ANCHOR_NAME
from keeptune.core.artefact import read_json, write_json
from keeptune.core.plan import Plan
from keeptune.pipeline.job import Job
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.run import export_stage, plan_stage, run, train_stage
from keeptune.pipeline.scoring import evaluate_stage
from keeptune.training.checkpoints import last_complete_checkpoint

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"method": METHODS["lora"]},
    "dora": {"method": METHODS["dora"]},
    "lora-fa": {"method": METHODS["lora-fa"]},
    "v1-residual": {"method": METHODS["lora-null-v1"], "anchor": "residual"},
    "v1-twin": {"method": METHODS["lora-null-v1"], "anchor": "twin"},
    "v2-twin": {"method": METHODS["lora-null-v2"], "anchor": "twin"},
    "full": {"method": METHODS["full"]},
    "l2-lora": {"method": {"name": "l2-lora", "rank": 4, "strength": 5.0}},
    "v1-delta-act": {"method": METHODS["lora-null-v1"], "anchor": "twin", "penalties": [{"name": "laplace"}]},
    "beside-the-head": {"method": METHODS["lora"], "modules_to_save": ["lm_head"]},
    "beside-tokens": {
        "method": METHODS["lora-null-v1"],
        "anchor": "twin",
        "modules_to_save": ["model.norm"],
        "trainable_token_indices": [5, 9, 300],
    },
    "loki": {"method": {"name": "loki", "q": 10, "rate": "by-q"}},
    "loki-within-delta-kfac": {
        "method": {"name": "loki", "q": 30, "rank": 4, "dropout": 0.1},
        "penalties": [{"name": "laplace", "curvature": "delta-kfac"}],
    },
    "lora-delta-kfac": {"method": METHODS["lora"], "penalties": [{"name": "laplace", "curvature": "delta-kfac"}]},
}
# The schedule, the order of the data and dropout must all go on where they were.
TRAIN = {"learning_rate": 5e-3, "max_steps": 4, "per_device_train_batch_size": 4, "seed": 3, "save_steps": 2}


class Killed(BaseException):
    """Stands for a kill inside this process."""


@contextmanager
def killed_after(saves: int, *, half_written: bool = False) -> Iterator[None]:
    """End the training without clean-up when a checkpoint is written, or in the middle of it."""
    save = Trainer._save_checkpoint

    def save_and_die(self: Trainer, *args: Any, **kwargs: Any) -> None:
        nonlocal saves
        saves -= 1
        if saves == 0 and half_written:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Trainer, "_save_rng_state", _die)
                save(self, *args, **kwargs)
        save(self, *args, **kwargs)
        if saves == 0:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_save_checkpoint", save_and_die)
        yield


def _die(*_: Any, **__: Any) -> None:
    raise Killed


def trained(output: Path) -> dict[str, Tensor]:
    folder = output / "trained"
    one = folder / "factors.safetensors"
    return load_file(one if one.is_file() else folder / "model" / "model.safetensors")


def train_in(output: Path, given: dict[str, Any]) -> Path:
    job = Job(recipe_of(given | {"output": str(output)}))
    train_stage(job, plan_stage(job))
    return output


@pytest.fixture(scope="module")
def whole(
    data: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Returns the recipe of a kind and the folder of its uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")

    def get(kind: str) -> tuple[dict[str, Any], Path]:
        given = values(data, folder / kind, store, train=TRAIN, **KINDS[kind])
        return given, train_in(folder / kind, given)

    return get


@pytest.fixture(scope="module")
def done(data: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Any]:
    """A whole job of two steps and two benchmarks: its recipe, its folder (to copy) and its report."""
    folder = tmp_path_factory.mktemp("done") / "out"
    given = values(data, folder, store, train=TRAIN | {"max_steps": 2})
    given["evaluate"] = given["evaluate"][:2]
    return given, folder, run(recipe_of(given))


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_equals_uninterrupted_training(
    kind: str, whole: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder with the first checkpoint alone is what a kill after it leaves."""
    given, reference = whole(kind)
    output = tmp_path / "out"
    (first,) = (reference / "checkpoints").glob("*/checkpoint-2")
    shutil.copytree(first, output / first.relative_to(reference))
    with caplog.at_level("INFO", logger="keeptune"):
        train_in(output, given)
    assert "checkpoint-2" in caplog.text
    for path in (reference / "plan").glob("*.safetensors"):
        assert (output / "plan" / path.name).read_bytes() == path.read_bytes()
    expected, resumed = trained(reference), trained(output)
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)
    assert read_json(output / "trained/train.json")["loss"] == read_json(reference / "trained/train.json")["loss"]


def test_dropout_and_training_do_something_in_that_comparison(whole: Any, tmp_path: Path) -> None:
    given, reference = whole("lora")
    other = train_in(tmp_path / "out", given | {"method": {**given["method"], "dropout": 0.0}})
    start = load_file(reference / "plan" / "factors.safetensors")
    gaps = [float((trained(reference)[name] - value).abs().max()) for name, value in trained(other).items()]
    moved = [float((trained(reference)[name] - value).abs().max()) for name, value in start.items()]
    assert max(gaps) > 1e-4
    assert min(moved) > 1e-4


def test_frozen_factors_are_bit_identical_after_resume(whole: Any, tmp_path: Path) -> None:
    given, _ = whole("v2-twin")
    with killed_after(1):
        train_in(tmp_path / "out", given)
    assert not (tmp_path / "out" / "trained").exists()
    planned = {path: path.read_bytes() for path in (tmp_path / "out" / "plan").iterdir()}
    train_in(tmp_path / "out", given)
    assert planned == {path: path.read_bytes() for path in planned}
    plan, factors = Plan.load(tmp_path / "out" / "plan"), trained(tmp_path / "out")
    for target_plan in plan.targets:
        name = target_plan.target.name
        assert torch.equal(factors[f"{name}.A"], target_plan.init.A)
        assert not torch.equal(factors[f"{name}.B"], target_plan.init.B)


def test_the_anchor_is_active_again_after_resume(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = whole("v1-twin")
    with killed_after(1):
        train_in(tmp_path / "out", given)
    models = []
    real = installing.install
    monkeypatch.setattr(
        "keeptune.pipeline.training.install", lambda *a, **k: models.append(real(*a, **k)) or models[-1]
    )
    train_in(tmp_path / "out", given)
    (model,) = models
    assert set(model.base_model.active_adapters) == {"default", ANCHOR_NAME}


@pytest.mark.parametrize(
    ("file", "kept"),
    [
        ("trainer_state.json", 0.0),
        ("trainer_state.json", 0.5),
        ("adapter_model.safetensors", 0.7),
        ("adapter_model.safetensors", 0.0),
        ("optimizer.pt", 0.7),
        ("rng_state.pth", 0.7),
        ("rng_state.pth", -1.0),
        ("optimizer.pt", -1.0),
        ("scheduler.pt", -1.0),
        ("optimizer.pt", 1.0),
        ("adapter_model.safetensors", 1.0),
        ("checksums.json", -1.0),
    ],
)
def test_damaged_checkpoints_are_removed_and_the_older_used(
    whole: Any, tmp_path: Path, file: str, kept: float, caplog: pytest.LogCaptureFixture
) -> None:
    _, reference = whole("lora")
    (source,) = (reference / "checkpoints").iterdir()
    folder = Path(shutil.copytree(source, tmp_path / "checkpoints"))
    assert last_complete_checkpoint(folder) == folder / "checkpoint-4"
    damaged = folder / "checkpoint-4" / file
    if kept < 0:
        damaged.unlink()
    elif kept == 1:  # one bit
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
    else:
        os.truncate(damaged, int(damaged.stat().st_size * kept))
    (folder / "checkpoint-notes").mkdir()
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"
    assert not (folder / "checkpoint-4").exists()
    assert "checkpoint-4 is not as it was written, or not to its end" in caplog.text


def test_killed_while_a_checkpoint_is_written(whole: Any, tmp_path: Path) -> None:
    given, reference = whole("lora")
    output = tmp_path / "out"
    with killed_after(2, half_written=True):
        train_in(output, given)
    (folder,) = (output / "checkpoints").iterdir()
    assert (folder / "checkpoint-4").is_dir()
    train_in(output, given)
    for name, value in trained(reference).items():
        torch.testing.assert_close(trained(output)[name], value, rtol=0, atol=1e-6)


def test_no_whole_checkpoint_means_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def test_kill_nine_of_the_command(forks: Forks, whole: Any, tmp_path: Path) -> None:
    given, reference = whole("lora")
    output = tmp_path / "out"
    recipe = write_recipe(tmp_path / "recipe.yaml", given | {"output": str(output)})
    pid = forks.start("train", recipe, folder=tmp_path, out=tmp_path / "said")
    until = time.monotonic() + 100
    while not list(output.glob("checkpoints/*/checkpoint-2")) and forks.code(pid) is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert forks.wait(pid) == -signal.SIGKILL
    assert not (output / "trained").exists()
    train_in(output, given)
    for name, value in trained(reference).items():
        torch.testing.assert_close(trained(output)[name], value, rtol=0, atol=1e-6)


def test_left_over_temporary_folders_confuse_nothing(done: Any, tmp_path: Path) -> None:
    given, folder, _ = done
    output = Path(shutil.copytree(folder, tmp_path / "out"))
    for stage in ("plan", "adapter", "trained", "merged"):
        (output / f".{stage}.01234abc" / stage).mkdir(parents=True)
        (output / f".{stage}.01234abc" / "plan.json").write_text("{", encoding="utf-8")
    in_store = output / "store" / "01" / f".{'01' * 32}.01234abc" / ".value.safetensors.01234abc"  # another's, perhaps
    in_store.parent.mkdir(parents=True)
    mine = [in_store, output / ".notes.txt", output / ".report.json.abc"]
    for path in (*mine, output / ".report.json.01234abc", output / "evaluation/.sums.json.01234abc"):
        path.write_text("{", encoding="utf-8")
    report = run(recipe_of(given | {"output": str(output)}))
    assert report["methods"][0]["adapter"] == str(output / "adapter")
    assert sorted(path for path in output.rglob(".*") if path.is_file()) == sorted(mine)


def test_a_training_of_before_the_checksums_of_all_files_is_exported(done: Any, tmp_path: Path) -> None:
    given, folder, _ = done
    output = Path(shutil.copytree(folder, tmp_path / "out"))
    record = read_json(output / "trained/train.json")
    (checksum,) = record.pop("files").values()
    write_json(output / "trained/train.json", record | {"sha256": checksum})
    shutil.rmtree(output / "adapter")
    run(recipe_of(given | {"output": str(output)}))
    assert load_file(output / "adapter/adapter_model.safetensors").keys()
    assert "sha256" in read_json(output / "trained/train.json"), "it was not trained again"


@pytest.mark.parametrize("stage", ["plan", "adapter", "evaluation"])
@pytest.mark.parametrize("before", [False, True])
def test_killed_in_a_stage_leaves_the_old_result_or_none(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, before: bool
) -> None:
    """Die when the last file of a stage is about to be written; then go on."""
    given, folder, _ = done
    output = tmp_path / "out"
    given = given | {"output": str(output), "evaluate": given["evaluate"][:1]}
    if before:
        shutil.copytree(folder, output)
        changes = {
            "plan": {"method": METHODS["lora"] | {"rank": 2}},
            "adapter": {"export": {"format": "peft"}},
            "evaluation": {"train": TRAIN | {"max_steps": 3}},
        }
        given |= changes[stage]
    old = {p: p.read_bytes() for p in (output / stage).rglob("*") if p.is_file()}
    last = {
        "plan": "keeptune.core.plan.write_json",
        "adapter": "keeptune.adapter.export.write_text",
        "evaluation": "keeptune.pipeline.cache.write_json",
    }
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(last[stage], _die)
        run(recipe_of(given))
    here = {p: p.read_bytes() for p in (output / stage).rglob("*") if p.is_file()}
    if stage == "evaluation":  # items are written before their record, which tells whether they are its own
        here, old = ({p: found[p] for p in found if p.suffix == ".json"} for found in (here, old))
    assert here == old
    report = run(recipe_of(given))
    assert [b["n"] for b in report["methods"][0]["benchmarks"]] == [3]
    assert not list(output.glob(".*"))


def test_a_damaged_result_is_computed_again(done: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given, folder, first = done
    output = Path(shutil.copytree(folder, tmp_path / "out"))
    damaged = (
        *("plan/factors.safetensors", "trained/factors.safetensors", "adapter/adapter_model.safetensors"),
        *("evaluation/sums.json", "evaluation/stories.items.jsonl", "recipe.json"),
    )
    for path in damaged:
        os.truncate(output / path, 7)
    second = run(recipe_of(given | {"output": str(output)}))
    assert second["methods"][0]["benchmarks"] == first["methods"][0]["benchmarks"]
    for stage in ("plan", "train", "export", "evaluate sums", "evaluate stories"):
        assert re.search(rf"{stage}: \S+ is damaged", caplog.text)


def test_stages_alone_in_order_are_the_whole_job(done: Any, tmp_path: Path) -> None:
    given, folder, whole_report = done
    job = Job(recipe_of(given | {"output": str(tmp_path / "stages")}))
    plan = plan_stage(job)
    train_stage(job, plan)
    export_stage(job, plan)
    evaluate_stage(job)
    write_json(job.output / "recipe.json", job.recipe.written())
    alone = write_report([job.output], job.output)
    assert alone["methods"][0]["benchmarks"] == whole_report["methods"][0]["benchmarks"]
    assert trained(job.output).keys() == trained(folder).keys()
