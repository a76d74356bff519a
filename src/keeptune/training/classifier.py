"""Training a sequence classifier with Transformers' Trainer: arguments, checkpoints and Guard as for completions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer
from trl import SFTConfig

from keeptune.core.artefact import explain_full_disk
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.data.labelled import LabelledExamples, collator
from keeptune.model.head import sequence_losses
from keeptune.training.attach import attach
from keeptune.training.trainer import fit

__all__ = ["train_classifier"]

_log = logging.getLogger(__name__)


def train_classifier(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    examples: LabelledExamples,
    config: SFTConfig,
) -> list[dict[str, float]]:
    """Train an installed classifier on labels or scores, going on from the last checkpoint if there is one.

    Args:
        model: From :func:`keeptune.adapter.install.install`; trained in place, with the dropout of its config.
        plan: The plan that was installed.
        tokenizer: The tokenizer.
        examples: The task.
        config: From :func:`keeptune.training.trainer.sft_config`, of which ``max_length`` and what it has from
            ``TrainingArguments`` are used; its ``output_dir`` holds the checkpoints.

    Returns:
        The loss curve: ``{"step": .., "loss": .., "learning_rate": ..}`` per logged step, mean over examples of
        the cross-entropy (nats) or the squared error.

    Raises:
        TrainError: A frozen factor would be trained, the loss is not finite, or ``Trainer`` cannot train with
            these arguments.
        ArtefactError: The disk is full.
    """
    return fit(lambda: _trainer(model, plan, tokenizer, examples, config), Path(config.output_dir))


def _trainer(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    examples: LabelledExamples,
    config: SFTConfig,
) -> Any:
    dataset, cut = examples.dataset(tokenizer, config.max_length)
    if cut:
        _log.warning("training: %d of %d examples are cut to %d tokens", cut, len(dataset), config.max_length)
    if config.label_smoothing_factor and not examples.names:
        raise TrainError(
            "train.label_smoothing_factor",
            got=str(config.label_smoothing_factor),
            wanted="none for scores, which have no classes to smooth over",
            next_step="Leave it out, or set task.kind: classification.",
        )
    try:
        with explain_full_disk(Path(config.output_dir)):
            trainer = Trainer(
                model=model,
                args=config,
                train_dataset=dataset,
                data_collator=collator(tokenizer),
                processing_class=tokenizer,
                compute_loss_func=_loss(config.label_smoothing_factor),
            )
    except (TypeError, ValueError) as error:
        raise TrainError(
            "train", got=str(error), wanted="arguments that Trainer can train with", next_step="Correct them."
        ) from error
    attach(trainer, plan)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _loss(smoothing: float) -> Callable[..., Tensor]:
    # The models' own loss is the mean of a micro-batch; accumulated, Trainer would add these up undivided.
    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        losses = sequence_losses(outputs["logits"], labels, smoothing)
        return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch

    return mean
