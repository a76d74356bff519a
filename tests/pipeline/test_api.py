"""The Python interface chooses targets as a recipe does."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from examples.encoder import make_encoder
from peft import PeftModel
from tests.pipeline.support import MODEL
from transformers import AutoModelForSequenceClassification

import keeptune
from keeptune.core.errors import DataError, PlanError, StatisticsError
from keeptune.data.completions import TaskExamples
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
    with pytest.raises(DataError, match='"sport"'):
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


def test_end_tokens_of_a_task_are_said_and_can_be_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    pairs = [("Once upon a", " time"), ("There was", f" a dog{tokenizer.eos_token}")]
    told = []
    for end in (True, False):
        options = keeptune.PlanOptions(targets=["q_proj"], layers=[0], end_token=end)
        with caplog.at_level(logging.INFO, logger="keeptune"):
            made = keeptune.plan(model, tokenizer, keeptune.Farss(rank=2, boundary=0), task=pairs, options=options)
        calibration = TaskExamples(*zip(*pairs, strict=True), end=end).calibration(tokenizer, max_length=99)
        assert made.provenance["task"] == calibration.fingerprint
        told.append([note for note in made.provenance.get("notes", ()) if tokenizer.eos_token in note])
        assert (f"completion of the task ends with {tokenizer.eos_token}" in caplog.text) == end
        caplog.clear()
    assert (len(told[0]), len(told[1])) == (1, 0)


def test_statistics_of_a_model_by_name(tmp_path: Path) -> None:
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    texts = ["Once upon a time there was a dog.", "Lily went to the park."]
    options = keeptune.PlanOptions(layers=[1], targets=["k_proj", "q_proj", "down_proj"], store=tmp_path)
    name = "model.layers.1.self_attn.k_proj"
    omega = keeptune.collect(model, tokenizer, keeptune.InputCovariance("knowledge"), texts, options=options)
    gamma = keeptune.collect(model, tokenizer, keeptune.GradientCovariance("knowledge", "true"), texts, options=options)
    seen, felt = [], []
    module = model.get_submodule(name)
    module.register_forward_hook(lambda _, given, __: seen.append(given[0][0].detach().double()))
    module.register_full_backward_hook(lambda _, __, out: felt.append(out[0][0].detach().double()))
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logits = model(ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
    for found, rows in ((omega, torch.cat(seen)), (gamma, torch.cat(felt))):
        assert list(found) == [
            f"model.layers.1.{part}" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
        ]
        torch.testing.assert_close(found[name].double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-7)
    with pytest.raises(StatisticsError, match="not finite|NaN"):
        torch.nn.init.constant_(model.get_submodule("model.layers.0.mlp.down_proj").weight, torch.nan)
        keeptune.collect(model, tokenizer, keeptune.InputCovariance("knowledge"), texts)


def test_nodes_are_attributed_and_selected_as_a_plan_of_loki_does() -> None:
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    texts = [("Once upon a", " time"), ("There was a little", " dog"), ("Lily went to the", " park")]
    request = keeptune.NeuronAttribution.as_paper()
    found = keeptune.attribute(model, tokenizer, request, texts)
    assert (found.samples, len(found.layers), found.read(0).shape) == (3, 5, (5, found.nodes))
    rows = dict(zip(found.modules, keeptune.chosen_rows(found, q=10), strict=True))
    made = keeptune.plan(model, tokenizer, keeptune.Loki(q=10, attribution=request), knowledge=texts)
    assert rows == {t.target.name: t.decision.rows for t in made.targets}
    assert rows != dict(zip(found.modules, keeptune.chosen_rows(found, q=10, where="layer-high"), strict=True))


def test_noise_of_a_trace_where_it_is_wanted() -> None:
    model, tokenizer = load_model(str(MODEL)), load_tokenizer(str(MODEL))
    texts = [("Once upon a", " time there"), ("Lily went to the", " park and")]
    last = tuple((len(tokenizer(prompt)["input_ids"]) - 1,) for prompt, _ in texts)
    given = keeptune.LayerEffect("knowledge", scale=2.0, noised=last)
    for text, (place,) in zip(keeptune.trace(model, tokenizer, texts, given).texts, last, strict=True):
        assert not text.heat[:, :place].any(), "what lies before the noise is as it was"
        assert text.heat[:, place].abs().max() > 0
    none = keeptune.trace(model, tokenizer, texts, replace(given, scale=0.0))
    assert not none.effects.any()
    drawn = keeptune.trace(model, tokenizer, texts, keeptune.LayerEffect("knowledge", scale=2.0))
    assert any(text.heat[:, :place].any() for text, (place,) in zip(drawn.texts, last, strict=True))
    for wrong in (last[:1], ((), (0,)), ((99,), (0,)), ((-1,), (0,))):
        with pytest.raises(StatisticsError, match="noised"):
            keeptune.trace(model, tokenizer, texts, replace(given, noised=wrong))
