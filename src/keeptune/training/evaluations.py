"""Benchmarks while training: scored at the trainer's evaluations, logged; too much lost ends the training.

The trainer's own options say when: ``eval_strategy``, ``eval_steps``, ``eval_delay``. Of the evaluations the best is

    s* = argmax over s of learned(s)   subject to   forgetting(t) <= stop_at_loss for all t <= s                     (1)

of equals the one that forgets less, then the later one; the state of s* is written as training goes on. All that (1)
needs is in the trainer's log, and so in its checkpoints.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from keeptune.core.artefact import file_checksum, read_tensors, write_tensors
from keeptune.core.errors import TrainError
from keeptune.core.eval_mode import in_evaluation
from keeptune.core.processes import by_first

_log = logging.getLogger(__name__)
FORGETTING, LEARNED = "eval_forgetting", "eval_learned"
Rows = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Evaluations:
    """What is scored while training, and what follows from it.

    Args:
        score: Scores the model as it is: ``eval_forgetting``, ``eval_learned`` and what else is to be logged.
        stop_at_loss: The most that ``eval_forgetting`` may be; None only logs.
    """

    score: Callable[[], Mapping[str, float]]
    stop_at_loss: float | None = None

    def best(self, rows: Rows) -> Mapping[str, float] | None:
        """Returns the row of the best evaluation (1) of a log; None where all lost too much, or none was to be chosen.

        Laws: it is one of the rows before the first above the limit, and none of these learned more.
        """
        if self.stop_at_loss is None:
            return None
        limit, own = self.stop_at_loss, [row for row in rows if row["step"] and FORGETTING in row]
        within = list(takewhile(lambda row: row[FORGETTING] <= limit, own))
        order = [(row.get(LEARNED, row["step"]), -row[FORGETTING], row["step"]) for row in within]
        return within[order.index(max(order))] if within else None

    def notes(self, rows: Rows) -> list[str]:
        """Returns what is to be said of the state that was kept."""
        best = self.best(rows)
        if best is None:
            return []
        lost = f"at which {best[FORGETTING]:.2g} was lost; it was chosen by the benchmarks' own scores"
        return [f"stop_at_loss {self.stop_at_loss:g}: the state of step {best['step']:.0f} is kept, {lost}"]


def evaluated(rows: Rows) -> list[dict[str, float]]:
    """Returns the evaluations among the rows of a log."""
    own = [{key: value for key, value in row.items() if key == "step" or key.startswith("eval_")} for row in rows]
    return [row for row in own if len(row) > 1]


def add_evaluations(trainer: Any, evaluations: Evaluations) -> None:
    """Has a trainer evaluate by benchmarks, before ``train()``, beside data to evaluate on where it has some.

    Laws: what is trained is the same with and without, to the last bit, until it stops; a training that is killed
    goes on to the same best evaluation.
    """
    folder, limit = Path(trainer.args.output_dir), evaluations.stop_at_loss
    theirs = (lambda *_, **__: {}) if trainer.eval_dataset is None else trainer.evaluate

    def evaluate(*given: Any, **options: Any) -> dict[str, float]:
        step, due = trainer.state.global_step, trainer.control.should_evaluate
        metrics: dict[str, float] = theirs(*given, **options)
        if step and not due:  # eval_on_start, of a training that goes on, or after it
            return metrics
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            own = dict(evaluations.score())
        with in_evaluation(trainer.model):  # TRL's own means of training stay where they are
            trainer.log(dict(own))
        row: Mapping[str, float] = trainer.state.log_history[-1]
        _log.info("training: step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in own.items()))
        control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics | own)
        if evaluations.best(trainer.state.log_history) is row:
            by_first(lambda: write_tensors(_place(folder, row), _trained(trainer.model)))
        if limit is not None and FORGETTING not in own:
            raise _refused("a base that scores 0 on every benchmark", "one that knows some of it", "Name others.")
        if limit is not None and own[FORGETTING] > limit:
            _log.info("training: stopped at step %d: %.2g is lost, more than %g", step, own[FORGETTING], limit)
            control.should_training_stop = True
            control.should_save = False  # what goes on from it would take one step more
        trainer.control = control
        return metrics | own

    trainer.evaluate = evaluate
    handler, first = trainer.callback_handler, _States(trainer, evaluations, folder)
    handler.callbacks = [first, *handler.callbacks]  # what others say at the end is of the state that is kept


class _States(TrainerCallback):
    """Keeps checkpoints and best states in step, and ends with the best one."""

    def __init__(self, trainer: Any, evaluations: Evaluations, folder: Path) -> None:
        self._trainer, self._evaluations, self._folder = trainer, evaluations, folder

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Removes states that are not the best, once a checkpoint knows which is."""
        best = self._evaluations.best(state.log_history)
        for path in (self._folder / "best").glob("step-*") if state.is_world_process_zero and best else ():
            if path != _place(self._folder, best):
                path.unlink()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Puts the best state into the model."""
        limit, best = self._evaluations.stop_at_loss, self._evaluations.best(state.log_history)
        if limit is None:
            return
        if best is None:
            rows = evaluated(state.log_history)
            raise _refused(
                f"{rows[-1][FORGETTING]:.2g} lost at step {rows[-1]['step']:.0f}" if rows else "no evaluation",
                f"an evaluation at which at most {limit:g} is lost",
                "Lower train.learning_rate or train.eval_steps, hold more, or raise stop_at_loss.",
            )
        kept = read_tensors(path := _place(self._folder, best), file_checksum(path))
        for name, parameter in _trained(self._trainer.model).items():
            parameter.copy_(kept[name])


def _refused(got: str, wanted: str, next_step: str) -> TrainError:
    return TrainError("stop_at_loss", got=got, wanted=wanted, next_step=next_step)


def _trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def _place(folder: Path, row: Any) -> Path:
    """Returns where the state at an evaluation is kept, beside the checkpoints."""
    return folder / "best" / f"step-{row['step']:.0f}.safetensors"
