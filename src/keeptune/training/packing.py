"""Packed examples must say what they say alone: checked on the model before it trains."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from keeptune.core.errors import TrainError
from keeptune.core.eval_mode import in_evaluation

_TOLERANCE = 0.02  # of the spread of the logits: far above rounding in 16 bits, far below another text's influence


def refuse_leaks(trainer: Any) -> None:
    """Refuses packing where a packed example sees another one.

    Law: the logits of each example in the first packed row are, to rounding, those of the example alone.

    Raises:
        TrainError: The packing strategy or the model's attention joins examples.
    """
    if trainer.args.packing_strategy == "wrapped":
        raise _refusal("packing_strategy wrapped, which puts examples behind each other without a border")
    rows = trainer.train_dataset
    packed = next((row for row in rows if len(row["seq_lengths"]) > 1), None)
    if packed is None:
        return
    batch = trainer.data_collator([packed])
    ends = torch.tensor(packed["seq_lengths"]).cumsum(0).tolist()
    at = ends[0], ends[1]  # the second example: the first sees nothing before it
    alone = {"input_ids": batch["input_ids"][:, slice(*at)]}
    together = _logits(trainer.model, {key: value for key, value in batch.items() if key != "labels"})[:, slice(*at)]
    single = _logits(trainer.model, alone)
    if float((together - single).abs().max()) > _TOLERANCE * float(single.max() - single.min()):
        raise _refusal(f"examples that see each other of a {trainer.model.config.model_type} model")


@torch.no_grad()
def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    with in_evaluation(model):
        logits: Tensor = model(**moved, use_cache=False).logits
    return logits.float()


def _refusal(got: str) -> TrainError:
    return TrainError(
        "train.packing",
        got=got,
        wanted="packed examples that say what they say alone",
        next_step="Set packing to false; packing_strategy bfd keeps examples apart where the attention can.",
    )
