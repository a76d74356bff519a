"""Bad input ends in one message, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.pipeline.support import METHODS, MODEL, Said, keeptune, read_jsonl, write_jsonl, write_recipe

from keeptune.adapter.load import SIDECAR
from keeptune.core import artefact
from keeptune.core.artefact import EXPORT, read_json

Values = Callable[..., dict[str, Any]]
Finished = Callable[[str], Path]


@pytest.fixture
def command(recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command on a recipe with changes."""

    def run(*words: object, name: str = "run", **changes: Any) -> Said:
        recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(**changes))
        return keeptune(name, recipe, *words, capsys=capsys)

    return run


def assert_told(said: Said, *marks: str) -> None:
    """One message on stderr with where, got, wanted and next step."""
    assert said.code == 2, said
    (line,) = said.err.strip().splitlines()
    assert line.startswith("error: ")
    assert ": got " in line
    assert ", wanted " in line
    for mark in marks:
        assert mark in line


def assert_nothing_written(tmp_path: Path) -> None:
    assert not (tmp_path / "out").exists()


def copy_model(folder: Path) -> Path:
    shutil.copytree(MODEL, folder, copy_function=shutil.copyfile)
    return folder


@pytest.mark.parametrize(
    ("words", "marks"),
    [
        (["--trian.max_steps", "3"], ["trian", '"train"']),
        (["--train.max_step", "3"], ["train.max_step", '"max_steps"']),
        (["--method.name", "lora-nul"], ["method.name", '"lora-null"']),
        (["--train.output_dir", "x"], ["train.output_dir", "`output`"]),
        (["--train.learning_rate", "fast"], ["train.learning_rate"]),
        (["--train.eval_strategy", "sometimes"], ["train", "sometimes"]),
        (["--train.per_device_train_batch_size", "0"], ["train.per_device_train_batch_size"]),
        (["--knowledge.max_length", "0"], ["knowledge.max_length"]),
        (["--knowledge.file", "nowhere.jsonl"], ["knowledge.file", "nowhere.jsonl", "no such file"]),
        (["--device", "cuda:99"], ["device", "cuda:99", "device: cpu"]),
        (["--device", "gpu"], ["device", "gpu"]),
        (["--device", "meta"], ["device", "meta", "device: cpu"]),
        (["--train.run_name", "hf_" + "aB3" * 10], ["key train", "a secret", "HF_TOKEN"]),
        (["--model", "https://me:pass-word@host/model"], ["key model", "a secret"]),
        (["--train.weight_decay", "'nan'"], ["train.weight_decay", "finite"]),
        (["--train.data_seed", str(2**33)], ["train.data_seed"]),
        (["--train.max_length", "'x'"], ["train.max_length", "integer"]),
        (["--evaluate.0.examples", "0"], ["examples"]),
        (["--evaluate.1.answer", "{reply}"], ["evaluate.sums", "row 1", '"reply"']),
        (["--task.prompt", '"{text}"'], ["task.train row 1", '"text"']),
        (["--model", "nowhere/at/all"], ["nowhere/at/all"]),
        (["--method.dropout", "1.5"], ["method.dropout"]),
        (["train.max_steps", "3"], ["command line"]),
        (["--train.max_steps"], ["command line"]),
        (["--targets", "[q_proj"], ["command line --targets"]),
        (["--model.x", "1"], ["command line --model.x"]),
    ],
)
def test_wrong_keys_and_values(
    command: Callable[..., Said], tmp_path: Path, words: list[str], marks: list[str]
) -> None:
    assert_told(command(*words), *marks)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("content", "marks"),
    [
        (b'{"text": "a"}\n\n{"text": \n', ["line 3"]),
        (b'{"text": "a"}\n["text"]\n', ["line 2", "a JSON list"]),
        (b'{"text": "a"}\n{"text": "\xff"}\n', ["line 2"]),
        (b'{"text": "a", "x": NaN}\n', ["line 1", "NaN"]),
        (b'{"text": "\\ud800"}\n', ["line 1"]),
        (b'{"other": "a"}\n', ["knowledge row 1", "or text", "other"]),
        (b"\n\n", ["no rows"]),
        (b"", ["no rows"]),
        (b'{"text": ""}\n', ["knowledge"]),
    ],
)
def test_malformed_data(command: Callable[..., Said], tmp_path: Path, content: bytes, marks: list[str]) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    knowledge = {"file": str(tmp_path / "bad.jsonl")}
    assert_told(command(method=METHODS["lora-null-v1"], knowledge=knowledge), "knowledge", *marks)
    assert not (tmp_path / "out" / "plan").exists()
    assert not list((tmp_path).glob("out/.*"))


