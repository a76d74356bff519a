"""keeptune trace: which layers restore known answers, in a model and in its tuned form (L2-LoRA Figs. 2 and 3).

From Python, of a loaded model::

    result = keeptune.trace(model, tokenizer, [("The sky is", " blue"), ...])
    result.average                                   # AIE of each layer
    result.normalised()                              # NAIE: what L2-LoRA weights its penalty by
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.load import check_base, load_adapter
from keeptune.core.artefact import content_key, file_fingerprint, write_json
from keeptune.core.errors import DataError, ModelError, need_known
from keeptune.data.calibration import Calibration
from keeptune.data.completions import knowledge_of, knowledge_set
from keeptune.data.sources import read_jsonl
from keeptune.model.blocks import positions
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import LoadOptions, load_model, load_positions, load_tokenizer
from keeptune.model.probes.causal_tracing import Noise, Reading, Traced, embedding_std
from keeptune.pipeline.machine import check_device, check_folder, device_named, statistics_store
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.recipe.paths import resolve_file, resolve_model
from keeptune.statistics.layer_effect import (
    LayerEffect,
    Norm,
    average_effect,
    is_distinct,
    normalised_effect,
    normalised_error,
    trace_texts,
)
from keeptune.statistics.store import Source

_SHORT = 32  # tokens of a prompt whose heat map is read with ease


@dataclass(frozen=True, slots=True)
class Trace:
    """The effects of one model's layers.

    Args:
        request: What was measured.
        texts: Each text's probabilities, in the order of the data.
    """

    request: LayerEffect
    texts: tuple[Traced, ...]

    @property
    def effects(self) -> Tensor:
        """``(N, L)``, ``IE_l`` of each text (eq. 2)."""
        return torch.stack([text.effect for text in self.texts])

    @property
    def average(self) -> Tensor:
        """``(L,)``, AIE (eq. 3)."""
        return average_effect(self.effects)[0]

    @property
    def error(self) -> Tensor:
        """``(L,)``, the standard error of AIE over texts."""
        return average_effect(self.effects)[1]

    def answer(self, values: Tensor) -> float:
        """Returns Σ_t p(y_t) of a text's ``clean`` or ``corrupted``, ``(K,)``."""
        # In reading B every position has the sum already.
        return float(values.sum() if self.request.reading == "diagonal" else values[0])

    def normalised(self, norm: Norm = "max") -> Tensor:
        """Returns NAIE, ``(L,)``: AIE over its ``"max"`` or ``"sum"``; a layer below 0 counts as 0.

        Raises:
            StatisticsError: No layer restores anything of the answers.
        """
        return normalised_effect(self.average, norm)

    def summary(self) -> dict[str, Any]:
        """Returns the effects and their errors, ready for JSON.

        ``clean`` and ``corrupted`` are Σ_t p(y_t), averaged over texts; errors are standard errors over texts. Where no
        effect is ``distinct``, NAIE is noise.
        """
        answers = {side: [self.answer(getattr(text, side)) for text in self.texts] for side in ("clean", "corrupted")}
        shares: dict[str, Any] = {}
        # A model that does not know the answers has no profile.
        known = bool((self.average > 0).any())
        for norm in get_args(Norm):
            shares[f"NAIE_{norm}"] = self.normalised(norm).tolist() if known else None
            shares[f"NAIE_{norm}_error"] = _numbers(normalised_error(self.effects, norm))
        return {
            **{side: math.fsum(values) / len(values) for side, values in answers.items()},
            "AIE": self.average.tolist(),
            "AIE_error": _numbers(self.error),
            "distinct": is_distinct(self.effects),
            **shares,
            "texts": [
                {"clean": clean, "corrupted": corrupted, "effect": text.effect.tolist()}
                for text, clean, corrupted in zip(self.texts, *answers.values(), strict=True)
            ],
        }


