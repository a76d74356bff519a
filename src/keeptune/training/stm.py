"""STM: Wu et al., Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token Learning, NeurIPS 2025, 2501.14315.

    x_i is learned     if 1 / p_base(x_i | x_<i) <= threshold                 2.5 in the paper                  (1)

A mask, not a loss: once before training, the base reads what is trained on, replay too, and tokens that it takes for
unlikely are not learned. They are still read, and are not among the tokens that the loss is a mean of.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from keeptune.core.artefact import read_json, write_json
from keeptune.core.errors import DataError
from keeptune.core.eval_mode import in_evaluation
from keeptune.data.calibration import Calibration
from keeptune.model.blocks import positions
from keeptune.model.runner import arguments_of

_log = logging.getLogger(__name__)


def stm(model: Any, dataset: Dataset, threshold: float = 2.5, *, kept: Path | None = None) -> Dataset:
    """Returns a dataset in which tokens of a perplexity above a threshold are not learned.

    Laws: no token is learned that was not; at infinity all stay; what a text says does not depend on the others.

    Args:
        model: The base, or the model as it starts.
        dataset: ``input_ids`` and ``labels``, -100 where nothing is learned, of which no text is longer than the model
            reads; as SFTTrainer takes them.
        threshold: The highest perplexity of a token that is learned, 1 or more.
        kept: A JSON file for the places of the masked tokens, read where it is there.

    Raises:
        DataError: No token is left.
    """
    if kept is None or not kept.is_file():
        longest, most = max(map(len, dataset["input_ids"])), positions(model)
        if most is not None and longest > most:
            raise DataError(
                "task.stm_threshold",
                got=f"a text of {longest} tokens",
                wanted=f"at most {most}, the positions of the base",
                next_step="Cut it, or pack with packing_strategy bfd.",
            )
        nats = token_nats(model, Calibration(tuple(map(tuple, dataset["input_ids"])), 0))
        places = [
            [i for i, label in enumerate(labels) if label != -100 and nats[tuple(ids)][i] > math.log(threshold)]
            for ids, labels in zip(dataset["input_ids"], dataset["labels"], strict=True)
        ]
    else:
        places = read_json(kept)["places"]
    before = sum(label != -100 for labels in dataset["labels"] for label in labels)
    masked = sum(map(len, places))
    _log.info("stm: %d of %d tokens have a perplexity above %g and are not learned", masked, before, threshold)
    if masked == before:
        raise DataError(
            "task.stm_threshold",
            got=f"{threshold:g}, below the perplexity of all {before} tokens that would be learned",
            wanted="a threshold under which some are",
            next_step="Raise it.",
        )
    if kept is not None:
        write_json(kept, {"threshold": threshold, "tokens": before, "masked": masked, "places": places})
    rows = zip(dataset["labels"], map(set, places), strict=True)
    left = [[-100 if i in hidden else label for i, label in enumerate(labels)] for labels, hidden in rows]
    return dataset.remove_columns("labels").add_column("labels", left)


def token_nats(model: Any, data: Calibration) -> dict[tuple[int, ...], Tensor]:
    """Returns -log p of each token of each text, float32; 0 for the first."""
    found = {}
    with torch.no_grad(), in_evaluation(model):
        for batch in tqdm(data.batches(1024), desc="stm", unit="batch", delay=2, disable=None, leave=False):
            mask = batch.attention_mask.to(model.device)
            logits = model(**arguments_of(batch, mask)).logits
            for row, ids, length in zip(logits, batch.input_ids, batch.attention_mask.sum(dim=1).tolist(), strict=True):
                nats = functional.cross_entropy(
                    row[: length - 1].float(), ids[1:length].to(row.device), reduction="none"
                )
                found[tuple(ids[:length].tolist())] = functional.pad(nats.cpu(), (1, 0))
    return found
