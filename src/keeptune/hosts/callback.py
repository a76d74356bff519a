"""Callback: keeptune in any trainer of Transformers', TRL's among them, with a LoRA of its own or a plan's."""

import inspect
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy

from keeptune.adapter.export import export, format_for
from keeptune.adapter.install import install, restore_state, trained_state
from keeptune.adapter.load import load_adapter
from keeptune.api import base_of, store_of, tokens_of
from keeptune.core.artefact import EXPORT, content_key, read_json, write_json
from keeptune.core.errors import TrainError
from keeptune.core.plan import Plan
from keeptune.data.chat_template import turn_ends
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.model_pairs import AdapterPair, ModelPair, TwoModels
from keeptune.hosts.adopted import adopted_plan, refuse_adapter, refuse_start, without_adapter
from keeptune.methods.base import Method
from keeptune.methods.keep import Keep
from keeptune.model.pretrained import load_model
from keeptune.model.runner import Runner
from keeptune.penalties.base import Penalty, conclusions
from keeptune.pipeline.planning import PlanOptions, penalties_of, refuse_scope, with_penalties
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.scoring import result_fingerprint, score
from keeptune.pipeline.while_training import scores
from keeptune.recipe.schema import make_method
from keeptune.training.attach import add_plan
from keeptune.training.evaluations import Evaluations, add_evaluations, evaluated
from keeptune.training.guard import Guard, divergence
from keeptune.training.trainer import loss_curve

_DEFAULTS = PlanOptions()
_log = logging.getLogger(__name__)
_ARGUMENTS = ("learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "num_train_epochs", "max_steps", "seed")
_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "bf16", "fp16")
# Modules of hosts, their packages, and the versions that were run (docs/guides/hosts.md).
_RUN = {
    "axolotl": ("axolotl", "0.21"),
    "llamafactory": ("llamafactory", "0.9"),
    "swift": ("ms-swift", "4.6"),
    "unsloth": ("unsloth", "2026.10"),
}


