"""SDFT: TRL's trainer against the equations text by text, for every anchor; what it reads; kills; refusals."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.reference import sdft_reference
from tests.training.support import EXAMPLES, MODEL, TOKENIZER, largest_gap, planned
from tests.training.test_preferences import CHATML, METHODS

from keeptune.adapter.install import install, trained_state
from keeptune.core.errors import DataError, PlanError, TrainError
from keeptune.core.plan import Plan
from keeptune.data.completions import Conversations, TaskExamples, with_replay
from keeptune.data.examples import Conversation
from keeptune.methods.lora import Lora
from keeptune.model.pretrained import load_model
from keeptune.penalties.l2 import L2
from keeptune.training.arguments import sft_config
from keeptune.training.losses.sdft import Sdft
from keeptune.training.self_distillation import sdft_trainer
from keeptune.training.trainer import Beside, train

GREEDY: dict[str, Any] = {"max_completion_length": 6, "temperature": 0.0}
OTHER = "A: {privileged_context} Q: {prompt}"


def config(folder: Path, **own: Any) -> Any:
    given = {"max_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 8, "logging_steps": 1, "seed": 0}
    return sft_config(given | own, folder, dtype=torch.float32, device="cpu", positions=512)


def run(plan: Plan, folder: Path, loss: Any, examples: Any = EXAMPLES, **own: Any) -> tuple[Any, Any]:
    anchor, stm = own.pop("anchor", "auto"), own.pop("stm_threshold", None)
    model = install(load_model(MODEL), plan, anchor=anchor)
    return train(model, plan, TOKENIZER, examples, config(folder, **own), loss, Beside(stm)), model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", {"teacher_update_rate": 0.5}),
        ("pissa", {"distillation_alpha": 1.0}),
        ("pissa on a twin", {"distillation_alpha": 0.3, "teacher_prompt_template": OTHER}),
        ("full", {"teacher_update_rate": 1.0, "num_loss_tokens_to_skip": 2}),
    ],
)
@torch.no_grad()
def test_two_steps_are_the_papers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The first at the base, whatever the anchor; the second with a teacher between the base and the model."""
    method, own = METHODS[name]
    plan, loss = planned(method, store=tmp_path, layers=None if name == "full" else (0, 1)), Sdft(**GREEDY, **options)
    template = loss.teacher_prompt_template or "{prompt}{privileged_context}\n\n{prompt}"
    rows = []
    for prompt, answer in zip(EXAMPLES.prompts or (), EXAMPLES.completions, strict=True):
        shown = template.format(prompt=prompt, privileged_context=answer)
        rows.append(tuple(list(TOKENIZER(text)["input_ids"]) for text in (prompt, shown)))
    with torch.enable_grad():
        curve, _ = run(plan, tmp_path / "two", loss, **own)
        _, after = run(plan, tmp_path / "one", loss, **own, max_steps=1)
    start = install(load_model(MODEL), plan, anchor=own.get("anchor", "auto")).eval()
    teacher = copy.deepcopy(start)
    for value, end in zip(teacher.parameters(), after.parameters(), strict=True):
        value.data.lerp_(end.data, loss.teacher_update_rate if end.requires_grad else 0)
    pairs = [(start, start), (after.eval(), teacher), (after, start)]
    first, second, still = (sdft_reference.loss(*pair, rows, loss, TOKENIZER.eos_token_id) for pair in pairs)
    assert [row["loss"] for row in curve] == pytest.approx([first, second], rel=1e-4)
    assert not torch.tensor([first, still]).isclose(torch.tensor(second), rtol=1e-3).any()


def test_the_head_reads_contiguous_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(Lora(rank=2))
    model, seen = install(load_model(MODEL), plan), set()
    head = model.get_output_embeddings()
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda states: seen.add(states.is_contiguous()) or forward(states))
    train(model, plan, TOKENIZER, EXAMPLES, config(tmp_path), Sdft(**GREEDY))
    assert seen == {True}  # those of a slice are not


