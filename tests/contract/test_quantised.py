"""Every method and penalty on a base in four bits: it works as on the same weights in floats, or refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from tests.contract.conftest import ADAPTERS, CASES, LOW_RANK, WHOLE, World
from tests.contract.test_penalties import PENALTIES, gradients
from tests.contract.test_plans import TOLERANCE, largest_difference
from tests.models import MODELS, NF4, Bench, calibration, logits, off_by, relative, save, tokens, train_steps, wide
from transformers import PreTrainedModel

from keeptune.adapter.anchor import ANCHOR_NAME, start_errors
from keeptune.adapter.install import check_frozen, install, lora_layer
from keeptune.adapter.trained_change import change_of, write_lora
from keeptune.core.errors import ModelError, PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan
from keeptune.core.weights import is_quantised, read_weight
from keeptune.model.blocks import find_targets
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import load_model
from keeptune.pipeline.planning import plan_for
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.statistics.store import StatStore

every_adapter = pytest.mark.parametrize("case", ADAPTERS)
every_penalty = pytest.mark.parametrize("penalty", PENALTIES)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A Llama whose maps are stored in four bits."""
    folder = tmp_path_factory.mktemp("nf4")
    saved = save(wide(MODELS["llama"]), folder / "base")
    return World(saved, folder / "store", saved.load(quantization=NF4))


