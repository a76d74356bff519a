"""Methods side by side: each target is what its own method makes of it, and one adapter holds them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.models import MODELS, Bench, copies, logits, off_by, save, tokens, train_steps
from tests.pipeline.support import keeptune, write_recipe
from torch import Tensor

from keeptune.adapter.anchor import ANCHOR_NAME
from keeptune.adapter.export import Base, ExportOptions, Format, export
from keeptune.adapter.install import check_frozen, held_parameters, install, lora_layer, trained_names, trained_state
from keeptune.core.errors import PlanError
from keeptune.core.plan import Plan, TargetPlan
from keeptune.methods.combined import Combined, Part, replaced, tuned_roles
from keeptune.methods.dora import Dora
from keeptune.methods.eva import Eva
from keeptune.methods.farss import Farss
from keeptune.methods.full import Full
from keeptune.methods.keep import Keep
from keeptune.methods.l2_lora import L2Lora
from keeptune.methods.lalora import Lalora
from keeptune.methods.loki import Loki
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA
from keeptune.methods.lora_ga import LoraGA
from keeptune.methods.lora_null import LoraNull
from keeptune.methods.mica import Mica
from keeptune.model.pretrained import load_model
from keeptune.penalties.l2 import L2
from keeptune.pipeline.planning import PlanOptions, plan_for, refuse_penalties, scoped_penalties
from keeptune.statistics.store import StatStore
from keeptune.training.penalty_engine import Penalties

# Statistics of inputs, of gradients and none; starts at zero and in W; frozen and trained factors; coupled ranks.
TRIOS: dict[str, tuple[Any, Any, Any]] = {
    "farss mica lora-null": (
        Farss(rank=4, boundary=1, r_max=4, r_avg=3),
        Mica(rank=3),
        LoraNull(rank=2, variant="v2"),
    ),
    "eva lora-fa lora-ga": (Eva(rank=3), LoraFA(rank=4, alpha=2.0), LoraGA(rank=2)),
    "lora lora lora-null": (Lora(rank=2), Lora(rank=5, seed=3), LoraNull(rank=4)),
}
every_trio = pytest.mark.parametrize("trio", TRIOS)


def shares(bench: Bench) -> list[list[str]]:
    """The roles of a model in three lots; the last role is nobody's."""
    roles = list(dict.fromkeys(target.role for target in bench.targets()))[:-1]
    return [roles[start::3] for start in range(3)]


def parts(bench: Bench, methods: Sequence[Any]) -> list[Part]:
    return [Part(method, roles) for method, roles in zip(methods, shares(bench), strict=True)]


def same(one: TargetPlan, other: TargetPlan) -> bool:
    """Bit for bit, in all that a target's plan holds."""
    facts = [(t.target, t.decision, t.scale, t.trainable, t.added) for t in (one, other)]
    tensors: list[dict[str, Tensor]] = [{**t.start, **t.evidence} for t in (one, other)]
    return facts[0] == facts[1] and (
        tensors[0].keys() == tensors[1].keys() and all(torch.equal(v, tensors[1][k]) for k, v in tensors[0].items())
    )


@pytest.fixture
def bench_of(tmp_path: Path) -> Callable[..., Bench]:
    def make(architecture: str = "llama", **options: Any) -> Bench:
        return Bench(MODELS[architecture](), tmp_path / "store", **options)

    return make


Benches = Callable[..., Bench]


# The plan


@pytest.mark.parametrize(
    ("trio", "architecture"),
    [*((trio, "llama") for trio in TRIOS), *((next(iter(TRIOS)), name) for name in MODELS)][1:],
)
def test_each_target_is_as_in_its_own_methods_plan(trio: str, architecture: str, bench_of: Benches) -> None:
    bench = bench_of(architecture)
    made = parts(bench, TRIOS[trio])
    plan = bench.plan(Combined(made))
    expected = [t for part in made for t in bench_of(architecture, roles=part.targets).plan(part.method).targets]
    assert len(plan.targets) == len(expected) > 0
    assert all(same(plan[t.target.name], t) for t in expected)
    assert [t.target.name for t in plan.targets] == [
        t.name for t in bench.targets() if t.role in {role for part in made for role in part.targets}
    ]


