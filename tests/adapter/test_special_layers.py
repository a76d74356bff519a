"""A LoRA confined to rows: by a hook in the forward pass, in penalties, in trainers, and in what is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.models import MODELS, Bench, Saved, copies, logits, off_by, save, tokens, train_steps
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import keeptune.training.penalty_engine as penalty_module
from keeptune.adapter.export import Base, ExportOptions, export, format_for
from keeptune.adapter.install import held_parameters, install, lora_layer, trained_names
from keeptune.adapter.special_layers import biases_are_no_shards, within_rows
from keeptune.adapter.trained_change import TrainedChange, change_of, truncated_changes, written_rank
from keeptune.core.errors import ExportError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import methods
from keeptune.methods.loki import Loki
from keeptune.model.blocks import find_targets
from keeptune.model.pretrained import load_model
from keeptune.penalties.base import penalty_named
from keeptune.training.penalty_engine import Penalties

ROWS = (1, 4, 5, 20)
OUTSIDE = [i for i in range(32) if i not in ROWS]
FORMS = ("rows", "within")
every_form = pytest.mark.parametrize("form", FORMS)
DOWN = {"llama": "down_proj", "gpt2": "mlp.c_proj"}
every_model = pytest.mark.parametrize("architecture", DOWN)


def row_plan(model: Any, role: str, form: str, rows: tuple[int, ...] = ROWS, *, rank: int = 2) -> Plan:
    """Rows of every target of a role, whole or within a rank; with the biases there are."""
    generator, made = torch.Generator().manual_seed(5), []
    for target in find_targets(model, [role]):
        m, n = target.out_features, target.in_features
        if form == "rows":
            B = torch.zeros(m, len(rows))
            B[list(rows), range(len(rows))] = 1.0
            init = LowRank(B, torch.zeros(len(rows), n))
        else:
            init = LowRank(torch.zeros(m, rank), torch.randn(rank, n, generator=generator) * 0.2)
        trainable: set[Any] = {"A"} if form == "rows" else {"A", "B"}
        made.append(
            TargetPlan(
                target=target,
                decision=Decision(init.rank, rows),
                init=init,
                scale=1.0 if form == "rows" else 1.5,
                trainable=frozenset(trainable | ({"bias"} if target.bias else set())),
                vectors={"bias": torch.zeros(m)} if target.bias else {},
            )
        )
    return Plan(method="by-hand", options={}, targets=tuple(made))


def installed(architecture: str, form: str) -> tuple[Any, Plan]:
    base = MODELS[architecture]()
    plan = row_plan(base, DOWN[architecture], form)
    return install(base, plan), plan


# Training


@every_model
@every_form
def test_gradients_are_exactly_zero_outside_the_rows(architecture: str, form: str) -> None:
    model, plan = installed(architecture, form)
    train_steps(model, steps=1)
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for t in plan.targets:
        for factor in t.confined:
            gradient = held_parameters(model, t)[factor].parameter.grad
            assert gradient is not None
            assert not gradient[OUTSIDE].any()
            assert bool(gradient[list(ROWS)].flatten(1).any(1).all() if factor == "B" else gradient[list(ROWS)].all())


@every_model
@every_form
def test_biases_are_trained_in_the_rows_alone(architecture: str, form: str) -> None:
    model, plan = installed(architecture, form)
    train_steps(model)
    found = change_of(model, plan).biases
    assert found.keys() == ({t.target.name for t in plan.targets} if architecture == "gpt2" else set())
    for bias in found.values():
        assert bias.nonzero().flatten().tolist() == list(ROWS)


@pytest.mark.parametrize("method", ["set_adapter", "disable_adapter"])
def test_a_frozen_B_with_a_trained_bias_stays_so(method: str) -> None:
    """PEFT freezes modules: the bias would be frozen with B, or B trained with the bias."""
    model, plan = installed("gpt2", "rows")
    if method == "set_adapter":
        model.set_adapter("default")
    else:
        with model.disable_adapter():
            pass
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == trained_names(model, plan)
    assert {name.rpartition("default.")[2] for name in trainable} == {"weight", "bias"}
    assert all("lora_A" in name for name in trainable if name.endswith("weight"))


@every_model
@every_form
def test_a_checkpoint_goes_on_as_trainers_do_it(architecture: str, form: str, tmp_path: Path) -> None:
    """PEFT writes rows and biases, and loads them into an installed model."""
    model, plan = installed(architecture, form)
    train_steps(model)
    with biases_are_no_shards():
        model.save_pretrained(str(tmp_path))
    again, _ = installed(architecture, form)
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(logits(again.eval(), tokens()), logits(model.eval(), tokens()))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained_names(again, plan)
    for one in (model, again):
        train_steps(one, seed=20)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert not any(change.dense()[OUTSIDE].any() for change in change_of(again, plan).weights.values())


def test_negative_control_without_the_hook_other_rows_move() -> None:
    model, plan = installed("llama", "within")
    for t in plan.targets:
        lora_layer(model, t.target.name).lora_B["default"]._forward_hooks.clear()
    train_steps(model)
    assert all(change.dense()[OUTSIDE].any() for change in change_of(model, plan).weights.values())


# Penalties


@pytest.fixture
def held_plan(tmp_path: Path) -> Callable[[str], tuple[Any, Plan]]:
    """LoKI* under curvature that ties every row of B to every other."""

    def make(architecture: str) -> tuple[Any, Plan]:
        kfac = penalty_named("laplace", {"curvature": "delta-kfac", "strength": 300.0})
        plan = Bench(MODELS[architecture](), tmp_path).plan(Loki(q=20, rank=2), [kfac])
        return install(MODELS[architecture](), plan), plan

    return make


def outside(plan: Plan, name: str) -> list[int]:
    return [i for i in range(32) if i not in (plan[name].decision.rows or ())]


def step_with(model: Any, plan: Plan, optimiser: torch.optim.Optimizer, seed: int, penalties: Penalties) -> None:
    optimiser.zero_grad()
    model(input_ids=tokens(seed), labels=tokens(seed)).loss.backward()
    penalties.step()
    optimiser.step()


@every_model
def test_what_a_penalty_adds_is_confined_too(architecture: str, held_plan: Callable[[str], tuple[Any, Plan]]) -> None:
    model, plan = held_plan(architecture)
    penalties = Penalties(model, plan)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for seed in range(4):
        step_with(model, plan, optimiser, seed, penalties)
    for name, change in change_of(model, plan).weights.items():
        assert not change.dense()[outside(plan, name)].any()
        assert bool(change.dense()[list(plan[name].decision.rows or ())].any(1).all())


def test_negative_control_unconfined_the_penalty_moves_other_rows(
    held_plan: Callable[[str], tuple[Any, Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = held_plan("llama")
    monkeypatch.setattr(penalty_module, "within_rows", lambda target_plan, factor, gradient: gradient)
    penalties = Penalties(model, plan)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        step_with(model, plan, optimiser, seed, penalties)
    assert all(change.dense()[outside(plan, name)].any() for name, change in change_of(model, plan).weights.items())


@pytest.mark.parametrize("shape", [(32,), (32, 3)])
@pytest.mark.parametrize("factor", ["A", "B", "bias"])
def test_gradients_are_cut_to_the_rows(shape: tuple[int, ...], factor: Any) -> None:
    target = Target("h.0.down", 0, "down", 32, 48, input_group="", bias=True)
    init, trainable = LowRank(torch.zeros(32, 3), torch.zeros(3, 48)), frozenset({"A", "B", "bias"})
    gradient = torch.ones(shape)
    confined = TargetPlan(target, Decision(3, ROWS), init, 1.0, trainable)
    free = TargetPlan(target, Decision(3), init, 1.0, trainable)
    assert within_rows(free, factor, gradient) is gradient
    found = within_rows(confined, factor, gradient)
    wanted = torch.ones(shape)
    if factor != "A":
        wanted[OUTSIDE] = 0
    assert torch.equal(found, wanted)
    assert torch.equal(gradient, torch.ones(shape))


# What is written


@dataclasses.dataclass(frozen=True)
class Tuned:
    model: Any
    plan: Plan
    saved: Saved

    def export(self, folder: Path, **options: Any) -> Any:
        base, load = str(self.saved.folder), self.saved.load
        return export(self.model, self.plan, folder, ExportOptions(**options), base=Base(base, load))

    def again(self, folder: Path, format: str) -> Any:
        if format == "merged":
            return load_model(str(folder))
        return PeftModel.from_pretrained(self.saved.load(), str(folder)).eval()


def tune(architecture: str, form: str, folder: Path) -> Tuned:
    saved = save(MODELS[architecture](), folder / "base")
    plan = row_plan(saved.load(), DOWN[architecture], form)
    model: Any = install(saved.load(), plan)
    train_steps(model)
    return Tuned(model.eval(), plan, saved)


@every_model
@every_form
@pytest.mark.parametrize("format", ["portable", "peft", "merged"])
def test_an_export_has_the_same_logits_on_a_fresh_base(
    architecture: str, form: str, format: Any, tmp_path: Path
) -> None:
    made = tune(architecture, form, tmp_path)
    done = made.export(tmp_path / "out", format=format)
    biased = architecture == "gpt2"
    assert done.format == ("merged" if biased and format == "portable" else format)
    assert ("Biases were trained" in done.note) == (biased and format == "portable")
    found = made.again(tmp_path / "out", done.format)
    assert off_by(logits(found, tokens(9)), logits(made.model, tokens(9))) < 1e-5
    before = copies(made.saved.load())
    if done.format == "peft":
        found = found.merge_and_unload()
    if done.format != "portable":
        for t in made.plan.targets:
            for part in ("weight", "bias") if biased else ("weight",):
                old, new = before[f"{t.target.name}.{part}"], found.get_parameter(f"{t.target.name}.{part}")
                turned = t.target.transposed and part == "weight"
                same = ((new == old).T if turned else new == old).reshape(32, -1).all(1)
                assert same.nonzero().flatten().tolist() == OUTSIDE


def test_a_wrong_bias_would_be_seen(tmp_path: Path) -> None:
    """Negative control: the logits of the model without its biases are others."""
    made = tune("gpt2", "rows", tmp_path)
    wanted = logits(made.model, tokens(9))
    with torch.no_grad():
        for t in made.plan.targets:
            held_parameters(made.model, t)["bias"].parameter.zero_()
    assert off_by(logits(made.model, tokens(9)), wanted) > 1e-3


def wide(rows: int) -> tuple[Any, Plan]:
    """520 nodes, of which so many are trained: above the ranks that servers take, or not."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=520, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    return model, row_plan(model, "down_proj", "rows", tuple(range(rows)))


