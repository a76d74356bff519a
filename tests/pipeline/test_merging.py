"""Merging an adapter into its base."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.pipeline.support import MODEL, keeptune
from transformers import AutoModelForCausalLM, AutoTokenizer

from keeptune.core.errors import ExportError, RecipeError
from keeptune.pipeline.merge import merge_adapter

Finished = Callable[[str], Path]


@pytest.mark.parametrize("name", ["lora", "lora-null-v1", "lora-null-v2"])
def test_the_merged_model_is_the_adapter_on_its_base(
    finished: Finished, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = finished(name) / "adapter"
    said = keeptune("merge", adapter, tmp_path / "merged", capsys=capsys)
    assert said.code == 0, said.err
    told = re.search(r"difference in logits (\S+), (\S+) relative", said.out)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = tuned(input_ids=ids).logits
        gap = float((wanted - merged(input_ids=ids).logits).abs().max())
    assert gap < 1e-4
    assert told is not None and max(map(float, told.groups())) < 1e-4
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = "Once upon a time"
    assert again(text)["input_ids"] == AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"]


def test_merging_again_replaces_what_it_wrote_but_nothing_else(finished: Finished, tmp_path: Path) -> None:
    adapter = finished("lora") / "adapter"
    (tmp_path / "empty").mkdir()
    first = merge_adapter(adapter, tmp_path / "empty")
    assert merge_adapter(adapter, tmp_path / "empty") == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    for place in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(ExportError, match="did not write"):
            merge_adapter(adapter, place)
    assert (tmp_path / "mine" / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_an_adapter_is_never_replaced_by_its_merge(finished: Finished, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(finished("lora") / "adapter", tmp_path / "adapter"))
    with pytest.raises(ExportError):
        merge_adapter(adapter, adapter)
    assert (adapter / "adapter_model.safetensors").is_file()


def test_dtypes(finished: Finished, tmp_path: Path) -> None:
    adapter = finished("lora") / "adapter"
    with pytest.raises(RecipeError, match="int8"):
        merge_adapter(adapter, tmp_path / "merged", dtype="int8")
    # A fingerprint is of the weights as loaded; the base is checked in the dtype of the training.
    assert merge_adapter(adapter, tmp_path / "merged", dtype="bfloat16", base=str(MODEL)).gap < 0.5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
