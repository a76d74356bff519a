"""Memory that runs out in a stage is told with what to turn there, and the same command goes on at that stage."""

from __future__ import annotations

import dataclasses
import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import MODELS, Bench
from tests.pipeline.support import METHODS, keeptune, write_recipe
from transformers import Trainer, TrainingArguments

import keeptune as package
from keeptune.core.errors import DeviceMemoryError, KeeptuneError, PlanError
from keeptune.core.out_of_memory import KEYS, Stage, out_of_memory
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.methods.keep import Keep
from keeptune.methods.lora_null import LoraNull
from keeptune.pipeline.planning import plan_for
from keeptune.recipe.schema import Recipe
from keeptune.recipe.sections import ExportSpec, Knowledge
from keeptune.statistics.self_generated import SelfGeneration
from keeptune.statistics.store import StatStore

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB is free."
    " If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)
# Where each stage's memory runs out: a function that the stage calls, and what is in the run folder by then.
PLACES: dict[Stage, str] = {
    "statistics": "keeptune.pipeline.planning.collect",
    "plan": "keeptune.pipeline.planning.make_plan",
    "train": "keeptune.pipeline.training.install",
    "export": "keeptune.pipeline.export.load_trained",
    "evaluate": "keeptune.pipeline.scoring.evaluate",
}


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("stage", PLACES)
def test_each_stage_tells_what_to_turn_and_the_run_resumes(
    stage: Stage,
    recipe_values: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = recipe_values(method=METHODS["lora-null-v1"], train={"max_steps": 1})
    given = given | {"evaluate": given["evaluate"][:1]}
    recipe = write_recipe(tmp_path / "recipe.yaml", given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PLACES[stage], raising(torch.OutOfMemoryError(CUDA)))
        said = keeptune("run", recipe, capsys=capsys)
    assert said.code == 2
    assert f"error: stage {stage}: got no memory for 2.50 GiB" in said.err
    assert "1.20 GiB is free" in said.err
    assert "PYTORCH_CUDA_ALLOC_CONF" not in said.err
    for key in KEYS[stage]:
        assert f"`{key}`" in said.err
    assert "The same command goes on from here." in said.err
    with caplog.at_level(logging.INFO, logger="keeptune"):
        assert keeptune("run", recipe, capsys=capsys).code == 0
    done = list(PLACES)[1 : list(PLACES).index(stage)]
    taken = [name for name in done if f"{name}: taken from" in caplog.text]
    assert taken == done


def test_training_goes_on_at_its_last_checkpoint(
    recipe_values: Callable[..., dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(evaluate=[]))
    step, calls = Trainer.training_step, []

    def full_at_the_third(self: Trainer, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return torch.empty(2**50) if len(calls) == 3 else step(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", full_at_the_third)
        said = keeptune("run", recipe, capsys=capsys)
    assert (said.code, f"stage train: got no memory for {4 * 2**50} bytes" in said.err) == (2, True)
    with caplog.at_level(logging.INFO, logger="keeptune"):
        assert keeptune("run", recipe, capsys=capsys).code == 0
    assert "training: going on from" in caplog.text
    assert "checkpoint-2" in caplog.text


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), "no memory for 2.50 GiB"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "no memory,"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 256 bytes on private pool."),
         "no memory for 256 bytes"),
        (MemoryError("Unable to allocate 8.00 PiB for an array with shape (2,)"), "no memory for 8.00 PiB"),
        (MemoryError(), "no memory,"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "no memory,"),
    ],
    ids=["cuda", "cublas", "mps", "numpy", "bare", "system"],
)  # fmt: skip
def test_every_library_s_way_to_say_it(error: Exception, asked: str) -> None:
    with pytest.raises(DeviceMemoryError, match=asked) as caught, out_of_memory("train"):
        raise error
    assert isinstance(caught.value, KeeptuneError)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), OSError(errno.ENOENT, "x"), ValueError("y")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory("plan"):
        raise error
    assert caught.value is error


def test_a_stage_inside_another_speaks_for_itself() -> None:
    with pytest.raises(DeviceMemoryError, match="stage statistics"), out_of_memory("plan"), out_of_memory("statistics"):
        raise MemoryError
    with pytest.raises(PlanError), out_of_memory("plan"):
        raise PlanError("x", got="a", wanted="b", next_step="c")


def test_what_the_failed_stage_held_is_let_go_of() -> None:
    """A comparison goes on with its next run while the error is still there."""

    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    @out_of_memory("train")
    def stage() -> None:
        held = Held()
        raise MemoryError(str(type(held)))

    with pytest.raises(DeviceMemoryError) as caught:
        stage()
    assert caught.value.__cause__ is not None
    assert Held.alive == 0


def test_python_users_are_told_too(tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keeptune.pipeline.planning.collect", raising(torch.OutOfMemoryError(CUDA)))
        with pytest.raises(DeviceMemoryError, match="stage statistics"):
            plan_for(made.model, LoraNull(rank=2), StatStore(made.folder), data={"knowledge": made.data})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("keeptune.api.evaluate_one", raising(MemoryError()))
        with pytest.raises(DeviceMemoryError, match="stage evaluate"):
            package.measure(None, None, [None])  # type: ignore[arg-type, list-item]


def test_the_keys_are_keys() -> None:
    sections: dict[str, Any] = {
        "train": {field.name for field in dataclasses.fields(TrainingArguments)} | {"max_length"},
        "knowledge": Knowledge.model_fields.keys() | {field.name for field in dataclasses.fields(SelfGeneration)},
        "export": ExportSpec.model_fields,
        "evaluate": {field.name for field in dataclasses.fields(FileBenchmark)},
        "": Recipe.model_fields.keys() | {field.name for field in dataclasses.fields(Keep)},
    }
    for keys in KEYS.values():
        for key in keys:
            section, _, name = key.split(" ")[0].rstrip(":").rpartition(".")
            assert name in sections[section.partition(".")[0]], key
