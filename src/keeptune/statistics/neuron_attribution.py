"""The attribution of MLP nodes over many texts: LoKI's KVA, streamed to disk text by text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.artefact import content_key
from keeptune.core.errors import StatisticsError
from keeptune.data.calibration import Calibration
from keeptune.model.probes.attribution import Attributor, Integral
from keeptune.statistics.request import DataRole, ModelRequest
from keeptune.statistics.store import Source, StatStore, TextEntries

_log = logging.getLogger(__name__)
Answer = Literal["own", "gold"]
# The tokens read, and the token to score; None for the model's own.
_ScoredText = tuple[tuple[int, ...], int | None]


@dataclass(frozen=True, slots=True)
class NeuronAttribution(ModelRequest, Integral):
    """``Attr_lj`` of every text: how much each output of each MLP contributes to the next token.

    Defaults are the first release. Of a prompt with a completion the prompt is read, of a whole text all of it; the
    token after it is scored. The options of the integral are those of
    :class:`~keeptune.model.probes.attribution.Integral`.

    Args:
        answer: Score the model's own most likely token, or the completion's first one.
        signed: False takes the absolute value in the end.
    """

    data: DataRole = "knowledge"
    answer: Answer = "own"
    signed: bool = True
    by_text: ClassVar[bool] = True
    # The store's key of each text, (N, 32) bytes in the order of their tokens; numbers of the blocks, (L,); names of
    # the down-projections as bytes, a line each.
    parts: ClassVar[tuple[str, ...]] = ("", "layers", "modules")

    @classmethod
    def as_paper(cls) -> NeuronAttribution:
        """Returns the paper's text (eqs. 4 and 5): the plain mean gradient of the logit, at the right ends of steps."""
        return cls(target="logit", rule="right", times_activation=False)

    @classmethod
    def as_current(cls) -> NeuronAttribution:
        """Returns the current release: all positions scaled, from a run on token 0, by trapezoids.

        Its trapezoids (Captum's) have weights that sum to 6/7; here they sum to 1, which changes no selection.
        """
        return cls(positions="all", baseline="pad", rule="trapezoid")

    def measure(
        self, model: PreTrainedModel, data: Calibration, store: StatStore, source: Source, *, chunk: int = 2048
    ) -> Mapping[str, Tensor]:
        """Attributes every text; the entry lists the store's keys of the texts, and :meth:`open` reads it.

        Raises:
            ModelError: The model is no causal language model, or no block has an MLP down-projection.
            StatisticsError: There is no text to read or, where its first token is to be scored, no completion.
        """
        attributor = Attributor(model, self, chunk=chunk)
        texts = _scored_texts(data, self.answer)
        options = ["positions", "baseline", "target", "rule", "steps", "times_activation"]
        options += ["pad_token"] if self.baseline == "pad" else []
        entries: TextEntries[_ScoredText] = TextEntries(
            store, source, "Attribution", self.version, {name: getattr(self, name) for name in options}, "attribution"
        )

        def attribute(texts: Sequence[_ScoredText]) -> Iterator[list[tuple[_ScoredText, Tensor]]]:
            tokens = [token for _, token in texts if token is not None]
            left = Calibration(tuple(ids for ids, _ in texts), data.pad_id, labels=tuple(tokens) or None)
            for batch in left.batches(chunk):
                labels: Sequence[Any] = [None] * len(batch.input_ids) if batch.labels is None else batch.labels.tolist()
                masked = zip(batch.input_ids, batch.attention_mask.bool(), labels, strict=True)
                rows = [(tuple(ids[mask].tolist()), token) for ids, mask, token in masked]
                yield list(zip(rows, attributor.attribute(batch, batch.labels), strict=True))

        entries.fill(texts, attribute, keep=False)
        keys = [list(bytes.fromhex(content_key(entries.recipe(text)))) for text in texts]
        names = "\n".join(target.name for target in attributor.targets).encode()
        return {
            "layers": torch.tensor([target.layer for target in attributor.targets]),
            "modules": torch.tensor(list(names), dtype=torch.uint8),
            "": torch.tensor(keys, dtype=torch.uint8),
        }

    def open(self, store: StatStore, parts: Mapping[str, Tensor]) -> Attributions:
        """Opens what :meth:`measure` stored; attributions are read one text at a time.

        Raises:
            StatisticsError: A text's entry is lost or damaged.
        """
        keys = parts[""]

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
            return value if self.signed else value.abs()

        modules = tuple(bytes(parts["modules"].tolist()).decode().split("\n"))
        return Attributions(tuple(parts["layers"].tolist()), int(read(0).shape[-1]), len(keys), read, modules)


@dataclass(frozen=True, slots=True)
class Attributions:
    """The attributions of many texts, read from disk as they are needed.

    Args:
        layers: Numbers of the blocks, L.
        nodes: Nodes of each, D.
        samples: Texts, N.
        read: Reads one text's ``(L, D)``.
        modules: Names of the down-projections that the nodes are the outputs of, L.
    """

    layers: tuple[int, ...]
    nodes: int
    samples: int
    read: Callable[[int], Tensor]
    modules: tuple[str, ...] = ()

    def chunks(self, size: int = 64) -> Iterator[Tensor]:
        """Reads them ``(<= size, L, D)``, float32, at a time, in the order of their tokens."""
        for first in range(0, self.samples, size):
            yield torch.stack([self.read(at).float() for at in range(first, min(first + size, self.samples))])


def layer_profile(attributions: Attributions) -> Tensor:
    """Computes how much of the next token each block's MLP carries: the mean over texts of ``sum_j |Attr_lj|``.

    Returns:
        ``(L,)``, float64, relative to the largest.

    Raises:
        StatisticsError: No attribution is above zero.
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


def _scored_texts(data: Calibration, answer: Answer) -> list[_ScoredText]:
    """Cuts prompts off their completions; in the order of tokens, whatever that of the data."""
    if data.labels is not None:
        raise StatisticsError(
            "attribution",
            got="texts with labels",
            wanted="texts, or prompts and completions: the next token is scored",
            next_step="Use a `text` template in the data section, or `prompt` and `completion`.",
        )
    starts = data.prompts or (0,) * len(data.sequences)
    texts: list[_ScoredText] = []
    for ids, start in zip(data.sequences, starts, strict=True):
        if answer == "gold" and 0 < start < len(ids):
            texts.append((ids[:start], ids[start]))
        elif answer == "own" and ids:
            texts.append((ids[:start] if start else ids, None))
    if not texts:
        raise StatisticsError(
            "attribution",
            got="no text with a prompt and a completion" if answer == "gold" else "no text",
            wanted="the completion's first token, to score it" if answer == "gold" else "at least one",
            next_step="Use `prompt` and `completion` templates in the data section, or take answer: own.",
        )
    if len(texts) < len(data.sequences):
        _log.warning("attribution: %d texts have no completion and are left out", len(data.sequences) - len(texts))
    return sorted(texts, key=lambda text: (text[0], text[1] or 0))
