"""One process of several that collect statistics and plan together; test_processes.py starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tests.contract.conftest import CASES
from tests.contract.test_penalties import PENALTIES
from tests.models import MODELS, Bench, qwen3_moe

from keeptune.core.artefact import write_json
from keeptune.core.plan import Plan
from keeptune.core.processes import by_first, is_first, joined, world
from keeptune.model.blockwise import BlockwiseRunner

__all__ = ["collect_all", "main", "plan_all"]

LORA, CORDA = CASES["lora rank=4"], CASES["corda rank=4 mode=kpm"]


def collect_all(store: Path) -> None:
    """Collects what methods and penalties ask for: batches that divide, too few of them, experts, block by block."""
    bench = Bench(MODELS["llama"](), store / "dense")
    for method in CASES.values():
        bench.collect(method, batch_tokens=60)
    for penalty in PENALTIES.values():
        bench.plan(LORA, [penalty])
    mixture = Bench(qwen3_moe(), store / "experts")
    mixture.collect(CORDA, batch_tokens=60)
    blocks = Bench(MODELS["llama"](), store / "blocks")
    blocks.collect(CORDA, runner=BlockwiseRunner(blocks.model))


def plan_all(store: Path) -> dict[str, Plan]:
    """Makes all plans from the statistics that are there."""
    bench = Bench(MODELS["llama"](), store / "dense")
    plans = {case: bench.plan(method) for case, method in CASES.items()}
    return plans | {penalty: bench.plan(LORA, [one]) for penalty, one in PENALTIES.items()}


def main(folder: str) -> None:
    """Collects into a store of its own, and plans from that of one process; notes what is sent meanwhile."""
    with joined():
        _work(Path(folder))


def _work(folder: Path) -> None:
    sent, count = list[int](), world()
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    collect_all(folder / f"of-{count}")
    with mock.patch.object(dist, "all_reduce", counted):
        Bench(MODELS["llama"](), folder / "counted").collect(CORDA, batch_tokens=60)
    plans = plan_all(folder / "one")
    by_first(lambda: [plan.save(folder / f"plans-{count}" / str(n)) for n, plan in enumerate(plans.values())])
    if is_first():
        write_json(folder / f"sent-{count}.json", sent)
