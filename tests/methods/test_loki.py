from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import (
    MODELS,
    VOCAB,
    Bench,
    copies,
    in_memory,
    labels_for,
    logits,
    off_by,
    relative,
    tokens,
    train_steps,
)
from tests.plan_differences import differences
from tests.reference import loki_reference as reference
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from keeptune.adapter.install import check_frozen, install, trained_names
from keeptune.adapter.trained_change import change_of
from keeptune.core.errors import ModelError, PlanError
from keeptune.core.plan import Plan
from keeptune.core.target import Target
from keeptune.linalg.selections import voted
from keeptune.methods.loki import Loki, select
from keeptune.methods.lora import Lora
from keeptune.statistics.neuron_attribution import NeuronAttribution

DOWN = {"llama": "down_proj", "qwen2": "down_proj", "gpt2": "mlp.c_proj", "neox": "dense_4h_to_h", "opt": "fc2"}
MODES = {"rows": Loki(q=20), "within": Loki(q=30, rank=3)}
every_mode = pytest.mark.parametrize("mode", MODES)
every_model = pytest.mark.parametrize("architecture", DOWN)


def neox() -> PreTrainedModel:
    """A plain MLP with biases, in nn.Linear; GPT-2's are in Conv1D."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return with_biases(GPTNeoXForCausalLM, config)


def opt() -> PreTrainedModel:
    """Its fc2 gets rows of tokens without a batch dimension."""
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.2,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return with_biases(OPTForCausalLM, config)


def with_biases(cls: type[Any], config: Any) -> PreTrainedModel:
    """Biases start as zeros, which would hide a mistake."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = cls(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("dense_4h_to_h.bias", "fc2.bias")):
                    parameter.normal_(std=0.1)
    return model.eval()


FACTORIES: dict[str, Callable[[], PreTrainedModel]] = {**MODELS, "neox": neox, "opt": opt}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Loki], Plan]:
    store = tmp_path_factory.mktemp("store")

    @cache
    def make(architecture: str, method: Loki) -> Plan:
        return Bench(FACTORIES[architecture](), store / architecture).plan(method)

    return make


Plans = Callable[[str, Loki], Plan]


def merged(model: Any, plan: Plan, base: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor | None]]:
    """W, ``(m, n)``, and b of every target with the trained change in it."""
    biases, found = change_of(model, plan).biases, {}
    for name, change in change_of(model, plan).weights.items():
        module = base.get_submodule(name)
        W = module.weight.detach().T if plan[name].target.transposed else module.weight.detach()
        b = None if module.bias is None else module.bias.detach() + biases[name]
        found[name] = (W + change.dense(), b)
    return found


# Selection


@pytest.mark.parametrize("selection", ["layer-balanced", "global-low", "global-high"])
@pytest.mark.parametrize("q", [5, 10.5, 29, 60])
def test_the_rows_are_those_of_the_paper(selection: Any, q: float) -> None:
    values = torch.randn(40, 3, 30, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 4.0, 0.3])[:, None]
    given = dataclasses.replace(in_memory(values), modules=("a", "b", "c"))
    found = select(given, q, selection)
    assert [list(found[name].rows) for name in "abc"] == reference.selected(values, str(q), selection)


def test_the_votes_are_shares_of_the_texts() -> None:
    values = torch.randn(9, 2, 10, generator=torch.Generator().manual_seed(1))
    found = select(dataclasses.replace(in_memory(values), modules=("a", "b")), 30, "layer-balanced")
    for one in found.values():
        assert float(one.votes.sum()) == pytest.approx(3)
        assert float(one.votes[list(one.rows)].min()) >= float(
            one.votes[[i for i in range(10) if i not in one.rows]].max()
        )


@every_model
def test_the_plan_takes_the_rows_of_the_attribution(architecture: str, plans: Plans, tmp_path: Path) -> None:
    method = MODES["rows"]
    bench = Bench(FACTORIES[architecture](), tmp_path)
    statistics = bench.collect(method)
    values = torch.cat(list(statistics.view(bench.targets()[0]).attributions(method.attribution).chunks()))
    plan = plans(architecture, method)
    wanted = reference.selected(values, "20", "layer-balanced")
    assert [list(t.decision.rows or ()) for t in plan.targets] == wanted
    assert [t.target.role for t in plan.targets] == [DOWN[architecture]] * len(wanted)
    assert [t.decision.rank for t in plan.targets] == [6] * len(wanted)  # floor(0.2 * 32)


