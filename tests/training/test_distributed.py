"""Two processes under DDP, FSDP2 and ZeRO take the steps of one, with penalties, accumulation and clipping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.forks import Forks
from tests.training.distributed import BACKENDS, answers, callbacks, interrupted, main, rows, scenarios, trained
from tests.training.support import every, here, planned
from torch import Tensor

from keeptune.core.plan import Plan
from keeptune.methods.loki import Loki
from keeptune.methods.lora import Lora
from keeptune.methods.oplora import Oplora
from keeptune.methods.pissa import Pissa
from keeptune.penalties.l2 import L2
from keeptune.penalties.laplace import Laplace

SQUARES = L2(strength=0.15, on="factors", unit="absolute")
SCENARIOS = list(scenarios(1))
PENALTIES = [SQUARES, L2(strength=300.0)]  # the second has no gradient at the start of PiSSA


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(Pissa(rank=2), PENALTIES)


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """LoKI* under curvature that ties every row of B to every other."""
    kfac = Laplace(curvature="delta-kfac", strength=300.0)
    return planned(Loki(q=20, rank=2), [kfac], store=tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def together(
    forks: Forks, plan: Plan, confined: Plan, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, dict[str, Tensor]]:
    """What two processes leave, by back-end."""
    folder = tmp_path_factory.mktemp("together")
    plan.save(folder / "plan")
    confined.save(folder / "rows")
    planned(Oplora(rank=2, k=6), [SQUARES]).save(folder / "off")
    planned(Lora(rank=2)).save(folder / "adopted")
    forks.together(main, 2, folder)
    written = sorted(path.parent.parent.name for path in folder.glob("*/keeptune/report.html"))
    assert written == ["ddp adopted", "ddp given", "fsdp2 given"]
    return {backend: load_file(folder / f"{backend}.safetensors") for backend in here(BACKENDS)}


@pytest.fixture(scope="module")
def alone(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[dict[str, Tensor]]]:
    """What one process leaves, by scenario: with penalties, and without."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: [trained(plan, trainer, folder, penalised=penalised, **extra) for penalised in (True, False)]
        for name, trainer, extra in SCENARIOS
    }


def part(found: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.partition("|")[2]: value for key, value in found.items() if key.partition("|")[0] == name}


@pytest.mark.parametrize("backend", every(BACKENDS))
@pytest.mark.parametrize("name", [name for name, *_ in SCENARIOS])
def test_two_processes_take_the_steps_of_one(
    backend: str,
    name: str,
    plan: Plan,
    together: Mapping[str, dict[str, Tensor]],
    alone: Mapping[str, list[dict[str, Tensor]]],
) -> None:
    found, (wanted, without) = part(together[backend], name), alone[name]
    assert bool(found.pop("shards")) == (backend == "fsdp2")
    assert {key for key in found if key.startswith("log pen")} == {
        "log penalty", "log penalty/l2", "log penalty_grad_norm",
    }  # fmt: skip
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-6)
    gap = max(float((found[f"{t.target.name}.B"] - without[f"{t.target.name}.B"]).abs().max()) for t in plan.targets)
    assert gap > 1e-4


@pytest.mark.parametrize("backend", ["one process", *every(BACKENDS)])
def test_a_resumed_run_takes_the_steps_of_one_that_was_not_stopped(
    backend: str, plan: Plan, together: Mapping[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    if backend == "one process":
        both = interrupted(plan, tmp_path, 1)
    else:
        both = {name: part(together[backend], name) for name in ("whole", "resumed")}
    for t in plan.targets:
        for key in (f"{t.target.name}.A", f"{t.target.name}.B"):
            assert torch.equal(both["whole"][key], both["resumed"][key])
    for key in ("log penalty", "log penalty_grad_norm", "log drift/layer_0"):
        assert both["whole"][key][-1] == both["resumed"][key][-1]


@pytest.mark.parametrize("backend", every(BACKENDS))
def test_rows_that_are_not_trained_stay_under_every_back_end(
    backend: str, confined: Plan, together: Mapping[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """FSDP2 replaces parameters, and with them any hook that they have."""
    found, alone = part(together[backend], "rows"), trained(confined, "transformers", tmp_path, **rows(1))
    assert bool(found.pop("shards")) == (backend == "fsdp2")
    for t in confined.targets:
        B = found[f"{t.target.name}.B"]
        assert B.any(dim=1).nonzero().flatten().tolist() == list(t.decision.rows or ())
        torch.testing.assert_close(B, alone[f"{t.target.name}.B"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_two_processes_stay_off_the_directions_as_one_does(
    backend: str, together: Mapping[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    plan = planned(Oplora(rank=2, k=6), [SQUARES])
    found, alone = part(together[backend], "off"), trained(plan, "transformers", tmp_path, **rows(1))
    assert bool(found.pop("shards")) == (backend == "fsdp2")
    for t in plan.targets:
        A, B = found[f"{t.target.name}.A"], found[f"{t.target.name}.B"]
        assert float((A @ t.kept["V"]).abs().max()) + float((t.kept["U"].T @ B).abs().max()) < 1e-6
        torch.testing.assert_close(B, alone[f"{t.target.name}.B"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["eaft", "asft"])
def test_two_processes_share_a_loss_of_the_tasks_tokens(
    loss: str, plan: Plan, together: Mapping[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    found, alone = part(together["ddp"], loss), trained(plan, "trl", tmp_path, loss=loss, **answers(1))
    assert "log nll" in alone
    for key, value in alone.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), [("given", "ddp"), ("given", "fsdp2"), ("adopted", "ddp")])
def test_a_callback_of_two_processes_takes_the_steps_of_one(
    name: str, backend: str, plan: Plan, together: Mapping[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    own, found = plan if name == "given" else planned(Lora(rank=2)), part(together[backend], name)
    alone = trained(own, "transformers", tmp_path, callback=callbacks(plan)[name], **rows(1))
    assert bool(found.pop("shards")) == (backend == "fsdp2")
    assert float(found["log penalty_grad_norm"].max()) > 0
    for key, value in found.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-3, atol=1e-5)
