"""The effect of each layer on known answers, by causal tracing: L2-LoRA's AIE and NAIE (eqs. 2 and 3)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.core.errors import StatisticsError
from keeptune.core.target import Target
from keeptune.data.calibration import Calibration
from keeptune.model.probes.causal_tracing import Kind, Noise, Reading, Traced, Tracer, embedding_std, noise_of
from keeptune.model.runner import Labels
from keeptune.statistics.request import Accumulator, DataRole, PassKind, WeightReader
from keeptune.statistics.store import Source, StatStore

__all__ = [
    "LayerEffect",
    "Norm",
    "Reading",
    "average_effect",
    "is_distinct",
    "layer_weights",
    "normalised_effect",
    "normalised_error",
    "trace_texts",
    "traced_effects",
]

_log = logging.getLogger(__name__)
Norm = Literal["max", "sum"]


@dataclass(frozen=True, slots=True)
class LayerEffect:
    """``IE_l`` of every text, ``(N, L)``: how much of the answer each layer's clean hidden states bring back.

    Texts are in the order of their tokens, so that the statistic does not depend on that of the data. The data need
    prompts and completions.

    Args:
        data: Which data.
        reading: Which reading of eq. 2: restore each position of the prompt (``positions``), or the one whose output
            predicts the answer token (``diagonal``, whose last layer is the clean run by definition).
        fraction: Share of the prompt's tokens that get noise.
        scale: The noise's standard deviation, in units of that of the token embeddings.
        seed: Seed of the noise; each text has its own stream.
        output: What is restored: the output of blocks, of attention or of MLPs.
        window: Layers restored together, for attention and MLPs; ROME takes 10.
        examples: How many examples of each set, the first ones; None is all.
    """

    data: DataRole
    reading: Reading = "positions"
    fraction: float = 0.5
    scale: float = 3.0
    seed: int = 0
    output: Kind = "block"
    window: int = 10
    examples: int | None = None
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "trace"
    labels: ClassVar[Labels | None] = None
    examples_alone: ClassVar[bool] = False

    @property
    def noise(self) -> Noise:
        """The noise."""
        return Noise(self.fraction, self.scale, self.seed)

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: there is none."""
        return 0

    def site(self, target: Target) -> str:
        """Name the whole model: all targets share one entry."""
        return "model"

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> Accumulator:
        """Refuse: a trace is no sum over rows.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a LayerEffect is traced, not summed")


def traced_effects(
    model: PreTrainedModel, data: Calibration, request: LayerEffect, store: StatStore, source: Source
) -> Tensor:
    """Measure the statistic.

    Args:
        model: The model.
        data: Texts with prompts.
        request: What to measure.
        store: Texts that were traced before are taken from it, and new ones are kept.
        source: What the model is.

    Returns:
        ``(N, L)``, float32, texts in the order of their tokens.

    Raises:
        StatisticsError: The data have no prompts and completions, or a probability is not finite.
    """
    found = trace_texts(model, data, request, store=store, source=source)
    return torch.stack([one.effect for one in sorted(found, key=lambda one: (one.tokens, one.prompt))]).float()


def trace_texts(
    model: PreTrainedModel,
    data: Calibration,
    request: LayerEffect,
    *,
    store: StatStore | None = None,
    source: Source | None = None,
    chunk: int = 2048,
    title: str = "trace",
) -> list[Traced]:
    """Trace every text; what is in the store is not traced again, so that an interrupted trace goes on.

    Args:
        model: The model.
        data: Texts with prompts.
        request: What to measure.
        store: Where each text's result is kept; None keeps nothing.
        source: What the model is; its data do not matter to a text.
        chunk: Tokens in a pass with restored states; it changes speed and memory only.
        title: What the progress bar says.

    Returns:
        One for each text, in the data's order; a text that is there twice is traced once. Texts without a prompt or
        without an answer are left out, which is logged.

    Raises:
        StatisticsError: The data have no prompts and completions, or a probability is not finite.
    """
    texts = _texts(data)
    found: dict[_Text, Traced] = {}
    if store is not None and source is not None:
        kept = {text: store.get(_recipe(request, text, source)) for text in dict.fromkeys(texts)}
        found = {text: _unpacked(text, value) for text, value in kept.items() if value is not None}
        if found:
            _log.info("trace: %d of %d texts taken from %s", len(found), len(kept), store.folder)
    missing = [text for text in dict.fromkeys(texts) if text not in found]
    if missing:
        left = Calibration(tuple(ids for ids, _ in missing), data.pad_id, tuple(prompt for _, prompt in missing))
        tracer = Tracer(model, reading=request.reading, kind=request.output, window=request.window, chunk=chunk)
        std = embedding_std(model)
        with tqdm(total=len(missing), desc=title, unit="text", delay=2, disable=None, leave=False) as bar:
            for batch in left.batches(max(1, chunk // 4)):
                for one in tracer.trace(batch, noise_of(request.noise, batch, model, std)):
                    found[one.tokens, one.prompt] = one
                    if store is not None and source is not None:
                        store.put(_recipe(request, (one.tokens, one.prompt), source), _packed(one))
                bar.update(len(batch.input_ids))
    return [found[text] for text in texts]


def average_effect(effects: Tensor) -> tuple[Tensor, Tensor]:
    """Average over texts.

    Args:
        effects: ``(N, L)``, ``IE_l`` of each text.

    Returns:
        ``AIE_l`` (eq. 3) and its standard error, each ``(L,)``, float64; the error of one text is NaN.
    """
    effects = effects.double()
    count = len(effects)
    spread = effects.std(dim=0) if count > 1 else torch.full_like(effects[0], torch.nan)
    return effects.mean(dim=0), spread / count**0.5


def normalised_effect(average: Tensor, norm: Norm = "max") -> Tensor:
    """Normalise over layers: NAIE. A layer that harms the answer counts as one without effect.

    Law: in [0, 1]; the largest is 1 (``max``), or they sum to 1 (``sum``); no scale of the effects changes it.

    Args:
        average: ``(L,)``, AIE.
        norm: ``"max"``, as the paper's schedule (eq. 8) has it, or ``"sum"``.

    Returns:
        ``(L,)``.

    Raises:
        StatisticsError: No layer brings anything of the answer back.
    """
    kept = average.clamp_min(0)
    size = kept.max() if norm == "max" else kept.sum()
    if not bool(size > 0):
        raise StatisticsError(
            "causal tracing",
            got=f"no layer with a positive effect (the largest is {float(average.max()):.2g})",
            wanted="noise that harms the answers, and answers that the model knows",
            next_step="Raise the share of damaged tokens or the scale of the noise, or take data that the model knows.",
        )
    return kept / size


def normalised_error(effects: Tensor, norm: Norm = "max") -> Tensor:
    """Estimate the standard error of NAIE over texts, by the jackknife: the errors of AIE go together over layers.

    Args:
        effects: ``(N, L)``.
        norm: As in :func:`normalised_effect`.

    Returns:
        ``(L,)``, float64; NaN for one text, or where without some text no layer has a positive effect.
    """
    effects = effects.double()
    count = len(effects)
    if count == 1:
        return torch.full_like(effects[0], torch.nan)
    kept = ((effects.sum(dim=0) - effects) / (count - 1)).clamp_min(0)
    shares = kept / (kept.amax(dim=1) if norm == "max" else kept.sum(dim=1))[:, None]
    return ((shares - shares.mean(dim=0)).square().sum(dim=0) * (count - 1) / count).sqrt()


def is_distinct(effects: Tensor) -> bool:
    """Tell whether some layer's effect stands out of the spread over texts; if none does, NAIE says nothing.

    Args:
        effects: ``(N, L)``.

    Returns:
        True when a layer's AIE is more than 1.96 standard errors above zero, or where one text leaves no spread.
    """
    average, error = average_effect(effects)
    return bool((average > 1.96 * error.nan_to_num(0.0)).any())


def layer_weights(effects: Tensor, norm: Norm = "max") -> Tensor:
    """Turn the stored statistic into weights of layers: NAIE, as L2-LoRA's penalty takes it (eq. 7).

    Args:
        effects: ``(N, L)``.
        norm: ``"max"`` or ``"sum"``.

    Returns:
        ``(L,)``, float64; a warning is logged where they are noise.

    Raises:
        StatisticsError: No layer brings anything of the answers back.
    """
    weights = normalised_effect(average_effect(effects)[0], norm)
    if not is_distinct(effects):
        _log.warning("trace: no layer's effect stands out of the spread over %d texts: NAIE is noise", len(effects))
    return weights


_Text = tuple[tuple[int, ...], int]


def _texts(data: Calibration) -> list[_Text]:
    if data.prompts is None or data.labels is not None:
        raise StatisticsError(
            "causal tracing",
            got="texts without an answer" if data.labels is None else "texts with labels",
            wanted="prompts and completions: the probability of the answer is measured",
            next_step="Give the data section `prompt` and `completion` templates.",
        )
    texts = [(ids, prompt) for ids, prompt in zip(data.sequences, data.prompts, strict=True) if 0 < prompt < len(ids)]
    if not texts:
        raise StatisticsError(
            "causal tracing",
            got="no text with a prompt and an answer",
            wanted="at least one token of each",
            next_step="Give the data section `prompt` and `completion` templates.",
        )
    # Pooled sets may hold plain texts among the answers.
    if len(texts) < len(data.sequences):
        _log.warning("trace: %d texts have no prompt or no answer and are left out", len(data.sequences) - len(texts))
    return texts


def _recipe(request: LayerEffect, text: _Text, source: Source) -> Mapping[str, Any]:
    fields = {"reading", "fraction", "scale", "seed", "output", *(["window"] if request.output != "block" else [])}
    return {
        "class": "Traced",
        "version": request.version,
        "request": {name: getattr(request, name) for name in sorted(fields)},
        "text": text,
        "model": source.model,
        "dtype": source.dtype,
    }


def _packed(one: Traced) -> Tensor:
    return torch.cat([one.clean[None], one.corrupted[None], one.restored]).float()


def _unpacked(text: _Text, value: Tensor) -> Traced:
    return Traced(*text, clean=value[0], corrupted=value[1], restored=value[2:])