def test_other_definitions_of_the_attribution_give_other_rows(plans: Plans) -> None:
    plain = plans("llama", Loki())
    for attribution in (NeuronAttribution.as_paper(), NeuronAttribution(signed=False)):
        other = plans("llama", Loki(attribution=attribution))
        assert [t.decision.rows for t in other.targets] != [t.decision.rows for t in plain.targets]
        assert any("rows of only one" in line for line in differences(other, plain))


def test_a_block_may_get_no_rows_of_all(plans: Plans) -> None:
    """And is left alone then; one with fewer rows than ranks gets as many ranks as rows."""
    sizes = {}
    for q in (2, 4, 10):
        method = Loki(q=q, rank=4, selection="global-high")
        plan = plans("llama", method)
        sizes[q] = [len(t.decision.rows or ()) for t in plan.targets]
        assert sum(sizes[q]) == q * 64 // 100
        assert [t.decision.rank for t in plan.targets] == [min(4, size) for size in sizes[q]]
        assert any("lowered to their number" in note for note in plan.provenance["notes"])
    assert min(map(len, sizes.values())) == 1  # some q leaves one of the two blocks without


def test_what_else_is_asked_for_is_left_alone_and_told(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path, roles=["q_proj", "down_proj"])
    plan = bench.plan(Loki())
    assert {t.target.role for t in plan.targets} == {"down_proj"}
    assert "q_proj: left alone, no down-projection" in plan.provenance["notes"]


# The change


@every_model
@every_mode
def test_before_training_the_output_is_the_bases_to_the_bit(architecture: str, mode: str, plans: Plans) -> None:
    model = install(FACTORIES[architecture](), plans(architecture, MODES[mode]))
    assert torch.equal(logits(model, tokens()), logits(FACTORIES[architecture](), tokens()))


def train_rows(base: PreTrainedModel, plan: Plan, *, decay: float, steps: int = 5) -> None:
    """Train rows of W and b by hand: whole weights get gradients, of which the rows are taken.

    A weight decay of AdamW acts on what the row has moved.
    """
    rows = {}
    for t in plan.targets:
        module = base.get_submodule(t.target.name)
        W = module.weight.T if t.target.transposed else module.weight
        S = list(t.decision.rows or ())
        rows[t.target.name] = (
            module,
            S,
            W.detach().clone()[S],
            None if module.bias is None else module.bias.detach().clone()[S],
        )
    moved = {name: torch.zeros_like(W) for name, (_, _, W, _) in rows.items()}
    biases = {name: torch.zeros_like(b) for name, (_, _, _, b) in rows.items() if b is not None}
    optimiser = torch.optim.AdamW(
        [p.requires_grad_() for p in (*moved.values(), *biases.values())], lr=1e-2, weight_decay=decay
    )
    base.requires_grad_(True)
    for step in range(steps):
        base.zero_grad()
        base(input_ids=tokens(step), labels=labels_for(base, tokens(step))).loss.backward()
        for name, (module, S, _, _) in rows.items():
            transposed = plan[name].target.transposed
            moved[name].grad = (module.weight.grad.T if transposed else module.weight.grad)[S].clone()
            if name in biases:
                biases[name].grad = module.bias.grad[S].clone()
        optimiser.step()
        with torch.no_grad():
            for name, (module, S, W, b) in rows.items():
                turned = module.weight.T if plan[name].target.transposed else module.weight
                turned[S] = W + moved[name]
                if b is not None:
                    module.bias[S] = b + biases[name]


@every_model
@pytest.mark.parametrize("decay", [0.0, 5.0])
def test_trained_rows_are_the_rows_of_W_in_training(architecture: str, decay: float, plans: Plans) -> None:
    """Five steps of AdamW; weight decay pulls towards W."""
    plan = plans(architecture, MODES["rows"])
    model: Any = install(FACTORIES[architecture](), plan)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=decay)
    for step in range(5):
        optimiser.zero_grad()
        model(input_ids=tokens(step), labels=labels_for(model, tokens(step))).loss.backward()
        optimiser.step()
    by_hand = FACTORIES[architecture]()
    train_rows(by_hand, plan, decay=decay)
    start = FACTORIES[architecture]()
    for name, (W, b) in merged(model, plan, FACTORIES[architecture]()).items():
        module = by_hand.get_submodule(name)
        found = (module.weight.T if plan[name].target.transposed else module.weight).detach()
        assert float((W - found).abs().max()) < 1e-6
        before = start.get_submodule(name).weight.detach()
        assert float((found - (before.T if plan[name].target.transposed else before)).abs().max()) > 1e-2
        if b is not None:
            assert float((b - module.bias.detach()).abs().max()) < 1e-6


