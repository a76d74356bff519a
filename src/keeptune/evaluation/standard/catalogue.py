"""The names of standard benchmarks: lm-eval's task, its metric, its shots, and how else it may be scored.

The default of every benchmark is lm-eval's task as it stands: prompt, shots and scoring. ``scoring`` names a departure:
another of the task's own metrics, or the protocol of a paper's scripts (:mod:`keeptune.evaluation.standard.protocols`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from keeptune.core.errors import RecipeError, nearest
from keeptune.evaluation.benchmarks import Role
from keeptune.evaluation.metrics import Measure

__all__ = ["NAMES", "STANDARD", "Known", "Scoring", "known"]

STANDARD = "standard"


@dataclass(frozen=True, slots=True)
class Scoring:
    """One way of scoring a benchmark.

    Args:
        metric: The metric, as results name it.
        key: lm-eval's own name of it, ``metric,filter``; None where a protocol of ours scores.
        protocol: The name in :mod:`keeptune.evaluation.standard.protocols`; None for lm-eval's own prompt and scoring.
    """

    metric: Measure
    key: str | None = None
    protocol: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A benchmark of the table.

    Args:
        task: lm-eval's task or group.
        folders: Where lm-eval keeps it, below its tasks; none where the task is ours.
        role: What it measures unless the recipe says otherwise.
        shots: Examples in the prompt, lm-eval's own number.
        scorings: By name; ``standard`` is lm-eval's.
        content: Fields of an item that together say which item it is, to find it in other data.
        code: Whether answers are programs, which are run.
        hub: Whether lm-eval can fetch it; else its data must be named.
    """

    task: str
    folders: tuple[str, ...]
    role: Role
    shots: int = 0
    scorings: Mapping[str, Scoring] = field(default_factory=dict)
    content: tuple[str, ...] = ("question",)
    code: bool = False
    hub: bool = True


def _answers(**more: Scoring) -> dict[str, Scoring]:
    return {STANDARD: Scoring("exact_match", "exact_match,remove_whitespace"), **more}


def _choices(*, normed: bool, adapters: bool = True) -> dict[str, Scoring]:
    plain, per_character = Scoring("accuracy", "acc,none"), Scoring("accuracy_norm", "acc_norm,none")
    found = {STANDARD: per_character, "plain": plain} if normed else {STANDARD: plain}
    return found | ({"llm-adapters": Scoring("exact_match", protocol="llm-adapters")} if adapters else {})


def _glue(task: str, *content: str, f1: bool = False) -> Known:
    score = Scoring("matthews", "mcc,none") if task == "cola" else Scoring("accuracy", "acc,none")
    scorings = {STANDARD: score} | ({"f1": Scoring("f1", "f1,none")} if f1 else {})
    folders = (f"glue/{task.partition('_')[0]}",)
    return Known(task=task, folders=folders, role="task", scorings=scorings, content=content)


_METAMATH = Scoring("exact_match", protocol="metamath")
_PROGRAMS = {STANDARD: Scoring("pass_at_1"), "bigcode": Scoring("pass_at_1", protocol="bigcode")}