class Callback(TrainerCallback):
    """keeptune in a trainer of your own: ``SFTTrainer(..., callbacks=[keeptune.Callback(knowledge=texts)])``.

    As training begins it takes the LoRA that is there, collects what penalties need and adds them, once per optimiser
    step and clipped with the task's gradient; budgets are in the trainer's log, and their state is in its checkpoints.
    As it ends, the adapter is exported to ``keeptune`` in ``output_dir``, checked on a fresh base, and reported.

    Args:
        method: One that starts as a plain LoRA does, such as ``Keep(nats=0.01)``, which None is. Rank, scale and
            dropout are those of the adapter that is there.
        knowledge: Texts that hold what the model should keep, or prompts and completions.
        penalties: Terms of the loss besides the method's own, such as ``L2(strength=1.0)``.
        plan: In place of these the plan that was installed, for methods that choose where to start.
        evaluate: Benchmarks that are scored before and after, on the same items, as training ends.
        stop_at_loss: They are scored every ``eval_steps`` of the trainer's too; training ends where on average more of
            what the base knew is lost, and the best state before is exported.
        options: How texts are cut, and where statistics are kept; which modules are tuned is the adapter's to say.

    Raises:
        TrainError: The method needs its plan beforehand, there is no knowledge, or a plan and more are given.
    """

    def __init__(
        self,
        *,
        method: Method | None = None,
        knowledge: Sequence[Any] | None = None,
        penalties: Sequence[Penalty] = (),
        plan: Plan | None = None,
        evaluate: Sequence[Benchmark] = (),
        stop_at_loss: float | None = None,
        options: PlanOptions = _DEFAULTS,
    ) -> None:
        """Checks what can be checked without a model."""
        if plan is not None and (method is not None or knowledge is not None or penalties):
            raise _refused("a plan, and a method, knowledge or penalties beside it", "Leave them out: it has them.")
        self.plan, self._method, self._knowledge = plan, method or Keep(), knowledge
        self._penalties = penalties_of(self._method, penalties)
        self._benchmarks, self._options = tuple(evaluate), options
        self._limit, self._evaluations = stop_at_loss, Evaluations(dict)
        if stop_at_loss is not None and not any(one.role == "knowledge" for one in evaluate):
            raise _refused("stop_at_loss without a benchmark of role knowledge", "Name one in `evaluate`.")
        self._trainer: Any = None
        self._started = 0.0
        if plan is None:
            refuse_start(self._method, self._penalties, knowledge)
            refuse_scope(self._method, self._penalties, None)

    def on_init_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Adds a plan that is given, and puts factors that TRL has rounded to bfloat16 back to float32."""
        if self._trainer is not None:  # adding penalties has an event come again
            return
        trainer = self._host()
        if self.plan is not None:
            self._attach(trainer, self.plan)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                parameter.data = parameter.data.float()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Makes the plan, or loads that of the checkpoint, and adds it to the trainer."""
        trainer = self._trainer or self._host()
        saved = result_folder(trainer) / "plan"
        plan = self.plan or (Plan.load(saved) if state.global_step else self._made(trainer))
        if self._trainer is None:
            self._attach(trainer, plan)
        self._watch(trainer, plan)
        if not self._started and state.is_world_process_zero:
            plan.save(saved)
        self._started = self._started or time.perf_counter()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Exports, checks and reports; what penalties hold has been said."""
        assert self.plan is not None
        seconds = time.perf_counter() - self._started
        write_result(self._trainer, self.plan, self._benchmarks, seconds, self._evaluations)
        self._started = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Refuses a trainer that had started before the callback was added."""
        if self._trainer is None:
            raise _refused("a trainer that had started before it was added", "Pass callbacks=[keeptune.Callback(...)].")

    def _host(self) -> Any:
        """Returns the trainer that has just called one of the events, which are not told; checked."""
        frames = (info.frame.f_locals.get("self") for info in inspect.stack(0))
        hosts = (own for own in frames if isinstance(own, Trainer) and self in own.callback_handler.callbacks)
        trainer: Any = next(hosts, None)
        if trainer is None:
            raise _refused("a loop that is no transformers.Trainer", "Call keeptune.Penalties.step in your loop.")
        others = trainer.callback_handler.callbacks
        if sum(isinstance(one, Callback) for one in others) > 1:
            raise _refused("two of them", "Leave one out; one takes several `penalties`.")
        if any(isinstance(one, Guard) and one.attached for one in others):
            raise _refused("a trainer with keeptune.attach", "Leave that out, and pass keeptune.Callback(plan=plan).")
        if trainer.hp_search_backend is not None:
            raise _refused("a search of hyperparameters", "Train those that it chose in a trainer of their own.")
        refuse_adapter(trainer.model, plain=self.plan is None)
        return trainer

    def _attach(self, trainer: Any, plan: Plan) -> None:
        warn_untried()
        add_plan(trainer, plan)
        self.plan, self._trainer = plan, trainer

    def _watch(self, trainer: Any, plan: Plan) -> None:
        """Has the trainer score the benchmarks, where there is a limit."""
        args = trainer.args
        if self._limit is None or self._evaluations.stop_at_loss is not None:
            return
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise _refused("stop_at_loss with a model in shards", "Use DDP, or leave it out.")
        if args.eval_strategy == IntervalStrategy.NO:
            if not args.eval_steps:
                raise _refused("stop_at_loss without eval_steps", "Set eval_steps in the trainer's arguments.")
            args.eval_strategy = IntervalStrategy.STEPS
        base = base_of(trainer.model, trainer.model.get_base_model().name_or_path).load
        where, tokenizer = result_folder(trainer), tokenizer_of(trainer)
        score = scores(trainer.model, plan, tokenizer, self._benchmarks, base=base, folder=where)
        self._evaluations = Evaluations(score, self._limit)
        add_evaluations(trainer, self._evaluations)

    def _made(self, trainer: Any) -> Plan:
        """Plans the adapter that is there, on the base beneath it; all processes take the plan of the first."""
        tokenizer = tokenizer_of(trainer)
        if self._knowledge is not None and tokenizer is None:
            raise _refused("a trainer without a tokenizer", "Pass processing_class=tokenizer to the trainer.")
        options, model = self._options, trainer.model
        with torch.random.fork_rng(), without_adapter(model) as (base, layers), store_of(options) as store:
            data, _ = tokens_of(base, tokenizer, {"knowledge": self._knowledge}, options)
            plan = adopted_plan(base, layers, model.peft_config["default"], self._method, data)
            made = [with_penalties(plan, self._penalties, Runner(base), store, data=data, options=options)]
        broadcast_object_list(made)
        return made[0]


