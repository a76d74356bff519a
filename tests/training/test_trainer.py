"""Training with TRL: its config, what the loss is taken on, and the guard, with and without keeptune's own loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.assets import STORIES
from tests.models import trained_factors
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from keeptune.adapter.anchor import Anchor
from keeptune.adapter.install import install, lora_layer, trained_state
from keeptune.core.errors import DataError, RecipeError, TrainError
from keeptune.core.plan import Plan
from keeptune.data.calibration import tokenize_calibration
from keeptune.data.completions import TaskExamples
from keeptune.methods.base import Method
from keeptune.methods.dora import Dora
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA
from keeptune.methods.lora_null import LoraNull
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.store import StatStore
from keeptune.training import trainer as training
from keeptune.training.arguments import check_arguments, sft_config
from keeptune.training.guard import Guard, divergence
from keeptune.training.trainer import train

MODEL = str(STORIES)
EXAMPLES = TaskExamples(
    prompts=tuple(f"Q: what is {n} plus {n}?\nA:" for n in range(8)), completions=tuple(f" {2 * n}" for n in range(8))
)
QUICK = {"max_steps": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 4, "save_strategy": "no"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def plans(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    store = StatStore(tmp_path_factory.mktemp("store"))
    texts = ["Once upon a time there was a dog.", "Lily and Tom went to the park to play with a big red ball."]
    knowledge = tokenize_calibration(texts, tokenizer, max_length=64, where="test")
    made: dict[str, Method] = {
        "lora": Lora(rank=2),
        "v1": LoraNull(rank=2),
        "v2": LoraNull(rank=2, variant="v2"),
        "fa": LoraFA(rank=2),
        "dora": Dora(rank=2),
    }
    return {name: plan_for(load_model(MODEL), m, store, data={"knowledge": knowledge}) for name, m in made.items()}


def installed(plan: Plan, anchor: Anchor = "auto") -> PeftModel:
    model = install(load_model(MODEL), plan, anchor=anchor)
    assert isinstance(model, PeftModel)
    return model


def config(folder: Path, **arguments: Any) -> SFTConfig:
    return sft_config(QUICK | arguments, folder, dtype=torch.float32, device="cpu", positions=512)


def test_defaults(tmp_path: Path) -> None:
    made = sft_config({}, tmp_path, dtype=torch.float32, device="cpu")
    assert (made.bf16, made.fp16, made.use_cpu) == (False, False, True)
    assert made.gradient_checkpointing is False
    assert made.report_to == []
    assert (made.save_strategy, made.save_steps, made.save_total_limit) == ("steps", 0.1, 2)
    assert made.logging_steps == 0.02
    assert made.logging_nan_inf_filter is False
    assert made.max_length == 1024
    assert made.output_dir == str(tmp_path)
    assert made.disable_tqdm is True
    assert sft_config({}, tmp_path, dtype=torch.float32, device="cpu", positions=512).max_length == 512
    assert sft_config({}, tmp_path, dtype=torch.float32, device="cpu", positions=9999).max_length == 1024


def test_mixed_precision_follows_the_base_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as in the configurations that TRL ships
    for dtype, mixed in ((torch.float32, "no"), (torch.bfloat16, "bf16")):
        assert sft_config({}, tmp_path, dtype=dtype, device="cpu").mixed_precision == mixed
    assert sft_config({}, tmp_path, dtype=torch.bfloat16, device="cpu").bf16 is True
    assert sft_config({"bf16": False}, tmp_path, dtype=torch.bfloat16, device="cpu").bf16 is False
    made = sft_config({"fp16": True, "use_cpu": True}, tmp_path, dtype=torch.bfloat16, device="cuda")
    assert (made.bf16, made.fp16) == (False, True)
    with pytest.raises(RecipeError, match=r"train\.fp16: got true on a CPU"):
        sft_config({"fp16": True}, tmp_path, dtype=torch.bfloat16, device="cpu")


def test_lengths_end_at_the_positions_of_the_base(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.max_length: got 513, wanted at most 512"):
        config(tmp_path, max_length=513)
    assert config(tmp_path, max_length=None).max_length == 512
    assert config(tmp_path, max_length=512).max_length == 512


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"report_to": "swanlab"}, "pip install swanlab"),
        ({"report_to": ["none", "clearml"]}, "pip install clearml"),
        ({"report_to": "wandbb"}, 'Did you mean "wandb"'),
        ({"optim": "paged_adamw_8bit"}, "pip install bitsandbytes"),
        ({"push_to_hub": True}, "hf auth login"),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_computed(
    arguments: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keeptune.training.arguments.find_spec", lambda name: None)
    monkeypatch.setattr("keeptune.training.arguments.get_token", lambda: None)
    with pytest.raises(RecipeError, match=told):
        config(tmp_path, **arguments)


def test_a_recipe_holds_no_secret(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.hub_token: .* in the environment") as caught:
        check_arguments({"hub_token": "hf_" + "a" * 30})
    assert "aaa" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_a_seed_is_one_that_all_libraries_take(seed: int) -> None:
    with pytest.raises(RecipeError, match=r"train\.seed"):
        check_arguments({"seed": seed})


def test_overrides_and_numbers_in_quotes(tmp_path: Path) -> None:
    given = {"gradient_checkpointing": True, "max_steps": "7", "weight_decay": "1e-2", "max_length": 13}
    given |= {"save_steps": 5}
    made = sft_config(given, tmp_path, dtype=torch.float32, device="cpu", positions=20)
    assert made.gradient_checkpointing is True
    assert (made.max_steps, made.weight_decay, made.max_length, made.save_steps) == (7, 0.01, 13, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rat": 1}, 'Did you mean "learning_rate"'),
        ({"output_dir": "x"}, "Use `output`"),
        ({"max_steps": 2.5}, r"train\.max_steps"),
        ({"gradient_checkpointing": "perhaps"}, r"train\.gradient_checkpointing"),
        ({"gradient_accumulation_steps": 0}, r"train\.gradient_accumulation_steps"),
        ({"lr_scheduler_type": "sometimes"}, "sometimes"),
        ({"load_best_model_at_end": True}, "eval"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sft_config(arguments, tmp_path, dtype=torch.float32, device="cpu")
    assert check_arguments({"learning_rate": "5e-4"}) == {"learning_rate": 5e-4}


def test_loss_is_on_the_completion_and_its_end(
    plans: dict[str, Plan], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    trainer = training._trainer(installed(plans["lora"]), plans["lora"], tokenizer, EXAMPLES, config(tmp_path))
    (batch, *_) = trainer.get_train_dataloader()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        text = tokenizer.decode(ids[labels == -100], skip_special_tokens=True)
        trained = ids[labels != -100]
        assert "A:" in text
        assert int(trained[-1]) == tokenizer.eos_token_id
        number = int(text.split("plus ")[1].split("?")[0])
        assert tokenizer.decode(trained[:-1]).strip() == str(2 * number)


@pytest.mark.parametrize("extra", [{}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("name", ["lora", "v1", "v2", "fa", "dora"])
def test_training_moves_the_trained_factors_only(
    plans: dict[str, Plan], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, extra: dict[str, Any]
) -> None:
    plan = plans[name]
    model = installed(plan)
    loss = train(model, plan, tokenizer, EXAMPLES, config(tmp_path, **extra))
    assert [point["step"] for point in loss] == [1, 2, 3]
    state = trained_state(model, plan)
    for target, change in trained_factors(model, plan).items():
        start = plan[target].init
        assert torch.equal(change.A, start.A) == ("A" not in plan[target].trainable)
        assert not torch.equal(change.B, start.B)
        for vector, value in plan[target].vectors.items():
            assert not torch.equal(state[f"{target}.{vector}"], value)


def test_anchors_train_alike(plans: dict[str, Plan], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = []
    for anchor in ("twin", "residual"):
        model = installed(plans["v1"], anchor)  # type: ignore[arg-type]
        # Plain gradient descent: Adam turns rounding of a gradient near zero into a step of the full size.
        train(model, plans["v1"], tokenizer, EXAMPLES, config(tmp_path / anchor, optim="sgd", learning_rate=0.1))
        found.append(trained_factors(model, plans["v1"]))
    for target, change in found[0].items():
        torch.testing.assert_close(change.A, found[1][target].A, rtol=0, atol=1e-5)
        torch.testing.assert_close(change.B, found[1][target].B, rtol=0, atol=1e-5)


def test_guard_tells_a_factor_that_was_unfrozen(
    plans: dict[str, Plan], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = installed(plans["v2"])
    name = plans["v2"].targets[3].target.name
    lora_layer(model, name).lora_A["default"].weight.requires_grad_(True)
    with pytest.raises(TrainError, match=f"{name}.lora_A.default.weight: got trainable"):
        train(model, plans["v2"], tokenizer, EXAMPLES, config(tmp_path))


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_guard_tells_a_loss_that_is_not_finite(
    plans: dict[str, Plan], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, logging_steps: int
) -> None:
    wild = config(tmp_path, learning_rate=1e30, max_grad_norm=0, logging_steps=logging_steps)
    with pytest.raises(TrainError, match=r"training step \d.*learning_rate"):
        train(installed(plans["lora"]), plans["lora"], tokenizer, EXAMPLES, wild)


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([2.0, 9.0], "from 2 to 9"),
        ([2.0, 2.9], None),
        ([3.0, 1.0], None),
        ([9.0], None),
        ([1.0] * 9 + [1.8], None),
    ],
)
def test_a_loss_that_ends_far_above_its_start_is_said(losses: list[float], told: str | None) -> None:
    sentence = divergence(losses)
    assert sentence is None if told is None else told in str(sentence)


def test_long_prompts_are_told(
    plans: dict[str, Plan], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = TaskExamples(prompts=(*EXAMPLES.prompts, "word " * 100), completions=(*EXAMPLES.completions, " x"))
    train(installed(plans["lora"]), plans["lora"], tokenizer, long, config(tmp_path, max_length=60))
    assert "1 of 9 examples are left out" in caplog.text
    assert "are cut to" not in caplog.text
    wordy = TaskExamples(prompts=(*EXAMPLES.prompts, "Tell"), completions=(*EXAMPLES.completions, " word" * 100))
    train(installed(plans["lora"]), plans["lora"], tokenizer, wordy, config(tmp_path / "cut", max_length=60))
    assert "1 of 9 examples are cut to 60 tokens (rows 9)" in caplog.text
    with pytest.raises(DataError, match=r"Raise train\.max_length \(3\)"):
        train(installed(plans["lora"]), plans["lora"], tokenizer, long, config(tmp_path, max_length=3))


@pytest.mark.parametrize("anchor", ["twin", "residual"])
def test_trls_own_trainer(
    plans: dict[str, Plan], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, anchor: Anchor
) -> None:
    """No recipe, no loop of keeptune: a plan, an installed model and any trainer."""
    plan = plans["v2"]
    model = installed(plan, anchor)
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, bf16=False, save_strategy="no",
        learning_rate=5e-3, disable_tqdm=True, dataloader_pin_memory=False, activation_checkpointing=False,
    )  # fmt: skip
    SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=EXAMPLES.dataset(tokenizer, 64)[0],
        processing_class=tokenizer,
        callbacks=[Guard(plan)],
    ).train()
    for target, change in trained_factors(model, plan).items():
        assert torch.equal(change.A, plan[target].init.A)
        assert not torch.equal(change.B, plan[target].init.B)


@pytest.mark.parametrize("name", ["lora", "v1", "v2"])
def test_transformers_own_trainer(
    plans: dict[str, Plan], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str
) -> None:
    plan = plans[name]
    model = installed(plan, "twin")
    rows = [tokenizer(p + c, return_tensors="pt")["input_ids"][0][:16] for p, c in zip(*_pairs(), strict=True)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        learning_rate=5e-3, dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    data: Any = [{"input_ids": ids, "labels": ids} for ids in rows]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Guard(plan)]).train()
    for target, change in trained_factors(model, plan).items():
        assert torch.equal(change.A, plan[target].init.A) == (name == "v2")
        assert not torch.equal(change.B, plan[target].init.B)


def _pairs() -> tuple[tuple[str, ...], tuple[str, ...]]:
    return EXAMPLES.prompts, EXAMPLES.completions
