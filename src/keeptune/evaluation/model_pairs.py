"""A model before and after fine-tuning, the state it is put into while it is scored, and the base's answers on disk.

The answers are kept so that the runs of a comparison compute them once. Laws: what is read back equals what was
computed, bit for bit; a damaged file is computed again, never used.

Only answers that need the base alone are kept: generated texts and log-likelihoods. A benchmark that also measures
KL(base || tuned), a cross-entropy or one of the task, needs the logits of both: its base is run each time for that.
A classifier's base has a head drawn with the run's seed and is run each time as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import torch
from transformers import PreTrainedModel

from keeptune.core.artefact import as_written, content_key, read_json, write_json
from keeptune.core.errors import ArtefactError, ModelError
from keeptune.core.eval_mode import in_evaluation
from keeptune.core.locks import locked
from keeptune.core.processes import by_first, held_by_first, is_first
from keeptune.model.blocks import positions
from keeptune.model.head import Head
from keeptune.model.probes.block_calls import without_nodes

if TYPE_CHECKING:
    from peft import PeftModel

Side = Literal["before", "after"]
_log = logging.getLogger(__name__)
SIDES: tuple[Side, Side] = ("before", "after")
T = TypeVar("T")


class ModelPair(Protocol):
    """Two models of one vocabulary.

    Law: contexts are entered one at a time, many times, and leave the models as they were.
    """

    def before(self) -> AbstractContextManager[PreTrainedModel]:
        """The model as it was before fine-tuning."""

    def after(self) -> AbstractContextManager[PreTrainedModel]:
        """The model as it is after fine-tuning."""


@dataclass(frozen=True, slots=True)
class AdapterPair:
    """One model with an adapter: "before" is the model with the adapter off.

    This holds only if the weights under the adapter are the original ones. Where a method has subtracted its
    initial adapter from them, or trained biases or whole modules in place, use :class:`TwoModels`.

    Raises:
        ModelError: The adapter cannot be switched off: it is prompt learning, or trains biases.
    """

    peft_model: PeftModel

    def __post_init__(self) -> None:
        config: Any = self.peft_model.active_peft_config
        bias = getattr(config, "bias", "none")
        if config.is_prompt_learning or bias != "none":
            kind = "prompt learning" if config.is_prompt_learning else f"bias: {bias}"
            raise ModelError(
                "evaluate",
                got=f"an adapter with {kind}",
                wanted="an adapter that can be switched off to give the base model",
                next_step="Load the base model beside the tuned one and use TwoModels(base, tuned).",
            )

    @contextmanager
    def before(self) -> Iterator[PreTrainedModel]:
        """The transformers model inside the PEFT model, with the adapter off."""
        # PEFT switches gradients on for every adapter weight when it enables the adapter again.
        trained = [(weight, weight.requires_grad) for weight in self.peft_model.parameters()]
        try:
            with self.peft_model.disable_adapter():
                yield self._inner()
        finally:
            for weight, wanted in trained:
                weight.requires_grad_(wanted)

    def after(self) -> AbstractContextManager[PreTrainedModel]:
        """The transformers model inside the PEFT model, with the adapter on."""
        return nullcontext(self._inner())

    def _inner(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.peft_model.get_base_model())


@dataclass(frozen=True, slots=True)
class TwoModels:
    """Two models in memory: full fine-tuning, merged models; or one, with and without some rows of its linear maps."""

    base: PreTrainedModel
    tuned: PreTrainedModel
    silenced: Mapping[str, Sequence[int]] = field(default_factory=dict)  # of the tuned one, rows of maps that give zero

    def before(self) -> AbstractContextManager[PreTrainedModel]:
        """The base model."""
        return nullcontext(self.base)

    def after(self) -> AbstractContextManager[PreTrainedModel]:
        """The tuned model."""
        return without_nodes(self.tuned, self.silenced)


@contextmanager
def scoring(pair: ModelPair, side: Side) -> Iterator[PreTrainedModel]:
    """Yields one side of a pair in evaluation mode and without gradients; restores every module's mode."""
    with pair.before() if side == "before" else pair.after() as model, torch.no_grad(), in_evaluation(model):
        yield model


def of_both(pair: ModelPair, ask: Callable[[PreTrainedModel], T]) -> tuple[T, T]:
    """Returns what a function says of the model before, and of the one after."""
    with scoring(pair, "before") as model:
        before = ask(model)
    with scoring(pair, "after") as model:
        return before, ask(model)


def shared_positions(pair: ModelPair) -> int | None:
    """Returns how many tokens both models have positions for; None where neither has a limit."""
    return min((limit for limit in of_both(pair, positions) if limit is not None), default=None)


def head_of_base(pair: ModelPair) -> Head | None:
    """Returns the head of a classifier or a regression; None for a language model."""
    with scoring(pair, "before") as model:
        return Head.of(model)


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """A folder with the answers of one base, a file per benchmark."""

    folder: Path
    base: str  # names all that the answers depend on besides benchmark and tokens: weights and device

    def get(self, name: str, parts: Any, count: int, compute: Callable[[], list[T]]) -> list[T]:
        """Reads the base's answers, or computes and writes them; several runs compute them once.

        ``parts`` are what they depend on besides the base; ``compute`` runs it, and its answers are held as JSON.
        """
        key = content_key([self.base, parts])
        path = self.folder / f"{name}-{key[:16]}.json"
        with held_by_first(locked(path.with_suffix(".lock"))):
            answers: list[T] | None = by_first(lambda: _read(path, key, count))
            if answers is None:
                answers = compute()
                if is_first():
                    write_json(path, {"key": key, "answers": answers, "check": content_key(answers)})
            return answers


def _read(path: Path, key: str, count: int) -> list[T] | None:
    if not path.exists():
        return None
    reason = "its contents are not those of its key"
    try:
        with as_written(path):
            record = read_json(path)
            answers: list[T] = record["answers"]
            if record["key"] == key and len(answers) == count and record["check"] == content_key(answers):
                _log.info("evaluate: the base's answers taken from %s", path)
                return answers
    except ArtefactError as error:
        reason = str(error)
    _log.warning("evaluate: %s is damaged (%s); the base is run again", path, reason)
    return None