def test_data_that_overlap(command: Callable[..., Said], tmp_path: Path, data: Path) -> None:
    benchmarks = [{"name": "stories", "role": "knowledge", "text": "{text}", "metric": "cross_entropy"}]
    stories = [benchmarks[0] | {"file": str(data / "knowledge.jsonl")}]
    assert_told(command(evaluate=stories), "evaluate.stories", "knowledge.file", "8 of 8", "items 1")
    rows = read_jsonl(data / "task.jsonl", 2)
    file = write_jsonl(tmp_path / "some.jsonl", [{"question": "?", "answer": "1"}, rows[1]])
    sums = {"name": "sums", "role": "task", "prompt": "{question}", "answer": "{answer}", "metric": "exact_match"}
    assert_told(command(evaluate=[sums | {"file": str(file)}]), "evaluate.sums", "task.train", "1 of 2", "items 2")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("rank", [0, -3, 65])
def test_ranks_that_no_target_allows(command: Callable[..., Said], tmp_path: Path, rank: int) -> None:
    said = command(method={"name": "lora", "rank": rank})
    assert_told(said, "q_proj", f"rank {rank}", "1 to 64", "method.rank")
    assert_nothing_written(tmp_path)


def test_unknown_roles(command: Callable[..., Said], tmp_path: Path) -> None:
    said = command(targets=["q_prj"])
    assert_told(said, "q_prj", '"q_proj"', "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj")
    assert_told(command(targets=[]), "targets")
    assert_nothing_written(tmp_path)


def test_layers_that_are_not_there(command: Callable[..., Said], tmp_path: Path) -> None:
    assert_told(command(layers=[4, 5]), "layers", "got 5", "0 to 4", "5 blocks")
    assert_told(command(method="full", layers=[0]), "full", "every weight")
    assert_nothing_written(tmp_path)


def spoil_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def spoil_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def spoil_truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ', encoding="utf-8")


def spoil_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def spoil_shapes(folder: Path) -> None:
    config = read_json(folder / "config.json") | {"intermediate_size": 100}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def spoil_missing_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")


def spoil_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "marks"),
    [
        (spoil_no_weights, ["without weights"]),
        (spoil_pickle, ["pickled weights only (pytorch_model.bin)", "allow_pickle"]),
        (spoil_truncated, ["SafetensorError"]),
        (spoil_config, ["config"]),
        (spoil_no_config, ["config.json"]),
        (spoil_shapes, ["other shapes than config.json"]),
        (spoil_missing_weight, ["model.layers.3.mlp.up_proj.weight"]),
        (spoil_tokenizer, ["model"]),
        (spoil_nan, ["model.layers.2.mlp.down_proj.weight", "NaN"]),
    ],
)
def test_damaged_models(
    command: Callable[..., Said], tmp_path: Path, spoil: Callable[[Path], None], marks: list[str]
) -> None:
    folder = copy_model(tmp_path / "model")
    spoil(folder)
    assert_told(command(model=str(folder)), str(folder), *marks)
    assert not (tmp_path / "out" / "plan").exists()


def test_pickled_weights_are_read_when_asked_for(command: Callable[..., Said], tmp_path: Path) -> None:
    folder = copy_model(tmp_path / "model")
    spoil_pickle(folder)
    assert command(name="plan", model=str(folder), allow_pickle=True).code == 0


