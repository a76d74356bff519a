"""Losses of the task's tokens in TRL's SFTTrainer: the log-probabilities that it learns from are put in place of l_t.

SFTTrainer's fused head returns log p_t of the data's tokens without ever holding all logits, and TRL sums -log p_t,
divides by the number of tokens of the step and averages over processes. Here log p_t becomes -l_t on its way. A loss
that reads whole distributions computes them from the last hidden states, for a few tokens at a time, forth and back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from trl import SFTTrainer

from keeptune.adapter.trained_head import head_names, token_rows
from keeptune.core.errors import TrainError
from keeptune.core.eval_mode import in_evaluation
from keeptune.core.plan import Plan
from keeptune.training.losses.base import TaskLoss
from keeptune.training.output_passes import at_start

_AT_ONCE = 2**25  # logits at a time: 128 MiB in float32
_ALONE = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU}
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


def add_loss(trainer: Any, plan: Plan, loss: TaskLoss) -> None:
    """Has a trainer learn by a loss of the task's tokens (its class is not changed).

    Laws: n micro-batches of b examples give the step of one batch of n b, n processes that of one. ``loss`` in the logs
    is the mean of l_t, in evaluations too, and ``nll`` beside it that of -log p_t, in nats per token.

    Raises:
        TrainError: The trainer is not TRL's SFTTrainer or has a loss of its own, or the loss needs a pass through the
            model that the trainer's back-end or the method has no room for.
    """
    _refuse(trainer, plan, loss)
    compute, log, tokens = trainer.compute_loss, trainer.log, _Tokens(trainer, plan, loss)

    def with_loss(model: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(partial(tokens, model), *args, **kwargs)

    def with_nll(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            total, count = trainer.accelerator.gather(tokens.nll[None]).sum(dim=0).tolist()
            logs["nll"] = total / max(count, 1)
            tokens.nll.zero_()
        log(logs, *args, **kwargs)

    trainer.compute_loss, trainer.log = with_loss, with_nll


class _Tokens:
    """The model in the trainer's hands, whose outputs' ``log_probs`` are -l_t."""

    def __init__(self, trainer: Any, plan: Plan, loss: TaskLoss) -> None:
        self._model, self._plan, self._loss = trainer.model, plan, loss
        self._inner = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
        self._autocast: Callable[[], Any] = trainer.accelerator.autocast
        self._checked = False
        self.nll = torch.zeros(2, dtype=torch.float64, device=trainer.accelerator.device)

    def __call__(self, model: Any, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return model(**inputs)
        reads = self._loss.reads
        base = self._base(inputs) if reads == "base" else None
        seen: list[Tensor] = []
        hook = self._inner.base_model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
        try:
            outputs = model(**inputs)
        finally:
            hook.remove()
        mask, log_probs = outputs.label_mask, outputs.log_probs[outputs.label_mask]
        if self._model.training:
            self.nll += torch.stack([-log_probs.detach().double().sum(), mask.sum()]).to(self.nll)
        measured = log_probs
        if reads != "log_probs":
            labels = inputs["labels"][:, 1:].to(mask.device)[mask]
            measured = self._measured(seen[-1], mask, base, labels, log_probs.detach())
        losses = self._loss.losses(log_probs, measured)
        outputs.log_probs = torch.zeros_like(outputs.log_probs).masked_scatter(mask, -losses)
        return outputs

    def _base(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns the last hidden states of the model as it starts, and its output projection."""
        own = {name: value for name, value in inputs.items() if name not in ("labels", "fused_lm_head")}
        with torch.no_grad(), in_evaluation(self._model), at_start(self._model, self._plan), self._autocast():
            return self._inner.base_model(**own).last_hidden_state, self._inner.get_output_embeddings().weight.detach()

    def _measured(
        self, hidden: Tensor, mask: Tensor, base: tuple[Tensor, Tensor] | None, labels: Tensor, log_probs: Tensor
    ) -> Tensor:
        head = self._inner.get_output_embeddings().weight
        own, weight = (hidden.detach(), head.detach()) if base is None else (hidden, head)
        start, start_weight = (own, weight) if base is None else base
        states = [part[:, :-1].to(mask.device)[mask] for part in (own, start)]
        size = max(1, _AT_ONCE // head.shape[0])
        found = []
        with self._autocast():
            for state, first, label, wanted in zip(*(t.split(size) for t in (*states, labels, log_probs)), strict=True):
                if not self._checked and len(label):
                    self._check(self._answers(state.detach(), weight).gather(-1, label[:, None])[:, 0], wanted)
                found.append(checkpoint(self._chunk, state, weight, first, start_weight, use_reentrant=False))
        return torch.cat(found)

    def _chunk(self, state: Tensor, weight: Tensor, first: Tensor, start_weight: Tensor) -> Tensor:
        answers = self._answers(state, weight)
        return self._loss.measure(answers, answers if first is state else self._answers(first, start_weight))

    def _answers(self, state: Tensor, weight: Tensor) -> Tensor:
        """Returns log-probabilities ``(tokens, vocabulary)``, float32."""
        config = self._inner.config.get_text_config()
        logits = functional.linear(state, weight, self._inner.get_output_embeddings().bias).float()
        for name in _SCALES:
            logits = logits * (getattr(config, name, None) or 1.0)
        logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(dim=-1)

    @torch.no_grad()
    def _check(self, found: Tensor, wanted: Tensor) -> None:
        """Checks, once, that the distributions are the model's: log p_t of the data's tokens are those of TRL."""
        gap, size = (float(part.abs().mean()) for part in (found - wanted, wanted))
        if not gap <= 0.02 * (1 + size):
            raise TrainError(
                f"task.loss {self._loss.name}",
                got=f"log-probabilities {gap:.3g} nats away from the model's own: {type(self._inner).__name__} does "
                "more than a projection and a soft cap to its last hidden states",
                wanted="a model whose logits are a projection of its last hidden states",
                next_step="Take nll or dft, which need the log-probabilities of the data's tokens alone.",
            )
        self._checked = True


def _refuse(trainer: Any, plan: Plan, loss: TaskLoss) -> None:
    args, reads = trainer.args, loss.reads
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    beside = [*head_names(plan), *token_rows(plan)]
    for refused, got, wanted, next_step in (
        (
            not isinstance(trainer, SFTTrainer),
            f"a {type(trainer).__name__}",
            "TRL's SFTTrainer, whose loss is a sum over tokens",
            "Use SFTTrainer, or leave the loss out.",
        ),
        (
            args.label_smoothing_factor > 0,
            "train.label_smoothing_factor",
            "one of the two: smoothed labels have a loss of their own",
            "Leave one out.",
        ),
        (
            getattr(args, "loss_type", "nll") != "nll" or getattr(trainer, "compute_loss_func", None) is not None,
            "a loss of the trainer's own (train.loss_type or compute_loss_func)",
            "one loss",
            "Leave one out.",
        ),
        (
            parallel is not None and (parallel.sp_enabled or parallel.cp_enabled),
            "sequence or context parallelism",
            "whole sequences in each process",
            "Train without it, or with nll.",
        ),
        (
            reads != "log_probs" and trainer.accelerator.distributed_type not in _ALONE,
            "weights that are sharded over processes, which the loss reads beside the trainer's own pass",
            "a single process or DDP",
            "Take nll or dft.",
        ),
        (
            reads == "base" and plan.scope != "adapter",
            f"the method {plan.method}, which changes whole weights: no base is left to compare with",
            "a method that trains low-rank factors",
            "Take dft or eaft, or another method.",
        ),
        (
            reads == "base" and bool(beside),
            f"whole modules or rows of tokens trained beside the factors ({', '.join(beside)})",
            "a model whose start is the base once its first factors are put in",
            "Take dft or eaft, or train the factors alone.",
        ),
    ):
        if refused:
            raise TrainError(f"task.loss {loss.name}", got=got, wanted=wanted, next_step=next_step)
