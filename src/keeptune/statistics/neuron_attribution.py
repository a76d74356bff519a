"""The attribution of MLP nodes over many texts: LoKI's KVA, streamed to disk text by text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.core.artefact import content_key
from keeptune.core.errors import StatisticsError
from keeptune.core.target import Target
from keeptune.data.calibration import Batch, Calibration
from keeptune.model.probes.attribution import Attributor, Baseline, Integral, Positions, Rule, Score
from keeptune.model.runner import Labels
from keeptune.statistics.request import Accumulator, DataRole, PassKind, WeightReader
from keeptune.statistics.store import Source, StatStore

__all__ = [
    "Answer",
    "Attributions",
    "NeuronAttribution",
    "attribute_texts",
    "layer_profile",
    "places_of",
    "stored_attributions",
]

_log = logging.getLogger(__name__)
Answer = Literal["own", "gold"]


@dataclass(frozen=True, slots=True)
class NeuronAttribution:
    """``Attr_lj`` of every text: what each output of each MLP says for the next token. Defaults are the first release.

    Of a prompt with a completion the prompt is read, of a whole text all of it; the token after it is scored.

    Args:
        data: Which data.
        positions: Scale the down-projection's output at the last token, or at all; kept is the last token's.
        baseline: Start at zero, or at the output in a run on ``pad_token`` everywhere.
        pad_token: Its id; the current release takes 0, whatever the tokenizer.
        target: The scored token's probability, or its logit.
        answer: Score the model's own most likely token, or the completion's first one.
        rule: How the path is integrated.
        steps: Points on it.
        times_activation: Multiply the mean gradient by how far the path goes, as integrated gradients do.
        signed: False takes the absolute value in the end.
        examples: How many examples of each set, the first ones; None is all.
    """

    data: DataRole = "knowledge"
    positions: Positions = "last"
    baseline: Baseline = "zero"
    pad_token: int = 0
    target: Score = "probability"
    answer: Answer = "own"
    rule: Rule = "left"
    steps: int = 7
    times_activation: bool = True
    signed: bool = True
    examples: int | None = None
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "trace"
    labels: ClassVar[Labels | None] = None
    examples_alone: ClassVar[bool] = False
    seed: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        _ = self.integral

    @classmethod
    def as_paper(cls) -> NeuronAttribution:
        """Give the paper's text (eqs. 4 and 5): the plain mean gradient of the logit, at the right ends of the steps.

        Returns:
            The request.
        """
        return cls(target="logit", rule="right", times_activation=False)

    @classmethod
    def as_current(cls) -> NeuronAttribution:
        """Give the current release: all positions scaled, from a run on token 0, by trapezoids.

        Its trapezoids (Captum's) have weights that sum to 6/7; here they sum to 1, which changes no selection.

        Returns:
            The request.
        """
        return cls(positions="all", baseline="pad", rule="trapezoid")

    @property
    def integral(self) -> Integral:
        """What is integrated."""
        return Integral(
            positions=self.positions,
            baseline=self.baseline,
            pad_token=self.pad_token,
            target=self.target,
            rule=self.rule,
            steps=self.steps,
            times_activation=self.times_activation,
        )

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: there is none."""
        return 0

    def site(self, target: Target) -> str:
        """Name the whole model: all targets share one entry."""
        return "model"

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> Accumulator:
        """Refuse: an attribution is no sum over rows.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a NeuronAttribution is traced, not summed")


@dataclass(frozen=True, slots=True)
class Attributions:
    """The attributions of many texts, read from disk as they are needed.

    Args:
        layers: Numbers of the blocks, L.
        nodes: Nodes of each, D.
        samples: Texts, N.
        read: Gives one text's ``(L, D)``.
        modules: Names of the down-projections that the nodes are the outputs of, L.
    """

    layers: tuple[int, ...]
    nodes: int
    samples: int
    read: Callable[[int], Tensor]
    modules: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Tensor) -> Attributions:
        """Serve attributions that are at hand.

        Args:
            values: ``(N, L, D)``, of blocks 0 to L - 1.

        Returns:
            The same.
        """
        return cls(tuple(range(values.shape[1])), values.shape[2], values.shape[0], lambda sample: values[sample])

    def chunks(self, size: int = 64) -> Iterator[Tensor]:
        """Read them a few texts at a time, in the order of their tokens.

        Args:
            size: Texts at a time.

        Yields:
            ``(<= size, L, D)``, float32.
        """
        for first in range(0, self.samples, size):
            yield torch.stack([self.read(at).float() for at in range(first, min(first + size, self.samples))])


def layer_profile(attributions: Attributions) -> Tensor:
    """Say how much of the next token each block's MLP carries: the mean over texts of ``sum_j |Attr_lj|``.

    Args:
        attributions: Of many texts.

    Returns:
        ``(L,)``, float64, relative to the largest.

    Raises:
        StatisticsError: Nothing carries anything.
    """
    total = torch.zeros(len(attributions.layers), dtype=torch.float64)
    for chunk in attributions.chunks():
        total += chunk.double().abs().sum(dim=(0, 2))
    if not float(total.max()) > 0:
        raise StatisticsError(
            "attribution, profile of the layers",
            got="no attribution above zero",
            wanted="a model whose MLPs move the scored token",
            next_step="Check the knowledge data, or take layers: uniform.",
        )
    return total / total.max()


def attribute_texts(
    model: PreTrainedModel,
    data: Calibration,
    request: NeuronAttribution,
    store: StatStore,
    source: Source,
    *,
    chunk: int = 2048,
) -> tuple[Tensor, tuple[Target, ...]]:
    """Attribute every text; each is stored by itself, so that an interrupted run goes on, and data sets share texts.

    Args:
        model: The model.
        data: The texts.
        request: What to measure.
        store: Where each text's result is looked up and kept.
        source: What the model is; its data do not matter to a text.
        chunk: Tokens in a pass; it changes speed and memory only.

    Returns:
        The store's key of each text, ``(N, 32)`` bytes, in the order of their tokens; and the
        down-projections that the nodes are the outputs of, L.

    Raises:
        ModelError: The model is no causal language model, or no block has an MLP down-projection.
        StatisticsError: There is no text to read or, where its first token is to be scored, no completion.
    """
    attributor = Attributor(model, request.integral, chunk=chunk)
    texts = _texts(data, request.answer)
    keys = {text: content_key(_recipe(request, text, source)) for text in dict.fromkeys(texts)}
    missing = [text for text in keys if store.read(keys[text]) is None]
    if len(missing) < len(keys):
        _log.info("attribution: %d of %d texts taken from %s", len(keys) - len(missing), len(keys), store.folder)
    if missing:
        _attribute(
            attributor,
            missing,
            data.pad_id,
            chunk,
            lambda text, value: store.put(_recipe(request, text, source), value),
        )
    rows = [list(bytes.fromhex(keys[text])) for text in texts]
    return torch.tensor(rows, dtype=torch.uint8), attributor.targets


def places_of(downs: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Write down which down-projections were attributed, as the store keeps it.

    Args:
        downs: The down-projections.

    Returns:
        The block numbers, ``(L,)``, and the names as bytes, a line each.
    """
    names = "\n".join(target.name for target in downs).encode()
    return torch.tensor([target.layer for target in downs]), torch.tensor(list(names), dtype=torch.uint8)


def stored_attributions(
    store: StatStore, keys: Tensor, layers: Tensor, names: Tensor, *, signed: bool = True
) -> Attributions:
    """Open what :func:`attribute_texts` stored.

    Args:
        store: The store.
        keys: ``(N, 32)``.
        layers: ``(L,)``, from :func:`places_of`.
        names: The names, from there too.
        signed: False gives absolute values.

    Returns:
        The attributions, read one text at a time.

    Raises:
        StatisticsError: A text's entry is lost or damaged.
    """

    def read(sample: int) -> Tensor:
        key = bytes(keys[sample].tolist()).hex()
        value = store.read(key)
        if value is None:
            raise StatisticsError(
                "attribution",
                got=f"no entry {key} in {store.folder}, or a damaged one",
                wanted="the entry that was stored",
                next_step="Run the stats stage again: it computes what is missing and keeps the rest.",
            )
        return value if signed else value.abs()

    modules = tuple(bytes(names.tolist()).decode().split("\n"))
    return Attributions(tuple(layers.tolist()), int(read(0).shape[-1]), len(keys), read, modules)


# What is read, and the token to score; None for the model's own.
_Text = tuple[tuple[int, ...], int | None]


def _texts(data: Calibration, answer: Answer) -> list[_Text]:
    """Cut prompts off their completions; in the order of tokens, whatever that of the data."""
    if data.labels is not None:
        raise StatisticsError(
            "attribution",
            got="texts with labels",
            wanted="texts, or prompts and completions: the next token is scored",
            next_step="Give the data section a `text` template, or `prompt` and `completion`.",
        )
    starts = data.prompts or (0,) * len(data.sequences)
    found: list[_Text] = []
    for ids, start in zip(data.sequences, starts, strict=True):
        if answer == "gold" and 0 < start < len(ids):
            found.append((ids[:start], ids[start]))
        elif answer == "own" and ids:
            found.append((ids[:start] if start else ids, None))
    if not found:
        raise StatisticsError(
            "attribution",
            got="no text with a prompt and a completion" if answer == "gold" else "no text",
            wanted="the completion's first token, to score it" if answer == "gold" else "at least one",
            next_step="Give the data section `prompt` and `completion` templates, or take answer: own.",
        )
    if len(found) < len(data.sequences):
        _log.warning("attribution: %d texts have no completion and are left out", len(data.sequences) - len(found))
    return sorted(found, key=lambda text: (text[0], text[1] or 0))


def _attribute(
    attributor: Attributor, texts: Sequence[_Text], pad_id: int, chunk: int, keep: Callable[[_Text, Tensor], None]
) -> None:
    tokens = [token for _, token in texts if token is not None]
    left = Calibration(tuple(ids for ids, _ in texts), pad_id, labels=tuple(tokens) or None)
    batches = left.batches(chunk)
    with tqdm(total=len(texts), desc="attribution", unit="text", delay=2, disable=None, leave=False) as bar:
        for number, batch in enumerate(batches):
            start = time.monotonic()
            for text, value in zip(_rows(batch), attributor.attribute(batch, batch.labels), strict=True):
                keep(text, value)
            bar.update(len(batch.input_ids))
            # The first batch also checks that the fast way applies.
            if number == min(1, len(batches) - 1):
                _tell((time.monotonic() - start) / len(batch.input_ids), len(texts))


def _tell(seconds: float, count: int) -> None:
    """Project the time; texts come longest first, so that it is an upper bound."""
    hours, rest = divmod(round(seconds * count), 3600)
    spelt = f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
    _log.info("attribution: %.2g s for each of the longest texts: %d take at most %s", seconds, count, spelt)


def _rows(batch: Batch) -> list[_Text]:
    labels: Sequence[Any] = [None] * len(batch.input_ids) if batch.labels is None else batch.labels.tolist()
    masked = zip(batch.input_ids, batch.attention_mask.bool(), labels, strict=True)
    return [(tuple(ids[mask].tolist()), token) for ids, mask, token in masked]


def _recipe(request: NeuronAttribution, text: _Text, source: Source) -> Mapping[str, Any]:
    fields = ["positions", "baseline", "target", "rule", "steps", "times_activation"]
    fields += ["pad_token"] if request.baseline == "pad" else []
    return {
        "class": "Attribution",
        "version": request.version,
        "request": {name: getattr(request, name) for name in fields},
        "text": text,
        "model": source.model,
        "dtype": source.dtype,
    }