NAMES: Mapping[str, Known] = {
    "triviaqa": Known(task="triviaqa", folders=("triviaqa",), role="knowledge", scorings=_answers()),
    "nq_open": Known(task="nq_open", folders=("nq_open",), role="knowledge", scorings=_answers()),
    "efficientqa": Known(task="nq_open", folders=("nq_open",), role="knowledge", scorings=_answers(), hub=False),
    "webqs": Known(
        task="webqs",
        folders=("webqs",),
        role="knowledge",
        scorings={
            STANDARD: Scoring("exact_match", "exact_match,none"),
            "generated": Scoring("exact_match", protocol="generated"),
        },
    ),
    "mmlu": Known(
        task="mmlu",
        folders=("mmlu/default",),
        role="knowledge",
        scorings=_choices(normed=False, adapters=False),
        content=("question", "choices"),
    ),
    "hellaswag": Known(
        task="hellaswag",
        folders=("hellaswag",),
        role="knowledge",
        content=("ctx", "endings"),
        scorings=_choices(normed=True),
    ),
    "winogrande": Known(
        task="winogrande",
        folders=("winogrande",),
        role="knowledge",
        content=("sentence", "option1", "option2"),
        scorings=_choices(normed=False),
    ),
    "arc_easy": Known(
        task="arc_easy",
        folders=("arc",),
        role="knowledge",
        content=("question", "choices"),
        scorings=_choices(normed=True),
    ),
    "arc_challenge": Known(
        task="arc_challenge",
        folders=("arc",),
        role="knowledge",
        content=("question", "choices"),
        scorings=_choices(normed=True),
    ),
    "piqa": Known(
        task="piqa",
        folders=("piqa",),
        role="knowledge",
        content=("goal", "sol1", "sol2"),
        scorings=_choices(normed=True),
    ),
    "boolq": Known(task="boolq", folders=("super_glue/boolq",), role="knowledge", scorings=_choices(normed=False)),
    "openbookqa": Known(
        task="openbookqa",
        folders=("openbookqa",),
        role="knowledge",
        content=("question_stem", "choices"),
        scorings=_choices(normed=True),
    ),
    "gsm8k": Known(
        task="gsm8k",
        folders=("gsm8k",),
        role="task",
        shots=5,
        scorings={
            STANDARD: Scoring("exact_match", "exact_match,strict-match"),
            "flexible": Scoring("exact_match", "exact_match,flexible-extract"),
            "metamath": _METAMATH,
        },
    ),
    "math": Known(
        task="minerva_math",
        content=("problem",),
        folders=("minerva_math", "benchmarks"),
        role="task",
        shots=4,
        scorings={
            STANDARD: Scoring("exact_match", "exact_match,none"),
            "verify": Scoring("exact_match", "math_verify,none"),
            "metamath": _METAMATH,
        },
    ),
    "humaneval": Known(
        task="humaneval", folders=("humaneval",), role="task", content=("prompt",), scorings=_PROGRAMS, code=True
    ),
    "mbpp": Known(
        task="mbpp", folders=("mbpp",), role="task", content=("text", "code"), shots=3, scorings=_PROGRAMS, code=True
    ),
    "ifeval": Known(
        task="ifeval",
        content=("prompt",),
        folders=("ifeval",),
        role="task",
        scorings={
            STANDARD: Scoring("prompts_followed", "prompt_level_strict_acc,none"),
            "prompt-loose": Scoring("prompts_followed", "prompt_level_loose_acc,none"),
            "instruction-strict": Scoring("instructions_followed", "inst_level_strict_acc,none"),
            "instruction-loose": Scoring("instructions_followed", "inst_level_loose_acc,none"),
        },
    ),
    "cola": _glue("cola", "sentence"),
    "mnli": _glue("mnli", "premise", "hypothesis"),
    "mnli_mismatch": _glue("mnli_mismatch", "premise", "hypothesis"),
    "mrpc": _glue("mrpc", "sentence1", "sentence2", f1=True),
    "qnli": _glue("qnli", "question", "sentence"),
    "qqp": _glue("qqp", "question1", "question2", f1=True),
    "rte": _glue("rte", "sentence1", "sentence2"),
    "sst2": _glue("sst2", "sentence"),
    "wnli": _glue("wnli", "sentence1", "sentence2"),
    "tinystories": Known(
        task="tinystories",
        content=("text",),
        folders=(),
        role="knowledge",
        scorings={STANDARD: Scoring("cross_entropy", "bits_per_byte,none")},
        hub=False,
    ),
    "c4_text": Known(
        task="c4_text",
        content=("text",),
        folders=(),
        role="knowledge",
        scorings={STANDARD: Scoring("cross_entropy", "bits_per_byte,none")},
        hub=False,
    ),
}


def known(name: str, task: str | None, *, where: str) -> Known | None:
    """Look a benchmark up.

    Args:
        name: The entry's name.
        task: The task that the entry names, of this table or of lm-eval.
        where: The recipe key, for error messages.

    Returns:
        The row of the table; None for a task of lm-eval that is not in it.

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
