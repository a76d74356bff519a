"""Stages on one model: the product is what was trained, for the original base; killed anywhere, it goes on."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.forks import Forks
from tests.models import logits, relative, tokens
from tests.pipeline.support import MODEL, keeptune, write_recipe
from torch import Tensor

from keeptune import measure
from keeptune.core.artefact import read_json
from keeptune.core.errors import ArtefactError, ExportError, KeeptuneError
from keeptune.core.locks import owned
from keeptune.core.plan import Plan
from keeptune.evaluation.model_pairs import AdapterPair
from keeptune.experiments.sequence import run_stages
from keeptune.experiments.sequence.run_stages import run_sequence
from keeptune.experiments.sequence.stages_section import StageSequence, make_sequence
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import LoadOptions, load_model, load_tokenizer

Make = Callable[..., StageSequence]
FOLDERS = ("1-cats", "2-dogs", "3-sums")
BRIEF = {"learning_rate": 5e-3, "max_steps": 2, "per_device_train_batch_size": 4, "seed": 0}


class Killed(BaseException):
    """Stands for a kill inside this process."""


@pytest.fixture(scope="module", autouse=True)
def finished(
    recipe_of_stages: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[StageSequence, dict[str, Any]]:
    """A finished sequence, its models kept; it may only be read."""
    output = tmp_path_factory.mktemp("sequence") / "out"
    values = recipe_of_stages(output, sequence={"keep_models": True})
    sequence = make_sequence(values, folder=Path(), where="recipe")
    return sequence, run_sequence(sequence)


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages take a second each; the first sequence, made before this, has one."""
    monkeypatch.setattr(run_stages, "write_sequence", lambda *_: None)


@pytest.fixture
def two(make: Make, recipe_of_stages: Any, tmp_path: Path) -> Make:
    """Make a sequence of the stages cats and dogs, two steps each."""

    def sequence(dogs: dict[str, Any] | None = None, **changes: Any) -> StageSequence:
        values = recipe_of_stages(tmp_path / "out")
        stages = values["stages"][:2]
        stages[1] |= dogs or {}
        return make(**{"stages": stages, "train": BRIEF, "evaluate": values["evaluate"][:1]} | changes)

    return sequence


def factors(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): (tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"])
        for name in names
    }


def summed(output: Path, count: int, base: str = str(MODEL)) -> Any:
    """The base with what each of the first stages' own adapters adds, one after the other, in float64."""
    model = load_model(base, LoadOptions(dtype="float32")).double()
    for folder in FOLDERS[:count]:
        for name, (B, A) in factors(output / "stages" / folder / "adapter").items():
            model.get_submodule(name).weight.data += B.double() @ A.double()
    return model


def adapted(adapter: Path, base: str = str(MODEL)) -> Any:
    return PeftModel.from_pretrained(load_model(base), str(adapter)).eval()


def test_every_product_is_the_sum_of_what_the_stages_changed(finished: Any) -> None:
    output, probe = finished[0].output, tokens(shape=(2, 12))
    wanted = [logits(summed(output, count), probe) for count in range(4)]
    for count, folder in enumerate(FOLDERS, start=1):
        found = logits(adapted(output / "after" / folder / "adapter"), probe)
        assert relative(found, wanted[count]) < 1e-5
        assert relative(found, wanted[count - 1]) > 1e-3
    assert relative(logits(adapted(output / "adapter"), probe), wanted[3]) < 1e-5


def test_ranks_add_up_and_are_padded_to_one_that_servers_take(finished: Any) -> None:
    sequence, record = finished
    # LoRA-Null v1 trains both factors away from its start, which takes twice its rank.
    assert [stage["rank"] for stage in record["stages"]] == [4, 4 + 2 * 2, 4 + 2 * 2 + 4]
    sizes = {B.shape[1] for B, _ in factors(Path(record["adapter"])).values()}
    assert sizes == {16}
    assert Path(record["adapter"]) == sequence.output / "adapter"
    assert all(stage["relative_gap"] < 1e-5 for stage in record["stages"])


def test_each_stage_starts_from_the_model_after_the_ones_before_it(finished: Any) -> None:
    output = finished[0].output
    started = [read_json(output / "after" / folder / "stage.json")["started_from"] for folder in FOLDERS]
    assert len(set(started)) == 3
    assert started[0] == body_fingerprint(load_model(str(MODEL)))
    for number, folder in enumerate(FOLDERS):
        assert Plan.load(output / "stages" / folder / "plan").provenance["model"] == started[number]
        if number:
            model = load_model(str(output / "models" / FOLDERS[number - 1]))
            assert body_fingerprint(model) == started[number]
            probe = tokens(shape=(2, 12))
            assert relative(logits(model, probe), logits(summed(output, number), probe)) < 1e-5


