"""keeptune.Callback in trainers of one's own: the numbers of attach, in pieces, after a kill, and what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.models import NF4
from tests.pipeline.support import write_jsonl
from tests.training.support import MODEL, TOKENIZER, TRAINERS, plain_trainer, trl_trainer, tuned
from torch import Tensor
from transformers import Trainer, TrainerCallback

import keeptune
from keeptune.adapter.load import load_adapter
from keeptune.core.artefact import read_json
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.hosts.callback import Callback
from keeptune.methods.keep import Keep
from keeptune.methods.l2_lora import L2Lora
from keeptune.methods.lalora import Lalora
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA
from keeptune.methods.pissa import Pissa
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.penalties.kl import Kl
from keeptune.pipeline.planning import PlanOptions
from keeptune.training.penalty_engine import Penalties

TEXTS = [f"Once upon a time there were {n} little birds.{' They sang.' * (n % 3)}" for n in range(16)]
LONG: dict[str, Any] = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 6}
KEPT = Keep(rank=2, nats=0.003, every=1)


def own(**extra: Any) -> PeftModel:
    """A LoRA as a user makes it."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]} | extra)
    found = get_peft_model(load_model(MODEL), config)
    assert isinstance(found, PeftModel)
    return found


def callback(method: Any = KEPT, **extra: Any) -> Callback:
    return Callback(method=method, knowledge=TEXTS, **extra)


def curve(trainer: Any) -> list[dict[str, float]]:
    left_out = ("epoch", "train_", "total_flos")
    rows = [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in trainer.state.log_history]
    return [row for row in rows if len(row) > 1]


def trained(model: PeftModel, folder: Path, *, kind: str = "transformers", resume: Any = None, **extra: Any) -> Any:
    """Trains with a callback or without; returns the trainer."""
    callbacks = extra.pop("callbacks", [callback()])
    made = TRAINERS[kind](model, folder, **LONG | extra, **({"callbacks": callbacks} if kind == "trl" else {}))
    made.processing_class = TOKENIZER
    for one in callbacks if kind != "trl" else ():
        made.add_callback(one)
    made.train(resume_from_checkpoint=resume)
    return made