def _refused(got: str, next_step: str) -> TrainError:
    wanted = "one, in a Trainer that trains one model"
    return TrainError("keeptune.Callback", got=got, wanted=wanted, next_step=next_step)


def warn_untried() -> None:
    """Logs a warning for each host at work here that is of another version than was run."""
    for package, run in (_RUN[module] for module in _RUN.keys() & sys.modules.keys()):
        try:
            found = version(package)
        except PackageNotFoundError:  # a module of that name, of no package
            continue
        if not f"{found}.".startswith(f"{run}."):
            _log.warning("keeptune: %s %s: only %s.x was run (docs/guides/hosts.md)", package, found, run)


def result_folder(trainer: Any) -> Path:
    """Returns where the plan, the result and the report go: a run folder, as `keeptune run` writes."""
    return Path(trainer.args.output_dir) / "keeptune"


def tokenizer_of(trainer: Any) -> Any:
    """Returns the tokenizer of a trainer, or of its processor; None without one."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def write_result(
    trainer: Any, plan: Plan, benchmarks: Sequence[Benchmark], seconds: float, evaluations: Evaluations
) -> None:
    """Exports what was trained, checks it on a fresh base, scores it and writes the report; all processes call it.

    Raises:
        ExportError: What was written does not compute what the trained model does.
    """
    model, tokenizer, output = trainer.model, tokenizer_of(trainer), result_folder(trainer)
    state = trained_state(model, plan) if trainer.is_fsdp_enabled else None
    if not trainer.accelerator.is_main_process:
        return
    base = replace(base_of(model, model.get_base_model().name_or_path), ends=turn_ends(tokenizer))
    if state is not None:
        model = install(base.load(), plan)
        restore_state(model, plan, state)
    format, _ = format_for(plan, "portable")
    folder = output / ("merged" if format == "merged" else "adapter")
    export(model, plan, folder, base=base, tokenizer=tokenizer)
    record, kind = _trained(trainer, plan, base.name, seconds, evaluations), type(trainer)
    name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    recipe: dict[str, Any] = {"trainer": name, "model": base.name, "task": {}, "evaluate": list(benchmarks)}
    recipe["method"] = {"name": plan.method, **plan.options}
    own = len(penalties_of(make_method(recipe["method"], seed=0)))  # the method's, which stand first
    recipe["penalties"] = [{"name": made.name, **made.options} for made in plan.penalties[own:]]
    write_json(output / "trained" / "train.json", record)
    write_json(folder / EXPORT, read_json(folder / EXPORT) | {"train": record["key"]})
    write_json(output / "recipe.json", recipe)
    pair: Callable[[], ModelPair] = cache(lambda: AdapterPair(load_adapter(base.load(), folder)))
    if format == "merged":
        pair = cache(lambda: TwoModels(base.load(), load_model(str(folder))))
    of: Any = SimpleNamespace(tokenizer=tokenizer, seed=trainer.args.seed, base_fingerprint=plan.provenance["model"])
    weights = result_fingerprint(folder)
    for one in benchmarks:
        score(of, one, pair, output / "evaluation", weights, None)

    write_report([output], output)
    _log.info("keeptune: %s, checked on a fresh base; report in %s", folder, output / "report.html")


def _trained(trainer: Any, plan: Plan, base: str, seconds: float, evaluations: Evaluations) -> dict[str, Any]:
    log, args = trainer.state.log_history, trainer.args
    loss, chosen = loss_curve(log, plan), evaluations.notes(log)
    diverged = divergence([row["loss"] for row in loss])
    notes = [*([diverged] if diverged else []), *(conclusions(plan, loss[-1]) if loss else []), *chosen]
    arguments = {name: getattr(args, name) for name in (*_ARGUMENTS, *_SIZES) if hasattr(args, name)}
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    record = {"plan": plan.key, "base": base, "arguments": arguments, "loss": loss, "notes": notes, "seconds": seconds}
    record |= {"trained_parameters": trained - sum(t.held_back for t in plan.targets)}
    record |= {"evaluations": evaluated(log)} if chosen else {}
    return {"key": content_key(record), **record}
