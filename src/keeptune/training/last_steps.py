"""The last step of an epoch, divided among processes, where no examples are left for some of them.

accelerate hands out the first examples once more then, which one process would not learn twice. Here those processes
get a row of which nothing is learned, so that the sum over the step's tokens, and their number, are those of one.
"""

import logging
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

_log = logging.getLogger(__name__)
_NOTHING = -100  # a label that is not learned


def fill_last_steps(trainer: Any, *, by_token: bool) -> None:
    """Has a trainer of several processes take the steps of one at the end of an epoch, or says that it cannot.

    Args:
        trainer: Before ``train()``; its dataset has ``labels``.
        by_token: Whether its loss is a sum over labels, divided by their number in the whole step.
    """
    args, rows = trainer.args, trainer.train_dataset
    at_once = args.world_size * args.per_device_train_batch_size
    if args.world_size == 1 or len(rows) % at_once == 0:
        return
    if not by_token or args.dataloader_drop_last or args.train_sampling_strategy != "random":
        known = "the last step of an epoch has other examples than with one process"
        _log.warning("training: %d examples are no multiple of %d: %s", len(rows), at_once, known)
        return
    first = rows[0]
    blank = Dataset.from_list([first | {"labels": [_NOTHING] * len(first["labels"])}], features=rows.features)
    trainer.train_dataset = concatenate_datasets([rows, blank])
    sampler_of, loader_of = trainer._get_train_sampler, trainer.get_train_dataloader
    trainer._get_train_sampler = lambda *_: sampler_of(rows)

    def filled() -> Any:
        loader = loader_of()
        batches = loader.batch_sampler.batch_sampler  # inside that of one process
        batches.sampler = _Filled(batches.sampler, at_once, len(rows))
        return loader

    trainer.get_train_dataloader = filled


class _Filled(Sampler[int]):
    """The numbers of another sampler, and one number to fill them up to a multiple."""

    def __init__(self, of: Any, multiple: int, number: int) -> None:
        self._of, self._more, self._number = of, -len(of) % multiple, number

    def __iter__(self) -> Iterator[int]:
        yield from self._of
        yield from [self._number] * self._more

    def __len__(self) -> int:
        return len(self._of) + self._more
