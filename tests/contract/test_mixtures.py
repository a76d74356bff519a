"""Laws of mixtures whose experts are fused into 3-D parameters: every method and penalty, held against modules.

The reference is the same model with a module for each expert (tests/reference/experts_reference.py), and the same plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.contract.conftest import CASES
from tests.contract.test_penalties import PENALTIES
from tests.models import MIXTURES, Bench, gpt_oss, llama, logits, off_by, qwen3_moe, relative, tokens, train_steps
from tests.reference.experts_reference import unfused
from transformers import PreTrainedModel

from keeptune.adapter.expert_layers import patterns_of_parameters
from keeptune.adapter.export import Base, Exported, ExportOptions, export
from keeptune.adapter.install import check_frozen, install, restore_state, trained_state
from keeptune.adapter.load import load_adapter
from keeptune.adapter.trained_change import change_of
from keeptune.core.errors import ModelError, PlanError, StatisticsError
from keeptune.core.plan import Plan
from keeptune.core.weights import read_weight
from keeptune.methods.lalora import Lalora
from keeptune.methods.lora import Lora
from keeptune.methods.lora_null import LoraNull
from keeptune.model.pretrained import load_model
from keeptune.penalties.base import penalty_named
from keeptune.pipeline.planning import plan_for
from keeptune.statistics.store import StatStore
from keeptune.training.penalty_engine import Penalties

# What PEFT cannot do to a parameter: each has its refusal below.
REFUSED = {"dora", "loki"}
# Ranks that differ beside an alpha are scales that differ, of which PEFT has one.
OTHER_SCALES = {case for case in CASES if case.startswith("farss") and "alpha" in case}
FITTING = [c for c, m in CASES.items() if m.name not in REFUSED | {"full"} and c not in OTHER_SCALES]
FEW = ["lora rank=4", "lora-null rank=4 variant=v2", "pissa rank=4 alpha=6.0"]
EVERY = [("qwen3_moe", case) for case in FITTING] + [(name, case) for name in ("gpt_oss", "deepseek") for case in FEW]
every_case = pytest.mark.parametrize(("architecture", "case"), EVERY)
BY_TOKEN = {name: one for name, one in PENALTIES.items() if not name.startswith("ewc") and "=diag" not in name}


@dataclasses.dataclass(frozen=True)
class Made:
    folder: Path
    plan: Plan
    model: Any

    def export(self, format: Any, make: Callable[[], PreTrainedModel]) -> Exported:
        base = str(self.folder / "base")
        return export(self.model, self.plan, self.folder / format, ExportOptions(format), base=Base(base, make))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """A twin, trained for a few steps."""

    @cache
    def make(architecture: str, case: str) -> Made:
        folder = tmp_path_factory.mktemp("mixture")
        plan = Bench(MIXTURES[architecture](), folder / "store").plan(CASES[case])
        model: Any = install(MIXTURES[architecture](), plan, anchor="twin")
        train_steps(model)
        return Made(folder, plan, model.eval())

    return make


@every_case
@pytest.mark.parametrize("anchor", ["twin", "residual"])
def test_install_leaves_the_output_unchanged_and_trains_what_is_planned(
    architecture: str, case: str, anchor: Any, made: Callable[[str, str], Made]
) -> None:
    plan = made(architecture, case).plan
    model: Any = install(MIXTURES[architecture](), plan, anchor=anchor)
    assert off_by(logits(model, tokens()), logits(MIXTURES[architecture](), tokens())) < 1e-5
    check_frozen(model, plan)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained >= sum(t.trained_parameters for t in plan.targets) > 0


@every_case
def test_a_merge_changes_each_expert_by_its_own_product(
    architecture: str, case: str, made: Callable[[str, str], Made]
) -> None:
    """And so do the files: what stock PEFT loads, and what is written whole, put out what was trained."""
    one, make = made(architecture, case), MIXTURES[architecture]
    wanted = logits(one.model, tokens(9))
    assert off_by(logits(make(), tokens(9)), wanted) > 1e-2
    assert one.export("merged", make).format == one.export("peft", make).format.replace("peft", "merged")
    with patterns_of_parameters():
        again = PeftModel.from_pretrained(make(), str(one.folder / "peft")).eval()
    merged, before, change = load_model(str(one.folder / "merged")), make(), change_of(one.model, one.plan)
    assert off_by(logits(again, tokens(9)), wanted) < 1e-5
    assert off_by(logits(merged, tokens(9)), wanted) < 1e-5
    for t in [t for t in one.plan.targets if t.target.expert is not None]:
        found = read_weight(merged, t.target) - read_weight(before, t.target)
        assert relative(found, change.weights[t.target.name].dense()) < 1e-4, t.target.name
    with one.model.disable_adapter():
        assert torch.equal(logits(one.model, tokens()), logits(before, tokens()))


def on_modules(plan: Plan) -> Plan:
    """The same plan for a model with a module for each expert."""

    def plain(t: Any) -> Any:
        if t.target.expert is None:
            return t
        return dataclasses.replace(t, target=dataclasses.replace(t.target, expert=None, experts=1, transposed=False))

    return dataclasses.replace(plan, targets=tuple(map(plain, plan.targets)))


@pytest.mark.parametrize(
    ("architecture", "case"),
    [(name, case) for name in MIXTURES for case in ("lora rank=4", "lora-null rank=4 variant=v2")],
)
def test_training_fused_experts_is_training_modules(architecture: str, case: str, tmp_path: Path) -> None:
    base = MIXTURES[architecture]()
    plan = Bench(base, tmp_path).plan(CASES[case])
    reference: Any = install(unfused(base), on_modules(plan), anchor="twin")
    model: Any = install(MIXTURES[architecture](), plan, anchor="twin")
    for one in (model, reference):
        optimiser = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.3)
        for step in range(3):
            optimiser.zero_grad()
            one(input_ids=tokens(step), labels=tokens(step)).loss.backward()
            optimiser.step()
    found, wanted = trained_state(model, plan), trained_state(reference, on_modules(plan))
    assert found.keys() == wanted.keys()
    moved = {t.target.name: t.init for t in plan.targets}
    for name, value in wanted.items():
        target, _, factor = name.rpartition(".")
        start = getattr(moved[target], factor)
        scale = float((value - start).norm().clamp_min(1e-6))
        assert float((found[name] - value).norm()) < 1e-3 * scale + 1e-6, name


@pytest.mark.parametrize("penalty", BY_TOKEN)
def test_a_penalty_holds_an_expert_as_it_holds_a_module(penalty: str, tmp_path: Path) -> None:
    """The value and the gradient of every factor, at factors anywhere."""
    base = gpt_oss()
    plan = Bench(base, tmp_path).plan(Lora(rank=2), [BY_TOKEN[penalty]])
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{t.target.name}.{factor}": value + 0.1 * torch.randn(value.shape, generator=generator)
        for t in plan.targets
        for factor, value in t.start.items()
    }
    found = []
    for model, own in ((gpt_oss(), plan), (unfused(base), on_modules(plan))):
        wrapped: Any = install(model, own)
        restore_state(wrapped, own, state)
        value = Penalties(wrapped, own).step()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    gradient = parameter.grad
                    parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
        found.append((value, trained_state(wrapped, own)))
    (value, gradients), (wanted, reference) = found
    assert float(wanted) > 0 and abs(float(value) / float(wanted) - 1) < 1e-4
    size = max(float(g.norm()) for g in reference.values())
    for name, gradient in reference.items():
        assert float((gradients[name] - gradient).norm()) < 1e-3 * float(gradient.norm()) + 1e-5 * size, name


def unreached() -> PreTrainedModel:
    """The last expert of the first block gets no token."""
    model = gpt_oss()
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias[3] = -1e9
    return model


LOST = ["model.layers.0.mlp.experts.3.gate_up_proj", "model.layers.0.mlp.experts.3.down_proj"]


def test_an_expert_without_statistics_is_left_alone_to_the_last_bit(tmp_path: Path) -> None:
    bench = Bench(unreached(), tmp_path)
    data = {"knowledge": bench.data, "task": bench.task}
    plan = plan_for(bench.model, LoraNull(rank=2), StatStore(tmp_path), data=data)
    assert {t.name for t in bench.targets()} - {t.target.name for t in plan.targets} == set(LOST)
    assert all(name in plan.provenance["notes"][0] for name in LOST)
    tuned: Any = install(unreached(), plan)
    with torch.no_grad():
        tuned.base_model.model.model.layers[0].mlp.router.bias[3] = 1e3  # training does reach it
    train_steps(tuned)
    with torch.no_grad():
        tuned.base_model.model.model.layers[0].mlp.router.bias[3] = -1e9
    done = export(tuned.eval(), plan, tmp_path / "out", base=Base("", unreached))
    merged = load_model(done.folder)
    for target in bench.targets():
        same = torch.equal(read_weight(merged, target), read_weight(bench.model, target))
        assert same == (target.name in LOST), target.name


def test_an_expert_that_the_knowledge_does_not_reach_is_trained_and_held_by_nothing(tmp_path: Path) -> None:
    bench = Bench(unreached(), tmp_path)
    plan = plan_for(
        bench.model, Lalora(rank=2, curvature="delta-kfac"), StatStore(tmp_path), data={"knowledge": bench.data}
    )
    assert {t.target.name for t in plan.targets} == {t.name for t in bench.targets()}
    noted = " ".join(plan.provenance["notes"])
    assert all(name in noted for name in LOST) and "trained, held by nothing" in noted
    held = plan.penalties[0].tensors
    for target in bench.targets():
        assert (f"norm:{target.name}" in held) == (target.name not in LOST)
    tuned: Any = install(unreached(), plan)
    train_steps(tuned, steps=2)
    assert float(Penalties(tuned, plan).step()) > 0


@pytest.mark.parametrize("case", [case for case, method in CASES.items() if method.name in REFUSED])
def test_what_peft_cannot_do_to_a_parameter_is_refused_before_anything_is_measured(case: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"experts\.down_proj.*A and B alone.*`targets`"):
        plan_for(qwen3_moe(), CASES[case], StatStore(tmp_path), data={})
    assert list(tmp_path.iterdir()) == []


def test_options_that_peft_has_for_modules_only_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"lora_dropout 0\.1"):
        plan_for(qwen3_moe(), Lora(rank=2, dropout=0.1), StatStore(tmp_path), data={})


@pytest.mark.parametrize("case", sorted(OTHER_SCALES))
def test_scales_that_differ_between_experts_are_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"experts of model.*got scales.*`method\.alpha`"):
        Bench(qwen3_moe(), tmp_path).plan(CASES[case])


def test_a_refused_method_tunes_the_maps_beside_the_experts(tmp_path: Path) -> None:
    plan = Bench(qwen3_moe(), tmp_path, roles=["q_proj", "o_proj"]).plan(CASES["dora rank=4 use_rslora=True alpha=6.0"])
    model: Any = install(qwen3_moe(), plan)
    train_steps(model)
    assert off_by(logits(model.eval(), tokens()), logits(qwen3_moe(), tokens())) > 1e-3


def test_a_fisher_by_texts_is_refused_for_experts(tmp_path: Path) -> None:
    """Which of an expert's rows belong to which text is not known."""
    with pytest.raises(StatisticsError, match=r'experts\..*per="token"'):
        Bench(qwen3_moe(), tmp_path).plan(Lora(rank=2), [penalty_named("ewc", {})])
    plan = Bench(qwen3_moe(), tmp_path).plan(Lora(rank=2), [penalty_named("ewc", {"per": "token"})])
    assert len(plan.penalties) == 1


