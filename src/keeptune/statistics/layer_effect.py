"""The effect of each layer on known answers, by causal tracing: L2-LoRA's AIE and NAIE (eqs. 2 and 3)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import StatisticsError
from keeptune.data.calibration import Calibration
from keeptune.model.probes.causal_tracing import Noise, Traced, Tracer, embedding_std, noise_of
from keeptune.model.probes.causal_tracing import Reading as Reading
from keeptune.statistics.request import ADDED, ModelRequest
from keeptune.statistics.store import Source, StatStore, TextEntries

_log = logging.getLogger(__name__)
Norm = Literal["max", "sum"]
# The tokens, and how many of them are the prompt.
_PromptedText = tuple[tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class LayerEffect(ModelRequest):
    """``IE_l`` of every text, ``(N, L)``: how much of the answer each layer's clean hidden states bring back.

    Texts are in the order of their tokens, so that the statistic does not depend on that of the data. The data need
    prompts and completions. For the noise, see :class:`~keeptune.model.probes.causal_tracing.Noise`.

    Args:
        reading: Which reading of eq. 2: restore each position of the prompt (``positions``), or the one whose output
            predicts the answer token (``diagonal``, whose last layer is the clean run by definition).
        noised: Positions among the prompt's tokens that get noise, of each text in the data's order, such as those of
            its subject; None draws ``fraction`` of them.
    """

    reading: Reading = "positions"
    fraction: float = 0.5
    scale: float = 3.0
    seed: int = 0
    noised: tuple[tuple[int, ...], ...] | None = field(default=None, metadata=ADDED)

    @property
    def noise(self) -> Noise:
        """The noise."""
        return Noise(self.fraction, self.scale, self.seed)

    def measure(
        self, model: PreTrainedModel, data: Calibration, store: StatStore, source: Source
    ) -> Mapping[str, Tensor]:
        """Traces every text: ``(N, L)``, float32, texts in the order of their tokens."""
        traced = trace_texts(model, data, self, store=store, source=source)
        ordered = sorted(traced, key=lambda one: (one.tokens, one.prompt))
        return {"": torch.stack([one.effect for one in ordered]).float()}


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
    """Traces every text; what is in the store is not traced again, so that an interrupted trace resumes.

    A pass with restored states has ``chunk`` tokens, which changes speed and memory only; the data of ``source`` do not
    matter to a text, and ``title`` heads log messages and the progress bar.

    Returns:
        One for each text, in the data's order; a text that is there twice is traced once. Texts without a prompt or
        without an answer are left out, which is logged.

    Raises:
        StatisticsError: The data have no prompts and completions, or a probability is not finite.
    """
    options = ("reading", "fraction", "scale", "seed", *(() if request.noised is None else ("noised",)))
    each = list(zip(data.sequences, data.prompts or (), request.noised or (), strict=False))
    given = {ids: places for ids, _, places in each}
    fit = all(places and set(places) <= set(range(start)) and given[ids] == places for ids, start, places in each)
    if request.noised is not None and not (fit and len(data.sequences) == len(each) == len(request.noised)):
        raise StatisticsError(
            "causal tracing, noised",
            got=f"{len(request.noised)} lists of positions for {len(data.sequences)} texts"
            if fit
            else "wrong positions",
            wanted="for each text one or more of its prompt's tokens, counted from 0; for equal texts the same",
            next_step="Count the tokens that the tokenizer makes of the prompt, a start token among them.",
        )
    noise = replace(request.noise, given=given)
    entries: TextEntries[_PromptedText] = TextEntries(
        store, source, "Traced", request.version, {name: getattr(request, name) for name in options}, title
    )

    def measure(missing: Sequence[_PromptedText]) -> Iterator[list[tuple[_PromptedText, Tensor]]]:
        left = Calibration.of_answers([ids for ids, _ in missing], data.pad_id, [prompt for _, prompt in missing])
        tracer = Tracer(model, reading=request.reading, chunk=chunk)
        std = embedding_std(model)
        for batch in left.batches(max(1, chunk // 4)):
            traced = tracer.trace(batch, noise_of(noise, batch, model, std))
            rows = [torch.cat([one.clean[None], one.corrupted[None], one.restored]) for one in traced]
            yield [((one.tokens, one.prompt), value) for one, value in zip(traced, rows, strict=True)]

    texts = _prompted_texts(data)
    values = entries.fill(texts, measure, keep=True)
    return [Traced(*text, values[text][0], values[text][1], values[text][2:]) for text in texts]


def average_effect(effects: Tensor) -> tuple[Tensor, Tensor]:
    """Averages ``IE_l`` ``(N, L)`` over texts.

    Returns:
        ``AIE_l`` (eq. 3) and its standard error, each ``(L,)``, float64; the error of one text is NaN.
    """
    effects = effects.double()
    count = len(effects)
    spread = effects.std(dim=0) if count > 1 else torch.full_like(effects[0], torch.nan)
    return effects.mean(dim=0), spread / count**0.5


def normalised_effect(average: Tensor, norm: Norm = "max") -> Tensor:
    """Normalises AIE ``(L,)`` over layers: NAIE. A layer that harms the answer counts as one without effect.

    Law: in [0, 1]; the largest is 1 (``max``, as the paper's schedule (eq. 8) has it), or they sum to 1 (``sum``); no
    scale of the effects changes it.

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
    """Estimates the standard error of NAIE over texts, by the jackknife: the errors of AIE go together over layers.

    Returns ``(L,)``, float64; NaN for one text, or where without some text no layer has a positive effect.
    """
    effects = effects.double()
    count = len(effects)
    if count == 1:
        return torch.full_like(effects[0], torch.nan)
    kept = ((effects.sum(dim=0) - effects) / (count - 1)).clamp_min(0)
    shares = kept / (kept.amax(dim=1) if norm == "max" else kept.sum(dim=1))[:, None]
    return ((shares - shares.mean(dim=0)).square().sum(dim=0) * (count - 1) / count).sqrt()


def is_distinct(effects: Tensor) -> bool:
    """Returns whether some layer's AIE is more than 1.96 standard errors above zero; if none is, NAIE is noise.

    True too where one text leaves no spread.
    """
    average, error = average_effect(effects)
    return bool((average > 1.96 * error.nan_to_num(0.0)).any())


def layer_weights(effects: Tensor, norm: Norm = "max") -> Tensor:
    """Computes weights of layers ``(L,)`` from the stored statistic: NAIE, as L2-LoRA's penalty takes it (eq. 7).

    A warning is logged where they are noise.

    Raises:
        StatisticsError: No layer brings anything of the answers back.
    """
    weights = normalised_effect(average_effect(effects)[0], norm)
    if not is_distinct(effects):
        _log.warning("trace: no layer's effect is larger than the spread over %d texts: NAIE is noise", len(effects))
    return weights


def _prompted_texts(data: Calibration) -> list[_PromptedText]:
    if data.prompts is None or data.labels is not None:
        raise _unanswered("texts without an answer" if data.labels is None else "texts with labels")
    texts = [(ids, prompt) for ids, prompt in zip(data.sequences, data.prompts, strict=True) if 0 < prompt < len(ids)]
    if not texts:
        raise _unanswered("no text with a prompt and an answer")
    # Pooled sets may hold plain texts among the answers.
    if len(texts) < len(data.sequences):
        _log.warning("trace: %d texts have no prompt or no answer and are left out", len(data.sequences) - len(texts))
    return texts


def _unanswered(got: str) -> StatisticsError:
    return StatisticsError(
        "causal tracing",
        got=got,
        wanted="prompts and completions of at least one token each: the probability of the answer is measured",
        next_step="Use `prompt` and `completion` templates in the data section; raise max_length if it cuts answers.",
    )