def test_the_matrix_is_what_the_products_score(finished: Any) -> None:
    sequence, record = finished
    benchmarks, tokenizer = sequence.whole.evaluate, load_tokenizer(str(MODEL))
    assert [b["name"] for b in record["benchmarks"]] == ["stories", "cats", "dogs", "sums"]
    assert [b["stage"] for b in record["benchmarks"]] == [None, "cats", "dogs", "sums"]
    for number, folder in enumerate(FOLDERS, start=1):
        pair = AdapterPair(adapted(sequence.output / "after" / folder / "adapter"))
        results = measure(pair, tokenizer, benchmarks)
        assert record["scores"][0] == pytest.approx([result.before for result in results])
        assert record["scores"][number] == pytest.approx([result.after for result in results])
        for interval, result in zip(record["intervals"][number], results, strict=True):
            assert interval == pytest.approx(list(result.interval), abs=1e-6)
    assert record["intervals"][0] == [None] * 4
    (stories,) = record["knowledge"]
    assert (stories["before"], stories["after"]) == (record["scores"][0][0], record["scores"][3][0])
    assert record == read_json(sequence.output / "sequence.json")
    assert "Backward transfer" in (sequence.output / "report.html").read_text(encoding="utf-8")


def test_started_again_it_does_nothing(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, record = finished
    before = {path: path.stat().st_mtime_ns for path in sequence.output.rglob("*.safetensors")}
    monkeypatch.setattr(run_stages, "start", lambda _: pytest.fail("a stage was started"))
    assert run_sequence(sequence) == record
    assert {path: path.stat().st_mtime_ns for path in sequence.output.rglob("*.safetensors")} == before


def test_what_changed_or_was_damaged_is_done_again_and_nothing_else(two: Make) -> None:
    before = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    sequence = two()
    first = run_sequence(sequence)
    assert not (sequence.output / "models").exists()
    kept = {path: path.stat().st_mtime_ns for path in (sequence.output / "stages" / "1-cats").rglob("*")}
    second = run_sequence(two({"train.learning_rate": 2e-2}))
    assert second["scores"][:2] == first["scores"][:2]
    assert second["scores"][2] != first["scores"][2]
    assert {path: path.stat().st_mtime_ns for path in (sequence.output / "stages" / "1-cats").rglob("*")} == kept
    weights = sequence.output / "after" / "1-cats" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\1")
    assert run_sequence(two())["scores"] == first["scores"]
    assert weights.read_bytes() == content
    assert hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest() == before


def test_cut_to_a_rank_the_error_is_stated_and_the_product_scored_and_merged_on_request(two: Make) -> None:
    record = run_sequence(two(export={"rank": 2}))
    assert record["export"]["error"] > 0
    assert {B.shape[1] for B, _ in factors(Path(record["adapter"])).values()} == {8}  # padded
    pair = AdapterPair(adapted(Path(record["adapter"])))
    results = measure(pair, load_tokenizer(str(MODEL)), two().whole.evaluate)
    assert [row["after"] for row in record["final"]] == pytest.approx([result.after for result in results])
    assert record["final"][0]["after"] != pytest.approx(record["scores"][-1][0], abs=1e-7)
    merged = run_sequence(two(export={"format": "merged"}))
    probe = tokens(shape=(2, 12))
    assert Path(merged["adapter"]).name == "merged"
    wanted = logits(summed(two().output, 2), probe)
    assert relative(logits(load_model(merged["adapter"]), probe), wanted) < 1e-5
    assert merged["final"][0]["after"] == pytest.approx(merged["scores"][-1][0], abs=1e-5)


def test_after_full_fine_tuning_the_product_is_a_whole_model(make: Make, recipe_of_stages: Any, tmp_path: Path) -> None:
    stages = recipe_of_stages(tmp_path / "out")["stages"]
    stages[0] |= {"method": "full", "train.learning_rate": 1e-3}
    stages[1] |= {"method": {"name": "lora", "rank": 2}}
    sequence = make(stages=stages[:2], train=BRIEF, evaluate=recipe_of_stages(tmp_path)["evaluate"][:1])
    record = run_sequence(sequence)
    assert record["adapter"] == str(sequence.output / "after" / "2-dogs" / "merged")
    assert "every weight" in record["stages"][0]["note"]
    after = load_model(str(sequence.output / "stages" / "1-cats" / "merged"))
    for name, (B, A) in factors(sequence.output / "stages" / "2-dogs" / "adapter").items():
        after.get_submodule(name).weight.data += B @ A
    probe = tokens(shape=(2, 12))
    assert relative(logits(load_model(record["adapter"]), probe), logits(after, probe)) < 1e-5
    assert all(stage["relative_gap"] < 1e-4 for stage in record["stages"])
    assert run_sequence(sequence) == record


def test_a_second_command_in_the_same_folder_is_refused(two: Make) -> None:
    sequence = two()
    with owned(sequence.output), pytest.raises(ArtefactError, match="another keeptune writes to"):
        run_sequence(sequence)


def test_a_rank_is_refused_before_a_stage_without_one_trains(two: Make) -> None:
    sequence = two({"method": "full"}, export={"rank": 4})
    with pytest.raises(ExportError, match=r"stage dogs.*rank 4.*export\.rank"):
        run_sequence(sequence)
    assert not (sequence.output / "stages" / "2-dogs" / "trained").exists()


def test_a_16_bit_base_goes_on_in_float32(two: Make, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    load_model(str(MODEL)).to(torch.bfloat16).save_pretrained(base)
    load_tokenizer(str(MODEL)).save_pretrained(base)
    sequence = two(model=base, sequence={"keep_models": True})
    record = run_sequence(sequence)
    working = load_model(str(sequence.output / "models" / "1-cats"))
    assert {weight.dtype for weight in working.parameters()} == {torch.float32}
    probe = tokens(shape=(2, 12))
    assert relative(logits(working, probe), logits(summed(sequence.output, 1, base), probe)) < 1e-5
    assert load_model(base).dtype == torch.bfloat16
    assert 0 < record["stages"][1]["relative_gap"] < 0.1
    exact = logits(summed(sequence.output, 2, base), probe)
    assert relative(logits(adapted(Path(record["adapter"]), base), probe), exact) < 0.05


def test_a_product_that_is_not_what_was_trained_is_refused(two: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_stages.joined
    monkeypatch.setattr(
        run_stages, "joined", lambda earlier, later: real(earlier, {k: v.scaled(1.5) for k, v in later.items()})
    )
    with pytest.raises(ExportError, match=r"stage cats.*differ from the trained model's"):
        run_sequence(two())


def test_errors_name_the_stage_before_anything_is_written(
    two: Make, recipe_of_stages: Any, data: Path, tmp_path: Path
) -> None:
    task = {"train": str(data / "dogs.test.jsonl"), "prompt": "{question}\nAnswer:", "completion": " {answer}"}
    sequence = two({"task": task}, evaluate=recipe_of_stages(tmp_path / "out")["evaluate"])
    with pytest.raises(KeeptuneError, match=r"stage dogs, evaluate\.dogs.*disjoint"):
        run_sequence(sequence)
    with pytest.raises(KeeptuneError, match=r"stage dogs.*q_projj"):
        run_sequence(two({"targets": ["q_projj"]}))
    assert not (tmp_path / "out").exists()


def product(output: Path) -> tuple[dict[str, str], Any]:
    weights = {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("after", "adapter")
        for path in (output / folder).rglob("*.safetensors")
    }
    return weights, read_json(output / "sequence.json")["scores"]


def test_killed_between_stages_it_goes_on(
    finished: Any, recipe_of_stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed three times: twice at the end of the second stage, and once when all of them are done."""
    output = tmp_path / "out"
    for part in ("stages", "after"):  # what was done before is taken from the finished sequence
        shutil.copytree(finished[0].output / part / "1-cats", output / part / "1-cats")
    sequence = make_sequence(recipe_of_stages(output), folder=Path(), where="recipe")

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    for where in ("write_whole", "_write_product", "_final"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(run_stages, where, die)
            run_sequence(sequence)
        assert (output / "after" / "3-sums").is_dir() == (where == "_final")
    record = run_sequence(sequence)
    assert product(output) == product(finished[0].output)
    assert all(Path(stage["adapter"]).is_relative_to(output) for stage in record["stages"])


@pytest.mark.slow
def test_killed_in_the_middle_of_training_it_goes_on(
    forks: Forks, finished: Any, recipe_of_stages: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    values = recipe_of_stages(output)
    values["train"] |= {"save_steps": 2}
    path = write_recipe(tmp_path / "recipe.yaml", values)
    for part in ("stages", "after"):
        shutil.copytree(finished[0].output / part / "1-cats", output / part / "1-cats")
    saved = output / "stages" / "2-dogs" / "checkpoints"
    pid = forks.start("run", path, folder=tmp_path, out=tmp_path / "said")
    deadline = time.monotonic() + 300
    while not list(saved.glob("*/checkpoint-2")) and forks.code(pid) is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert forks.wait(pid) == -signal.SIGKILL
    assert not (output / "after" / "2-dogs").exists()
    run_sequence(make_sequence(values, folder=Path(), where="recipe"))
    weights, scores = product(output)
    reference, wanted = product(finished[0].output)
    assert scores == wanted
    assert weights == reference


def test_the_command_line(recipe_of_stages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = recipe_of_stages(tmp_path / "out", train=BRIEF)
    short = {"stages": values["stages"][:1], "evaluate": values["evaluate"][:2]}
    path = write_recipe(tmp_path / "recipe.yaml", values | short)
    said = keeptune("run", path, "--sequence.keep_models", "true", capsys=capsys)
    assert said.code == 0, said.err
    assert "cats (lora)" in said.out
    assert "average accuracy 0.000, backward transfer –" in said.out
    assert str(tmp_path / "out" / "adapter") in said.out.replace("\n", "")
    assert keeptune("run", path, "--sequence.keep_model", "true", capsys=capsys).code == 2
