"""Nodes that are suppressed: rows of down-projections whose outputs are zero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def without_nodes(model: PreTrainedModel, rows: Mapping[str, Sequence[int]]) -> Iterator[PreTrainedModel]:
    """Runs a model as if some rows of linear maps, by name, and their entries of the bias, were zero.

    Laws: these outputs are exactly zero; no rows change nothing; no weight is touched, and afterwards the model
    computes what it did.
    """
    with ExitStack() as stack:
        for name, own in rows.items():
            if own:
                hook = partial(_silence, rows=torch.tensor(list(own)))
                handle = model.get_submodule(name).register_forward_hook(hook)
                stack.callback(handle.remove)
        yield model


def _silence(module: nn.Module, given: object, output: Tensor, *, rows: Tensor) -> Tensor:
    """Not a product with a mask: zero times infinity is none."""
    return output.index_fill(-1, rows.to(output.device), 0)