def trace(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[tuple[str, str]],
    request: LayerEffect | None = None,
    *,
    max_length: int = 512,
    chunk: int = 2048,
) -> Trace:
    """Traces a loaded model.

    Args:
        model: A causal language model, or one with an adapter, which is traced as it is switched.
        tokenizer: Its tokenizer.
        examples: Prompts and completions that it knows, such as ``("The sky is", " blue")``.
        request: What is measured: the reading of eq. 2, the noise; None takes the defaults.
        max_length: Longer examples are cut to this many tokens, or to the model's positions.
        chunk: Tokens in a pass with restored states; it changes speed and memory only.

    Raises:
        DataError: An example is empty.
        ModelError: It has no blocks, or no attention or MLP of its own.
        RecipeError: A wrong option.
        StatisticsError: A probability is not finite.
    """
    request = LayerEffect("knowledge") if request is None else request
    _check_effect(request)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    length = min(max_length, positions(base) or max_length)
    data = knowledge_of(examples).calibration(tokenizer, max_length=length)
    return Trace(request, tuple(trace_texts(base, data, request, chunk=chunk)))


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """The models and data that the command traces.

    Args:
        model: ``atlas``, a folder or a hub id.
        data: A JSONL file, or one of ``atlas:``, of which the first ``examples`` rows are used.
        prompt: Template of the prompt.
        completion: Template of the answer.
        adapter: An adapter of the model, a run's folder, or another model.
        max_length: Longer examples are cut to this many tokens.
        store: Folder where each text's result is kept; None is the user's cache.
        chunk: Tokens in a pass with restored states.
    """

    model: str
    data: Path | str
    prompt: str
    completion: str
    output: Path
    adapter: str | None = None
    examples: int = 100
    max_length: int = 512
    store: Path | None = None
    device: str = "auto"
    dtype: Any = "auto"
    chunk: int = 2048


def trace_models(options: TraceOptions, request: LayerEffect, norm: str = "max") -> dict[str, Any]:
    """Traces a model, and its tuned form if there is one, on the same texts with the same noise.

    The figure's profile is normalised by ``norm``, ``"max"`` or ``"sum"``.

    Returns:
        The record in ``trace.json``; the folder also has ``layers.png`` and ``heat.png``.

    Raises:
        KeeptuneError: An option, a model or the data are wrong; nothing was written to the folder then.
    """
    store, device = statistics_store(options.store), device_named(options.device)
    _check_effect(request)
    need_known(norm, get_args(Norm), "--norm", " or ".join(get_args(Norm)))
    check_folder("--output", options.output)
    check_folder("--store", store.folder)
    check_device(device)
    name = resolve_model(options.model)
    tokenizer = load_tokenizer(name)
    data = _data(options, name, tokenizer)
    chosen: int | None = None  # whose heat map is drawn, of each model
    models = []
    for title, model, source in _models(options, name, device):
        texts = trace_texts(model, data, request, store=store, source=source, chunk=options.chunk, title=title)
        store.note_model(source.model, model.name_or_path)
        traced = Trace(request, tuple(texts))
        chosen = _most_harmed(traced) if chosen is None else chosen
        heat = _heat(model, traced.texts[chosen], request, options.chunk)
        models.append({"name": title, "embedding_std": embedding_std(model), **traced.summary(), "heat": heat.tolist()})
    assert chosen is not None
    templates = {"file": str(options.data), "prompt": options.prompt, "completion": options.completion}
    record = {
        "data": templates | {"examples": len(data.sequences), "fingerprint": data.fingerprint},
        "reading": request.reading,
        "noise": asdict(request.noise),
        "norm": norm,
        "models": models,
        "example": _example(chosen + 1, data, request, tokenizer),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.output / "trace.json", record)
    from keeptune.report.figures import write_figure  # loads matplotlib and plotly
    from keeptune.report.pages.study_charts import trace_charts

    profiles, maps = trace_charts(record)
    write_figure(profiles, options.output / "layers.png", across=2)
    write_figure(maps, options.output / "heat.png")
    return record


