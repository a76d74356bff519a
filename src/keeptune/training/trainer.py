"""Training with TRL's SFTTrainer or Transformers' Trainer: Guard, checkpoints, resume after a kill."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig, SFTTrainer

from keeptune.adapter.special_layers import biases_are_no_shards
from keeptune.core.artefact import explain_full_disk
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.core.processes import by_first
from keeptune.data.examples import LanguageExamples, Lost, Mixed
from keeptune.data.labelled import LabelledExamples, collator
from keeptune.data.preferences import Preferences
from keeptune.model.head import sequence_losses
from keeptune.training.arguments import example_length
from keeptune.training.attach import attach
from keeptune.training.checkpoints import Checksums, go_on, last_complete_checkpoint
from keeptune.training.evaluations import Evaluations, add_evaluations, evaluated
from keeptune.training.last_steps import fill_last_steps
from keeptune.training.losses.base import TaskLoss, loss_named
from keeptune.training.losses.sdft import Sdft
from keeptune.training.packing import refuse_leaks
from keeptune.training.preference_trainers import judged_trainer, refer
from keeptune.training.self_distillation import refuse_sdft, sdft_trainer, teach
from keeptune.training.sharding import shard_anywhere, shard_blocks
from keeptune.training.stm import stm
from keeptune.training.zero import refuse_other_states

_log = logging.getLogger(__name__)
STM = "stm.json"  # beside the checkpoints
_CURVE = ("step", "loss", "nll", "learning_rate", "penalty", "penalty_grad_norm")


@dataclass(frozen=True)
class Beside:
    """What training has beside a task and its loss."""

    stm_threshold: float | None = None  # the highest perplexity of a token that is learned (training/stm.py)
    evaluations: Evaluations | None = None


_NOTHING = Beside()


def train(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    examples: LanguageExamples | LabelledExamples,
    config: SFTConfig,
    loss: str | TaskLoss = "nll",
    beside: Beside = _NOTHING,
) -> list[dict[str, float]]:
    """Trains an installed model on a task, from the last checkpoint that is whole if there is one.

    Args:
        model: From :func:`keeptune.adapter.install.install`; trained in place, a classifier with its own dropout.
        plan: The plan that was installed.
        tokenizer: The tokenizer.
        examples: The task: completions for a language model, labels or scores for a classifier.
        config: From :func:`keeptune.training.arguments.sft_config`; its ``output_dir`` holds the checkpoints. A
            classifier uses ``max_length`` and the fields of ``TrainingArguments``.
        loss: What a language model learns of each token, as of :func:`keeptune.training.attach.attach`.
        beside: What training has beside these.

    Returns:
        The loss curve: ``{"step": .., "loss": .., "learning_rate": ..}`` per logged step, without any penalty: nats
        per token, or the mean over examples of the cross-entropy (nats) or the squared error. Penalties and the
        drift of each layer have keys of their own, as has ``nll`` where the loss is another. After it the evaluations,
        ``{"step": .., "eval_forgetting": ..}``.

    Raises:
        TrainError: A frozen factor would be trained, the loss is not finite, or the arguments do not fit the trainer.
        DataError: Of no example anything is learned within ``max_length``.
    """
    folder = Path(config.output_dir)
    resume = by_first(lambda: last_complete_checkpoint(folder))
    if resume is not None:
        _log.info("training: going on from %s", resume)
    trainer = _trainer(model, plan, tokenizer, examples, config, loss, beside)
    if resume is not None:
        refuse_other_states(trainer, resume)
    with explain_full_disk(folder), biases_are_no_shards():
        trainer.train() if resume is None else go_on(trainer, resume)
    log = trainer.state.log_history
    return loss_curve(log, plan) + evaluated(log)


def loss_curve(log: Sequence[Mapping[str, float]], plan: Plan) -> list[dict[str, float]]:
    """Returns the loss curve of :func:`train`, given the log of a trainer that has ended."""
    rows = [_point(row) for row in log if "loss" in row]
    if rows and plan.penalties:  # the last row is that of the verdict
        rows[-1] |= {key: value for key, value in log[-1].items() if key.startswith("held_out/")}
    return rows


def _trainer(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    examples: LanguageExamples | LabelledExamples,
    config: SFTConfig,
    loss: str | TaskLoss = "nll",
    beside: Beside = _NOTHING,
) -> Any:
    task = examples.parts[0] if isinstance(examples, Mixed) else examples
    judged = isinstance(task, Preferences)
    loss = loss_named(loss, {}) or "nll" if isinstance(loss, str) else loss
    refuse_sdft(loss, examples, config, beside.stm_threshold)
    dataset: Any = None
    lost: Lost = {}
    if not isinstance(loss, Sdft):
        dataset, lost = (task if judged else examples).dataset(tokenizer, example_length(config))
    for reason, numbers in lost.items():
        some = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        _log.warning("training: %d of %d examples are %s (rows %s)", len(numbers), len(examples), reason, some)
    if beside.stm_threshold is not None:
        dataset = stm(model, dataset, beside.stm_threshold, kept=Path(config.output_dir) / STM)
    kind, parts = _classifier_parts(tokenizer, examples, config) if isinstance(examples, LabelledExamples) else _SFT
    if judged:
        kind, parts = judged_trainer, {"examples": examples}
    if isinstance(loss, Sdft):
        kind, parts = sdft_trainer, {"loss": loss, "examples": examples}
    shard_anywhere(config)
    strategy = config.eval_strategy
    if beside.evaluations is not None:  # benchmarks have their own data
        config.eval_strategy = IntervalStrategy.NO
    config._n_gpu = min(config.n_gpu, 1)  # else Trainer copies the model to all GPUs that it sees (nn.DataParallel)
    try:
        with explain_full_disk(Path(config.output_dir)):
            trainer = kind(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, **parts)
    except (TypeError, ValueError) as error:
        name = "Trainer" if kind is Trainer else f"TRL's {type(config).__name__.removesuffix('Config')}Trainer"
        raise TrainError(
            "train", got=str(error), wanted=f"arguments that {name} can train with", next_step="Correct them."
        ) from error
    shard_blocks(trainer, plan)
    attach(trainer, plan, "nll" if isinstance(loss, Sdft) else loss)
    if beside.evaluations is not None:
        trainer.args.eval_strategy = strategy
        add_evaluations(trainer, beside.evaluations)
    if judged:
        refer(trainer)
    if isinstance(loss, Sdft):
        teach(trainer, loss)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Checksums())
    if getattr(config, "packing", False):
        by_first(lambda: refuse_leaks(trainer))  # under FSDP2 the others may have no weights yet
    fill_last_steps(trainer, by_token=kind is SFTTrainer)
    return trainer


_SFT: tuple[Callable[..., Any], Mapping[str, Any]] = (SFTTrainer, {})


def _classifier_parts(
    tokenizer: PreTrainedTokenizerBase, examples: LabelledExamples, config: SFTConfig
) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    smoothing = config.label_smoothing_factor
    if smoothing and not examples.names:
        raise TrainError(
            "train.label_smoothing_factor",
            got=str(smoothing),
            wanted="none for scores, which have no classes to smooth over",
            next_step="Leave it out, or set task.kind: classification.",
        )
    return Trainer, {"data_collator": collator(tokenizer), "compute_loss_func": _loss(smoothing)}


def _loss(smoothing: float) -> Callable[..., Tensor]:
    # The models' own loss is the mean of a micro-batch; accumulated, Trainer would add these up undivided.
    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        losses = sequence_losses(outputs["logits"], labels, smoothing)
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    return mean


def _point(row: Mapping[str, float]) -> dict[str, float]:
    prefixes = ("penalty/", "drift/", "kl_", "multiplier", "rewards/", "replay_loss", "completions/mean_l")
    return {key: row[key] for key in _CURVE if key in row} | {
        key: value for key, value in row.items() if key.startswith(prefixes)
    }