def factors(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("kind", "pieces", "method", "penalties"),
    [
        ("transformers", 1, KEPT, []),
        ("trl", 4, KEPT, []),
        ("transformers", 4, L2Lora(rank=2), [Kl(strength=1.0)]),
        ("trl", 1, Lalora(rank=2), []),
    ],
)
def test_it_trains_to_the_last_bit_as_attach_does(
    kind: str, pieces: int, method: Any, penalties: Sequence[Any], tmp_path: Path
) -> None:
    options = PlanOptions(layers=[0, 1])
    base = load_model(MODEL)
    plan = keeptune.plan(base, TOKENIZER, method, knowledge=TEXTS, penalties=penalties, options=options)
    extra = {"per_device_train_batch_size": 8 // pieces, "gradient_accumulation_steps": pieces, "max_grad_norm": 0.5}
    there = trained(tuned(plan), tmp_path, kind=kind, callbacks=[callback(method, penalties=penalties)], **extra)
    wanted = TRAINERS[kind](tuned(plan), tmp_path, **LONG | extra)
    keeptune.attach(wanted, plan)
    wanted.train()
    assert all(torch.equal(value, factors(wanted)[name]) for name, value in factors(there).items())
    assert curve(there) == curve(wanted)
    given = trained(tuned(plan), tmp_path, kind=kind, callbacks=[Callback(plan=plan)], **extra)
    assert curve(given) == curve(wanted)
    assert any(row.get("penalty_grad_norm", 0) > 0 for row in curve(there))


@pytest.mark.parametrize("kind", TRAINERS)
def test_pieces_of_a_step_take_the_steps_of_the_whole(kind: str, tmp_path: Path) -> None:
    """Under clipping, so that penalties are in the norm, and at a rate at which D is no rounding."""
    found = []
    for pieces in (1, 4):
        extra = {"per_device_train_batch_size": 8 // pieces, "gradient_accumulation_steps": pieces, "optim": "sgd"}
        found.append(trained(own(), tmp_path, kind=kind, max_grad_norm=0.5, learning_rate=0.3, **extra))
    one, four = found
    for name, value in factors(one).items():
        torch.testing.assert_close(factors(four)[name], value, rtol=1e-4, atol=1e-6)
    for row, other in zip(curve(one), curve(four), strict=True):
        assert {k: v for k, v in other.items() if "penalty" in k or "kl" in k} == pytest.approx(
            {k: v for k, v in row.items() if "penalty" in k or "kl" in k}, rel=1e-3, abs=3e-6
        )


def test_a_run_that_was_killed_goes_on_as_one_that_was_not(tmp_path: Path) -> None:
    """With another draw of A in the new process: the start is that of the plan beside the checkpoints."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trained(own(), tmp_path, **saving)
    torch.manual_seed(1)
    again = get_peft_model(load_model(MODEL), whole.model.peft_config["default"])
    gone_on = trained(again, tmp_path, resume=tmp_path / "checkpoint-3", **saving)
    assert all(torch.equal(value, factors(gone_on)[name]) for name, value in factors(whole).items())
    assert curve(gone_on) == curve(whole)
    assert len({row["multiplier"] for row in curve(whole) if "multiplier" in row}) > 3
    for name, told in (("plan.json", "no such file|No such file"), ("other", "of another plan's penalties")):
        if name == "other":
            trained(own(r=1), tmp_path)
        else:
            (tmp_path / "keeptune/plan" / name).unlink()
        with pytest.raises((keeptune.KeeptuneError, OSError), match=told):
            trained(own(), tmp_path, resume=tmp_path / "checkpoint-3", **saving)


def lost(model: PeftModel, plan: Plan) -> float:
    return Penalties(model, plan).value()["held_out/kl"]


BUDGET: dict[str, Any] = {"max_steps": 60, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    model: PeftModel = trained(own(), tmp_path_factory.mktemp("free"), callbacks=[], **BUDGET).model
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_budget_is_held_and_without_the_callback_it_is_not(
    checkpointing: bool, free: PeftModel, tmp_path: Path
) -> None:
    one = callback(Keep(nats=0.02, every=1))
    held = trained(own(), tmp_path, callbacks=[one], gradient_checkpointing=checkpointing, **BUDGET)
    (row,) = [row for row in curve(held) if "held_out/kl" in row]
    assert one.plan is not None
    assert row["held_out/kl"] < 0.04
    assert row["held_out/kl"] == pytest.approx(lost(held.model, one.plan), rel=1e-4)
    assert lost(free, one.plan) > 0.1
    assert min(r["loss"] for r in curve(held) if "loss" in r) < 0.7 * curve(held)[0]["loss"], "it learns"


def test_it_leaves_an_adapter_that_was_checked_and_a_report(tmp_path: Path) -> None:
    data = tmp_path / "stories.jsonl"
    data.write_text('{"text": "Once upon a time there was a little girl."}\n' * 3)
    asked = FileBenchmark(name="stories", role="knowledge", file=str(data), text="{text}", metric="cross_entropy")
    made = trained(own(), tmp_path, kind="trl", bf16=True, callbacks=[callback(evaluate=[asked])])
    out = tmp_path / "keeptune"
    report = read_json(out / "report.json")
    (entry,), (scored,) = report["methods"], report["methods"][0]["benchmarks"]
    assert entry["name"] == entry["method"] == "keep" and entry["trained_parameters"] == sum(
        p.numel() for p in factors(made).values()
    )
    assert entry["loss"][-1]["held_out/kl"] == [r for r in curve(made) if "held_out/kl" in r][0]["held_out/kl"]
    assert scored["before"] != scored["after"]
    assert entry["export_relative_gap"] < 1e-4
    assert "stories" in (out / "report.html").read_text() and "keeptune run" not in (out / "report.html").read_text()
    loaded = load_adapter(load_model(MODEL), out / "adapter")
    ids = torch.tensor([TOKENIZER("Once upon a time")["input_ids"]])
    with torch.no_grad():
        wanted = made.model.eval()(input_ids=ids).logits
    assert torch.allclose(loaded(input_ids=ids).logits, wanted, atol=0.2)  # training computed in bfloat16
    assert load_file(out / "adapter/adapter_model.safetensors").keys()


def test_a_base_in_four_bits_is_tuned_as_it_is(tmp_path: Path) -> None:
    """TRL would round the factors to bfloat16."""
    torch.manual_seed(0)
    base = load_model(MODEL, LoadOptions(quantization=NF4 | {"llm_int8_skip_modules": ["lm_head", "down_proj"]}))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    made = trl_trainer(model, tmp_path, [callback()], **LONG)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    made.train()
    assert any(row.get("penalty_grad_norm", 0) > 0 for row in curve(made))
    assert read_json(tmp_path / "keeptune/adapter/keeptune.json")["export"]["relative_gap"] < 0.1


# Wrong input


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Callback(method=Keep()), r"knowledge: got none, wanted texts .*for kl\. Pass knowledge=texts"),
        (
            lambda: Callback(method=Pissa(), knowledge=TEXTS),
            r"method pissa: got a start of its own.*Callback.plan=",
        ),
        (lambda: Callback(method=LoraFA(), knowledge=TEXTS), r"method lora-fa: got a start of its own"),
        (lambda: Callback(plan=tiny_plan(), knowledge=TEXTS), r"got a plan, and a method, knowledge or penalties"),
        (lambda: Callback(method=KEPT, knowledge=TEXTS, penalties=[Kl()]), r"got 2 penalties kl"),
    ],
)
def test_what_is_wrong_without_a_model_is_said_at_once(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(keeptune.KeeptuneError, match=told):
        make()


def tiny_plan() -> Plan:
    return keeptune.plan(load_model(MODEL), TOKENIZER, Lora(rank=2), options=PlanOptions(layers=[0]))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize(
    ("model", "told"),
    [
        (lambda: load_model(MODEL).requires_grad_(True), r"got LlamaForCausalLM without an adapter.*peft_config=Lora"),
        (lambda: own(use_dora=True), r"got a LoRA with use_dora=True.*keeptune\.install"),
        (lambda: own(init_lora_weights="pissa"), r"got a LoRA with init_lora_weights='pissa'"),
        (lambda: own(modules_to_save=["embed_tokens"]), r"got a LoRA with modules_to_save=\['embed_tokens'\]"),
        (lambda: own(target_modules=["embed_tokens"]), r"got a LoRA on model\.embed_tokens, no linear map"),
        (lambda: own(init_lora_weights=False), r"init_lora_weights=False"),
        (lambda: moved(own()), r"got a LoRA that has been trained already: B of .*merge_and_unload"),
        (
            lambda: get_peft_model(load_model(MODEL), IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
            "IA3",
        ),
        (lambda: get_peft_model(load_model(MODEL), LoraConfig(), adapter_name="mine"), "got the active adapters mine"),
    ],
)
def test_a_model_that_has_no_plain_lora_is_refused(model: Callable[[], Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=told):
        trained(model(), tmp_path)
    assert not (tmp_path / "keeptune").exists()


def moved(model: PeftModel) -> PeftModel:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    return model


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("no clip", None),
        ("no step", "got an optimiser step without the penalties kl"),
        ("inside", "got gradients clipped without the penalties kl"),
        ("twice", "got an optimiser step more than once with the penalties kl"),
        ("stepped", "got an optimiser step without the penalties kl"),
    ],
)
def test_a_loop_that_steps_or_clips_without_penalties_is_stopped_before_anything_moves(
    where: str, told: str | None, tmp_path: Path
) -> None:
    class Own(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            if where == "inside":
                self.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            if where == "stepped":
                self.optimizer.step()
            return loss

        def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
            if where not in ("no step", "twice"):
                return super()._inner_training_loop(*args, **kwargs)
            self.create_optimizer_and_scheduler(1)
            self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
            self.current_gradient_accumulation_steps = 1
            inputs = next(iter(self.get_train_dataloader()))
            if where == "no step":
                super().training_step(self.model, inputs)
            else:
                [self.training_step(self.model, inputs) for _ in range(2)]
            self.optimizer.step()
            raise AssertionError("a step was taken")

    model = own()
    made = plain_trainer(model, tmp_path, **LONG | {"max_grad_norm": 0.0})
    made.__class__, made.processing_class = Own, TOKENIZER
    made.add_callback(callback())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if told is None:
        made.train()
        return
    with pytest.raises(TrainError, match=rf"training step 1: {told}.*keeptune\.Penalties\.step"):
        made.train()
    assert all(torch.equal(value, before[name]) for name, value in factors(made).items())


@pytest.mark.parametrize("late", ["callback", "attach"])
def test_a_trainer_that_has_started_is_refused(late: str, tmp_path: Path) -> None:
    plan = tiny_plan()

    class Late(TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            keeptune.attach(made, plan) if late == "attach" else made.add_callback(callback())

    made = plain_trainer(tuned(plan), tmp_path)
    made.add_callback(Late())
    with pytest.raises(TrainError, match="got a trainer that ha[ds] started"):
        made.train()


def test_a_trainer_has_one(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="got two of them, wanted one"):
        trained(own(), tmp_path, callbacks=[callback(), callback()])
    plan = tiny_plan()
    made = plain_trainer(tuned(plan), tmp_path, callbacks=[])
    keeptune.attach(made, plan)
    made.add_callback(callback())
    with pytest.raises(TrainError, match=r"got a trainer with keeptune\.attach.*Callback\(plan=plan\)"):
        made.train()
    with pytest.raises(TrainError, match="got two of them, wanted one"):
        Trainer(own(), made.args, callbacks=[callback(), callback()])


def test_it_stops_at_a_loss_and_exports_the_best_state_before(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "kept.jsonl", [{"text": text} for text in TEXTS[:4]])
    file = str(tmp_path / "kept.jsonl")
    kept = FileBenchmark(name="kept", role="knowledge", file=file, text="{text}", metric="cross_entropy")
    made = callback(Lora(rank=2), evaluate=[kept], stop_at_loss=0.002)
    trainer = trained(own(), tmp_path, kind="trl", callbacks=[made], eval_steps=1)
    rows = [row for row in trainer.state.log_history if "eval_forgetting" in row]
    assert rows[-1]["eval_forgetting"] > 0.002 > rows[-2]["eval_forgetting"] and len(rows) < 6
    record = read_json(tmp_path / "keeptune/trained/train.json")
    assert f"the state of step {rows[-2]['step']} is kept" in record["notes"][-1]
    scored = read_json(tmp_path / "keeptune/evaluation/kept.json")["summary"]
    assert scored["after"] == pytest.approx(rows[-2]["eval_kept"], rel=1e-4), "what is exported is that state"
    with pytest.raises(TrainError, match="got stop_at_loss without a benchmark of role knowledge"):
        callback(stop_at_loss=0.1)
    with pytest.raises(TrainError, match="got stop_at_loss without eval_steps"):
        trained(own(), tmp_path / "no", callbacks=[callback(evaluate=[kept], stop_at_loss=0.1)])
