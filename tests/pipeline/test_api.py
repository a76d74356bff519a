"""The Python interface chooses targets as a recipe does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from examples.encoder import make_encoder
from peft import PeftModel
from tests.pipeline.support import MODEL
from transformers import AutoModelForSequenceClassification

import keeptune
from keeptune.core.errors import DataError, PlanError
from keeptune.model.pretrained import load_model, load_tokenizer


def test_layers_and_targets_of_a_plan() -> None:
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    made = keeptune.plan(
        model, tokenizer, keeptune.Lora(rank=2), options=keeptune.PlanOptions(["q_proj", "v_proj"], [4, 1])
    )
    assert [(t.target.layer, t.target.role) for t in made.targets] == [
        (1, "q_proj"),
        (1, "v_proj"),
        (4, "q_proj"),
        (4, "v_proj"),
    ]
    with pytest.raises(PlanError, match="every weight"):
        keeptune.plan(model, tokenizer, keeptune.Full(), options=keeptune.PlanOptions(layers=[0]))


def test_knowledge_as_texts_or_as_pairs() -> None:
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    pairs = [("Once upon a", " time"), ("There was", " a dog")]
    data = [[read + said for read, said in pairs], pairs, ["Once", ("a", "b")]]
    options = keeptune.PlanOptions(targets=["q_proj"], layers=[0])
    plans = [
        keeptune.plan(model, tokenizer, keeptune.LoraNull(rank=2), knowledge=given, options=options)
        for given in data[:2]
    ]
    assert plans[0].provenance["knowledge"] != plans[1].provenance["knowledge"]
    assert torch.equal(plans[0].targets[0].init.A, plans[1].targets[0].init.A)
    with pytest.raises(DataError, match="different forms"):
        keeptune.plan(model, tokenizer, keeptune.LoraNull(rank=2), knowledge=data[2])  # type: ignore[arg-type]


def test_a_classifier_that_one_has_already(tmp_path: Path) -> None:
    texts = ["Piano is what she plays.", "He speaks Finnish.", "She plays the harp.", "They grew up with Greek."]
    make_encoder(tmp_path / "encoder", texts)
    names = {"id2label": {0: "music", 1: "speech"}, "label2id": {"music": 0, "speech": 1}}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", **names).eval()
    tokenizer = load_tokenizer(str(tmp_path / "encoder"))
    task = list(zip(texts, ["music", "speech", "music", "speech"], strict=True))
    plan = keeptune.plan(model, tokenizer, keeptune.Farss(rank=4, boundary=1), task=task, knowledge=texts)
    assert {t.target.role for t in plan.targets} >= {"query", "intermediate.dense", "output.dense"}
    with pytest.raises(DataError, match='the label "sport"'):
        keeptune.plan(model, tokenizer, keeptune.Farss(rank=4, boundary=1), task=[("A.", "sport")], knowledge=texts)
    tuned = keeptune.install(model, plan)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    for _ in range(3):
        optimiser.zero_grad()
        tuned(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimiser.step()
    tuned.eval()
    keeptune.export(tuned, plan, tmp_path / "adapter", base=str(tmp_path / "encoder"))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "encoder", num_labels=2)
    again = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, tuned(**batch).logits, rtol=1e-4, atol=1e-5)
