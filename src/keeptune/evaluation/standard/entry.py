"""An entry of ``evaluate`` that names a standard benchmark, and the table of them, from ``benchmarks.yaml``.

The default of every benchmark is lm-eval's task as it stands: prompt, shots and scoring. ``scoring`` names a departure:
another of the task's own metrics, or the protocol of a paper's scripts (:mod:`keeptune.evaluation.standard.protocols`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import yaml
from pydantic import TypeAdapter

from keeptune.core.errors import RecipeError, nearest
from keeptune.core.options import Range
from keeptune.evaluation.benchmarks import Benchmark, Role
from keeptune.evaluation.metrics import Measure

STANDARD = "standard"


@dataclass(frozen=True, slots=True)
class Scoring:
    """One way of scoring a benchmark: lm-eval's, or a protocol of ours."""

    metric: Measure  # as results name it
    key: str | None = None  # lm-eval's own name of it, ``metric,filter``
    protocol: str | None = None  # the name in keeptune.evaluation.standard.protocols


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """A benchmark of the table, ``benchmarks.yaml``."""

    task: str  # lm-eval's task or group
    folders: tuple[str, ...] = ()  # where lm-eval keeps it, below its tasks; none where the task is ours
    role: Role = "knowledge"  # unless the recipe names one
    items: int | None = None  # of the split that is scored on the hub; None where it is not known
    scorings: Mapping[str, Scoring] = field(default_factory=dict)  # by name; ``standard`` is lm-eval's
    content: tuple[str, ...] = ("question",)  # fields of an item that together identify it, to find it in other data
    code: bool = False  # answers are programs, which are run
    word: str = ""  # LLM-Adapters' for a choice
    hub: bool = True  # lm-eval can fetch it; else its data must be named
    fields: tuple[str, ...] = ()  # of local data, which are kept; none where rows have several forms, or any
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of local data, by split


NAMES: Mapping[str, TableRow] = TypeAdapter(dict[str, TableRow]).validate_python(
    yaml.safe_load(Path(__file__).with_name("benchmarks.yaml").read_text("utf-8"))["benchmarks"]
)


def table_row(name: str, task: str | None, *, where: str) -> TableRow | None:
    """Returns the row of an entry's task, or else of its name; None for a task of lm-eval that is not in the table.

    Raises:
        RecipeError: No task is named, and the name is not in the table.
    """
    if task is None and name not in NAMES:
        raise RecipeError(
            where,
            got=f'"{name}", without `metric` and without `task`',
            wanted="the name of a standard benchmark",
            next_step=f"{nearest(name, NAMES)} Another task of lm-eval is named by `task:`; "
            "a benchmark of your own has `file` and `metric`.",
        )
    return NAMES.get(name if task is None else task)


@dataclass(frozen=True, kw_only=True)
class NamedBenchmark(Benchmark):
    """A standard benchmark, run by lm-eval.

    Args:
        name: A name of the table in ``docs/guides/benchmarks.md``, or with ``task`` any name; it names files.
        role: None takes the table's.
        task: A name of the table, or another task of lm-eval; None takes ``name``.
        data: Folder or file of JSONL to take the items from; None fetches them from the hub, as lm-eval does.
        examples: Number of items, from the top (of each subject, where there are several); None takes them all.
        shots: Examples in the prompt; None takes lm-eval's number.
        max_length: Tokens of prompt and answer together; None takes what the model has positions for.
        scoring: ``"standard"`` is lm-eval's; the table names others.
        chat: Asks through the chat template, with examples as turns (lm-eval's ``apply_chat_template`` and
            ``fewshot_as_multiturn``); None does so for generative tasks where the tokenizer has a template.
        system: The system's turn of a chat.
        enable_thinking: Given to a chat template that has this switch; None is false there.
        think_end_token: Ends a thought, and the answer follows; None takes ``</think>`` where the template has it.
        max_new_tokens: Tokens generated at most; None takes lm-eval's number.
        run_code: Whether programs that the model wrote may be run, in a confined process.

    Raises:
        RecipeError: The name is not known, or a value is out of range.
    """

    ranges = {"shots": Range(least=0), "max_length": Range(least=8)}

    role: Role | None = None
    task: str | None = None
    data: str | None = None
    shots: int | None = None
    batch_size: int = 8
    max_length: int | None = None
    scoring: str = STANDARD
    chat: bool | None = None
    system: str | None = None
    enable_thinking: bool | None = None
    think_end_token: str | None = None
    max_new_tokens: int | None = None
    run_code: bool = False

    def __post_init__(self) -> None:
        row = self.row
        if self.role is None:
            # A frozen field is set once, here, so that every reader has a role.
            object.__setattr__(self, "role", "knowledge" if row is None else row.role)
        self._check_words(role=get_args(Role), scoring=(STANDARD,) if row is None else tuple(row.scorings))
        super().__post_init__()
        self.need(
            row is None or row.hub or self.data is not None,
            "data",
            "the folder or file that holds it: lm-eval cannot fetch this one",
            "Add `data: path`.",
        )
        self.need(
            row is None or not row.code or self.run_code,
            "run_code",
            "leave to run the programs that the model writes: that is how this benchmark is scored",
            "Add `run_code: true`; docs/guides/benchmarks.md says what the programs can and cannot do.",
        )

    @property
    def row(self) -> TableRow | None:
        """Its row in the table; None for another task of lm-eval."""
        return table_row(self.name, self.task, where=self.where)

    @property
    def lm_eval_task(self) -> str:
        """The task or group of lm-eval."""
        row = self.row
        return row.task if row is not None else str(self.task)

    @property
    def how(self) -> Scoring | None:
        """How it is scored; None where lm-eval's first metric of the task decides."""
        row = self.row
        return None if row is None else row.scorings[self.scoring]

    @property
    def metric(self) -> Measure:
        """The metric, as results name it; of a task outside the table it is known with the results only."""
        return "accuracy" if self.how is None else self.how.metric
