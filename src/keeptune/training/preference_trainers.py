"""TRL's DPO and KTO trainers with the base as the reference: the model as it is installed, whatever its anchor.

With replay, of N judged examples and the texts t of knowledge beside them in a batch,

    L = (sum of TRL's losses + sum over t of the mean loss of t's tokens) / N.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import DPOTrainer, KTOTrainer

from keeptune.core.errors import TrainError
from keeptune.data.calibration import Calibration, pad_id_of
from keeptune.data.examples import LanguageExamples, Mixed, TokenRow
from keeptune.data.preferences import Preferences
from keeptune.training.output_passes import holding


class Start(nn.Module):
    """The model with its trained parameters as they are now: they are put in for the time of a pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self._of = model.config, (model,)  # in a tuple, the model is no part of this one
        self.values = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}

    def forward(self, **inputs: Any) -> Any:
        """Runs the model as it was."""
        if self.values.keys() != {p for p in self._of[0].parameters() if p.requires_grad}:
            raise TrainError(
                "task.kind",
                got="a back-end that replaces parameters",
                wanted="a single process or DDP, in which the reference is the model with its first parameters",
                next_step="Train without FSDP and DeepSpeed.",
            )
        with holding(self._of[0], self.values):
            return self._of[0](**inputs)


def judged_trainer(examples: LanguageExamples, *, model: Any, args: Any, **parts: Any) -> Any:
    """Returns TRL's trainer of judged examples, or of such with knowledge among them; :func:`refer` comes next."""
    task = examples.parts[0] if isinstance(examples, Mixed) else examples
    assert isinstance(task, Preferences)
    none = nn.Module()  # without a reference TRL would add an adapter, or load the base again
    none.config = model.config
    trainer = (KTOTrainer if task.good else DPOTrainer)(model=model, ref_model=none, args=args, **parts)
    if isinstance(examples, Mixed):
        tokenizer = parts["processing_class"]
        _replay(trainer, _beside(examples, tokenizer, args.max_length), pad_id_of(tokenizer))
    return trainer


def refer(trainer: Any) -> None:
    """Makes the model as it is now the reference of a trainer, once its parameters are what training starts from."""
    trainer.ref_model = Start(trainer.model)


def _beside(mixed: Mixed, tokenizer: PreTrainedTokenizerBase, length: int | None) -> dict[int, list[TokenRow]]:
    """Returns of each judged example the texts of knowledge that come after it, before the next."""
    found: dict[int, list[TokenRow]] = {}
    last = 0
    for (part, index), row in zip(mixed.order, mixed.token_rows(tokenizer), strict=True):
        if part == 0:
            last = index
        elif any(row.learned[1:length]):
            found.setdefault(last, []).append(TokenRow(row.ids[:length], row.learned[:length]))
    return found


def _replay(trainer: Any, beside: Mapping[int, Sequence[TokenRow]], pad: int) -> None:
    """Adds the loss of the knowledge beside the examples of each batch."""
    compute, collate = trainer.compute_loss, trainer.data_collator

    def with_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**collate(rows), "row": torch.tensor([row["row"] for row in rows])}

    def with_knowledge(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = inputs.pop("row").tolist()
        loss = compute(model, inputs, *args, **kwargs)
        texts = [text for row in rows for text in beside.get(row, ())]
        if not texts:
            return loss
        data = Calibration(tuple(text.ids for text in texts), pad, tuple(text.learned for text in texts))
        (batch,) = data.batches(len(texts) * max(len(text.ids) for text in texts))
        assert batch.loss_mask is not None
        learned = batch.loss_mask[:, 1:].to(loss.device)
        labels = batch.input_ids.masked_fill(batch.loss_mask == 0, -100).to(loss.device)
        ids, mask = batch.input_ids.to(loss.device), batch.attention_mask.to(loss.device)
        found = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
        losses = -found.log_probs.sum(dim=1) / learned.sum(dim=1)
        trainer._metrics["train"]["replay_loss"].append(losses.mean().item())
        return loss + losses.sum() / len(rows)

    trainer._set_signature_columns_if_needed()
    trainer._signature_columns.append("row")
    trainer.data_collator, trainer.compute_loss = with_rows, with_knowledge
