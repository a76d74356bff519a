"""Training a classifier with Transformers' Trainer: the loss, its accumulation, smoothing, and what is frozen."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.encoder import FACTS, make_encoder
from peft import PeftModel
from tests.pipeline.support import read_jsonl
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keeptune.adapter.install import install, trained_state
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.data.labelled import LabelledExamples, collator, labelled_examples
from keeptune.methods.lora import Lora
from keeptune.model.head import Head, sequence_losses
from keeptune.model.pretrained import LoadOptions, load_model, load_tokenizer
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.store import StatStore
from keeptune.training import trainer
from keeptune.training.arguments import sft_config

ROWS = [row | {"length": len(row["sentence"]) / 10} for row in read_jsonl(FACTS, 16)]
WORDS = labelled_examples(ROWS, text="{sentence}", text_pair=None, label="{relation}", where="test")
LENGTHS = labelled_examples(ROWS, text="{sentence}", text_pair=None, label="{length}", scores=True, where="test")
QUICK = {"max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0, "save_strategy": "no", "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("encoder")
    make_encoder(made, list(WORDS.texts.first))
    return str(made)


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


@pytest.fixture
def still(folder: str, tmp_path: Path) -> Any:
    """An installed model without dropout, and its plan."""

    def make(examples: LabelledExamples) -> tuple[PeftModel, Plan]:
        model = load_model(folder, LoadOptions(head=Head(examples.names)))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in model.roberta.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        plan = plan_for(model, Lora(rank=2), StatStore(tmp_path / "store"), data={})
        tuned = install(model, plan)
        assert isinstance(tuned, PeftModel)
        return tuned, plan

    return make


def train(made: tuple[PeftModel, Plan], tokenizer: Any, examples: LabelledExamples, folder: Path, **more: Any) -> Any:
    config = sft_config(QUICK | more, folder, dtype=torch.float32, device="cpu", positions=64)
    return trainer.train(*made, tokenizer, examples, config)


def losses(model: PeftModel, tokenizer: Any, examples: LabelledExamples, smoothing: float = 0.0) -> Tensor:
    batch = collator(tokenizer)(examples.texts.encode(tokenizer, 64)[0].to_list())
    with torch.no_grad():
        return sequence_losses(model(**batch).logits, torch.tensor(examples.labels), smoothing)


@pytest.mark.parametrize("examples", [WORDS, LENGTHS], ids=["labels", "scores"])
def test_the_loss_that_is_logged_is_the_mean_over_examples(
    examples: LabelledExamples, still: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    made = still(examples)
    wanted = losses(made[0], tokenizer, examples).mean()
    rates = {"learning_rate": 1e-3, "logging_steps": 1, "per_device_train_batch_size": 16}
    (first, second) = train(made, tokenizer, examples, tmp_path, **rates)
    assert first["loss"] == pytest.approx(float(wanted), abs=1e-4)
    assert second["loss"] < first["loss"]


@pytest.mark.parametrize("examples", [WORDS, LENGTHS], ids=["labels", "scores"])
def test_micro_batches_take_the_step_of_one_batch(
    examples: LabelledExamples, still: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Transformers' own loss of a classifier would give a step four times as long."""
    found = []
    for rows, pieces in ((8, 1), (2, 4)):
        made = still(examples)
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": pieces, "learning_rate": 1e-3}
        loss = train(made, tokenizer, examples, tmp_path / str(rows), logging_steps=1, **sizes)
        found.append((trained_state(*made), loss))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=0, atol=1e-6)
    for first, second in zip(found[0][1], found[1][1], strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)


def test_smoothing_is_in_the_loss_and_not_for_scores(
    still: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    made = still(WORDS)
    wanted = losses(made[0], tokenizer, WORDS, 0.2).mean()
    options = {"label_smoothing_factor": 0.2, "per_device_train_batch_size": 16, "logging_steps": 1}
    first, *_ = train(made, tokenizer, WORDS, tmp_path, **options)
    assert first["loss"] == pytest.approx(float(wanted), abs=1e-4)
    assert abs(float(wanted) - float(losses(still(WORDS)[0], tokenizer, WORDS).mean())) > 1e-3
    with pytest.raises(TrainError, match="label_smoothing_factor"):
        train(still(LENGTHS), tokenizer, LENGTHS, tmp_path, label_smoothing_factor=0.2)


@pytest.mark.parametrize("frozen", ["classifier.modules_to_save.default.dense.bias", "layer.0.output.dense.lora_B"])
def test_guard_tells_a_part_that_should_be_trained(
    frozen: str, still: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, plan = still(WORDS)
    (name,) = [name for name, _ in model.named_parameters() if frozen in name]
    model.get_parameter(name).requires_grad_(False)
    with pytest.raises(TrainError, match=rf"{frozen}.*got frozen"):
        train((model, plan), tokenizer, WORDS, tmp_path)


def test_the_encoder_itself_and_the_drawn_head_stay_as_they_were(
    still: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, plan = still(WORDS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train((model, plan), tokenizer, WORDS, tmp_path, per_device_train_batch_size=16)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_B" in name or "lora_A" in name or "modules_to_save" in name}


def test_long_texts_are_cut_and_told(
    still: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(still(WORDS), tokenizer, WORDS, tmp_path, max_length=6)
    assert "of 16 examples are cut to 6 tokens" in caplog.text
