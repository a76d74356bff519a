"""The sections of a recipe: what to keep, what to learn, how the result is written, what a paper published."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from keeptune.adapter.export import Format
from keeptune.core.errors import RecipeError, nearest, need_known, placed
from keeptune.data.chat_template import ChatOptions
from keeptune.data.examples import Truncate
from keeptune.data.formats import FormatOptions
from keeptune.data.labelled import LOKI_PROMPT
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.recipe.reading import spelt_out
from keeptune.statistics.self_generated import SelfGeneration

_FORMS = ("text", "prompt", "completion")
_TAGS = ("one section", "several sections")
OWN, NAMED = "of a file", "of a name"
BY_FILE, BY_BASE = "knowledge of a file", "knowledge of the base"
_WRITTEN = {"generate", "prompts", "answer_with", "temperature"}


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Origin(Section):
    """Which part of a dataset of the hub, or of a folder, is read."""

    split: str | None = None
    config: str | None = None
    revision: str | None = None

    @property
    def origin(self) -> dict[str, str | None]:
        """Its fields by name."""
        return {name: getattr(self, name) for name in Origin.model_fields}


class DataSection(Origin):
    """How rows of data become examples, and what of a conversation is learned."""

    format: str | None = None
    field_messages: str | None = None
    message_property_mappings: dict[str, str] | None = None
    roles: dict[str, list[str]] | None = None
    chat_template: str | None = None
    roles_to_train: Annotated[list[str], Field(min_length=1)] = ["assistant"]
    turns: Literal["all", "last", "each"] = "all"
    train_on_eos: Literal["turn", "all", "last", "none"] = "turn"
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def formats(self) -> FormatOptions:
        """How rows are read."""
        names = self.message_property_mappings or {}, self.roles or {}
        return placed(self._key, lambda: FormatOptions(self.format, self.field_messages, *names))

    @property
    def _key(self) -> str:
        return f"recipe, key {type(self).__name__.lower()}"

    @property
    def talk(self) -> ChatOptions:
        """What is learned of a conversation."""
        kwargs = self.chat_template_kwargs or {}
        roles = tuple(self.roles_to_train)
        return ChatOptions(roles, self.turns, self.train_on_eos, self.chat_template, kwargs)

    def _check_formats(self, templates: Sequence[str]) -> None:
        if self.formats != FormatOptions() and templates:
            raise RecipeError(
                f"{self._key}.{templates[0]}",
                got="a template beside keys of a format",
                wanted="either templates, or a format",
                next_step="Remove one of them: templates name the fields themselves.",
            )


class Knowledge(DataSection):
    """A set of what to keep: whole texts, prompts with their completions, or conversations."""

    file: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    choices: str | None = None
    chat: bool = False
    examples: int = Field(256, ge=1)
    by: str | None = None
    seed: int | None = Field(None, ge=0)
    max_length: int = Field(1024, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _default_form(cls, values: Any) -> Any:
        lettered = isinstance(values, Mapping) and values.get("choices") is not None
        if lettered and all(values.get(key) is None for key in _FORMS):
            given = {key: value for key, value in values.items() if key not in _FORMS}
            return {"prompt": LOKI_PROMPT, "completion": "{letter}", "chat": True, **given}
        return values

    @model_validator(mode="after")
    def _check_form(self) -> Knowledge:
        given = [key for key in _FORMS if getattr(self, key) is not None]
        self._check_formats(given)
        if given not in ([], ["text"], ["prompt", "completion"]):
            raise RecipeError(
                f"recipe, key knowledge, file {self.file}",
                got=" and ".join(given),
                wanted="either text, or prompt and completion, or none of them: told by the rows",
                next_step="Set `text` to keep whole texts, `prompt` and `completion` to keep answers.",
            )
        if self.chat and self.prompt is None:
            raise RecipeError(
                f"recipe, key knowledge.chat, file {self.file}",
                got="true for whole texts",
                wanted="prompts, which the user of a chat writes",
                next_step="Set `prompt` and `completion`, or leave `chat` out.",
            )
        return self


def _form(value: Any) -> str:
    return _TAGS[isinstance(value, list | tuple)]


def _origin(entry: Any) -> str:
    written = isinstance(entry, SelfGeneration) or (isinstance(entry, Mapping) and not _WRITTEN.isdisjoint(entry))
    return BY_BASE if written else BY_FILE


KnowledgeSet = Annotated[
    Annotated[Knowledge, Tag(BY_FILE)] | Annotated[SelfGeneration, Tag(BY_BASE)], Discriminator(_origin)
]
KnowledgeSets = Annotated[
    Annotated[KnowledgeSet, Tag(_TAGS[0])] | Annotated[list[KnowledgeSet], Field(min_length=1), Tag(_TAGS[1])],
    Discriminator(_form),
]


MethodSection = Annotated[dict[str, Any], BeforeValidator(spelt_out)]
Penalties = list[Annotated[dict[str, Any], BeforeValidator(spelt_out)]]


def _source(entry: Any) -> str:
    own = isinstance(entry, FileBenchmark) or (isinstance(entry, Mapping) and not {"metric", "file"}.isdisjoint(entry))
    return OWN if own else NAMED


BenchmarkEntry = Annotated[
    Annotated[FileBenchmark, Tag(OWN)] | Annotated[NamedBenchmark, Tag(NAMED)],
    Discriminator(_source),
    BeforeValidator(spelt_out),
]


Kind = Literal["completion", "preference", "unpaired_preference", "classification", "regression"]
# Keys that a kind needs, and those that it may have.
_KIND_KEYS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "completion": ((), ("prompt", "completion", "loss", "stm_threshold")),
    "preference": ((), ("prompt", "chosen", "rejected")),
    "unpaired_preference": ((), ("prompt", "completion", "label")),
    "classification": (("text", "label"), ("text_pair", "labels")),
    "regression": (("text", "label"), ("text_pair",)),
}
_KINDS_KEYS = tuple(dict.fromkeys(key for keys in _KIND_KEYS.values() for part in keys for key in part))


class TaskCalibration(Section):
    """How much of the task statistics of inputs and gradients are taken from."""

    examples: int = Field(256, ge=1)
    max_length: int = Field(1024, ge=2)
    seed: int = Field(0, ge=0)


class TrainFile(Origin):
    """One of several files of a task, with its share of the whole."""

    file: str
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)


class Task(DataSection):
    """What to learn: conversations, prompts and completions, judged answers, or texts with a label or a score each."""

    train: Annotated[
        Annotated[str, Tag(_TAGS[0])] | Annotated[list[TrainFile], Field(min_length=1), Tag(_TAGS[1])],
        Discriminator(_form),
    ]
    kind: Kind = "completion"
    prompt: str | None = None
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    examples: int | None = Field(None, ge=1)
    truncate: Truncate = "right"
    calibration: TaskCalibration = TaskCalibration()
    loss: Annotated[dict[str, Any], BeforeValidator(spelt_out)] | None = None
    stm_threshold: float | None = Field(None, ge=1, allow_inf_nan=False)

    @property
    def files(self) -> tuple[TrainFile, ...]:
        """The files, one or more, with their weights; what they do not say of their origin the task says."""
        entries = (TrainFile(file=self.train),) if isinstance(self.train, str) else tuple(self.train)
        own = {name: value for name, value in self.origin.items() if value is not None}
        return tuple(TrainFile(**{**own, **entry.model_dump(exclude_none=True)}) for entry in entries)

    @model_validator(mode="after")
    def _check_kind(self) -> Task:
        needed, optional = _KIND_KEYS[self.kind]
        given = [key for key in _KINDS_KEYS if getattr(self, key) is not None]
        unused = [key for key in given if key not in (*needed, *optional)]
        templates = [key for key in given if key in ("prompt", "completion") and self.kind == "completion"]
        self._check_formats(templates)
        missing = [key for key in (needed if not templates else ("prompt", "completion")) if key not in given]
        other = f"or set task.kind: {' or '.join(kind for kind in _KIND_KEYS if kind != self.kind)}."
        several, labels = self.kind != "completion" and len(self.files) > 1, self.labels or ()
        used, kind = f"the keys {', '.join((*needed, *optional))}", f"kind {self.kind}"
        for keys, got, wanted, next_step in (
            (unused, f"a key that {kind} does not use", used, f"Remove it, {other}"),
            (missing, "nothing", f"a value, for {kind}", f"Add it to the task, {other}"),
            (["train"] * several, f"{len(self.files)} files with {kind}", "one file", "Join the files."),
            (["labels"] * (len(set(labels)) < len(labels)), str(labels), "different labels", "Name each once."),
        ):
            if keys:
                raise RecipeError(f"recipe, key task.{keys[0]}", got=got, wanted=wanted, next_step=next_step)
        return self


class ExportSpec(Section):
    """How the result is written."""

    format: Format = "portable"
    max_gap: float | None = Field(None, gt=0)
    rank: int | None = Field(None, ge=1)
    check_original: bool = False


class PublishedRow(Section):
    """One line of a table.

    ``method`` is the name in the paper and ``label`` the entry of ``compare.methods`` that stands for it, if one
    does; ``scores`` are by benchmark of the recipe, ``others`` are columns that no benchmark of ours measures.
    """

    method: str
    label: str | None = None
    parameters: str | None = None
    scores: dict[str, float] = Field(default_factory=dict)
    others: dict[str, float] = Field(default_factory=dict)


class Published(Section):
    """A table: where it stands, its unit, its lines, and what is known to differ from our run or is not known."""

    source: str
    unit: str = "percent"
    rows: list[PublishedRow] = Field(min_length=1)
    differs: list[str] = Field(default_factory=list)
    unknown: list[str] = Field(default_factory=list)

    def check_scores(self, benchmarks: Iterable[str], where: str) -> None:
        """Raises RecipeError where a score is of no benchmark in ``evaluate``."""
        known, wanted = list(benchmarks), "a benchmark in `evaluate`; other columns go under `others`"
        for number, row in enumerate(self.rows):
            for name in row.scores:
                need_known(name, known, f"{where}, key published.rows.{number}.scores.{name}", wanted)

    def check_labels(self, labels: Iterable[str], where: str) -> None:
        """Raises RecipeError where a label is that of no entry of the comparison."""
        known = list(labels)
        for number, row in enumerate(self.rows):
            if row.label is not None:
                need_known(
                    row.label, known, f"{where}, key published.rows.{number}.label", "a label in compare.methods"
                )

    def scores(self) -> list[dict[str, Any]]:
        """Returns the scores of lines that have a label, as shares where the table is in per cent."""
        scale = 100 if self.unit == "percent" else 1
        return [
            {
                "label": row.label,
                "benchmark": name,
                "score": score / scale,
                "source": self.source,
                "note": f"({row.method}{', ' + row.parameters if row.parameters else ''})",
            }
            for row in self.rows
            if row.label is not None
            for name, score in row.scores.items()
        ]


def explain(
    error: ValidationError, where: str, known: Callable[[Sequence[str | int]], Sequence[str]], section: str = ""
) -> RecipeError:
    """Returns the error to raise for the first value that pydantic refused; ``known`` are the keys of a place."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part not in (*_TAGS, OWN, NAMED, BY_FILE, BY_BASE))
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        next_step = nearest(place.rpartition(".")[2], known(first["loc"]))
        got, wanted = "an unknown key", "a key that recipes have"
    elif first["type"] in ("missing", "missing_argument"):
        got, wanted, next_step = "nothing", "a value", f"Add `{place}:` to the recipe."
    else:
        wanted, next_step = first["msg"].removeprefix("Input should be "), "Correct the value."
        wanted = "a size such as 500MB, 20GB or a number of bytes" if first["type"].startswith("byte_size") else wanted
        got = json.dumps(first["input"], ensure_ascii=False, default=repr)
    return RecipeError(f"{where}, key {section}{place}", got=got, wanted=wanted, next_step=next_step)
