"""DPO and KTO: the base is the reference, whatever the method; replay beside it; options that TRL checks too late."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.support import MODEL, TOKENIZER, largest_gap, planned
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from keeptune.adapter.install import install, trained_state
from keeptune.core.errors import RecipeError
from keeptune.core.plan import Plan
from keeptune.data.completions import TaskExamples, with_replay
from keeptune.data.examples import LanguageExamples, Mixed
from keeptune.data.preferences import Preferences, preferences
from keeptune.methods.full import Full
from keeptune.methods.keep import Keep
from keeptune.methods.lora import Lora
from keeptune.methods.lora_null import LoraNull
from keeptune.methods.pissa import Pissa
from keeptune.model.pretrained import load_model
from keeptune.penalties.kl import Kl
from keeptune.training.arguments import CONFIGS, check_arguments, sft_config
from keeptune.training.trainer import train

_WORDS = ("a dog", "the big red ball", "Lily", "to the park", "his mom and dad", "one day", "it", "little birds")
ROWS = [{"prompt": f"Once {word}", "chosen": f" {word} was", "rejected": f" {word[::-1]} 7"} for word in _WORDS]
SINGLE = [
    {"prompt": r["prompt"], "completion": r[n], "label": n == "chosen"} for r in ROWS for n in ("chosen", "rejected")
]
PAIRS = preferences(ROWS, prompt=None, answers=("{chosen}", "{rejected}"), where="task.train")
JUDGED = preferences(SINGLE, prompt=None, answers=("{completion}",), label="{label}", where="task.train")
TEXTS = TaskExamples(None, tuple(f"There were {n} birds." for n in range(6)), end=False)


def run(
    plan: Plan,
    folder: Path,
    examples: LanguageExamples = PAIRS,
    *,
    anchor: Any = "auto",
    dtype: str = "float32",
    **own: Any,
) -> tuple[list[dict[str, float]], Any]:
    model = install(load_model(MODEL), plan, anchor=anchor)
    given = {"max_steps": 2, "learning_rate": 0.01, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 0}
    first = examples.parts[0] if isinstance(examples, Mixed) else examples
    kind = CONFIGS["unpaired_preference" if isinstance(first, Preferences) and first.good else "preference"]
    config = sft_config(given | own, folder, dtype=torch.float32, device="cpu", positions=512, kind=kind)
    return train(model, plan, TOKENIZER, examples, config), model


METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (Lora(rank=2), {}),
    "keep": (Keep(rank=2), {}),
    "pissa": (Pissa(rank=2), {"anchor": "residual"}),
    "pissa on a twin": (Pissa(rank=2), {"anchor": "twin"}),
    "lora-null": (LoraNull(rank=2), {"anchor": "residual"}),
    "full": (Full(), {"learning_rate": 1e-3}),
}


def log_ratios(model: Any, base: Any, examples: Preferences) -> Tensor:
    """``log pi(y|x) / pi_ref(y|x)`` of each answer of each example, one by one from the logits."""
    rows = []
    for row in range(len(examples)):
        for ids, learned, _ in examples.tokens(TOKENIZER, row):
            sums = []
            for one in (model, base):
                with torch.no_grad():
                    logits = one(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
                sums.append(sum(logits[at - 1, ids[at]] for at in range(len(ids)) if learned[at]))
            rows.append(sums[0] - sums[1])
    return torch.stack(rows).view(len(examples), -1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_the_reference_is_the_base_for_every_method_and_anchor(name: str, tmp_path: Path) -> None:
    """The first loss is log 2; the second is the paper's equation of the model after one step and a fresh base."""
    method, extra = METHODS[name]
    plan = planned(method, store=tmp_path, layers=None if name == "full" else (0, 1))
    extra = {"per_device_train_batch_size": 8, **extra}
    loss, _ = run(plan, tmp_path / "two", **extra)
    _, model = run(plan, tmp_path / "one", **extra, max_steps=1)
    margins = (lambda r: r[:, 0] - r[:, 1])(log_ratios(model.eval(), load_model(MODEL), PAIRS))
    assert loss[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert loss[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert loss[1]["loss"] == pytest.approx(float(-logsigmoid(0.1 * margins).mean()), abs=2e-6)
    assert loss[1]["rewards/accuracies"] == float((margins > 0).double().mean())
    assert abs(loss[1]["loss"] - math.log(2)) > 1e-4


def test_kto_compares_with_the_base_too(tmp_path: Path) -> None:
    """APO-zero: 1 - sigmoid(beta r) of good answers, sigmoid(beta r) of bad ones, 1/2 each at the base."""
    plan = planned(Pissa(rank=2))
    extra: dict[str, Any] = {"loss_type": "apo_zero_unpaired", "per_device_train_batch_size": 16}
    loss, _ = run(plan, tmp_path / "two", JUDGED, **extra)
    _, model = run(plan, tmp_path / "one", JUDGED, **extra, max_steps=1)
    rewards = 0.1 * log_ratios(model.eval(), load_model(MODEL), JUDGED)[:, 0]
    signs = torch.tensor([1.0 if good else -1.0 for good in JUDGED.good])
    assert loss[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert loss[1]["loss"] == pytest.approx(float(torch.sigmoid(-signs * rewards).mean()), abs=2e-6)
    kto, _ = run(plan, tmp_path / "kto", JUDGED)
    assert kto[0]["loss"] == pytest.approx(0.5, abs=1e-6) and kto[1]["loss"] != kto[0]["loss"]


def mixed(share: float = 0.5) -> LanguageExamples:
    return with_replay(PAIRS, [TEXTS], share, seed=0)


def test_replay_adds_the_loss_of_each_text_like_one_of_an_example(tmp_path: Path) -> None:
    """L = log 2 + (sum over the texts of their mean loss) / N at the base, whatever the micro-batches."""
    plan, whole = planned(Lora(rank=2)), mixed(0.3)
    assert isinstance(whole, Mixed)
    base, losses = load_model(MODEL), []
    for part, index in whole.order:
        if part:
            (row,) = whole.parts[part].token_rows(TOKENIZER, [index])
            ids = torch.tensor([row.ids])
            losses.append(base(input_ids=ids, labels=ids).loss.item())
    sums = {}
    for size in (8, 2):
        own = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "optim": "sgd"}
        loss, model = run(plan, tmp_path / str(size), whole, **own, max_steps=1)
        assert len(losses) == 3
        assert loss[0]["loss"] == pytest.approx(math.log(2) + sum(losses) / 8, abs=1e-5)
        sums[size] = trained_state(model, plan)
    assert largest_gap(sums[8], sums[2]) < 1e-6
    alone = trained_state(run(plan, tmp_path / "alone", optim="sgd", max_steps=1)[1], plan)
    assert largest_gap(sums[8], alone) > 1e-5


def test_a_killed_run_goes_on_to_the_same_bits_with_kl_and_replay(tmp_path: Path) -> None:
    plan = planned(Pissa(rank=2), [Kl(strength=0.1, batch_size=2)], store=tmp_path / "store")
    extra: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "save_total_limit": 4}
    loss, model = run(plan, tmp_path / "whole", mixed(), **extra)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    again, other = run(plan, tmp_path / "killed", mixed(), **extra)
    one, two = trained_state(model, plan), trained_state(other, plan)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert again == loss and {"penalty/kl", "rewards/accuracies", "replay_loss"} <= loss[0].keys()


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("examples", [PAIRS, JUDGED], ids=["pairs", "single"])
@pytest.mark.parametrize("chat", ["", "the tokenizer's", "the recipe's"])
def test_tokens_are_those_of_trls_trainers(
    examples: Preferences, chat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chat:
        own = {"chat_template": CHATML} if "recipe" in chat else {}
        monkeypatch.setattr(TOKENIZER, "chat_template", None if own else CHATML)
        prompts = tuple(({"role": "user", "content": prompt},) for prompt in examples.prompts)
        said = tuple(tuple(({"role": "assistant", "content": a},) for a in own) for own in examples.answers)
        examples = Preferences(prompts, said, examples.good, template=own)
    trainer, config = (KTOTrainer, KTOConfig) if examples.good else (DPOTrainer, DPOConfig)
    data, _ = examples.dataset(TOKENIZER, None)
    args = config(str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    found = trainer(load_model(MODEL), load_model(MODEL), args, train_dataset=data, processing_class=TOKENIZER)
    names = ("completion_ids",) if examples.good else ("chosen_ids", "rejected_ids")
    for row, theirs in enumerate(found.train_dataset):
        ours = examples.tokens(TOKENIZER, row)
        assert [list(one.ids) for one in ours] == [theirs["prompt_ids"] + theirs[name] for name in names]
        assert {one.learned.index(True) for one in ours} == {len(theirs["prompt_ids"])}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("preference", {"beta": 0.3, "loss_type": "ipo"}, None),
        ("preference", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}, None),
        ("preference", {"f_divergence_type": "js_divergence"}, None),
        ("preference", {"loss_type": "sigmoyd"}, 'Did you mean "sigmoid"'),
        ("preference", {"loss_type": ["sigmoid", "nll"]}, '"nll"'),
        ("preference", {"f_divergence_type": "kl"}, "reverse_kl"),
        ("preference", {"beta": 0}, "greater than 0"),
        ("preference", {"ld_alpha": 1.5}, "less than or equal to 1"),
        ("preference", {"packing": True}, "a field of TRL's DPOConfig"),
        ("preference", {"bta": 0.1}, 'Did you mean "beta"'),
        ("preference", {"precompute_ref_log_probs": True}, "the reference is the base"),
        ("preference", {"sync_ref_model": True}, "the reference is the base"),
        ("unpaired_preference", {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.3}, None),
        ("unpaired_preference", {"loss_type": "ipo"}, "apo_zero_unpaired"),
        ("unpaired_preference", {"label_smoothing": 0.1}, "a field of TRL's KTOConfig"),
        ("unpaired_preference", {"per_device_train_batch_size": 1}, "greater than or equal to 2"),
        ("completion", {"beta": 0.1}, "a field of TRL's SFTConfig"),
    ],
)
def test_options_are_checked_before_anything_runs(kind: str, options: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert check_arguments(options, CONFIGS[kind]) == options
        return
    with pytest.raises(RecipeError) as error:
        check_arguments(options, CONFIGS[kind])
    assert message in str(error.value)
