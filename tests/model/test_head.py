"""The head of a sequence classifier: found, drawn, left out of fingerprints, and the loss it is trained with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models import HIDDEN, MODELS, VOCAB, Saved, save
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from keeptune.core.artefact import model_fingerprint
from keeptune.core.errors import ModelError
from keeptune.data.calibration import Batch, Calibration
from keeptune.model.blocks import find_targets, head_of, positions
from keeptune.model.head import (
    Head,
    Loss,
    body_fingerprint,
    drawn_labels,
    head_fingerprint,
    sequence_losses,
    summed_loss,
)
from keeptune.model.pretrained import LoadOptions, load_model, load_positions

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
}
DISTIL = {
    "vocab_size": VOCAB,
    "dim": HIDDEN,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 66,
}
DENSE = {"attention.output.dense", "intermediate.dense", "output.dense"}
# Other encoders, and a decoder with a head: what is beside the body, and the roles in it.
OTHERS: dict[str, tuple[Callable[[], PreTrainedModel], tuple[str, ...], set[str]]] = {
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**SIZES)),
        ("classifier",),
        {"query", "key", "value", *DENSE},
    ),
    "electra": (
        lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=16)),
        ("classifier",),
        {"query", "key", "value", *DENSE},
    ),
    "deberta": (
        lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES)),
        ("pooler", "classifier"),
        {"query_proj", "key_proj", "value_proj", *DENSE},
    ),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL)),
        ("pre_classifier", "classifier"),
        {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"},
    ),
    "llama": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0)),
        ("score",),
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
}

ONE = torch.ones(1, 1, dtype=torch.long)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(MODELS["roberta"](), tmp_path_factory.mktemp("encoder"))


@pytest.mark.parametrize("name", OTHERS)
def test_targets_are_the_linear_maps_of_the_blocks_alone(name: str) -> None:
    make, head, roles = OTHERS[name]
    model = make()
    assert head_of(model) == head
    found = find_targets(model)
    assert {target.role for target in found} == roles
    assert len(found) == 2 * len(roles)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_language_model_has_no_head_of_this_kind(architecture: str) -> None:
    model = MODELS[architecture]()
    assert head_of(model) == ()
    assert Head.of(model) is None
    assert body_fingerprint(model) == model_fingerprint(model)


def test_positions_that_roberta_does_not_use_are_not_counted(saved: Saved) -> None:
    assert positions(MODELS["roberta"]()) == 64  # two of 66 are taken
    assert load_positions(str(saved.folder), LoadOptions(head=saved.head)) == 64
    assert positions(OTHERS["bert"][0]()) == 66
    assert positions(MODELS["llama"]()) == 64


def test_the_same_seed_draws_the_same_head_and_the_encoder_stays(saved: Saved) -> None:
    torch.manual_seed(5)
    first, again, other = saved.load(1), saved.load(1), saved.load(2)
    assert torch.initial_seed() == 5
    assert head_fingerprint(first) == head_fingerprint(again) != head_fingerprint(other)
    assert body_fingerprint(first) == body_fingerprint(other) == body_fingerprint(MODELS["roberta"]())
    with torch.no_grad():
        other.roberta.encoder.layer[1].output.dense.weight[0, 0] += 1
    assert body_fingerprint(first) != body_fingerprint(other)


@pytest.mark.parametrize("labels", [("no", "yes"), ("b", "a", "c"), ()])
def test_the_config_says_what_the_head_tells(saved: Saved, labels: tuple[str, ...]) -> None:
    model = load_model(str(saved.folder), LoadOptions(head=Head(labels)))
    assert model.config.num_labels == max(1, len(labels))
    assert model.classifier.out_proj.out_features == max(1, len(labels))
    found = Head.of(model)
    assert found is not None
    assert found.labels == labels
    if labels:
        assert model.config.label2id == {label: index for index, label in enumerate(labels)}


def test_only_the_head_may_be_missing(saved: Saved, tmp_path: Path) -> None:
    weights = load_file(saved.folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((saved.folder / "config.json").read_text())
    with pytest.raises(ModelError, match=r"roberta\.encoder\.layer\.0\.output\.dense\.weight.*only the head"):
        load_model(str(tmp_path), LoadOptions(head=saved.head))


def test_a_head_that_is_there_is_kept_unless_its_labels_are_in_another_order(tmp_path: Path) -> None:
    model = MODELS["roberta"]()
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.save_pretrained(tmp_path)
    kept = load_model(str(tmp_path), LoadOptions(head=Head(("a", "b", "c"), seed=9)))
    assert torch.equal(kept.classifier.dense.weight, model.classifier.dense.weight)
    with pytest.raises(ModelError, match=r"Set task\.labels: \[a, b, c\]"):
        load_model(str(tmp_path), LoadOptions(head=Head(("c", "b", "a"))))
    with pytest.raises(ModelError, match="other shapes"):
        load_model(str(tmp_path), LoadOptions(head=Head(("a", "b"))))
    assert json.loads((tmp_path / "config.json").read_text())["id2label"]["0"] == "a"


def test_a_model_that_cannot_classify_is_told(tmp_path: Path) -> None:
    config = {"model_type": "vits", "architectures": ["VitsModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="AutoModelForSequenceClassification"):
        load_model(str(tmp_path), LoadOptions(head=Head(("a", "b"))))


# Loss


def test_losses_are_those_of_transformers_one_by_one() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    wanted = -logits.log_softmax(-1)[torch.arange(5), labels]
    torch.testing.assert_close(sequence_losses(logits, labels), wanted)
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0])
    torch.testing.assert_close(sequence_losses(logits[:, :1], scores), (logits[:, 0] - scores) ** 2)
    smooth = 0.9 * wanted - 0.1 * logits.log_softmax(-1).mean(-1)
    torch.testing.assert_close(sequence_losses(logits, labels, 0.1), smooth)


def batch_of(labels: Any) -> Batch:
    sequences = tuple((3 + n, 5, 9) for n in range(len(labels)))
    (batch,) = Calibration(sequences, 0, labels=labels).batches()
    return batch


def test_the_loss_of_a_batch_is_the_sum_over_its_texts() -> None:
    logits = torch.randn(4, 3)
    batch = batch_of((2, 0, 1, 1))
    assert batch.labels is not None
    found = summed_loss(logits, batch, Loss("true"))
    torch.testing.assert_close(found, sequence_losses(logits, batch.labels).sum())


def test_drawn_classes_follow_the_model_and_their_seed() -> None:
    logits, batch = torch.tensor([[0.0, 1.0, -1.0]]), batch_of((0,))
    found = torch.cat([drawn_labels(logits, batch, ONE, seed) for seed in range(4000)])
    assert (torch.bincount(found, minlength=3) / 4000 - logits[0].softmax(0)).abs().max() < 0.03
    scores = torch.cat([drawn_labels(logits[:, 1:2], batch, ONE, seed) for seed in range(4000)])
    assert scores.mean() == pytest.approx(1.0, abs=0.05)
    # exp(-(s - y)^2), the density that the squared error is the logarithm of, has the variance 1/2.
    assert scores.var() == pytest.approx(0.5, abs=0.05)
    other = dataclasses.replace(batch, labels=torch.tensor([1]))
    assert drawn_labels(logits, batch, ONE, 3).equal(drawn_labels(logits, other, ONE, 3))