def test_more_rows_than_servers_take_are_merged_and_the_note_says_why() -> None:
    _, plan = wide(513)
    assert written_rank(plan) == 513
    format, note = format_for(plan, "portable")
    assert format == "merged"
    assert "The change has rank 513, and vLLM takes adapters of rank 512 at most" in note
    assert "export.rank" in note
    assert format_for(plan, "peft") == ("peft", "")
    assert format_for(plan, "portable", 64) == ("portable", "")
    assert format_for(wide(512)[1], "portable") == ("portable", "")


def test_what_no_server_takes_is_written_merged_in_full_for_peft_or_cut(tmp_path: Path) -> None:
    base, plan = wide(514)
    saved = save(base, tmp_path / "base")
    model: Any = install(saved.load(), plan)
    train_steps(model, steps=3)
    made = Tuned(model.eval(), plan, saved)
    wanted = logits(model, tokens(9))
    found = {}
    for name, options in {"whole": {}, "peft": {"format": "peft"}, "cut": {"rank": 4}}.items():
        done = made.export(tmp_path / name, **options)
        found[name] = (done.format, done.rank)
        gap = off_by(logits(made.again(tmp_path / name, done.format), tokens(9)), wanted)
        if name == "cut":
            change = change_of(model, plan).weights[plan.targets[0].target.name].dense().double()
            values = torch.linalg.svdvals(change)
            assert done.error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-5)
            assert 0.05 < done.error < 0.95
            assert min(gap, done.relative_gap) > 1e-3
            assert f"{done.error:.2%} of the trained change" in (tmp_path / name / "README.md").read_text()
            assert "--max-lora-rank 8" in done.serve  # the least that servers allow
        else:
            assert gap < 1e-5
            assert done.error == 0
    assert found == {"whole": ("merged", 0), "peft": ("peft", 514), "cut": ("portable", 8)}


