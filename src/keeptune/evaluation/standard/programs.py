"""HumanEval and MBPP: lm-eval's prompts and programs, run in our sandbox instead of lm-eval's own process.

lm-eval's task files load ``code_eval`` and run it when they are merely read, so they are read without their functions,
which this module replaces: the program of an answer, and MBPP's examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keeptune.core.processes import by_first
from keeptune.data.sources import Row
from keeptune.evaluation.standard.sandbox import Sandbox

METRIC = "pass_at_1"
MBPP_EXAMPLES = (2, 3, 4)  # by task_id, as in lm-eval's list


def program_of(name: str, row: Row, answer: str) -> str:
    """Returns an answer with the tests that it has to pass, as in lm-eval's ``code_eval``."""
    if name == "humaneval":
        return f"{row['prompt']}{answer}\n{row['test']}\ncheck({row['entry_point']})"
    # MBPP's test_setup_code, of one item in 500, is left out there as well.
    return f"{answer}\n" + "\n".join(row["test_list"][:3])


class Runs:
    """Runs the answers of ``humaneval`` or ``mbpp`` and keeps what stopped each, in the order of the items."""

    def __init__(self, name: str, sandbox: Sandbox) -> None:
        self.name = name
        self.sandbox = sandbox
        self.stopped: list[str] = []

    def process(self, row: Row, results: Sequence[str]) -> dict[str, float]:
        """Runs the one answer to an item: lm-eval's ``process_results``."""
        program = program_of(self.name, row, results[0])
        self.stopped.append(by_first(lambda: self.sandbox.run(program)))
        return {METRIC: float(not self.stopped[-1])}


def task_overrides(name: str, process: Callable[[Row, Sequence[str]], dict[str, float]]) -> dict[str, Any]:
    """Returns fields of a task's configuration in place of those that run programs in this process."""
    fields: dict[str, Any] = {
        "unsafe_code": False,
        "filter_list": None,
        "process_results": process,
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
    }
    if name == "mbpp":
        fields["fewshot_config"] = {
            "sampler": "first_n",
            "split": "prompt",
            "process_docs": lambda rows: [row for row in rows if row["task_id"] in MBPP_EXAMPLES],
            "doc_to_target": "{{code}}\n[DONE]",
        }
    return fields
