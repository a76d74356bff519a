"""An entry of ``evaluate`` that names a standard benchmark, and the table of them: task, metric, shots, scorings.

The default of every benchmark is lm-eval's task as it stands: prompt, shots and scoring. ``scoring`` names a departure:
another of the task's own metrics, or the protocol of a paper's scripts (:mod:`keeptune.evaluation.standard.protocols`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

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
    """A benchmark of the table."""

    task: str  # lm-eval's task or group
    folders: tuple[str, ...]  # where lm-eval keeps it, below its tasks; none where the task is ours
    role: Role = "knowledge"  # unless the recipe names one
    items: int | None = None  # of the split that is scored on the hub; None where it is not known
    scorings: Mapping[str, Scoring] = field(default_factory=dict)  # by name; ``standard`` is lm-eval's
    content: tuple[str, ...] = ("question",)  # fields of an item that together identify it, to find it in other data
    code: bool = False  # answers are programs, which are run
    hub: bool = True  # lm-eval can fetch it; else its data must be named


_ACCURACY, _PER_CHARACTER = Scoring("accuracy", "acc,none"), Scoring("accuracy_norm", "acc_norm,none")
_F1, _MATTHEWS = Scoring("f1", "f1,none"), Scoring("matthews", "mcc,none")
_BITS = Scoring("cross_entropy", "bits_per_byte,none")
_QUESTION = ("question", "choices")
_ADAPTERS = {"llm-adapters": Scoring("exact_match", protocol="llm-adapters")}
_ANSWERS = {STANDARD: Scoring("exact_match", "exact_match,remove_whitespace")}
_CHOICES = {STANDARD: _ACCURACY}
_NORMED = {STANDARD: _PER_CHARACTER, "plain": _ACCURACY, **_ADAPTERS}
_PROGRAMS = {STANDARD: Scoring("pass_at_1"), "bigcode": Scoring("pass_at_1", protocol="bigcode")}
_METAMATH = {"metamath": Scoring("exact_match", protocol="metamath")}
_WEBQS = {
    STANDARD: Scoring("exact_match", "exact_match,none"),
    "generated": Scoring("exact_match", protocol="generated"),
}
_GSM8K = {
    STANDARD: Scoring("exact_match", "exact_match,strict-match"),
    "flexible": Scoring("exact_match", "exact_match,flexible-extract"),
    "peft": Scoring("exact_match", protocol="peft"),
    **_METAMATH,
}
_MATH = {
    STANDARD: Scoring("exact_match", "exact_match,none"),
    "verify": Scoring("exact_match", "math_verify,none"),
    **_METAMATH,
}
_IFEVAL = {
    STANDARD: Scoring("prompts_followed", "prompt_level_strict_acc,none"),
    "prompt-loose": Scoring("prompts_followed", "prompt_level_loose_acc,none"),
    "instruction-strict": Scoring("instructions_followed", "inst_level_strict_acc,none"),
    "instruction-loose": Scoring("instructions_followed", "inst_level_loose_acc,none"),
}


def _row(
    task: str, items: int, scorings: Mapping[str, Scoring], *content: str, folders: tuple[str, ...] = (), **more: Any
) -> TableRow:
    content = content or ("question",)
    return TableRow(task=task, folders=folders or (task,), items=items, scorings=scorings, content=content, **more)


def _glue(task: str, items: int, *content: str, standard: Scoring = _ACCURACY, f1: bool = False) -> TableRow:
    scorings = {STANDARD: standard} | ({"f1": _F1} if f1 else {})
    return _row(task, items, scorings, *content, folders=(f"glue/{task.partition('_')[0]}",), role="task")


def _texts(task: str) -> TableRow:
    return TableRow(task=task, folders=(), scorings={STANDARD: _BITS}, content=("text",), hub=False)


NAMES: Mapping[str, TableRow] = {
    "triviaqa": _row("triviaqa", 17_944, _ANSWERS),
    "nq_open": _row("nq_open", 3_610, _ANSWERS),
    "efficientqa": TableRow(task="nq_open", folders=("nq_open",), scorings=_ANSWERS, hub=False),
    "webqs": _row("webqs", 2_032, _WEBQS),
    "mmlu": _row("mmlu", 14_042, _CHOICES, *_QUESTION, folders=("mmlu/default",)),
    "hellaswag": _row("hellaswag", 10_042, _NORMED, "ctx", "endings"),
    "winogrande": _row("winogrande", 1_267, _CHOICES | _ADAPTERS, "sentence", "option1", "option2"),
    "arc_easy": _row("arc_easy", 2_376, _NORMED, *_QUESTION, folders=("arc",)),
    "arc_challenge": _row("arc_challenge", 1_172, _NORMED, *_QUESTION, folders=("arc",)),
    "piqa": _row("piqa", 1_838, _NORMED, "goal", "sol1", "sol2"),
    "boolq": _row("boolq", 3_270, _CHOICES | _ADAPTERS, folders=("super_glue/boolq",)),
    "openbookqa": _row("openbookqa", 500, _NORMED, "question_stem", "choices"),
    "gsm8k": _row("gsm8k", 1_319, _GSM8K, role="task"),
    "math": _row("minerva_math", 5_000, _MATH, "problem", folders=("minerva_math", "benchmarks"), role="task"),
    "humaneval": _row("humaneval", 164, _PROGRAMS, "prompt", role="task", code=True),
    "mbpp": _row("mbpp", 500, _PROGRAMS, "text", "code", role="task", code=True),
    "ifeval": _row("ifeval", 541, _IFEVAL, "prompt", role="task"),
    "cola": _glue("cola", 1_043, "sentence", standard=_MATTHEWS),
    "mnli": _glue("mnli", 9_815, "premise", "hypothesis"),
    "mnli_mismatch": _glue("mnli_mismatch", 9_832, "premise", "hypothesis"),
    "mrpc": _glue("mrpc", 408, "sentence1", "sentence2", f1=True),
    "qnli": _glue("qnli", 5_463, "question", "sentence"),
    "qqp": _glue("qqp", 40_430, "question1", "question2", f1=True),
    "rte": _glue("rte", 277, "sentence1", "sentence2"),
    "sst2": _glue("sst2", 872, "sentence"),
    "wnli": _glue("wnli", 71, "sentence1", "sentence2"),
    "tinystories": _texts("tinystories"),
    "c4_text": _texts("c4_text"),
}


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