def test_a_rank_above_that_of_the_change_cuts_nothing(tmp_path: Path) -> None:
    made = tune("llama", "rows", tmp_path)
    done = made.export(tmp_path / "out", rank=16)
    assert (done.error, done.rank) == (0, 8)
    assert done.relative_gap < 1e-6


def test_a_gap_that_the_user_allows_holds_for_a_cut_change_too(tmp_path: Path) -> None:
    made = tune("llama", "rows", tmp_path)
    with pytest.raises(ExportError, match="differ from the trained model"):
        made.export(tmp_path / "out", rank=1, max_gap=1e-6)
    assert not (tmp_path / "out").exists()
    assert made.export(tmp_path / "out", rank=1).error > 0


@pytest.mark.parametrize(
    ("architecture", "format", "told"),
    [("llama", "merged", "a merged model has no rank"), ("gpt2", "portable", "Biases were trained")],
)
def test_a_rank_where_nothing_has_one_is_refused(architecture: str, format: Any, told: str) -> None:
    plan = row_plan(MODELS[architecture](), DOWN[architecture], "rows")
    with pytest.raises(ExportError, match=told):
        format_for(plan, format, 2)


def test_cut_changes_are_the_nearest_and_their_error_is_stated() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    changes = {"a": LowRank(drawn(12, 5), drawn(5, 9)), "b": LowRank(drawn(7, 2), drawn(2, 9))}
    for rank in (1, 2, 3, 5, 6):
        found, error = truncated_changes(TrainedChange(changes), rank)
        lost = torch.cat([torch.linalg.svdvals(c.dense().double())[rank:] for c in changes.values()])
        whole = torch.cat([c.dense().double().flatten() for c in changes.values()]).norm()
        assert error == pytest.approx(float(lost.norm() / whole), rel=1e-6, abs=1e-7)
        for name, change in found.weights.items():
            gap = (change.dense() - changes[name].dense()).double().norm()
            best = torch.linalg.svdvals(changes[name].dense().double())[rank:].norm()
            assert float(gap) == pytest.approx(float(best), rel=1e-5, abs=1e-5)
            assert change.rank <= max(rank, 1)
    assert truncated_changes(TrainedChange({"a": LowRank(torch.zeros(4, 2), torch.zeros(2, 4))}), 1)[1] == 0


def test_ranks_are_told_before_training_as_they_are_written(tmp_path: Path) -> None:
    """Of a plan with anchors too: both factors trained double the rank."""
    bench = Bench(MODELS["llama"](), tmp_path, roles=["q_proj", "down_proj"])
    for name in ("lora", "pissa", "lora-fa", "lora-null", "milora"):
        plan = bench.plan(methods()[name](rank=3))
        model: Any = install(MODELS["llama"](), plan, anchor="twin")
        train_steps(model, steps=1)
        assert written_rank(plan) == max(change.rank for change in change_of(model, plan).weights.values()), name