def test_a_plan_of_experts_is_saved_and_loaded(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    plan = made("qwen3_moe", "lora rank=4").plan
    plan.save(tmp_path / "plan")
    found = Plan.load(tmp_path / "plan")
    assert found.key == plan.key
    assert [t.target for t in found.targets] == [t.target for t in plan.targets]


# A base that is packed otherwise


def adapter(made: Callable[[str, str], Made], architecture: str) -> Path:
    one = made(architecture, "lora rank=4")
    one.export("peft", MIXTURES[architecture])
    return one.folder / "peft"


@pytest.mark.parametrize(
    "other",
    [
        lambda: unfused(qwen3_moe()),
        lambda: qwen3_moe(num_experts=8),
        llama,
    ],
    ids=["modules", "more-experts", "dense"],
)
def test_an_adapter_is_refused_on_a_base_with_other_experts(
    other: Callable[[], PreTrainedModel], made: Callable[[str, str], Made]
) -> None:
    """PEFT adapts the attention of such a base and says nothing."""
    folder = adapter(made, "qwen3_moe")
    assert isinstance(load_adapter(qwen3_moe(), folder), PeftModel)
    with pytest.raises(ModelError, match="adapter"):
        load_adapter(other(), folder)


@pytest.mark.parametrize("other", [gpt_oss, lambda: unfused(qwen3_moe()), lambda: qwen3_moe(num_experts=2)])
def test_a_plan_is_refused_on_a_base_with_other_experts(
    other: Callable[[], PreTrainedModel], made: Callable[[str, str], Made]
) -> None:
    with pytest.raises(PlanError, match=r"experts\..*made for another model"):
        install(other(), made("qwen3_moe", "lora rank=4").plan)


def test_a_start_from_a_part_of_W_is_refused_for_experts_of_a_16_bit_base(made: Callable[[str, str], Made]) -> None:
    with pytest.raises(PlanError, match=r"experts\.0\..*bfloat16.*`dtype: float32`"):
        install(qwen3_moe(dtype=torch.bfloat16), made("qwen3_moe", "pissa rank=4 alpha=6.0").plan)
    assert isinstance(install(qwen3_moe(dtype=torch.bfloat16), made("qwen3_moe", "lora rank=4").plan), PeftModel)
