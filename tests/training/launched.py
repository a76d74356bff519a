"""What a launcher's processes train, each as the job does; test_launched.py starts them and compares with one."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import patch_environment
from peft import PeftModel
from safetensors.torch import save_file
from tests.training.support import MODEL, TOKENIZER, here, planned
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from keeptune.adapter.anchor import Anchor
from keeptune.adapter.install import install, trained_state
from keeptune.adapter.trained_head import full
from keeptune.core.artefact import write_json
from keeptune.core.plan import Plan
from keeptune.core.processes import by_first, gathered, is_first, joined, world
from keeptune.data.completions import TaskExamples, with_replay
from keeptune.methods.dora import Dora
from keeptune.methods.farss import Farss
from keeptune.methods.full import Full
from keeptune.methods.keep import Keep
from keeptune.methods.loki import Loki
from keeptune.methods.lora import Lora
from keeptune.methods.lora_fa import LoraFA
from keeptune.methods.lora_null import LoraNull
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.penalties.ewc import Ewc
from keeptune.penalties.kl import Kl
from keeptune.penalties.l2 import L2
from keeptune.penalties.laplace import Laplace
from keeptune.training.arguments import divide_step, sft_config
from keeptune.training.penalty_engine import Penalties
from keeptune.training.sharding import asks, load_to_share
from keeptune.training.trainer import train

__all__ = ["BACKENDS", "CASES", "SHARD", "Case", "Found", "goes_on", "learned", "main", "resumed"]

SHARD = "the shard of the first process"
STEPS, SAVED, STEP = 8, 6, 6  # of 20 examples: every fourth step has two of them
Found = dict[str, Tensor]
BACKENDS = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    },
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    method: Any
    penalties: tuple[Any, ...] = ()
    anchor: Anchor = "auto"
    replay: float = 0.0
    beside: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, store: Path) -> Plan:
        """The plan, which one process makes for all."""
        layers = None if self.method.scope == "all" else (0, 1)
        return planned(self.method, self.penalties, store=store, layers=layers, **self.beside)


LORA = Lora(rank=2)
CASES = {
    "keep": Case(Keep(rank=2, nats=1e-2, every=2)),
    "l2": Case(LORA, (L2(strength=300.0),)),
    "laplace": Case(LORA, (Laplace(curvature="delta-kfac", strength=300.0),)),
    # Rounding the logits of one process anew moves what is trained by 3e-6 here, with seed 0 by 3e-5 to 6e-5.
    "kl": Case(LORA, (Kl(strength=5.0, batch_size=2, seed=1),)),
    "ewc": Case(LORA, (Ewc(strength=1e3),)),
    "replay": Case(LORA, replay=0.2),
    "lora-null v1, twin": Case(LoraNull(rank=2), anchor="twin"),
    "lora-null v2, residual": Case(LoraNull(rank=2, variant="v2"), anchor="residual"),
    "loki": Case(Loki(q=20, rank=2)),
    "farss": Case(Farss(r_avg=2, r_max=4)),
    "dora": Case(Dora(rank=2)),
    "lora-fa": Case(LoraFA(rank=2)),
    "full": Case(Full()),
    "head": Case(LORA, beside={"modules_to_save": ["lm_head"]}),
}


def _examples(share: float) -> Any:
    prompts = tuple(f"Q: what is {n} plus {n}?\nA:" for n in range(20))
    answers = tuple(f" {2 * n} because it is twice {n}"[: 3 + n] for n in range(20))
    task = TaskExamples(prompts=prompts, completions=answers)
    texts = TaskExamples(prompts=None, completions=tuple(f"Once there were {n} birds." for n in range(9)))
    return with_replay(task, [texts], share, seed=0)


def learned(case: Case, plan: Plan, folder: Path) -> Found:
    """Trains as the job does, from a checkpoint that is there; what was trained, whole, and the loss of each step."""
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": STEP, "logging_steps": 1, "seed": 3,
        "learning_rate": 1e-4 if plan.scope == "all" else 1e-2,
        "save_strategy": "steps" if plan.method == "keep" else "no", "save_steps": SAVED,
    }  # fmt: skip
    config = divide_step(sft_config(arguments, folder, dtype=torch.float32, device="cpu"), world())
    shares = asks("FSDP") and not case.beside  # as Job.base_to_train
    model = install(load_to_share(MODEL, LoadOptions()) if shares else load_model(MODEL), plan, anchor=case.anchor)
    rows = train(model, plan, TOKENIZER, _examples(case.replay), config)
    if isinstance(model, PeftModel):
        state = trained_state(model, plan)
        for t in plan.targets:
            for factor in t.start.keys() - t.trainable:  # on every process
                assert torch.equal(state[f"{t.target.name}.{factor}"], t.start[factor].float())
    else:
        state = {name: full(p.detach()) for name, p in model.named_parameters()}
    if plan.method == "keep":
        every = [[row["multiplier"] for row in own if "multiplier" in row] for own in gathered(rows)]
        assert every[0][0] != every[0][-1] and all(own == every[0] for own in every)
    shards = [p.data.to_local() for p in model.parameters() if p.requires_grad and isinstance(p.data, DTensor)]
    own = {SHARD: shards[-1].clone()} if shards else {}
    return state | {"loss": torch.tensor([row["loss"] for row in rows])} | own


def resumed(plan: Plan, folder: Path, source: str) -> Found:
    """Goes on from the checkpoint that another training left half way."""
    here = folder / by_first(lambda: secrets.token_hex(4))
    by_first(lambda: shutil.copytree(folder / source / f"checkpoint-{SAVED}", here / f"checkpoint-{SAVED}"))
    return learned(CASES["keep"], plan, here)


def goes_on(source: str, backend: str, size: int) -> bool:
    """Whether processes can go on from a checkpoint: under ZeRO from that of the same ones."""
    return "zero" not in source + backend or source == f"{backend} {size}"


class Sent(TorchDispatchMode):
    """Counts collectives; those of shards are seen once the shards are taken apart."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = func.name()
        self.count += "c10d" in func.namespace and "_wrap_" not in name and "wait_" not in name
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(counts: list[int]) -> Iterator[None]:
    """Counts what penalties send at each step, their own passes through the model included."""
    step = Penalties.step

    def with_count(self: Penalties, scale: float = 1.0, tokens: int = 0) -> Tensor:
        with Sent() as sent:
            total = step(self, scale, tokens)
        counts.append(sent.count)
        return total

    with mock.patch.object(Penalties, "step", with_count):
        yield


def main(place: str, *names: str) -> None:
    """Trains each CASE, or CASE from CHECKPOINT, under every back-end; the first process writes what it has."""
    folder = Path(place)
    with joined():
        for name in names:
            case, _, source = name.partition(" from ")
            for backend in here(BACKENDS):
                if source and not goes_on(source, backend, world()):
                    continue
                plan = Plan.load(folder / case)
                form = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"} if world() == 3 else {}
                counts: list[int] = []
                with patch_environment(**BACKENDS[backend], **form), counted(counts):
                    if source:
                        found = resumed(plan, folder, source)
                    else:
                        own = folder / (f"{backend} {world()}" if case == "keep" else "unused")
                        found = learned(CASES[case], plan, own)
                if is_first():
                    save_file(found, folder / f"{name}, {backend} {world()}.safetensors")
                    write_json(folder / f"{name}, {backend} {world()}.json", counts)
