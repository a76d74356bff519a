"""An entry of ``evaluate`` that names a standard benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from keeptune.core.errors import RecipeError
from keeptune.evaluation.benchmarks import Benchmark, Role
from keeptune.evaluation.metrics import Measure
from keeptune.evaluation.standard.catalogue import STANDARD, Scoring, TableRow, table_row


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
        self._check_numbers(examples=1, shots=0, batch_size=1, max_length=8, max_new_tokens=1)
        if row is not None and not row.hub and self.data is None:
            raise RecipeError(
                f"{self.where}.data",
                got="nothing",
                wanted="the folder or file that holds it: lm-eval cannot fetch this one",
                next_step="Add `data: path`.",
            )
        if row is not None and row.code and not self.run_code:
            raise RecipeError(
                f"{self.where}.run_code",
                got="false",
                wanted="leave to run the programs that the model writes: that is how this benchmark is scored",
                next_step="Add `run_code: true`; docs/guides/benchmarks.md says what the programs can and cannot do.",
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
