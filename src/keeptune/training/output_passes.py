"""Penalties on the model's answers: the passes they need, beside those of the trainer.

Gradients are taken with respect to the trained parameters by ``torch.autograd.grad``, which fires none of the hooks
that DDP averages gradients with. Each process runs its share of the texts, and the sums are added up here. Under FSDP2
gradients are had from a backward pass alone, as means over processes; all run as many passes as the others.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from keeptune.adapter.install import sharded_like, starting_values
from keeptune.adapter.trained_head import full
from keeptune.core.bootstrap import paired_interval
from keeptune.core.eval_mode import in_evaluation
from keeptune.core.plan import Plan
from keeptune.penalties.budget import allowed
from keeptune.penalties.kl import Kl, TextBatch, kl_and_slope

Gradients = dict[nn.Parameter, Tensor]  # float32; parameters are keys by identity


def add_gradients(total: Gradients, more: Gradients) -> None:
    """Adds gradients to a sum, in place."""
    for parameter, gradient in more.items():
        total[parameter] = total[parameter] + gradient if parameter in total else gradient


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Returns the norm of all together, also of those of which each process has a shard; all call it then."""
    return full(get_total_norm([*gradients]))


class Outputs:
    """A penalty on answers, on the installed model in training (not what wraps it)."""

    def __init__(self, penalty: Kl, model: PeftModel, plan: Plan) -> None:
        self.penalty, self._model, self._plan = penalty, model, plan

    def value_and_grad(self, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Gradients]:
        """Returns the value on the texts of this step and its gradient, given the penalty's own tensors.

        ``scale`` is what a ``GradScaler`` multiplies losses by, so that 16-bit gradients do not vanish on the way; the
        gradient is returned without it.
        """
        batch, weight = self.penalty.batch(tensors), self.penalty.weight(tensors)
        count = max(int(batch.learned.sum()), 1)
        trained = [p for p in self._model.parameters() if p.requires_grad]
        sharded = _is_sharded(trained)
        own = _share(batch, keep_one=sharded)
        value = torch.zeros((), device=batch.input_ids.device)
        gradients: list[Tensor | None] = [None] * len(trained)
        with in_evaluation(self._model):
            if len(own.input_ids):
                base = self._base(own)
                with torch.enable_grad():
                    logits = self._logits(own)
                    nats, slope = kl_and_slope(base, logits.detach())
                    slope = slope.mul_(scale / count).to(logits.dtype)
                    gradients = (_by_backward if sharded else _by_autograd)(logits, slope, trained)
                value = nats.sum() * (weight / count)
        own_gradients = {
            p: torch.zeros_like(full(p.detach()), dtype=torch.float32) if g is None else g.float() * (weight / scale)
            for p, g in zip(trained, gradients, strict=True)
        }
        return _together(value, own_gradients)

    def limited(self, tensors: Mapping[str, Tensor], gradients: Gradients, scale: float) -> Gradients:
        """Returns the gradients of a budget, limited by the task's in ``.grad``, which ``scale`` multiplies."""
        task = [p.grad for p in gradients if p.grad is not None]
        if self.penalty.budget is None or not task:
            return gradients
        pressure = self.penalty.weight(tensors) * self.penalty.budget
        taken = allowed(gradient_norm(gradients.values()) / pressure, gradient_norm(task).float() / scale)
        return {parameter: gradient * taken.to(gradient.device) for parameter, gradient in gradients.items()}

    def measured(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns the KL on all texts that are held out, nats per token, with its interval over the texts."""
        every = torch.cat([self._sums(batch) for batch in self.penalty.held_out(tensors)])
        total, tokens = every[every[:, 1] > 0].cpu().T.numpy()
        low, high = paired_interval(0 * total, total, 0, weights=tokens)
        return {"kl": float(total.sum() / tokens.sum()), "low": low, "high": high, "texts": float(len(tokens))}

    def due(self, tensors: Mapping[str, Tensor], tokens: int) -> bool:
        """Returns whether this step has a batch, given how many tokens of the task this process has passed in it."""
        if self.penalty.undecided(tensors):
            every = torch.tensor(tokens, device=next(self._model.parameters()).device)
            if dist.is_initialized():
                dist.all_reduce(every)
            self.penalty.choose(tensors, int(every))
        return self.penalty.weight(tensors) > 0

    def checked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the KL on some of the texts that are held out, where a budget asks for it."""
        batch = self.penalty.check(tensors)
        if batch is None:
            return {}
        nats, tokens = self._sums(batch).sum(dim=0)
        return {"held_out": nats / tokens.clamp_min(1)}

    @torch.no_grad()
    def _sums(self, batch: TextBatch) -> Tensor:
        """Returns the nats lost on each text, and its learned tokens, ``(texts, 2)``; processes divide the texts."""
        own = _share(batch, keep_one=_is_sharded(self._model.parameters()))
        (rank, world), sums = _process(), batch.input_ids.new_zeros(len(batch.learned), 2).double()
        if len(own.input_ids):
            with in_evaluation(self._model):
                nats, _ = kl_and_slope(self._base(own), self._logits(own))
            parts = torch.split(nats.double(), own.learned.sum(dim=1).tolist())
            for row, part in zip(range(rank, len(sums), world), parts, strict=False):
                sums[row, 0], sums[row, 1] = part.sum(), len(part)
        if world > 1:
            dist.all_reduce(sums)
        return sums

    def _logits(self, batch: TextBatch) -> Tensor:
        """Returns the logits at each learned place, ``(learned tokens, vocabulary)``."""
        logits: Tensor = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[:, :-1][batch.learned[:, 1:]]

    def _base(self, batch: TextBatch) -> Tensor:
        """Returns the log-probabilities of the base there."""
        with torch.no_grad(), at_start(self._model, self._plan):
            return self._logits(batch).float().log_softmax(dim=-1)


def _is_sharded(parameters: Iterable[nn.Parameter]) -> bool:
    return any(isinstance(parameter.data, DTensor) for parameter in parameters)


def _by_autograd(outputs: Tensor, slope: Tensor, trained: Sequence[nn.Parameter]) -> list[Tensor | None]:
    return list(torch.autograd.grad(outputs, trained, slope, allow_unused=True))


def _by_backward(outputs: Tensor, slope: Tensor, trained: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Returns the mean gradients of all processes, whole, and leaves ``.grad`` as it is."""
    before = [parameter.grad for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    torch.autograd.backward(outputs, slope)
    means = [parameter.grad for parameter in trained]
    for parameter, gradient in zip(trained, before, strict=True):
        parameter.grad = gradient
    return [g if g is None else full(g) for g in means]


def _process() -> tuple[int, int]:
    """Returns this process's number, and how many there are, also under a launcher of the user's own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _share(batch: TextBatch, *, keep_one: bool) -> TextBatch:
    """Returns this process's texts of a batch; where it has none, on demand one of which nothing counts."""
    rank, world = _process()
    rows, learned = slice(rank, None, world), batch.learned
    if keep_one and rank >= len(learned):
        rows, learned = slice(1), torch.zeros_like(learned)
    return TextBatch(batch.input_ids[rows], batch.attention_mask[rows], learned[rows])


def _together(value: Tensor, gradients: Gradients) -> tuple[Tensor, Gradients]:
    """Adds up the shares of all processes; means that all have are as many equal shares."""
    if not dist.is_initialized():  # one process, whose layers may be on several devices
        return value.float(), gradients
    flat = torch.cat([value.float().reshape(1), *(gradient.reshape(-1) for gradient in gradients.values())])
    dist.all_reduce(flat)
    parts = torch.split(flat[1:], [gradient.numel() for gradient in gradients.values()])
    return flat[0], {p: part.view(p.shape) for p, part in zip(gradients, parts, strict=True)}


def at_start(model: PeftModel, plan: Plan) -> AbstractContextManager[None]:
    """Puts the plan's first factors in, and then those in training again."""
    return holding(model, {p: start.to(p.device, p.dtype) for p, start in starting_values(model, plan).items()})


@contextmanager
def holding(model: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Gives parameters other values inside a ``with`` block."""
    sharded = _is_sharded(values)
    now = {parameter: parameter.detach().clone() if sharded else parameter.data for parameter in values}
    try:
        _put(model, values, sharded)
        yield
    finally:
        _put(model, now, sharded)


def _put(model: nn.Module, values: Mapping[nn.Parameter, Tensor], sharded: bool) -> None:
    """Gives parameters other values; shards get them in place, and what FSDP2 gathered of the old ones is freed."""
    for parameter, value in values.items():
        if sharded:
            with torch.no_grad():
                parameter.copy_(value if isinstance(value, DTensor) else sharded_like(value, parameter))
        else:
            parameter.data = value
    for module in model.modules() if sharded else ():
        if isinstance(module, FSDPModule):
            module.reshard()