def _check_effect(request: LayerEffect) -> None:
    """Checks the options of a request that comes from a user."""
    need_known(request.reading, get_args(Reading), "reading", " or ".join(get_args(Reading)))
    Noise(request.fraction, request.scale, request.seed)  # checks their ranges


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _data(options: TraceOptions, name: str, tokenizer: PreTrainedTokenizerBase) -> Calibration:
    rows = read_jsonl(resolve_file(str(options.data)), where="--data")[: options.examples]
    known = knowledge_set(rows, where="--data", prompt=options.prompt, completion=options.completion)
    empty = next((number for number, text in enumerate(known.prompts or (), start=1) if not text.strip()), None)
    if empty is not None:
        raise DataError(
            f"--data example {empty}",
            got="an empty prompt",
            wanted="a prompt that can be damaged",
            next_step="Change --prompt, or remove the row.",
        )
    length = min(options.max_length, load_positions(name) or options.max_length)
    return known.calibration(tokenizer, max_length=length)


def _models(options: TraceOptions, name: str, device: str) -> Iterator[tuple[str, PreTrainedModel, Source]]:
    """Yields one model after the other; an adapter goes onto the first."""
    tuned = None if options.adapter is None else TrainedModel.of(options.adapter, base=name, device=device)
    loading = LoadOptions(dtype=options.dtype, device=device)
    if tuned is not None and not tuned.is_adapter:
        load_positions(tuned.whole)  # checks that it is there
    base = load_model(name, loading)
    fingerprint, vocabulary = body_fingerprint(base), base.config.get_text_config().vocab_size
    if tuned is not None and tuned.is_adapter:
        check_base(tuned.folder, fingerprint)
    first = Path(options.model).name
    yield first, base, Source(fingerprint, "", str(base.dtype))
    if tuned is None:
        return
    second = Path(tuned.source).name
    if tuned.is_adapter:
        wrapped = load_adapter(base, tuned.folder)
        if wrapped.active_peft_config.is_prompt_learning:
            raise ModelError(
                f"adapter {tuned.folder}",
                got="an adapter of prompt learning",
                wanted="one that changes weights: its tokens would be traced as a part of the prompt",
                next_step="Trace a LoRA adapter or a whole model.",
            )
        files = [tuned.folder / "adapter_config.json", tuned.folder / "adapter_model.safetensors"]
        source = Source(content_key([fingerprint, file_fingerprint(files)]), "", str(base.dtype))
        yield f"{first} + {second}", wrapped.get_base_model(), source
    else:
        del base
        other = load_model(tuned.whole, loading)
        own = other.config.get_text_config().vocab_size
        if own < vocabulary:
            raise ModelError(
                f"model {tuned.source}",
                got=f"{own} token embeddings",
                wanted=f"those of the first model ({vocabulary}): both are traced on the same tokens",
                next_step="Trace models that share a tokenizer.",
            )
        yield second, other, Source(body_fingerprint(other), "", str(other.dtype))


def _most_harmed(traced: Trace) -> int:
    """Returns the example whose answer loses most to the noise, among short ones where there are such."""
    lost = [traced.answer(text.clean - text.corrupted) for text in traced.texts]
    short = [index for index, text in enumerate(traced.texts) if text.prompt <= _SHORT]
    return max(short or range(len(lost)), key=lambda index: lost[index])


def _heat(model: PreTrainedModel, text: Traced, request: LayerEffect, chunk: int) -> Tensor:
    """Returns the heat map over the prompt's positions, ``(L, S)``, whatever the reading."""
    if request.reading == "positions":
        return text.heat
    other = replace(request, reading="positions")
    data = Calibration.of_answers([text.tokens], 0, [text.prompt])
    return trace_texts(model, data, other, chunk=chunk)[0].heat


def _example(
    number: int, data: Calibration, request: LayerEffect, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    assert data.prompts is not None
    ids, prompt = data.sequences[number - 1], data.prompts[number - 1]
    return {
        "number": number,
        "prompt": [tokenizer.decode([token]) for token in ids[:prompt]],
        "answer": tokenizer.decode(list(ids[prompt:])),
        "noised": request.noise.positions(ids, prompt),
    }
