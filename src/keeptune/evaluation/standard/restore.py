"""Restores a process and a model: lm-eval sets seeds, loggers, variables and models as it likes."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import PreTrainedModel

from keeptune.core.errors import RecipeError

INSTALL = 'pip install "keeptune[benchmarks]"'
_NOISY = ("lm_eval", "datasets", "httpx", "absl")


def engine_version(where: str) -> str:
    """Returns the version of lm-eval.

    Raises:
        RecipeError: It is not installed.
    """
    try:
        return str(importlib.import_module("lm_eval").__version__)
    except ModuleNotFoundError as error:
        raise RecipeError(
            where,
            got=f"a standard benchmark, without lm-eval ({error})",
            wanted="the library that runs it",
            next_step=f"Run `{INSTALL}`.",
        ) from error


@contextmanager
def restored_process(where: str) -> Iterator[None]:
    """Restores random number generators, environment, loggers and progress bars; silences lm-eval meanwhile.

    Raises:
        RecipeError: lm-eval is not installed.
    """
    engine_version(where)
    import datasets
    import lm_eval.api.task

    python, numpy_state = random.getstate(), np.random.get_state()
    root = logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in _NOISY}
    shown, no_bar = datasets.is_progress_bar_enabled(), mock.patch.object(lm_eval.api.task, "tqdm", lambda i, **_: i)
    datasets.disable_progress_bars()
    try:
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)
        with mock.patch.dict(os.environ), torch.random.fork_rng(range(torch.cuda.device_count())), no_bar:
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        for name, own in levels.items():
            logging.getLogger(name).setLevel(own)
        root.handlers[:] = handlers
        random.setstate(python)
        np.random.set_state(numpy_state)


@contextmanager
def restored_model(model: PreTrainedModel, ends: frozenset[int] = frozenset()) -> Iterator[None]:
    """Keeps lm-eval from tying weights, and restores generation settings; meanwhile ``ends`` end texts too."""
    own: Any = model.generation_config
    # Weights that were trained apart would be tied again.
    with mock.patch.object(model, "tie_weights", lambda *_, **__: None):
        model.generation_config = copy.deepcopy(own)
        if ends:
            named = own.eos_token_id
            listed = named if isinstance(named, list) else [named]
            model.generation_config.eos_token_id = sorted(ends | {token for token in listed if token is not None})
        try:
            yield
        finally:
            model.generation_config = own


@contextmanager
def seeded_langdetect() -> Iterator[None]:
    """Seeds langdetect, which IFEval's checks use and which draws without a seed."""
    detect: Any = sys.modules.get("langdetect")
    with nullcontext() if detect is None else mock.patch.object(detect.DetectorFactory, "seed", 0):
        yield