def test_micro_batches_make_the_step_of_one_batch(tmp_path: Path) -> None:
    plan, found = planned(Lora(rank=2)), []
    for size in (8, 2):
        own = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "optim": "sgd"}
        found.append(trained_state(run(plan, tmp_path / str(size), Sdft(**GREEDY), **own, max_steps=1)[1], plan))
    assert largest_gap(*found) < 1e-6
    assert largest_gap(found[0], trained_state(install(load_model(MODEL), plan), plan)) > 1e-5  # type: ignore[arg-type]


def test_a_killed_run_goes_on_to_the_same_bits_while_it_samples(tmp_path: Path) -> None:
    """In the middle of an epoch or between two, with a penalty, and with a teacher that has moved."""
    plan, loss = planned(Lora(rank=2), [L2(strength=0.1)]), Sdft(max_completion_length=6, teacher_update_rate=0.5)
    extra: dict[str, Any] = {"max_steps": 6, "save_steps": 1, "save_total_limit": 9, "per_device_train_batch_size": 2}
    whole, model = run(plan, tmp_path / "whole", loss, **extra)
    assert {"penalty/l2", "completions/mean_length"} <= whole[0].keys()
    for step in (1, 4, 5):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / f"{step}" / f"checkpoint-{step}")
        again, other = run(plan, tmp_path / f"{step}", loss, **extra)
        assert again == whole
        assert largest_gap(trained_state(model, plan), trained_state(other, plan)) == 0


def test_a_conversation_is_asked_for_its_last_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the chat template; left out are one that ends with the user, one with tools, and one without room."""
    monkeypatch.setattr(TOKENIZER, "chat_template", CHATML)
    said = tuple({"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant"))
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    long = Conversation(({"role": "user", "content": "long " * 90}, said[-1]))
    examples = Conversations((Conversation(said), Conversation(said[:3]), Conversation(said, (tool,)), long))
    parts = {"model": load_model(MODEL), "processing_class": TOKENIZER, "examples": examples}
    trainer = sdft_trainer(
        Sdft(**GREEDY), args=config(tmp_path, per_device_train_batch_size=1, max_length=200), **parts
    )
    (row,) = trainer.train_dataset
    assert row == {"prompt": list(said[:3]), "privileged_context": "assistant 1"}
    shown = trainer.teacher_context_builder.select_generation_prompts([row["prompt"]], [row["privileged_context"]])[0]
    assert shown[:2] == list(said[:2])
    assert shown[2]["content"].startswith("user 1\n\nThis is an example for a response to the question:\nassistant 1\n")
    for few, told in (
        (examples, "1 of 4 examples.*wanted 8"),
        (Conversations((Conversation(said, (tool,)),)), "0 of 1"),
    ):
        with pytest.raises(DataError, match=told):
            sdft_trainer(Sdft(**GREEDY), args=config(tmp_path, max_length=200), **parts | {"examples": few})


TEXTS = TaskExamples(None, tuple(f"There were {n} birds." for n in range(6)), end=False)


@pytest.mark.parametrize(
    ("examples", "own", "told"),
    [
        (TEXTS, {}, "whole texts"),
        (with_replay(EXAMPLES, [TEXTS], 0.5, seed=0), {}, "replay"),
        (EXAMPLES, {"packing": True}, "train.packing"),
        (EXAMPLES, {"stm_threshold": 2.5}, "task.stm_threshold"),
    ],
)
def test_what_has_no_place_is_refused(examples: Any, own: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=f"task.loss sdft: got .*{told}"):
        run(planned(Lora(rank=2)), tmp_path, "sdft", examples, **own)


@pytest.mark.parametrize("template", ["{prompt}", '{prompt} {privileged_context} {"a": 1}'])
def test_a_template_has_both_fields_and_no_other(template: str) -> None:
    with pytest.raises(PlanError, match="teacher_prompt_template"):
        Sdft(teacher_prompt_template=template)