@pytest.fixture(scope="module")
def plain(packed: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same with the same weights in floats."""
    folder = tmp_path_factory.mktemp("dequantised")
    model = packed.saved.load()
    with torch.no_grad():
        for target in find_targets(model):
            model.get_submodule(target.name).weight.copy_(read_weight(packed.loaded, target))  # type: ignore[operator]
    saved = save(model, folder / "base")
    return World(saved, folder / "store", load_model(str(saved.folder)))


def plan_of(world: World, case: str, penalty: str | None = None) -> Plan:
    bench = world.bench()
    data = {"knowledge": bench.data, "task": bench.task}
    extra = [] if penalty is None else [PENALTIES[penalty]]
    return plan_for(bench.model, CASES[case], StatStore(world.store), data=data, penalties=extra)  # type: ignore[arg-type]


@every_adapter
def test_a_plan_is_that_of_the_base_with_the_same_weights_in_floats(case: str, packed: World, plain: World) -> None:
    assert largest_difference(plan_of(packed, case), plan_of(plain, case)) < TOLERANCE


@every_adapter
def test_an_installed_plan_trains_as_on_the_base_in_floats_and_leaves_the_base_alone(
    case: str, packed: World, plain: World
) -> None:
    plan, before = plan_of(packed, case), body_fingerprint(packed.loaded)
    base = packed.base()
    model, floats = install(base, plan), install(plain.base(), plan, anchor="twin")
    assert isinstance(model, PeftModel) and isinstance(floats, PeftModel)
    check_frozen(model, plan)
    wanted = logits(packed.loaded, tokens())
    assert off_by(logits(model, tokens()), wanted) < 1e-5
    trained = []
    for one in (model, floats):
        train_steps(one, steps=3)
        trained.append(logits(one.eval(), tokens()))
    assert off_by(trained[0], wanted) > 1e-3
    assert off_by(trained[0], trained[1]) < 1e-3
    for target_plan in plan.targets:
        layer = lora_layer(model, target_plan.target.name).get_base_layer()
        assert torch.equal(layer.weight, packed.loaded.get_submodule(target_plan.target.name).weight)  # type: ignore[arg-type]
        assert (ANCHOR_NAME in lora_layer(model, target_plan.target.name).lora_A) == target_plan.anchored
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), wanted)
    assert body_fingerprint(packed.loaded) == before
    assert set(start_errors(packed.base(), plan).values()) <= {0.0}


@pytest.mark.parametrize("case", ["lora rank=4", next(case for case in LOW_RANK if case.startswith("lora-null"))])
@every_penalty
def test_a_penalty_holds_the_same_as_on_the_base_in_floats(
    case: str, penalty: str, packed: World, plain: World
) -> None:
    found = []
    for world in (packed, plain):
        plan = plan_of(world, case, penalty)
        model = install(world.base(), plan, anchor="twin")
        assert isinstance(model, PeftModel)
        train_steps(model, steps=3)
        found.append(gradients(model, plan))
    (value, found_gradients), (wanted, wanted_gradients) = found
    assert value > 0
    assert value == pytest.approx(wanted, rel=1e-3)
    for a, b in zip(found_gradients, wanted_gradients, strict=True):
        assert relative(a, b) < 5e-3 or not bool(a.any() or b.any())


@pytest.mark.parametrize("case", WHOLE)
def test_a_method_that_changes_whole_weights_refuses(case: str, packed: World, plain: World) -> None:
    with pytest.raises(PlanError, match="got a quantised base"):
        plan_of(packed, case)
    with pytest.raises(PlanError, match="got a quantised base"):
        install(packed.base(), plan_of(plain, case))


def test_a_residual_is_refused_with_the_reason(packed: World) -> None:
    plan = plan_of(packed, "pissa rank=4 alpha=6.0")
    for act in (install, start_errors):
        with pytest.raises(PlanError, match="would have to be quantised again"):
            act(packed.base(), plan, anchor="residual")  # type: ignore[operator]


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "roberta"])
@pytest.mark.parametrize("case", ["lora rank=4", "pissa rank=4 alpha=6.0"])
def test_other_architectures_start_from_what_the_base_computes(architecture: str, case: str, tmp_path: Path) -> None:
    """With biases, transposed weights and a head that is drawn."""
    saved = save(wide(MODELS[architecture]), tmp_path / "base")

    def base() -> PreTrainedModel:
        return saved.load(quantization=NF4)

    model = base()
    assert is_quantised(model)
    wanted = logits(model, tokens())
    tuned = install(base(), Bench(model, tmp_path / "store", calibration()).plan(CASES[case]))
    assert off_by(logits(tuned, tokens()), wanted) < 1e-5
    train_steps(tuned, steps=2)
    assert off_by(logits(tuned.eval(), tokens()), wanted) > 1e-3


def test_dora_in_eight_bits_is_refused_on_the_cpu(packed: World, tmp_path: Path) -> None:
    model = packed.saved.load(quantization={"load_in_8bit": True})
    case = next(case for case in ADAPTERS if case.startswith("dora"))
    with pytest.raises(PlanError, match="loses the scales"):
        install(model, Bench(model, tmp_path, calibration()).plan(CASES[case]))


def test_eight_bits_train_too(packed: World, tmp_path: Path) -> None:
    """LLM.int8 rounds inputs, so that what is added to its outputs is compared with those of the same state."""
    model = packed.saved.load(quantization={"load_in_8bit": True})
    wanted = logits(model, tokens())
    plan = Bench(model, tmp_path, calibration()).plan(CASES["pissa rank=4 alpha=6.0"])
    tuned = install(model, plan)
    assert off_by(logits(tuned, tokens()), wanted) < 2e-2
    train_steps(tuned, steps=2)
    assert off_by(logits(tuned.eval(), tokens()), wanted) > 5e-2


@pytest.mark.parametrize("case", ["lora rank=4", "dora rank=4 use_rslora=True alpha=6.0"])
def test_what_an_adapter_changed_is_read_from_its_factors(case: str, packed: World, tmp_path: Path) -> None:
    plan = plan_of(packed, case)
    model = install(packed.base(), plan)
    assert isinstance(model, PeftModel)
    train_steps(model)
    made = change_of(model, plan)
    write_lora(made, plan, tmp_path, str(packed.saved.folder), portable=False)
    trained = dataclasses.replace(TrainedModel.of(str(tmp_path)), quantization=NF4)
    assert is_quantised(trained.load_base())
    for target, W, change in trained.changes():
        assert torch.equal(W, read_weight(packed.loaded, target))
        wanted = made.weights[target.name].dense()
        if target.name in made.magnitudes:
            tuned = W + wanted
            wanted = tuned * (made.magnitudes[target.name] / tuned.norm(dim=1))[:, None] - W
        assert change is not None
        assert relative(change.dense() if isinstance(change, LowRank) else change, wanted) < 1e-5


def test_an_adapter_that_would_be_merged_in_four_bits_is_refused(packed: World, tmp_path: Path) -> None:
    config = LoHaConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(packed.saved.load(), config).save_pretrained(str(tmp_path))
    trained = dataclasses.replace(TrainedModel.of(str(tmp_path)), quantization=NF4)
    with pytest.raises(ModelError, match="quantised base that is not plain LoRA|fits|adapter"):
        list(trained.changes())
