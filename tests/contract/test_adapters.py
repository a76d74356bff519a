"""Laws of install, training and export, for every registered method on every tiny architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from tests.contract.conftest import ADAPTERS, LOW_RANK, RESCALING, WHOLE, World
from tests.models import Bench, copies, head_parameters, logits, off_by, tokens, train_steps
from torch import Tensor

from keeptune.adapter.anchor import ANCHOR_NAME, Anchor
from keeptune.adapter.export import Base, ExportOptions, Format, export, format_for
from keeptune.adapter.install import check_frozen, install, trained_names, trained_state
from keeptune.adapter.trained_change import change_of
from keeptune.core.errors import ExportError
from keeptune.core.plan import Plan
from keeptune.model.pretrained import LoadOptions, load_model

every_adapter = pytest.mark.parametrize("case", ADAPTERS)
every_low_rank = pytest.mark.parametrize("case", LOW_RANK)
every_rescaling = pytest.mark.parametrize("case", RESCALING)
every_anchor = pytest.mark.parametrize("anchor", ["twin", "residual"])
PlanOf = Callable[[str], Plan]


def installed(world: World, plan: Plan, anchor: Anchor = "twin") -> PeftModel:
    found = install(world.base(), plan, anchor=anchor)
    assert isinstance(found, PeftModel)
    return found


def tuned(world: World, plan: Plan, anchor: Anchor = "twin") -> PeftModel:
    model = installed(world, plan, anchor)
    train_steps(model)
    return model.eval()


def exported(world: World, model: Any, plan: Plan, folder: Path, format: Format) -> Any:
    """Exports, and loads what was written."""
    done = export(model, plan, folder, ExportOptions(format), base=Base(str(world.saved.folder), world.base))
    return reloaded(world, folder, done.format)


def reloaded(world: World, folder: Path, format: str, seed: int = 0) -> Any:
    """Loads an export with nothing but PEFT and Transformers; the seed is that of a fresh head."""
    if format == "merged":
        return load_model(str(folder), LoadOptions(head=world.saved.head))
    return PeftModel.from_pretrained(world.saved.load(seed), str(folder)).eval()


@dataclass(frozen=True)
class Trained:
    """A trained twin that tests share and leave as it is, and where it is written in each format."""

    world: World
    plan: Plan
    model: PeftModel
    folder: Path
    formats: dict[str, str] = field(default_factory=dict)

    def reloaded(self, format: Format, seed: int = 0) -> Any:
        """Loads the export, which the first call writes."""
        folder = self.folder / format
        if format not in self.formats:
            base = str(self.world.saved.folder)
            done = export(self.model, self.plan, folder, ExportOptions(format), base=Base(base, self.world.base))
            self.formats[format] = done.format
        return reloaded(self.world, folder, self.formats[format], seed)


@pytest.fixture(scope="session")
def twins(
    worlds: Callable[[str], World], plans: Callable[[str, str], Plan], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Trained]:
    @cache
    def make(case: str, architecture: str) -> Trained:
        world, plan = worlds(architecture), plans(case, architecture)
        return Trained(world, plan, tuned(world, plan), tmp_path_factory.mktemp("exports"))

    return make


@pytest.fixture
def twin(request: pytest.FixtureRequest, world: World, twins: Callable[[str, str], Trained]) -> Trained:
    parameters = request.node.callspec.params
    return twins(parameters["case"], parameters["world"])


def adapter(plan: Plan, format: Format) -> Format:
    """Trained biases are in an adapter for PEFT only, not in a portable one."""
    biased = any("bias" in t.vectors for t in plan.targets)
    assert (format_for(plan, format)[0] == "merged") == (biased and format == "portable")
    return "peft" if biased else format


# Install


@every_adapter
@every_anchor
def test_install_leaves_the_output_unchanged(case: str, world: World, plan_of: PlanOf, anchor: Anchor) -> None:
    wanted = logits(world.base(), tokens())
    model = installed(world, plan_of(case), anchor)
    assert off_by(logits(model, tokens()), wanted) < 1e-5
    assert any(p.requires_grad for p in model.parameters())


@every_adapter
def test_a_twin_leaves_the_output_of_a_16_bit_base_unchanged(
    case: str, world: World, plan_of: PlanOf, tmp_path: Path
) -> None:
    """B0 A0 - B0 A0 is formed in float32, so that nothing but a rare last bit can change."""
    wanted, plan = logits(world.base().to(torch.bfloat16), tokens()), plan_of(case)
    if case in RESCALING:  # the lengths are those of the rounded rows
        plan = Bench(world.base().to(torch.bfloat16), tmp_path).plan(ADAPTERS[case])
    found = logits(install(world.base().to(torch.bfloat16), plan, anchor="twin"), tokens())
    assert off_by(found, wanted) < 1e-2
    if world.saved.head is None:  # a classifier's head runs in float32
        assert float((found == wanted).float().mean()) > 0.9


@every_adapter
@every_anchor
def test_exactly_the_planned_factors_are_trainable(case: str, world: World, plan_of: PlanOf, anchor: Anchor) -> None:
    model = installed(world, plan_of(case), anchor)
    check_frozen(model, plan_of(case))
    head = head_parameters(model, plan_of(case))
    count = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and name not in head)
    assert count == sum(t.trained_parameters + t.held_back for t in plan_of(case).targets)


# Frozen stays frozen


def leave_alone(model: PeftModel) -> None:
    """The plain case."""


def set_default(model: PeftModel) -> None:
    """As Trainer does when it resumes."""
    model.set_adapter("default")


def disable_and_enable(model: PeftModel) -> None:
    """As an evaluation of the base in the middle of training; PEFT sets requires_grad anew when it ends."""
    with model.disable_adapter():
        logits(model, tokens())


def merge_and_unmerge(model: PeftModel) -> None:
    """As some generation callbacks do."""
    model.merge_adapter()
    model.unmerge_adapter()


@every_adapter
@every_anchor
def test_untrained_factors_get_no_gradient_and_keep_their_bits(
    case: str, world: World, plan_of: PlanOf, anchor: Anchor
) -> None:
    """Every parameter is handed to AdamW with weight decay: only requires_grad protects it."""
    plan = plan_of(case)
    model = installed(world, plan, anchor)
    for event in (leave_alone, set_default, disable_and_enable):
        event(model)
        before = copies(model)
        train_steps(model, steps=2, everything=True)
        trained = trained_names(model, plan)
        for name, parameter in model.named_parameters():
            if name in trained:
                assert not torch.equal(parameter, before[name]), (event, name)
            else:
                assert parameter.grad is None, (event, name)
                assert torch.equal(parameter, before[name]), (event, name)
        check_frozen(model, plan)


@every_adapter
@every_anchor
def test_what_peft_switches_on_and_off_changes_no_output(
    case: str, world: World, plan_of: PlanOf, anchor: Anchor
) -> None:
    model = tuned(world, plan_of(case), anchor)
    wanted = logits(model, tokens())
    for event in (set_default, disable_and_enable, merge_and_unmerge):
        event(model)
        assert off_by(logits(model, tokens()), wanted) < 1e-5, event


@every_adapter
def test_disabling_an_installed_twin_gives_the_base_back_exactly(case: str, twin: Trained) -> None:
    wanted = logits(twin.world.base(), tokens())
    with twin.model.disable_adapter():
        assert torch.equal(logits(twin.model, tokens()), wanted)
    assert off_by(logits(twin.model, tokens()), wanted) > 1e-3


# Export


@every_adapter
def test_an_export_reloads_without_keeptune_on_a_fresh_base_with_the_same_logits(case: str, twin: Trained) -> None:
    wanted = logits(twin.model, tokens(9))
    assert off_by(logits(twin.world.base(), tokens(9)), wanted) > 1e-2  # training changed something
    for format in get_args(Format):
        assert off_by(logits(twin.reloaded(format, seed=1), tokens(9)), wanted) < 1e-5, format


@every_adapter
def test_a_residual_exports_the_same_as_a_twin(case: str, world: World, plan_of: PlanOf, tmp_path: Path) -> None:
    model = tuned(world, plan_of(case), "residual")
    again = exported(world, model, plan_of(case), tmp_path / "out", "portable")
    assert off_by(logits(again, tokens(9)), logits(model, tokens(9))) < 1e-5


@every_rescaling
def test_what_is_no_low_rank_change_is_merged_and_the_log_says_why(
    case: str, world: World, plan_of: PlanOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, base = tuned(world, plan_of(case)), str(world.saved.folder)
    done = export(model, plan_of(case), tmp_path / "out", base=Base(base, world.base))
    assert (done.format, done.rank) == ("merged", 0)
    assert "no change of low rank, and vLLM refuses DoRA adapters" in done.note
    assert done.note in caplog.text
    assert done.note in (tmp_path / "out" / "README.md").read_text()


def rows_apart(before: Tensor, after: Tensor, transposed: bool) -> Tensor:
    return (after - before).T if transposed else after - before


@every_adapter
def test_what_is_exported_as_lora_has_a_change_of_low_rank(case: str, twin: Trained) -> None:
    """And what is not, has not: the exemption of the rescaling methods is a fact about them."""
    base, merged = twin.world.base(), twin.reloaded("merged")
    for t in twin.plan.targets:
        name = f"{t.target.name}.weight"
        delta = rows_apart(base.get_parameter(name), merged.get_parameter(name), t.target.transposed).detach()
        values = torch.linalg.svdvals(delta.double())
        assert bool(values[2 * t.decision.rank] < 1e-4 * values[0]) == (case in LOW_RANK), t.target.name


@every_adapter
def test_disabling_an_exported_adapter_gives_the_base_back_exactly(case: str, twin: Trained) -> None:
    formats: set[Format] = {"peft"}
    if case in LOW_RANK:
        formats.add(adapter(twin.plan, "portable"))
    for format in formats:
        again = twin.reloaded(format)
        with again.disable_adapter():
            assert torch.equal(logits(again, tokens()), logits(twin.world.base(), tokens())), format


@pytest.mark.parametrize("case", LOW_RANK)
def test_an_untrained_export_changes_nothing(case: str, world: World, plan_of: PlanOf, tmp_path: Path) -> None:
    """The change is exactly zero: B0 A0 - B0 A0."""
    model = installed(world, plan_of(case))
    assert all(not change.dense().any() for change in change_of(model, plan_of(case)).weights.values())
    again = exported(world, model, plan_of(case), tmp_path / "out", "portable")
    assert torch.equal(logits(again, tokens()), logits(world.base(), tokens()))


@every_rescaling
def test_an_untrained_export_leaves_the_lengths_of_rows(
    case: str, world: World, plan_of: PlanOf, tmp_path: Path
) -> None:
    for format in ("peft", "merged"):
        model = installed(world, plan_of(case))
        again = exported(world, model, plan_of(case), tmp_path / format, format)
        assert off_by(logits(again, tokens()), logits(world.base(), tokens())) < 1e-6


@every_adapter
def test_training_does_not_depend_on_the_random_state_of_install(case: str, world: World, plan_of: PlanOf) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = installed(world, plan_of(case))
        assert torch.initial_seed() == seed
        found.append(trained_state(model, plan_of(case)))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


@every_low_rank
def test_the_twin_is_no_part_of_the_export(case: str, twin: Trained) -> None:
    again = twin.reloaded(adapter(twin.plan, "portable"))
    assert list(again.peft_config) == ["default"]
    assert not any(ANCHOR_NAME in name for name, _ in again.named_parameters())


# Methods that train every weight


@pytest.mark.parametrize("case", WHOLE)
def test_full_tuning_makes_every_weight_trainable_and_adds_nothing(case: str, world: World, plan_of: PlanOf) -> None:
    base = world.base()
    wanted, names = logits(base, tokens()), [name for name, _ in base.named_parameters()]
    model = install(base, plan_of(case))
    assert model is base
    assert all(p.requires_grad for p in model.parameters())
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(logits(model, tokens()), wanted)


@pytest.mark.parametrize("case", WHOLE)
def test_a_fully_tuned_model_is_exported_merged_and_reloads(
    case: str, world: World, plan_of: PlanOf, tmp_path: Path
) -> None:
    model = install(world.base(), plan_of(case))
    before = copies(model)
    train_steps(model)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    again = exported(world, model, plan_of(case), tmp_path / "out", "merged")
    assert torch.equal(logits(again, tokens(9)), logits(model, tokens(9)))


@pytest.mark.parametrize("case", WHOLE)
def test_a_fully_tuned_model_has_no_adapter_form(
    case: str, world: World, plan_of: PlanOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = install(world.base(), plan_of(case))
    with pytest.raises(ExportError, match="A change of every weight has no adapter form"):
        exported(world, model, plan_of(case), tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []
    done = export(model, plan_of(case), tmp_path / "out", base=Base("", world.base))
    assert (done.format, done.note) == ("merged", "A change of every weight has no adapter form")
    assert done.note in caplog.text
