"""What a stage or a command takes is what was exported; the end of texts is the same in all that is exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.pipeline.support import MODEL, recipe_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from keeptune.adapter import merging
from keeptune.core.artefact import EXPORT, read_json, write_json
from keeptune.core.errors import ArtefactError, DataError, ExportError, ModelError, RecipeError
from keeptune.pipeline.export import export_stage
from keeptune.pipeline.job import Job
from keeptune.pipeline.merge import merge_adapter
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.run import plan_stage
from keeptune.pipeline.scoring import evaluate_stage, find_result, result_fingerprint
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.pipeline.training import load_trained, train_stage

Finished = Callable[[str], Path]
Values = Callable[..., dict[str, Any]]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def larger_alpha(file: Path) -> None:
    config = read_json(file)
    write_json(file, config | {"lora_alpha": 50 * config["lora_alpha"]})


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a bit of the weights": ("adapter_model.safetensors", flip),
    "the scale": ("adapter_config.json", larger_alpha),
    "half a config": ("adapter_config.json", lambda file: file.write_bytes(file.read_bytes()[:20])),
    "the tokenizer": ("tokenizer.json", flip),
    "a file that is gone": ("tokenizer_config.json", Path.unlink),
    "the sidecar": ("keeptune.json", lambda file: file.write_text("null")),
    "half a record": (EXPORT, lambda file: file.write_bytes(file.read_bytes()[:20])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_exported_is_not_taken(damage: str, finished: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for part in ("adapter", "plan", "trained", "evaluation"):
        shutil.copytree(finished("lora") / part, run / part)
    shutil.copy(finished("lora") / "recipe.json", run)
    file, do = DAMAGES[damage]
    do(run / "adapter" / file)
    job = Job(recipe_of(read_json(run / "recipe.json") | {"output": str(run)}))
    takers: list[Callable[[], object]] = [
        lambda: find_result(run),
        lambda: evaluate_stage(job),
        lambda: evaluate_stage(job, run / "adapter"),
        lambda: TrainedModel.of(str(run)),
        lambda: TrainedModel.of(str(run / "adapter")),
        lambda: merge_adapter(run / "adapter", tmp_path / "merged"),
        lambda: write_report([run], run),
    ]
    for take in takers:
        with pytest.raises(ArtefactError, match=file):
            take()
    assert not (tmp_path / "merged").exists()


def test_adapters_of_another_origin_are_taken_as_they_are(finished: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished("lora") / "adapter", tmp_path / "adapter"))
    before = result_fingerprint(folder)
    (folder / EXPORT).unlink()
    own = result_fingerprint(folder)
    larger_alpha(folder / "adapter_config.json")
    assert TrainedModel.of(str(folder)).is_adapter
    assert len({before, own, result_fingerprint(folder)}) == 3, "scores of one scale are not those of another"


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_damaged_training_is_not_exported(name: str, finished: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished(name), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    job = Job(recipe_of(read_json(run / "recipe.json") | {"output": str(run)}))
    flip(run / "trained" / ("model/config.json" if name == "full" else "factors.safetensors"))
    with pytest.raises(ArtefactError, match="do not match"):
        load_trained(job, plan_stage(job))


def test_next_to_nothing_kept_is_said_whatever_the_loss(finished: Finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished("lora"), tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    assert not write_report([run], run)["methods"][0]["notes"]
    for name in ("stories", "animals"):
        record = read_json(run / "evaluation" / f"{name}.json")
        after = 19.0 if name == "stories" else 0.0
        write_json(run / "evaluation" / f"{name}.json", record | {"summary": record["summary"] | {"after": after}})
    (note,) = write_report([run], run)["methods"][0]["notes"]
    assert "hardly any knowledge is left" in note


# The end of texts


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a token that neither its tokenizer nor its generation config ends texts with."""
    folder = tmp_path_factory.mktemp("turns")
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for one in (tokenizer, model):
        one.save_pretrained(folder)
    return folder


def test_all_that_is_exported_ends_texts_as_training_did(turns: Path, recipe_values: Values, tmp_path: Path) -> None:
    train = {"max_steps": 1, "per_device_train_batch_size": 2, "eos_token": "<|im_end|>", "learning_rate": 1e-3}
    given = recipe_values(model=str(turns), train=train, evaluate=[])
    job = Job(recipe_of(given))
    rows = job.task.token_rows(job.tokenizer, range(2))
    end = job.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [row.ids[-1] for row in rows] == [end, end]
    plan = plan_stage(job)
    train_stage(job, plan)
    export_stage(job, plan)
    adapter = job.output / "adapter"
    files = {name: (adapter / name).read_bytes() for name in ("tokenizer_config.json", "generation_config.json")}
    shutil.rmtree(adapter)
    export_stage(Job(recipe_of(given)), plan)  # as another process does, in which nothing was trained
    assert files == {name: (adapter / name).read_bytes() for name in files}
    merge_adapter(adapter, tmp_path / "merged")
    for folder in (adapter, tmp_path / "merged"):
        assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 2, end]
    assert f"--generation-config {adapter}" in read_json(adapter / EXPORT)["serve"]
    with pytest.raises(RecipeError, match=r"train.eos_token: got <end>"):
        _ = Job(recipe_of(given | {"train": {"eos_token": "<end>"}})).tokenizer


def test_tokens_without_rows_are_refused_before_anything_is_computed(turns: Path, recipe_values: Values) -> None:
    small = Path(shutil.copytree(turns, turns.with_name("small")))
    AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(small)
    values = recipe_values(model=str(small), evaluate=[])
    values["task"] |= {"completion": "{answer}<|im_end|>"}
    with pytest.raises(DataError, match="got the token 513, wanted ids below 512"):
        Job(recipe_of(values)).check()


# Merges


@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied weights
@pytest.mark.parametrize("modules", [["lm_head", "q_proj"], ["embed_tokens"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_on_tied_weights_is_merged_into_two(modules: list[str], dtype: str, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", target_modules=modules)
    gap = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype=dtype).gap
    assert gap < (1e-4 if dtype == "float32" else 1)
    assert not read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"]


@pytest.mark.filterwarnings("ignore")  # PEFT's, of just that
def test_what_peft_does_not_merge_is_an_error(tmp_path: Path) -> None:
    adapter(tmp_path / "adapter", target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ModelError, match="no bias"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_a_merge_that_is_off_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter(tmp_path / "adapter", target_modules=["q_proj"])
    save = merging.save_model

    def off(model: Any, folder: Path) -> None:
        save(model, folder)
        (file,) = folder.glob("*.safetensors")
        save_file({key: value * 1.01 for key, value in load_file(file).items()}, file, {"format": "pt"})

    monkeypatch.setattr(merging, "save_model", off)
    with pytest.raises(ExportError, match="differ from the adapter on its base"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def adapter(folder: Path, **how: Any) -> None:
    """An adapter that PEFT wrote, without keeptune's files."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(task_type="CAUSAL_LM", r=2, **how))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.requires_grad
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(MODEL)
