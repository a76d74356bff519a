"""Penalties: terms of the loss that depend on the trained factors only, once per optimiser step.

    L = L_task + sum over penalties, over targets, of P(A, B)

Their gradients are in closed form and are added to ``.grad`` after the last micro-batch's backward pass and before
clipping. So they count once whatever the gradient accumulation, the normalisation of the loss and the number of
processes (gradients are averaged before), and take part in clipping. A hand-written loop does the same:

    penalties = keeptune.Penalties(model, plan)
    loss.backward()                                  # as often as the step has micro-batches
    penalties.step()
    clip_grad_norm_(...); optimizer.step(); optimizer.zero_grad()
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from keeptune.adapter.expert_layers import Held
from keeptune.adapter.install import held_parameters, sharded_like
from keeptune.adapter.special_layers import within_rows
from keeptune.adapter.trained_head import full
from keeptune.core.errors import TrainError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan, TargetPlan
from keeptune.core.target import TensorName
from keeptune.penalties.base import NORM, Penalty, Term, conclusions, penalty_named, start_of
from keeptune.penalties.kl import Kl
from keeptune.penalties.kronecker import change_since
from keeptune.training.compatibility import refuse_trainer
from keeptune.training.output_passes import Gradients, Outputs, add_gradients, gradient_norm

_log = logging.getLogger(__name__)


class Penalties:
    """The penalties of a plan on the installed model in training; what wraps it (DDP, FSDP2) does not matter."""

    def __init__(self, model: PeftModel, plan: Plan) -> None:
        """Looks parameters up at each step, not here: sharding may replace them."""
        self._model, self._plan = model, plan
        self._penalties: list[Penalty] = [penalty_named(made.name, made.options) for made in plan.penalties]
        self._state = [
            {name: made.tensors[name].clone() for name in penalty.state}
            for penalty, made in zip(self._penalties, plan.penalties, strict=True)
        ]
        self._outputs = [Outputs(one, model, plan) if isinstance(one, Kl) else None for one in self._penalties]
        self._terms: list[dict[int, Term]] = []
        self._logs: dict[str, list[Tensor]] = defaultdict(list)  # since the last reading
        self.taken = 0

    @torch.no_grad()
    def step(self, scale: float = 1.0, tokens: int = 0) -> Tensor:
        """Adds the gradients of all penalties to ``.grad``: after the backward pass, before clipping.

        ``scale`` is that of gradients at this moment: ``scaler.get_scale()`` under a ``GradScaler``; ``tokens`` how
        many tokens of the task this process has passed in this step, by which ``kl`` chooses how often it measures.
        """
        total, summed = self._gradients(scale, tokens, limited=True)
        for parameter, gradient in summed.items():
            _add(parameter, gradient if scale == 1 else gradient * scale)
        return total

    def term(self, tokens: int = 0) -> Tensor:
        """Returns a term of the last micro-batch's loss whose gradients are those that :meth:`step` adds (DeepSpeed).

        It is the same on all processes, and so its own average; its value is the sum of <g, p>, not the penalties'.
        A budget's are not limited by the task's gradient, which is still to come.
        """
        _, summed = self._gradients(1.0, tokens, limited=False)
        zero = torch.zeros((), device=self._home)
        with torch.enable_grad():
            return sum(((gradient.to(p.dtype) * p).sum() for p, gradient in summed.items()), zero)

    @torch.no_grad()
    def _gradients(self, scale: float, tokens: int, *, limited: bool) -> tuple[Tensor, Gradients]:
        held = self._held()
        values: list[dict[str, Tensor]] = [{} for _ in self._penalties]
        summed: Gradients = {}
        for target_plan, of_target, terms in zip(self._plan.targets, held, self._terms, strict=True):
            for factor, gradient in _gradients(target_plan, of_target, terms, values).items():
                of_target[factor].add(summed, gradient)
        logs: dict[str, Tensor] = {}
        checked: list[Mapping[str, Tensor]] = [{} for _ in values]
        for index, (outputs, own, parts) in enumerate(zip(self._outputs, self._own, values, strict=True)):
            if outputs is not None and outputs.due(own, tokens):
                parts[""], gradients = outputs.value_and_grad(own, scale)
                checked[index] = outputs.checked(own)
                gradients = outputs.limited(own, gradients, scale) if limited else gradients
                logs[f"penalty_grad_norm/{outputs.penalty.name}"] = gradient_norm(gradients.values())
                add_gradients(summed, gradients)
        for penalty, own, parts, more in zip(self._penalties, self._own, values, checked, strict=True):
            logs |= penalty.update(own, {**parts, **more})
        sums = self._by_penalty(values)
        total = torch.stack(list(sums.values())).sum()
        logs |= {"penalty": total, "penalty_grad_norm": gradient_norm(summed.values()).to(self._home), **sums}
        for name, value in logs.items():
            self._logs[name].append(value)
        self.taken += 1
        return total, summed

    def read(self) -> dict[str, float]:
        """Returns the means over the steps since the last reading, and how far each layer is from its start now.

        Returns:
            ``penalty``, the sum; ``penalty/l2`` and the like; ``penalty_grad_norm``; ``drift/layer_0`` and the
            like, ``‖ΔW‖ / ‖W‖``, the mean over the layer's targets that a penalty holds. Empty where there was no step.
        """
        if not self._logs:
            return {}
        means = {name: float(torch.stack(values).mean()) for name, values in self._logs.items()}
        self._logs.clear()
        return means | self._drift()

    @torch.no_grad()
    def value(self) -> dict[str, float]:
        """Returns each penalty at the weights as they are; takes no step.

        Returns:
            ``penalty/l2`` and the like; of ``kl`` instead ``held_out/kl``, the nats per token lost on the texts that
            are not trained on, with the ends ``held_out/low`` and ``held_out/high`` of its 95% interval over
            ``held_out/texts`` texts.
        """
        values: list[dict[str, Tensor]] = [{} for _ in self._penalties]
        for target_plan, of_target, terms in zip(self._plan.targets, self._held(), self._terms, strict=True):
            _gradients(target_plan, of_target, terms, values)
        found = {name: float(value) for name, value in self._by_penalty(values).items()}
        for outputs, own in zip(self._outputs, self._own, strict=True):
            if outputs is not None:
                del found[f"penalty/{outputs.penalty.name}"]
                found |= {f"held_out/{name}": value for name, value in outputs.measured(own).items()}
        return found

    def state(self) -> dict[str, list[float]]:
        """Returns what changes while training, such as multipliers: a checkpoint needs it."""
        return {
            f"{index}:{name}": value.double().tolist()
            for index, held in enumerate(self._state)
            for name, value in held.items()
        }

    def restore(self, state: Mapping[str, list[float]]) -> None:
        """Goes on from the :meth:`state` of a checkpoint."""
        for index, held in enumerate(self._state):
            for name, value in held.items():
                value.copy_(torch.tensor(state[f"{index}:{name}"], dtype=torch.float64))

    def _held(self) -> list[Mapping[TensorName, Held]]:
        """Returns what is trained of each target, and binds the terms to it at first."""
        held: list[Mapping[TensorName, Held]] = [held_parameters(self._model, t) for t in self._plan.targets]
        if not self._terms:
            self._bind([next(iter(of_target.values())).parameter.device for of_target in held])
        return held

    def _by_penalty(self, values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self._home))
        for penalty, parts in zip(self._penalties, values, strict=True):
            name = f"penalty/{penalty.name}"
            sums[name] = sums[name] + sum(value.to(self._home) for value in parts.values())
        return sums

    def _bind(self, devices: list[torch.device]) -> None:
        self._home = devices[0]
        self._state = [{name: value.to(self._home) for name, value in held.items()} for held in self._state]
        pairs = list(zip(self._plan.penalties, self._state, strict=True))
        on = {device: [_On(made.tensors, device, held) for made, held in pairs] for device in dict.fromkeys(devices)}
        self._own = on[self._home]
        self._terms = []
        for target_plan, device in zip(self._plan.targets, devices, strict=True):
            terms = {}
            for index, (penalty, made) in enumerate(zip(self._penalties, self._plan.penalties, strict=True)):
                if f"{NORM}:{target_plan.target.name}" in made.tensors:
                    term = penalty.bind(target_plan, on[device][index])
                    if term is not None:
                        terms[index] = term
            self._terms.append(terms)

    @torch.no_grad()
    def _drift(self) -> dict[str, float]:
        by_layer: dict[int, list[float]] = defaultdict(list)
        for target_plan in self._plan.targets:
            target = target_plan.target
            at = f"{NORM}:{target.name}"
            norms = [float(made.tensors[at]) for made in self._plan.penalties if at in made.tensors]
            if not norms:
                continue
            factors = _values(held_parameters(self._model, target_plan))
            start = start_of(target_plan, factors["B"].device)
            change = LowRank(*change_since(LowRank(factors["B"], factors["A"]), start))
            moved = target_plan.scale * float(change.norm_squared().clamp_min(0).sqrt())
            by_layer[target.layer].append(moved / norms[0] if norms[0] else 0.0)
        return {f"drift/layer_{layer}": sum(shares) / len(shares) for layer, shares in sorted(by_layer.items())}


def add_penalties(trainer: Any, plan: Plan) -> Penalties:
    """Adds the penalties of a plan to a trainer (its class is not changed), once per optimiser step.

    Laws: n micro-batches of b examples give the step of one batch of n b, n processes that of one; evaluation losses
    have no penalty; ``loss`` in the logs stays the task's own.

    Raises:
        TrainError: The trainer's back-end or optimiser leaves no moment at which a gradient can be added once.
    """
    refuse_trainer(trainer, plan)
    penalties = Penalties(trainer.model, plan)
    training_step, log = trainer.training_step, trainer.log
    counted = 0  # tokens of the micro-batches of the first step

    def counting(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        if not penalties.taken:
            counted += tokens_of(inputs)
        loss = training_step(model, inputs, *args, **kwargs)
        if trainer.accelerator.sync_gradients and not zero:
            scaler = trainer.accelerator.scaler
            penalties.step(1.0 if scaler is None else scaler.get_scale(), counted)
        return loss

    def with_term(loss: Tensor, scale_wrt_gas: bool = True, **kwargs: Any) -> None:
        if trainer.accelerator.sync_gradients:  # the engine divides by the micro-batches, or Trainer has
            steps = trainer.accelerator.gradient_accumulation_steps if scale_wrt_gas else 1
            loss = loss + penalties.term(counted) * steps
        backward(loss, scale_wrt_gas=scale_wrt_gas, **kwargs)

    def with_parts(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= penalties.read()
        log(logs, *args, **kwargs)

    def clipping(*args: Any, **kwargs: Any) -> Any:
        state.check("gradients clipped")  # both are clipped together
        return clip(*args, **kwargs)

    state = PenaltyState(penalties, plan, trainer)
    clip, trainer.accelerator.clip_grad_norm_ = trainer.accelerator.clip_grad_norm_, clipping
    if zero := trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        backward, trainer.accelerator.backward = trainer.accelerator.backward, with_term
    trainer.training_step = counting
    trainer.log = with_parts
    trainer.add_callback(state)
    trainer.callback_handler.callbacks.insert(0, _Verdict(trainer, penalties, plan))  # trackers end with training
    return penalties


def tokens_of(inputs: Any) -> int:
    """Returns how many tokens a trainer's batch has; padding is left out, so that processes have what one has.

    Where the batch is of rows that are still to be written (GRPO) that is not known: 0.
    """
    if not isinstance(inputs, Mapping):
        return 0
    masks = [int(value.sum()) for name, value in inputs.items() if name.endswith("attention_mask")]
    return sum(masks) or sum(value.numel() for name, value in inputs.items() if name.endswith("input_ids"))


class _Verdict(TrainerCallback):
    """Says at the end of training what penalties hold: a row of the log with their values, and their conclusions."""

    def __init__(self, trainer: Any, penalties: Penalties, plan: Plan) -> None:
        self._trainer, self._penalties, self._plan = trainer, penalties, plan

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        row = self._penalties.value()
        self._trainer.log(dict(row))
        for sentence in conclusions(self._plan, row):
            _log.info("train: %s", sentence)


class PenaltyState(TrainerCallback, ExportableState):
    """Keeps what penalties change while training in the trainer's checkpoints, and sees that they count once a step.

    A step without them is refused before the optimiser takes it.
    """

    def __init__(self, penalties: Any = None, plan: Any = None, trainer: Any = None) -> None:
        self.penalties, self._plan, self._trainer, self._key = penalties, plan, trainer, plan and plan.key
        self._optimizer: Any = None
        self._seen, self._stepped = 0, False

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"args": {}, "attributes": {"kept": self.penalties.state() if self.penalties else {}, "plan": self._key}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Restores the state of the checkpoint that training goes on from; a TrainError says that it has none."""
        if self.penalties is None:
            raise TrainError(
                "train.restore_callback_states_from_checkpoint",
                got="true",
                wanted="false: keeptune's callbacks restore themselves",
                next_step="Leave it out.",
            )
        self._seen, self._stepped = self.penalties.taken, False  # training may have been interrupted within a step
        optimizer = getattr(self._trainer.optimizer, "optimizer", self._trainer.optimizer)
        if isinstance(optimizer, torch.optim.Optimizer) and optimizer is not self._optimizer:
            optimizer.register_step_pre_hook(lambda *_: self.check("an optimiser step", steps=True))
            self._optimizer = optimizer
        if state.global_step == 0:
            state.stateful_callbacks[type(self).__name__] = self.state()  # it may be added as training begins
            return
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes")
        if kept is None or kept.get("plan", self._key) != self._key:
            raise TrainError(
                f"checkpoint of step {state.global_step}",
                got="no state of the penalties" if kept is None else "the state of another plan's penalties",
                wanted="a checkpoint of a run with these penalties",
                next_step="Train from the start, in another output folder.",
            )
        self.penalties.restore(kept["kept"])

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Counts a step, which the optimiser may have left out, as under a ``GradScaler``."""
        self.check("an optimiser step")
        self._seen, self._stepped = self._seen + 1, False

    def check(self, what: str, *, steps: bool = False) -> None:
        """Raises TrainError unless penalties were added to the gradients once, and no optimiser has stepped since."""
        counted = self.penalties.taken - self._seen
        if counted != 1 or (steps and self._stepped):
            raise TrainError(
                f"training step {self._seen + 1}",
                got=f"{what} {'more than once with' if counted else 'without'} the penalties "
                + ", ".join(penalty.name for penalty in self._plan.penalties),
                wanted="a trainer whose loop calls training_step and ends each step at its last micro-batch",
                next_step="Use another trainer, or call keeptune.Penalties.step in a loop of your own.",
            )
        self._stepped |= steps


def _gradients(
    target_plan: TargetPlan, held: Mapping[TensorName, Held], terms: Mapping[int, Term], values: list[dict[str, Tensor]]
) -> dict[TensorName, Tensor]:
    """Sums the gradients of a target's terms, within its rows, and records their values."""
    factors = _values(held) if terms else {}
    summed: dict[TensorName, Tensor] = {}
    for index, term in terms.items():
        values[index][target_plan.target.name], gradients = term(factors)
        for factor, gradient in gradients.items():
            if held[factor].parameter.requires_grad:
                summed[factor] = summed[factor] + gradient if factor in summed else gradient
    return {factor: within_rows(target_plan, factor, gradient) for factor, gradient in summed.items()}


def _values(held: Mapping[TensorName, Held]) -> dict[TensorName, Tensor]:
    return {factor: part.of(full(part.parameter.detach())).float() for factor, part in held.items()}


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Adds to ``.grad``; every process has the whole gradient, and keeps its shard."""
    gradient = gradient.to(parameter.dtype if parameter.grad is None else parameter.grad.dtype)
    gradient = sharded_like(gradient, parameter)
    if parameter.grad is None:
        parameter.grad = gradient.contiguous()
    else:
        parameter.grad.add_(gradient)


class _On(Mapping[str, Tensor]):
    """Tensors on a device, moved when first read; ``shared`` are those that change in training, for all devices."""

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device, shared: Mapping[str, Tensor]) -> None:
        self.tensors, self.device = tensors, device
        self.moved: dict[str, Tensor] = dict(shared)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.moved:
            self.moved[name] = self.tensors[name].to(self.device)
        return self.moved[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