def test_weight_decay_pulls_towards_W(plans: Plans) -> None:
    sizes = []
    for decay in (0.0, 50.0):
        plan = plans("llama", MODES["rows"])
        model: Any = install(MODELS["llama"](), plan)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=decay)
        for step in range(20):
            optimiser.zero_grad()
            model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
            optimiser.step()
        sizes.append(sum(float(change.norm_squared()) for change in change_of(model, plan).weights.values()))
    assert sizes[1] < 0.5 * sizes[0]


@every_model
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_selected_keep_their_bits(
    architecture: str, mode: str, dtype: torch.dtype, plans: Plans
) -> None:
    """Every parameter is handed to AdamW with weight decay and momentum; the selected rows do move."""
    plan = plans(architecture, MODES[mode])
    model: Any = install(FACTORIES[architecture]().to(dtype), plan)
    train_steps(model, steps=4, everything=True)
    check_frozen(model, plan)
    start, tuned = FACTORIES[architecture]().to(dtype), model.merge_and_unload()
    for name, before in copies(start).items():
        after = tuned.get_parameter(name)
        module, _, part = name.rpartition(".")
        if module not in {t.target.name for t in plan.targets}:
            assert torch.equal(after, before), name
            continue
        turned = plan[module].target.transposed and part == "weight"
        same = (after == before).T if turned else after == before
        by_row = same.flatten(1).all(1) if part == "weight" else same
        rows = list(plan[module].decision.rows or ())
        assert by_row.nonzero().flatten().tolist() == [i for i in range(len(by_row)) if i not in rows], name


@every_mode
def test_only_the_rows_of_the_factors_move_and_they_are_what_is_counted(mode: str, plans: Plans) -> None:
    plan = plans("gpt2", MODES[mode])
    model: Any = install(MODELS["gpt2"](), plan)
    before, names = copies(model), trained_names(model, plan)
    train_steps(model, steps=3)
    moved = sum(int((model.get_parameter(name) != before[name]).sum()) for name in names)
    assert moved == sum(t.trained_parameters for t in plan.targets)
    rows, n = (6, 48) if mode == "rows" else (9, 48)
    assert moved == 2 * (rows * n + rows if mode == "rows" else 3 * n + rows * 3 + rows)


@every_mode
def test_a_copy_of_the_model_is_confined_too(mode: str, plans: Plans) -> None:
    plan = plans("gpt2", MODES[mode])
    model: Any = copy.deepcopy(install(MODELS["gpt2"](), plan))
    train_steps(model, steps=2)
    for t in plan.targets:
        outside = [i for i in range(32) if i not in (t.decision.rows or ())]
        assert not change_of(model, plan).weights[t.target.name].dense()[outside].any()
        assert not change_of(model, plan).biases[t.target.name][outside].any()
        assert change_of(model, plan).weights[t.target.name].dense().any()


def test_within_the_rows_it_is_the_lora_of_those_rows(plans: Plans) -> None:
    """Eq. 11: a LoRA of the |S| x n matrix alone, trained by hand."""
    plan = plans("llama", MODES["within"])
    model: Any = install(MODELS["llama"](), plan)
    train_steps(model, steps=5)
    base = MODELS["llama"]().requires_grad_(False)
    factors = {}
    for t in plan.targets:
        S = list(t.decision.rows or ())
        factors[t.target.name] = (torch.zeros(len(S), 3, requires_grad=True), t.init.A.clone().requires_grad_())

        def hook(_: Any, inputs: Any, output: Tensor, name: str = t.target.name, S: list[int] = S) -> Tensor:
            B, A = factors[name]
            return output.index_add(-1, torch.tensor(S), plan[name].scale * inputs[0] @ A.T @ B.T)

        base.get_submodule(t.target.name).register_forward_hook(hook)
    optimiser = torch.optim.AdamW([p for pair in factors.values() for p in pair], lr=1e-2, weight_decay=0.1)
    for step in range(5):
        optimiser.zero_grad()
        base(input_ids=tokens(3 + step), labels=tokens(3 + step)).loss.backward()
        optimiser.step()
    for name, change in change_of(model, plan).weights.items():
        B, A = factors[name]
        wanted = torch.zeros(32, 48)
        wanted[list(plan[name].decision.rows or ())] = (plan[name].scale * B @ A).detach()
        assert relative(change.dense(), wanted) < 1e-5


def test_trained_rows_learn_what_no_lora_of_their_inputs_could(plans: Plans) -> None:
    """The trained change has full rank within the rows, and rank r of LoKI*."""
    for mode, rank in (("rows", 6), ("within", 3)):
        plan = plans("llama", MODES[mode])
        model: Any = install(MODELS["llama"](), plan)
        train_steps(model)
        for change in change_of(model, plan).weights.values():
            values = torch.linalg.svdvals(change.dense().double())
            assert int((values > 1e-5 * values[0]).sum()) == rank


