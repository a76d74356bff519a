"""Callback: keeptune in any trainer of Transformers', TRL's among them, which has a LoRA of its own or a plan's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from keeptune.adapter.export import ExportOptions
from keeptune.api import store_of, tokens_of
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.hosts.adopted import Adopted, refuse_adapter, refuse_start, without_adapter
from keeptune.hosts.host import agreed, refuse_host, trainer_of
from keeptune.hosts.result import Result
from keeptune.methods.base import Method
from keeptune.methods.keep import Keep
from keeptune.penalties.base import Penalty
from keeptune.pipeline.planning import PlanOptions, penalties_of, refuse_scope
from keeptune.training.attach import add_plan


@dataclass(frozen=True)
class CallbackOptions:
    """What a :class:`Callback` reads and writes.

    Args:
        output: Folder of the plan, the exported adapter and the report; None is ``keeptune`` in the trainer's
            ``output_dir``.
        base: Path or hub id of the base, which the export is checked on; None is where the model was loaded from.
        plan: How texts are cut, and where statistics are kept. Which modules are tuned is the adapter's to say.
        export: What is written, and how it is checked.
    """

    output: Path | str | None = None
    base: str | None = None
    plan: PlanOptions = PlanOptions()
    export: ExportOptions = ExportOptions()


_DEFAULTS = CallbackOptions()


class Callback(TrainerCallback):
    """keeptune in a trainer of your own: ``SFTTrainer(..., callbacks=[keeptune.Callback(knowledge=texts)])``.

    As training begins it takes the LoRA that is there, collects what penalties need and adds them, once per optimiser
    step and clipped with the task's gradient; budgets are in the trainer's log, and their state is in its checkpoints.
    As it ends, the adapter is exported, checked on a fresh base, and reported.
    """

    def __init__(
        self,
        *,
        method: Method | None = None,
        knowledge: Sequence[Any] | None = None,
        penalties: Sequence[Penalty] = (),
        plan: Plan | None = None,
        evaluate: Sequence[Benchmark] = (),
        options: CallbackOptions = _DEFAULTS,
    ) -> None:
        """Checks what can be checked without a model.

        Args:
            method: One that starts as a plain LoRA does, such as ``Keep(nats=0.01)``, which None is. Rank, scale and
                dropout are those of the adapter that is there.
            knowledge: Texts that hold what the model should keep, or prompts and completions.
            penalties: Terms of the loss besides the method's own, such as ``L2(strength=1.0)``.
            plan: In place of these the plan that was installed, for methods that choose where to start.
            evaluate: Benchmarks that are scored before and after, on the same items, as training ends.
            options: Where the result goes, and the rest.

        Raises:
            TrainError: The method needs its plan beforehand, there is no knowledge, or a plan and more are given.
        """
        if plan is not None and (method is not None or knowledge is not None or penalties):
            raise TrainError(
                "keeptune.Callback",
                got="a plan, and a method, knowledge or penalties beside it",
                wanted="one of the two: all of these are in the plan",
                next_step="Leave the others out.",
            )
        self.plan, self._method, self._knowledge = plan, method or Keep(), knowledge
        self._penalties = penalties_of(self._method, penalties)
        self._benchmarks, self._options = tuple(evaluate), options
        self._trainer: Any = None
        if plan is None:
            refuse_start(self._method, self._penalties, knowledge)
            refuse_scope(self._method, self._penalties, None)

    def on_init_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Puts factors that the trainer has rounded to bfloat16 (TRL, on a quantised base) back to float32."""
        refuse_host(trainer_of(self), self)
        if isinstance(kwargs["model"], PeftModel):
            for parameter in kwargs["model"].parameters():
                if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                    parameter.data = parameter.data.float()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Makes the plan, or loads that of the checkpoint, and adds it to the trainer."""
        trainer = trainer_of(self)
        if self._trainer is trainer:  # which trains again
            return
        refuse_host(trainer, self)
        if self.plan is not None and not isinstance(trainer.model, PeftModel):
            refuse_adapter(trainer.model)
        result = self._result(trainer)
        with torch.random.fork_rng():
            if self.plan is None:
                self.plan = agreed(lambda: Plan.load(result.plan) if state.global_step else self._made(trainer))
            add_plan(trainer, self.plan)
        if state.is_world_process_zero:
            self.plan.save(result.plan)
        trainer.add_callback(_End(trainer, result, self.plan))
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Refuses a trainer that had started before the callback was added."""
        if self._trainer is None:
            raise TrainError(
                f"training step {state.global_step + 1}",
                got="a callback that was added to a trainer that had started",
                wanted="one that is there when training begins",
                next_step="Pass callbacks=[keeptune.Callback(...)] to the trainer.",
            )

    def _made(self, trainer: Any) -> Plan:
        """Plans the adapter that is there, on the base beneath it."""
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if self._knowledge is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TrainError(
                "keeptune.Callback",
                got="a trainer without a tokenizer",
                wanted="the tokenizer of the model, for the knowledge",
                next_step="Pass processing_class=tokenizer to the trainer.",
            )
        options = self._options.plan
        with without_adapter(trainer.model) as (base, layers), store_of(options) as store:
            data, _ = tokens_of(base, tokenizer, {"knowledge": self._knowledge}, options)
            made = Adopted(layers, trainer.model.peft_config["default"])
            return made.plan(base, self._method, self._penalties, store, data=data, options=options)

    def _result(self, trainer: Any) -> Result:
        name = self._options.base or trainer.model.get_base_model().name_or_path
        if not name:
            raise TrainError(
                "keeptune.Callback, base",
                got="a model that does not say where it was loaded from",
                wanted="the path or hub id of the base, on which the export is checked",
                next_step="Set options=keeptune.CallbackOptions(base=...).",
            )
        folder = Path(self._options.output or Path(trainer.args.output_dir) / "keeptune")
        return Result(folder, name, self._options.export, self._benchmarks)


class _End(TrainerCallback):
    """Exports, checks and reports once training is over, and what penalties say of it."""

    def __init__(self, trainer: Any, result: Result, plan: Plan) -> None:
        self._trainer, self._result, self._plan = trainer, result, plan
        self._started = time.perf_counter()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._result.write(self._trainer, self._plan, time.perf_counter() - self._started)