@every_trio
def test_the_order_of_parts_and_roles_does_not_matter(trio: str, bench_of: Benches, tmp_path: Path) -> None:
    bench = bench_of()
    made = parts(bench, TRIOS[trio])
    turned = [Part(part.method, part.targets[::-1]) for part in reversed(made)]
    plans = [bench.plan(Combined(order)) for order in (made, turned)]
    assert Combined(made) == Combined(turned)
    assert plans[0].key == plans[1].key
    plans[0].save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").key == plans[1].key


def test_the_plan_tells_methods_options_and_who_has_what(bench_of: Benches) -> None:
    plan = bench_of().plan(Combined([Part(LoraNull(rank=2), ["q_proj"]), Part(Mica(rank=3), ["down_proj", "up_proj"])]))
    assert plan.method == "lora-null+mica"
    assert plan.options == {
        "lora-null.rank": 2,
        "lora-null.variant": "v1",
        "lora-null.covariance": "exact",
        "lora-null.targets": ["q_proj"],
        "mica.rank": 3,
        "mica.alpha": None,
        "mica.dropout": 0.0,
        "mica.targets": ["down_proj", "up_proj"],
    }
    assert plan.provenance["notes"] == ["lora-null: q_proj", "mica: down_proj, up_proj"]


def test_two_parts_of_one_method_are_told_apart_by_their_roles(bench_of: Benches) -> None:
    plan = bench_of().plan(Combined([Part(Lora(rank=2), ["q_proj"]), Part(Lora(rank=3), ["up_proj", "down_proj"])]))
    assert plan.method == "lora+lora"
    assert plan.options["lora (q_proj).rank"] == 2
    assert plan.options["lora (down_proj up_proj).rank"] == 3
    assert {t.target.role: t.decision.rank for t in plan.targets} == {"q_proj": 2, "up_proj": 3, "down_proj": 3}


def test_each_methods_notes_are_of_its_own_targets(bench_of: Benches) -> None:
    farss = Farss(rank=4, boundary=1, r_max=4, r_avg=3)
    notes = bench_of().plan(Combined([Part(farss, ["q_proj", "k_proj"]), Part(Lora(), ["up_proj"])]))
    alone = bench_of(roles=["q_proj", "k_proj"]).plan(farss).provenance["notes"]
    assert notes.provenance["notes"][2:] == [f"farss: {note}" for note in alone]
    assert "2 targets in blocks below 1" in alone[0]


def test_equal_options_of_other_methods_are_another_whole() -> None:
    one, other = (Combined([Part(method(rank=2), ["q_proj"])]) for method in (Lora, Dora))
    assert one != other
    assert one.parts[0].name == "lora"


def test_only_the_roles_of_the_parts_are_looked_at(bench_of: Benches, tmp_path: Path) -> None:
    bench = bench_of()
    both = Combined([Part(LoraNull(rank=2), ["q_proj"]), Part(Lora(rank=3), ["down_proj"])])
    plan = plan_for(bench.model, both, StatStore(tmp_path / "own"), data={"knowledge": bench.data})
    assert {t.target.role for t in plan.targets} == {"q_proj", "down_proj"}
    assert tuned_roles(both, None) == ["down_proj", "q_proj"]
    assert (tuned_roles(Lora(), None), tuned_roles(Lora(), ("q_proj",))) == (None, ["q_proj"])
    with pytest.raises(PlanError, match=r"targets: got v_proj, beside methods with `targets` of their own"):
        plan_for(
            bench.model,
            both,
            StatStore(tmp_path / "own"),
            data={"knowledge": bench.data},
            options=PlanOptions(["v_proj"]),
        )
    with pytest.raises(PlanError, match='targets: q_porj.*Did you mean "q_proj"'):
        wrong = Combined([Part(Lora(), ["q_porj"])])
        plan_for(bench.model, wrong, StatStore(tmp_path / "own"), data={})


