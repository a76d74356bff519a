"""STM: Wu et al., Mitigating Forgetting in LLM Fine-Tuning via Low-Perplexity Token Learning, NeurIPS 2025, 2501.14315.

    x_i is learned     if 1 / p_base(x_i | x_<i) <= threshold                 2.5 in the paper                  (1)

A mask, not a loss: once before training, the base reads what is trained on, replay too, and tokens that it takes for
unlikely are not learned. They are still read, and are not among the tokens that the loss is a mean of.
"""

import logging
import math
from collections.abc import Sequence
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
from keeptune.core.processes import by_first, is_first
from keeptune.data.calibration import Calibration
from keeptune.model.blocks import positions
from keeptune.model.runner import arguments_of

_log = logging.getLogger(__name__)


def stm(model: Any, dataset: Dataset, threshold: float = 2.5, *, kept: Path | None = None) -> Dataset:
    """Returns a dataset in which tokens of a perplexity above a threshold are not learned.

    Laws: no token is learned that was not; at infinity all stay; what a text says does not depend on the others.

    Args:
        model: The base, or the model as it starts.
        dataset: ``input_ids`` and ``labels``, -100 where nothing is learned, as SFTTrainer takes them.
        threshold: The highest perplexity of a token that is learned, 1 or more.
        kept: A JSON file for the places of the masked tokens, read where it is there.

    Raises:
        DataError: No token is left, or a text is longer than the model's positions.
    """
    learned = [[i for i, label in enumerate(labels) if label != -100] for labels in dataset["labels"]]

    def chosen() -> list[list[int]]:
        if kept is not None and kept.is_file():
            found: list[list[int]] = read_json(kept)["places"]
            return found
        nats, most = _nats(model, dataset["input_ids"]), math.log(threshold)
        rows = zip(dataset["input_ids"], learned, strict=True)
        return [[i for i in own if nats[tuple(ids)][i] > most] for ids, own in rows]

    places = by_first(chosen)
    masked, before = (sum(map(len, those)) for those in (places, learned))
    _log.info("stm: %d of %d tokens have a perplexity above %g and are not learned", masked, before, threshold)
    if masked == before:
        raise _error(
            f"{threshold:g}, below the perplexity of all {before} tokens", "one above some of them", "Raise it."
        )
    if kept is not None and is_first():
        write_json(kept, {"threshold": threshold, "tokens": before, "masked": masked, "places": places})
    hidden = [frozenset(own) for own in places]
    both = zip(dataset["labels"], hidden, strict=True)
    left = [[-100 if i in own else label for i, label in enumerate(labels)] for labels, own in both]
    return dataset.remove_columns("labels").add_column("labels", left)


def _nats(model: Any, texts: Sequence[Sequence[int]]) -> dict[tuple[int, ...], Tensor]:
    """Computes -log p of each token of each text, float32; 0 for the first."""
    longest, most, found = max(map(len, texts)), positions(model), {}
    if most is not None and longest > most:
        raise _error(f"a text of {longest} tokens", f"at most {most}", "Cut it, or pack with packing_strategy bfd.")
    with torch.no_grad(), in_evaluation(model):
        for batch in tqdm(Calibration(tuple(map(tuple, texts)), 0).batches(1024), desc="stm", delay=2, disable=None):
            mask = batch.attention_mask.to(model.device)
            logits = model(**arguments_of(batch, mask)).logits
            for row, ids, length in zip(logits, batch.input_ids, batch.attention_mask.sum(dim=1).tolist(), strict=True):
                wanted = ids[1:length].to(row.device)
                nats = functional.cross_entropy(row[: length - 1].float(), wanted, reduction="none").cpu()
                found[tuple(ids[:length].tolist())] = functional.pad(nats, (1, 0))
    return found


def _error(got: str, wanted: str, next_step: str) -> DataError:
    return DataError("task.stm_threshold", got=got, wanted=wanted, next_step=next_step)