# Plans and what they ask for


@every_mode
def test_rows_are_saved_with_the_plan(mode: str, plans: Plans, tmp_path: Path) -> None:
    plan = plans("gpt2", MODES[mode])
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert [t.decision for t in loaded.targets] == [t.decision for t in plan.targets]
    assert [t.target for t in loaded.targets] == [t.target for t in plan.targets]
    assert loaded.key == plan.key
    assert [row["rows"] for row in loaded.summary()] == [len(t.decision.rows or ()) for t in plan.targets]
    found = [
        off_by(logits(install(MODELS["gpt2"](), p), tokens()), logits(MODELS["gpt2"](), tokens()))
        for p in (plan, loaded)
    ]
    assert found == [0.0, 0.0]


def test_the_rate_follows_q_only_where_it_is_asked_to() -> None:
    assert Loki(q=30).training() == {}
    factors = {q: Loki(q=q, rate="by-q").training()["learning_rate_factor"] for q in (5, 10, 20, 30)}
    assert factors[10] == 1
    assert factors[30] == pytest.approx(0.4)
    assert factors[5] > 1 > factors[20] > factors[30]


def test_what_is_derived_of_one_attribution_is_kept_apart(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path)
    view = bench.collect(Loki()).view(bench.targets()[0])
    given: list[tuple[float, Any]] = [(10.0, "layer-balanced"), (30.0, "layer-balanced"), (30.0, "global-high")]
    found = [{n: s.rows for n, s in view.derive(Loki().attribution, select, *one).items()} for one in given]
    alone = [{n: s.rows for n, s in select(view.attributions(Loki().attribution), *one).items()} for one in given]
    assert found == alone
    assert found[0] != found[1] != found[2]


def test_the_votes_are_counted_once_for_all_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, counted = Bench(MODELS["llama"](), tmp_path), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return voted(*args, **kwargs)

    monkeypatch.setattr("keeptune.methods.loki.voted", watched)
    bench.plan(Loki())
    assert len(counted) == 1


def test_options_of_the_attribution_are_the_requests() -> None:
    attribution = NeuronAttribution(positions="all", steps=3)
    target = Target("h.0.up", 0, "up", 8, 8, input_group="h.0.up")
    assert Loki(attribution=attribution).requests(target) == {attribution}


# Wrong inputs


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"q": 0.0}, r"method\.q: got 0\.0, wanted above 0 and at most 100"),
        ({"q": -1.0}, r"method\.q"),
        ({"q": 100.5}, r"method\.q"),
        ({"rank": 0}, r"method\.rank: got 0, wanted 1 or more"),
        ({"alpha": 2.0}, r"method\.alpha: got 2\.0, wanted none without a rank"),
        ({"rank": 2, "alpha": 0.0}, r"method\.alpha"),
        ({"dropout": 1.0}, r"method\.dropout"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        Loki(**options)


def test_a_share_without_a_row_is_refused(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path)
    for selection in ("layer-balanced", "global-low"):
        with pytest.raises(
            PlanError, match=r"got 1 per cent of 32 nodes, which leaves no row to train, wanted 3\.1 or"
        ):
            bench.plan(Loki(q=1, selection=selection))  # type: ignore[arg-type]
    assert bench.plan(Loki(q=3.2)).targets[0].decision.rank == 1


def test_a_rank_above_the_rows_is_refused_with_the_target(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path)
    with pytest.raises(
        PlanError, match=r"mlp\.down_proj: got rank 4, wanted 1 to 3: q = 10 per cent of 32 nodes is 3 rows"
    ):
        bench.plan(Loki(q=10, rank=4))
    assert [t.decision.rank for t in bench.plan(Loki(q=10, rank=3)).targets] == [3, 3]


def test_targets_without_a_down_projection_are_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    bench = Bench(MODELS["llama"](), tmp_path, roles=["q_proj", "up_proj"])
    with pytest.raises(PlanError, match=r"got the targets q_proj, up_proj, wanted the down-projection.*mlp\.down_proj"):
        bench.plan(Loki())


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="writes no next token"):
        Bench(MODELS["roberta"](), tmp_path).plan(Loki())


def test_other_methods_leave_biases_alone(tmp_path: Path) -> None:
    plan = Bench(MODELS["gpt2"](), tmp_path).plan(Lora(rank=2))
    assert all(t.trainable == {"A", "B"} and not t.vectors and t.held_back == 0 for t in plan.targets)