def test_a_part_without_targets_is_refused(bench_of: Benches) -> None:
    bench = bench_of(roles=["q_proj"])
    with pytest.raises(PlanError, match=r"method lora, targets up_proj: got no target"):
        bench.plan(Combined([Part(Mica(rank=2), ["q_proj"]), Part(Lora(), ["up_proj"])]))


def test_a_method_takes_the_place_of_another() -> None:
    old, other, new = Lora(rank=2), Lora(rank=2), Mica(rank=3)
    assert replaced(old, old, new) == new
    assert replaced(old, other, new) is old
    both = Combined([Part(old, ["q_proj"]), Part(other, ["up_proj"])])
    assert replaced(both, old, new) == Combined([Part(new, ["q_proj"]), Part(other, ["up_proj"])])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "got an empty list"),
        ([(Lora(), [])], "method lora, targets: got none"),
        ([(Lora(), ["up"]), (Mica(), ["up"])], "method mica, targets: got up, which lora has too"),
        ([(Lora(), ["up", "up"])], "got up twice"),
        ([(Lora(), ["up"]), (Full(), ["q"])], "method full, targets q: got a method that trains whole weights"),
        (
            [(Lora(dropout=0.1), ["up"]), (LoraNull(), ["q"])],
            "methods lora and lora-null: got lora_dropout 0.1 of lora, no lora_dropout of lora-null",
        ),
        ([(Lora(dropout=0.1), ["up"]), (Lora(dropout=0.2), ["q"])], "got lora_dropout 0.2 of lora, lora_dropout 0.1"),
        ([(Dora(), ["up"]), (Lora(), ["q"])], "got use_dora true of dora, no use_dora of lora"),
        (
            [(LoraFA(optimizer="preconditioned"), ["up"]), (Lora(), ["q"])],
            'got no optimizer of lora, optimizer "lora-fa" of lora-fa, wanted the same of both: the trainer has one',
        ),
        (
            [(Loki(q=20, rate="by-q"), ["down"]), (Lora(), ["q"])],
            r"got learning_rate_factor 0\.56\d* of loki, no learning_rate_factor of lora, wanted the same of both",
        ),
        ([(Farss(), ["up"]), (Farss(rank=2), ["q"])], "got boundary: auto of two methods"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_both_sides(given: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Combined([Part(method, roles) for method, roles in given])


def test_roles_as_one_text_are_refused() -> None:
    with pytest.raises(PlanError, match=r"""targets: got 'up', wanted a list of roles. Write \["up"\]"""):
        Part(Lora(), "up")


def test_what_is_the_same_in_all_parts_is_taken() -> None:
    assert Combined([Part(Lora(dropout=0.1), ["up"]), Part(Mica(dropout=0.1), ["q"])]).peft() == {"lora_dropout": 0.1}
    twice = [Part(LoraFA(rank=rank, optimizer="preconditioned"), [role]) for rank, role in ((2, "up"), (3, "q"))]
    assert Combined(twice).training() == {"optimizer": "lora-fa"}
    assert Combined([Part(Dora(rank=rank), [role]) for rank, role in ((2, "up"), (3, "q"))]).peft() == {
        "use_dora": True
    }


# The model


def installed(model: Any, plan: Plan, anchor: Any = "twin") -> PeftModel:
    made = install(model, plan, anchor=anchor)
    assert isinstance(made, PeftModel)
    return made


@pytest.mark.parametrize(
    ("trio", "architecture", "anchor"),
    [
        ("farss mica lora-null", "llama", "twin"),
        ("farss mica lora-null", "llama", "residual"),
        ("farss mica lora-null", "roberta", "twin"),
        ("eva lora-fa lora-ga", "gpt2", "residual"),
        ("lora lora lora-null", "qwen2", "twin"),
    ],
)
def test_the_model_starts_as_the_base_and_trains_what_each_method_would(
    trio: str, architecture: str, anchor: str, bench_of: Benches
) -> None:
    bench = bench_of(architecture)
    made = parts(bench, TRIOS[trio])
    plan = bench.plan(Combined(made))
    model = installed(MODELS[architecture](), plan, anchor)
    assert off_by(logits(model, tokens()), logits(bench.model, tokens())) < 1e-5
    expected = set()
    for part in made:
        own = bench_of(architecture, roles=part.targets).plan(part.method)
        expected |= trained_names(installed(MODELS[architecture](), own, anchor), own)
    check_frozen(model, plan)
    before = copies(model)
    train_steps(model, steps=2, everything=True)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == expected


def test_only_what_starts_in_the_weights_gets_a_twin(bench_of: Benches) -> None:
    plan = bench_of().plan(Combined([Part(LoraNull(rank=2), ["q_proj"]), Part(Mica(rank=3), ["down_proj"])]))
    model = installed(MODELS["llama"](), plan)
    twins = {t.target.role: ANCHOR_NAME in lora_layer(model, t.target.name).lora_A for t in plan.targets}
    assert twins == {"q_proj": True, "down_proj": False}


@pytest.mark.parametrize("format", ["portable", "peft", "merged"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_export_is_the_trained_model(format: Format, architecture: str, bench_of: Benches, tmp_path: Path) -> None:
    bench = bench_of(architecture)
    saved = save(bench.model, tmp_path / "base")
    plan = bench.plan(Combined(parts(bench, TRIOS["farss mica lora-null"])))
    model = installed(saved.load(), plan).eval()
    train_steps(model)
    base = str(saved.folder)
    done = export(model, plan, tmp_path / "out", ExportOptions(format), base=Base(base, saved.load))
    assert (done.format, done.note) == (format, "")
    assert off_by(logits(model, tokens()), logits(bench.model, tokens())) > 1e-2
    if format != "merged":
        again = PeftModel.from_pretrained(saved.load(), str(tmp_path / "out")).eval()
        assert off_by(logits(again, tokens(9)), logits(model, tokens(9))) < 1e-5


# Penalties

HELD = Lalora(rank=2, curvature="delta-act", batches=1, batch_size=4)


def test_a_methods_own_penalty_holds_its_own_targets_and_a_recipes_holds_all(bench_of: Benches) -> None:
    both = Combined([Part(HELD, ["up_proj", "down_proj"]), Part(LoraNull(rank=3), ["q_proj"])])
    penalties = bench_of().plan(both, [L2(strength=2.0)]).penalties
    wanted = (
        *bench_of(roles=["down_proj", "up_proj"]).plan(HELD).penalties,
        *bench_of(roles=["down_proj", "up_proj", "q_proj"]).plan(Lora(), [L2(strength=2.0)]).penalties,
    )
    assert [p.name for p in penalties] == ["laplace", "l2"]
    for one, other in zip(penalties, wanted, strict=True):
        assert one.options == other.options
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(one.tensors[name], value) for name, value in other.tensors.items())


@pytest.mark.parametrize("held", [HELD, L2Lora(rank=2), Keep(rank=2, per="layer")])
def test_value_and_gradient_are_those_of_the_methods_own_plan(held: Any, bench_of: Benches, tmp_path: Path) -> None:
    """Trained alike; the other part's factors get no gradient, before and after the plan is saved."""
    alone = bench_of(roles=["down_proj"]).plan(held)
    bench_of().plan(Combined([Part(held, ["down_proj"]), Part(Mica(rank=3), ["q_proj"])])).save(tmp_path / "plan")
    both = Plan.load(tmp_path / "plan")
    values, gradients, logs = [], [], []
    for plan in (alone, both):
        model = installed(MODELS["llama"](), plan)
        with torch.no_grad():
            for t in plan.targets:
                for factor, held in held_parameters(model, t).items():
                    p = held.parameter
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(factor + t.target.name))))
        penalties = Penalties(model, plan)
        values.append(penalties.step())
        gradients.append(
            {
                f"{t.target.name}.{f}": p.parameter.grad
                for t in plan.targets
                for f, p in held_parameters(model, t).items()
            }
        )
        logs.append(penalties.read())
    assert values[0] > 0 and torch.equal(*values)
    assert logs[0] == logs[1]
    assert "drift/layer_1" in logs[0]
    for name, gradient in gradients[1].items():
        wanted = gradients[0].get(name)
        assert wanted is None if gradient is None else torch.equal(gradient, wanted), name
    assert any(gradient is not None and gradient.any() for gradient in gradients[1].values())