def test_a_damaged_cache_entry_is_computed_again_and_said(
    command: Callable[..., Said], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"method": METHODS["lora-null-v1"], "store": str(tmp_path / "own")}
    assert command(name="plan", **given).code == 0
    plan = (tmp_path / "out" / "plan" / "factors.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    first, second, *_ = sorted(tmp_path.glob("own/*/*/value.safetensors"))
    os.truncate(first, 100)
    second.with_name("recipe.json").unlink()
    assert command(name="plan", **given).code == 0
    told = [record.message for record in caplog.records if "damaged and will be recomputed" in record.message]
    assert sorted(str(path.parent) for path in (first, second)) == sorted({line.split()[2] for line in told})
    assert (tmp_path / "out" / "plan" / "factors.safetensors").read_bytes() == plan


@pytest.mark.parametrize("output", ["file", "file/below/it"])
@pytest.mark.parametrize("key", ["output", "store"])
def test_a_file_in_the_place_of_a_folder(command: Callable[..., Said], tmp_path: Path, key: str, output: str) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert_told(command(**{key: str(tmp_path / output)}), key, "is a file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_folders_of_others_are_left_alone(command: Callable[..., Said], tmp_path: Path) -> None:
    mine = tmp_path / "out" / "adapter" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine", encoding="utf-8")
    assert_told(command(), str(mine.parent), "did not write")
    assert mine.read_text(encoding="utf-8") == "mine"


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("stage", ["plan", "trained", "adapter", "evaluation", "report.html"])
def test_a_disk_that_fills_up(
    command: Callable[..., Said], recipe_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    given = recipe_values(train={"max_steps": 1})
    given = {"train": given["train"], "evaluate": given["evaluate"][:1]}
    real = artefact._beside

    def beside(path: Path) -> Path:
        if f"/{stage}/" in str(path) or f"/.{stage}." in str(path) or path.name == "report.html":
            full_disk()
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(artefact, "_beside", beside)
        said = command(**given)
    assert_told(said, "No space left on device")
    left = tmp_path / "out" / stage
    assert not left.is_dir() or not list(left.iterdir())
    assert not list((tmp_path / "out").glob(".*"))
    assert command(**given).code == 0


@pytest.mark.parametrize("method", ["full"])
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    command: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    saved = torch.save

    def save(value: Any, file: Any, *args: Any, **options: Any) -> None:
        if "checkpoint-2" in str(file):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file")
        saved(value, file, *args, **options)

    given = {"method": METHODS[method], "evaluate": []}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert_told(command(**given), "checkpoints", "wanted room to write")
    assert not (tmp_path / "out" / "trained").exists()
    assert command(**given).code == 0


def test_a_real_full_disk(command: Callable[..., Said], tmp_path: Path) -> None:
    """A file system of 300 KB, where the test may mount one: what libraries raise then is not what one thinks."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=300k tmpfs {small} 2>/dev/null"):
        pytest.skip("cannot mount a file system here")
    try:
        assert_told(command(output=str(small / "out"), evaluate=[]), "wanted room to write")
    finally:
        os.system(f"umount -l {small}")  # lazily: a failure may hold files open


def test_a_loss_that_is_not_finite(command: Callable[..., Said], tmp_path: Path) -> None:
    train = {"learning_rate": 1e30, "max_steps": 6, "per_device_train_batch_size": 4, "max_grad_norm": 0}
    assert_told(command(train=train), "training step", "train.learning_rate")
    assert not (tmp_path / "out" / "trained").exists()


def test_numbers_that_are_lost_in_the_last_step(command: Callable[..., Said], tmp_path: Path) -> None:
    train = {"learning_rate": 1e38, "max_steps": 1, "per_device_train_batch_size": 4, "weight_decay": 1e10}
    assert_told(command(train=train), "training step 1", "lora_", "train.learning_rate")
    assert not (tmp_path / "out" / "trained").exists()


def test_prompts_that_leave_no_room_for_completions(command: Callable[..., Said]) -> None:
    assert_told(command(train={"max_length": 4, "max_steps": 1}), "task.train", "train.max_length (4)")


def test_arguments_that_trl_refuses(command: Callable[..., Said]) -> None:
    assert_told(command(train={"lr_scheduler_type": "nonsense"}), "train", "SchedulerType")


def other_base(folder: Path) -> Path:
    copy_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_for_another_base(
    command: Callable[..., Said], finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, other = finished("lora") / "adapter", other_base(tmp_path / "other")
    marks = ["adapter", "not the ones it was made for", str(MODEL)]
    assert command("--adapter", adapter, name="evaluate").code == 0
    # Scores of that adapter on the right base are there now; they must not be taken for this one.
    assert_told(command("--adapter", adapter, "--model", other, name="evaluate"), *marks)
    said = keeptune("merge", adapter, tmp_path / "merged", "--base", other, capsys=capsys)
    assert_told(said, *marks)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_shape_or_kind(
    command: Callable[..., Said], finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters of others carry no fingerprint: PEFT's own errors must be told."""
    adapter = tmp_path / "adapter"
    shutil.copytree(finished("lora") / "adapter", adapter)
    for ours in (SIDECAR, EXPORT):
        (adapter / ours).unlink()
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v[:, :-1].contiguous() for k, v in weights.items()}, adapter / "adapter_model.safetensors")
    config = read_json(adapter / "adapter_config.json")
    for change in ({}, {"target_modules": ["c_attn"]}, {"peft_type": "NOSUCH"}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
        assert_told(command("--adapter", adapter, name="evaluate"), f"adapter {adapter}")
        said = keeptune("merge", adapter, tmp_path / "merged", capsys=capsys)
        assert_told(said, f"adapter {adapter}")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("what", ["missing", "empty", "pickled"])
def test_adapter_folders_that_hold_no_adapter(
    command: Callable[..., Said], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    adapter = tmp_path / "adapter"
    if what != "missing":
        adapter.mkdir()
    if what == "pickled":
        config = {"peft_type": "LORA", "base_model_name_or_path": str(MODEL)}
        (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        torch.save({}, adapter / "adapter_model.bin")
    assert_told(command("--adapter", adapter, name="evaluate"), f"adapter {adapter}")
    assert_told(keeptune("merge", adapter, tmp_path / "merged", capsys=capsys), str(adapter))


def test_stages_that_are_not_finished(
    command: Callable[..., Said], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert_told(keeptune("report", out, capsys=capsys), str(out), "keeptune")
    assert command(name="plan").code == 0
    assert_told(keeptune("report", out, capsys=capsys), "keeptune train")
    assert_told(command(name="export"), "keeptune train")
    assert_told(command(name="evaluate"), "keeptune export")
    assert command(name="train").code == 0
    assert_told(keeptune("report", out, capsys=capsys), "keeptune export")
    assert command(name="export").code == 0
    assert_told(keeptune("report", out, capsys=capsys), "keeptune evaluate")
    assert_told(command("--train.max_steps", 2, name="export"), "keeptune train")
    assert not (out / "report.json").exists()


@pytest.mark.parametrize("words", [["run"], ["walk"], ["merge", "a"], ["report"], ["demo", "--seeds", "0"]])
def test_commands_without_what_they_need(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune(*words, capsys=capsys)
    assert said.code == 2
    assert "Traceback" not in said.err
