"""Losses of the task's tokens in TRL's SFTTrainer: the log-probabilities that it learns from are put in place of l_t.

SFTTrainer's fused head returns log p_t of the data's tokens without ever holding all logits, and TRL sums -log p_t,
divides by the number of tokens of the step and averages over processes. Here log p_t becomes -l_t on its way. A loss
that reads whole distributions computes them from the last hidden states, for a few tokens at a time, forth and back.
"""

from collections.abc import Mapping, Sequence
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

AT_ONCE = 2**25  # logits at a time: 128 MiB in float32
_ONE = "Leave one of the two out."
_ALONE = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU}


def add_loss(trainer: Any, plan: Plan, loss: TaskLoss) -> None:
    """Has a trainer learn by a loss of the task's tokens (its class is not changed).

    Laws: n micro-batches of b examples give the step of one batch of n b, n processes that of one. ``loss`` in the logs
    is the mean of l_t, in evaluations too, and ``nll`` beside it that of -log p_t, in nats per token.

    Raises:
        TrainError: The trainer is not TRL's SFTTrainer or has a loss of its own, or the loss needs a pass through the
            model that the trainer's back-end or the method has no room for.
    """
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    sharded = loss.reads != "log_probs" and trainer.accelerator.distributed_type not in _ALONE
    _refuse(
        loss,
        (loss.reads == "own texts", "a trainer that is made already", "Set it in a recipe, which takes SDFTTrainer."),
        (not isinstance(trainer, SFTTrainer), f"a {type(trainer).__name__}", "Use TRL's SFTTrainer."),
        (trainer.compute_loss_func is not None, "a compute_loss_func beside it", _ONE),
        (parallel is not None and (parallel.sp_enabled or parallel.cp_enabled), "sequences in parts", "Take nll."),
        (sharded, "weights in parts (FSDP, DeepSpeed)", "Take dft, a single process or DDP."),
    )
    refuse_loss(loss, trainer.args, plan.method, plan.scope, [*head_names(plan), *token_rows(plan)])
    compute, log, tokens = trainer.compute_loss, trainer.log, _Tokens(trainer, plan, loss)

    def with_loss(model: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(partial(tokens, model), *args, **kwargs)

    def with_nll(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            sums = trainer.accelerator.gather(tokens.nll.float().to(trainer.accelerator.device))
            total, count = sums.view(-1, 2).double().sum(dim=0).tolist()
            logs["nll"] = total / max(count, 1)
            tokens.nll.zero_()
        log(logs, *args, **kwargs)

    trainer.compute_loss, trainer.log = with_loss, with_nll


class _Tokens:
    """The model in the trainer's hands, whose outputs' ``log_probs`` are -l_t."""

    def __init__(self, trainer: Any, plan: Plan, loss: TaskLoss) -> None:
        self._model, self._plan, self._loss = trainer.model, plan, loss
        self._inner = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
        self._autocast, self._checked = trainer.accelerator.autocast, False
        self.nll = torch.zeros(2, dtype=torch.float64)  # the sum, and of how many tokens

    def __call__(self, model: Any, **inputs: Any) -> Any:
        if not inputs.get("fused_lm_head"):
            return model(**inputs)
        start = self._start(inputs) if self._loss.reads == "base" else None
        seen: list[Tensor] = []
        hook = self._inner.base_model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
        try:
            outputs = model(**inputs)
        finally:
            hook.remove()
        mask, log_probs = outputs.label_mask, outputs.log_probs[outputs.label_mask]
        if self._model.training:
            self.nll += torch.stack([-log_probs.detach().cpu().double().sum(), mask.sum().cpu()])
        if self._loss.reads == "log_probs":
            losses = self._loss.losses(log_probs, log_probs, log_probs)
        else:
            now = (seen[0].detach() if start is None else seen[0])[:, :-1].to(mask.device)[mask]
            first = now if start is None else start[:, :-1].to(mask.device)[mask]
            with self._autocast():
                losses = self._of_states(log_probs, now, first, inputs["labels"][:, 1:].to(mask.device)[mask])
        outputs.log_probs = torch.zeros_like(outputs.log_probs).masked_scatter(mask, -losses)
        return outputs

    def _start(self, inputs: Mapping[str, Any]) -> Tensor:
        """Computes the last hidden states of the model as it starts."""
        own = {name: value for name, value in inputs.items() if name not in ("labels", "fused_lm_head")}
        with torch.no_grad(), in_evaluation(self._model), at_start(self._model, self._plan), self._autocast():
            hidden: Tensor = self._inner.base_model(**own).last_hidden_state
        return hidden

    def _of_states(self, log_probs: Tensor, now: Tensor, start: Tensor, labels: Tensor) -> Tensor:
        """Computes l_t, some tokens at a time; distributions are not kept, but computed again in the backward pass."""
        size = max(1, AT_ONCE // self._inner.get_output_embeddings().weight.shape[0])
        if not self._checked and len(labels):
            self._check(now[:size].detach(), labels[:size, None], log_probs[:size].detach())

        def losses(own: Tensor, state: Tensor, first: Tensor) -> Tensor:
            answers = self._answers(state)
            return self._loss.losses(own, answers, answers if now is start else self._answers(first))

        parts = zip(*(torch.split(values, size) for values in (log_probs, now, start)), strict=True)
        return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])

    def _answers(self, states: Tensor) -> Tensor:
        """Computes log-probabilities ``(tokens, vocabulary)``, float32."""
        head, config = self._inner.get_output_embeddings(), self._inner.config.get_text_config()
        logits = functional.linear(states, head.weight, head.bias).float()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return (logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)).log_softmax(dim=-1)

    @torch.no_grad()
    def _check(self, states: Tensor, labels: Tensor, wanted: Tensor) -> None:
        """Checks log p_t of the data's tokens against TRL's once, so that distributions are the model's."""
        gap = float((self._answers(states).gather(-1, labels)[:, 0] - wanted).abs().mean())
        if not gap <= 0.02 * (1 + float(wanted.abs().mean())):
            raise TrainError(
                f"task.loss {self._loss.name}",
                got=f"logits of {type(self._inner).__name__} that are not known here: {gap:.3g} nats away",
                wanted="a projection of the last hidden states, but for a scale and a soft cap",
                next_step="Take nll or dft, which read the log-probabilities of the data's tokens alone.",
            )
        self._checked = True


def refuse_loss(loss: TaskLoss | None, args: Any, method: str, scope: str, beside: Sequence[str]) -> None:
    """Raises TrainError for a loss beside another in the fields of SFTConfig, or where a method leaves it no base."""
    if loss is None:
        return
    base = loss.reads == "base"
    _refuse(
        loss,
        (args.label_smoothing_factor > 0, "train.label_smoothing_factor beside it", _ONE),
        (getattr(args, "loss_type", "nll") != "nll", "train.loss_type beside it", _ONE),
        (base and scope != "adapter", f"the method {method}, which overwrites the base", "Take dft or eaft."),
        (base and bool(beside), f"{', '.join(beside)} trained beside the factors, in place", "Take dft or eaft."),
    )


def _refuse(loss: TaskLoss, *reasons: tuple[bool, str, str]) -> None:
    for refused, got, next_step in reasons:
        if refused:
            wanted = "TRL's sum over the tokens of whole texts" + (" and the base" if loss.reads == "base" else "")
            raise TrainError(f"task.loss {loss.name}", got=got, wanted=wanted, next_step=next_step)