def test_what_a_penalty_says_is_of_its_own_targets(bench_of: Benches) -> None:
    """B starts at zero and A is trained, so that the Fisher of factors is blind to A: at all of its own targets."""
    held = Lalora(rank=2, curvature="diag", batches=1)
    both = Combined([Part(held, ["down_proj"]), Part(LoraNull(rank=3), ["q_proj"])])
    told = bench_of().plan(both).provenance["notes"]
    alone = bench_of(roles=["down_proj"]).plan(held).provenance["notes"]
    assert told == ["lalora: down_proj", "lora-null: q_proj", "penalty laplace: down_proj only", *alone]
    assert len(alone) == 1


def test_a_budget_on_drift_is_that_of_its_own_targets(bench_of: Benches) -> None:
    both = Combined([Part(Keep(rank=2, per="layer"), ["down_proj"]), Part(Lora(), ["q_proj", "k_proj"])])
    (penalty,) = bench_of().plan(both).penalties
    (alone,) = bench_of(roles=["down_proj"]).plan(Keep(rank=2, per="layer")).penalties
    assert {name for name in penalty.tensors if name.startswith("share:")} == {
        f"share:model.layers.{layer}.mlp.down_proj" for layer in range(2)
    }
    assert all(torch.equal(value, alone.tensors[name]) for name, value in penalty.tensors.items())


def test_two_budgets_on_drift_are_refused(bench_of: Benches) -> None:
    with pytest.raises(PlanError, match=r"got 2 penalties drift, wanted one"):
        both = Combined([Part(Keep(), ["down_proj"]), Part(Keep(), ["q_proj"])])
        refuse_penalties(both, scoped_penalties(both))


def test_a_methods_penalty_on_answers_is_refused_among_several() -> None:
    from keeptune.penalties.kl import Kl

    @dataclasses.dataclass(frozen=True)
    class Held(Lora):
        def penalties(self) -> tuple[Kl, ...]:
            return (Kl(),)

    both = Combined([Part(Held(), ["down_proj"]), Part(Lora(), ["q_proj"])])
    with pytest.raises(PlanError, match=r"penalty kl for down_proj.*outputs of the whole model"):
        refuse_penalties(both, scoped_penalties(both))
    refuse_penalties(Held(), scoped_penalties(Held()))
    refuse_penalties(replaced(both, both.parts[0].method, Lora()), scoped_penalties(Lora(), [Kl()]))


def test_two_parts_with_penalties_of_one_name_hold_their_own(bench_of: Benches) -> None:
    pair = {"down_proj": L2Lora(rank=2, strength=1.0), "q_proj": L2Lora(rank=3, strength=5.0)}
    plan = bench_of().plan(Combined([Part(method, [role]) for role, method in pair.items()]))
    assert len(plan.penalties) == 2

    def value(plan: Plan) -> float:
        model = installed(MODELS["llama"](), plan)
        with torch.no_grad():
            for t in plan.targets:
                held_parameters(model, t)["B"].parameter.fill_(0.1)
        return float(Penalties(model, plan).step())

    alone = [value(bench_of(roles=[role]).plan(method)) for role, method in pair.items()]
    assert value(plan) == pytest.approx(sum(alone), rel=1e-6)
    assert min(alone) > 0


def test_the_state_of_the_trained_model_holds_every_part(bench_of: Benches) -> None:
    plan = bench_of().plan(Combined([Part(LoraNull(rank=2), ["q_proj"]), Part(Mica(rank=3), ["down_proj"])]))
    state = trained_state(installed(MODELS["llama"](), plan), plan)
    assert {name.rpartition(".")[2] for name in state} == {"A", "B"}
    assert len(state) == 2 * len(plan.targets)


# LoKI on the down-projections, another method on the others

DOWN = {"llama": "down_proj", "gpt2": "mlp.c_proj"}
BESIDE = {"llama": "q_proj", "gpt2": "c_attn"}


@pytest.mark.parametrize("beside", [LoraNull(rank=3), Farss(rank=4, boundary=1, r_max=4, r_avg=3), Mica(rank=2)])
@pytest.mark.parametrize("loki", [Loki(q=20), Loki(q=20, rank=2, selection="global-low")])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_loki_beside_another_method_is_what_each_is_alone(
    architecture: str, loki: Loki, beside: Any, bench_of: Benches, tmp_path: Path
) -> None:
    """Installed, trained and exported; rows that were not selected stay, bit for bit, biases too."""
    made = [Part(loki, [DOWN[architecture]]), Part(beside, [BESIDE[architecture]])]
    bench = bench_of(architecture)
    plan = bench.plan(Combined(made), [L2(strength=0.1)])
    expected = [t for part in made for t in bench_of(architecture, roles=part.targets).plan(part.method).targets]
    assert len(plan.targets) == len(expected) == 4
    assert all(same(plan[t.target.name], t) for t in expected)
    saved = save(bench.model, tmp_path / "base")
    model = installed(saved.load(), plan).eval()
    assert off_by(logits(model, tokens()), logits(bench.model, tokens())) < 1e-5
    check_frozen(model, plan)
    train_steps(model, everything=True)
    check_frozen(model, plan)
    done = export(model, plan, tmp_path / "out", ExportOptions("merged"), base=Base(str(saved.folder), saved.load))
    merged, base = load_model(done.folder), saved.load()
    for t in plan.targets:
        after, before = (one.get_submodule(t.target.name) for one in (merged, base))
        moved = (after.weight != before.weight).any(0 if t.target.transposed else 1)
        if t.decision.rows is None:
            assert bool(moved.all())
        else:
            assert moved.nonzero().flatten().tolist() == list(t.decision.rows)
            if after.bias is not None:
                assert (after.bias != before.bias).nonzero().flatten().tolist() == list(t.decision.rows)


# The command line


def test_plan_shows_who_has_what_and_compares(
    recipe_values: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = [{"name": "mica", "rank": 4, "targets": ["down_proj"]}, {"name": "lora-null", "targets": ["q_proj"]}]
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(method=sections))
    said = keeptune("stats", recipe, capsys=capsys)
    assert (said.code, said.out.split(" in ")[0]) == (0, "5 statistics for 10 targets")
    said = keeptune("plan", recipe, "--method.1.rank", "2", capsys=capsys)
    assert said.code == 0
    assert "\n\nlora-null: q_proj\nmica: down_proj\nstart error" in said.out
    diff = ("--diff", tmp_path / "out" / "plan", "--output", tmp_path / "other")
    said = keeptune("plan", recipe, "--method.1.rank", "3", *diff, capsys=capsys)
    assert "method.lora-null.rank: 3 | 2" in said.out
    assert "ranks that differ: 5 of 10 targets" in said.out
    assert keeptune("plan", recipe, "--method.rank", "3", capsys=capsys).code == 2
