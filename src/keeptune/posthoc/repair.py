"""keeptune repair: restores what a finished adapter has forgotten, without training (``repair_equations.py``).

One forward pass over knowledge and task data for the covariances, then one solve for each group of targets that share
an input. The result is a plain LoRA for the untouched base: of a LoRA, its own B with another A.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.export import export
from keeptune.adapter.install import install, restore_state
from keeptune.adapter.load import load_adapter, refuse_foreign
from keeptune.adapter.trained_head import put_head, trained_head
from keeptune.core.artefact import remove_leftovers, write_json
from keeptune.core.errors import DataError, RecipeError, named
from keeptune.core.low_rank import LowRank
from keeptune.core.options import Options, Range
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration
from keeptune.data.completions import TaskExamples, joined_knowledge, knowledge_of
from keeptune.data.examples import LanguageExamples
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import TwoModels
from keeptune.evaluation.results import interval_between
from keeptune.model.blocks import head_of, positions
from keeptune.pipeline.machine import check_device, check_folder, device_named, statistics_store
from keeptune.pipeline.planning import starting_from
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.posthoc.repair_equations import mu_for_drift
from keeptune.posthoc.repair_problem import FactoredModel, RepairProblem, repair_problem
from keeptune.statistics.request import DataRole
from keeptune.statistics.self_generated import SelfGeneration, write_texts

_log = logging.getLogger(__name__)
_DRIFT = 0.005  # the default budget
# Metrics that are no means over items, or whose items have several answers.
_OF_THE_WHOLE = ("f1", "matthews", "pearson", "spearman", "instructions_followed")
Examples = Sequence[str] | Sequence[tuple[str, str]]
Knowledge = Examples | LanguageExamples | Sequence[LanguageExamples]


@dataclass(frozen=True)
class Repair(Options):
    """The options of :func:`repair`.

    Args:
        drift: Budget: the relative feature drift that is left, the mean over targets; None is 0.005 unless μ is given.
        mu: The weight of the knowledge against the task; None takes the one that meets ``drift``.
        rank: Of the result, for changes that are not of low rank (DoRA, whole models).
        damping: How much the task uses every direction, as a share of the mean (``repair_equations.damped``).
        rounds: 2 repairs once more with the inputs that the repaired model sees, in place of the base's: one more pass
            over the data, for a little more of the task (``docs/guides/repair.md``).
        max_length: Texts are cut to this many tokens, or to the model's positions.
        end_token: Whether the end-of-text token counts as the end of each completion of the task.
        sweep: Further values of μ that the record reports drift, what is kept of the task, and scores of.
        seed: Of the bootstrap intervals; nothing else is random.
        store: Folder where covariances are kept; None takes the user's own store.
        device: ``auto`` is CUDA where there is a GPU.

    Raises:
        RecipeError: Both ``drift`` and ``mu`` are given, or a value is out of range.
    """

    refusal = RecipeError
    ranges = {
        **dict.fromkeys(("drift", "damping"), Range(above=0)),
        **dict.fromkeys(("rank", "rounds"), Range(least=1)),
        "mu": Range(least=0),
    }

    drift: float | None = None
    mu: float | None = None
    rank: int = 64
    damping: float = 1e-3
    rounds: int = 1
    max_length: int = 1024
    end_token: bool = True
    sweep: Sequence[float] = ()
    seed: int = 0
    store: Path | str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        """Checks the options, also against each other."""
        super().__post_init__()
        self.need(all(mu in Range(least=0) for mu in self.sweep), "sweep", "numbers of 0 or more")
        if self.drift is not None and self.mu is not None:
            raise RecipeError(
                "repair",
                got=f"both drift {self.drift:g} and mu {self.mu:g}",
                wanted="one of them: mu is the weight, or drift is the budget that the weight is computed for",
                next_step="Leave one out.",
            )

    def place(self, option: str) -> str:
        """Returns ``"repair, drift"`` for ``"drift"``."""
        return f"repair, {option}"

    @property
    def budget(self) -> float | None:
        """The drift that μ is computed for; None where μ is given."""
        return (_DRIFT if self.drift is None else self.drift) if self.mu is None else None


def repair(
    adapter: Path | str,
    output: Path | str,
    options: Repair | None = None,
    *,
    knowledge: Knowledge | None = None,
    task: Examples | LanguageExamples | None = None,
    base: str | None = None,
    benchmarks: Sequence[Benchmark] = (),
) -> dict[str, Any]:
    """Keeps what a finished adapter does on the task, and undoes what it does to the knowledge.

    Args:
        adapter: A PEFT adapter folder, a run folder of keeptune, or a whole model tuned from the base.
        output: Where the repaired adapter goes: a plain LoRA; it appears whole or not at all.
        options: Budget or weight, and the rest; None takes the defaults.
        knowledge: Texts that hold what the model should keep, or prompts and completions; None has the base
            write its own.
        task: Prompts and completions of the task, or texts; a few hundred are enough. Without them every direction
            counts as equally needed by the task.
        base: The base; None takes what the adapter names.
        benchmarks: Scored with the base, the adapter and the repaired adapter.

    Returns:
        The record that lies beside the adapter as ``repair.json``: ``mu``, ``drift_before``, ``drift``, ``task_kept``,
        ``task_error``, ``targets``, ``dropped``, ``end_token``, ``seconds``, ``export``, ``scores``, ``sweep``.

    Raises:
        RecipeError: There is no such device, or the output cannot be written.
        ModelError: There is no such adapter, it is of another base, or it changed none of the weights.
        DataError: There are no texts.
        StatisticsError: Activations are not finite.
        ExportError: The output holds something that keeptune did not write.
    """
    options, output, clock = options or Repair(), Path(output), _Clock()
    refuse_foreign(output)
    check_folder("--output", output)
    check_device(device := device_named(options.device))
    trained = TrainedModel.of(str(adapter), base=base, device=device)
    start = FactoredModel.of(trained)
    data = _tokens(start, knowledge, task, options)
    clock.lap("load")
    problem, total, changes, rows = _solved_in_rounds(start, data, options, clock)
    _warn(total, rows, start, options.rank)
    record = total | {"targets": rows, "dropped": list(start.dropped), "end_token": options.end_token}
    examples = {role: len(tokens.sequences) for role, tokens in data.items()}
    made_from = {
        "model": start.fingerprint,
        "dtype": trained.dtype,
        "seed": options.seed,
        "adapter": start.weights,
        "data": {role: tokens.fingerprint for role, tokens in data.items()},
        "examples": examples,
        "repair": record,
    }
    tuned, plan = _repaired(start, problem, changes, options, total["mu"], made_from)
    remove_leftovers(output)
    done = export(tuned, plan, output, base=trained.export_base, tokenizer=start.tokenizer)
    clock.lap("export")
    record = record | {"examples": examples, "export": asdict(done), "seconds": clock.seconds}
    mus = sorted(set(options.sweep))
    if mus:
        record["sweep"] = [_means(problem.solve(mu, options.rank)[1]) | {"mu": mu} for mu in mus]
    if benchmarks:
        models: dict[str, Callable[[], PreTrainedModel]] = {"adapter": trained.load_tuned}
        models["repaired"] = lambda: load_adapter(trained.load_base(), output).get_base_model()
        models |= {f"mu {mu:g}": partial(_with, tuned, plan, problem, mu, options.rank) for mu in mus}
        record["scores"] = _score_models(trained.load_base(), models, start.tokenizer, benchmarks, options.seed)
        clock.lap("evaluate")
    write_json(output / "repair.json", record)
    from keeptune.report.figures import write_figure  # loads matplotlib and plotly
    from keeptune.report.pages.sweep_charts import repair_charts

    if charts := repair_charts(record):
        words = "bars: 95% intervals; dotted: the base model; dashed: the adapter as it was"
        write_figure(charts, output / "repair.png", words)
    return record


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._started
        self._started = now


def _solved_in_rounds(
    start: FactoredModel, data: Mapping[DataRole, Calibration], options: Repair, clock: _Clock
) -> tuple[RepairProblem, dict[str, Any], dict[str, LowRank], list[dict[str, Any]]]:
    """Repairs with the inputs of the base, and in each further round with those of the model repaired before."""
    store = statistics_store(options.store)
    running, fingerprint = None, ""
    for number in range(1, options.rounds + 1):
        problem = repair_problem(start, data, store, damping=options.damping, running=running, fingerprint=fingerprint)
        clock.lap("statistics")
        mu = mu_for_drift(problem.curves(), options.budget or _DRIFT) if options.mu is None else options.mu
        changes, rows = problem.solve(mu, options.rank)
        clock.lap("solve")
        if number < options.rounds:
            tuned, plan = _repaired(start, problem, changes, options, mu, {})
            running, fingerprint = tuned.get_base_model(), plan.key + start.fingerprint
    return problem, {"mu": mu, "budget": options.budget} | _means(rows), changes, rows


def _tokens(
    start: FactoredModel, knowledge: Knowledge | None, task: Examples | LanguageExamples | None, options: Repair
) -> dict[DataRole, Calibration]:
    length = min(options.max_length, positions(start.model) or options.max_length)
    base, store = start.model, statistics_store(options.store)
    if knowledge is None and not head_of(base):
        own = SelfGeneration()
        knowledge = write_texts(lambda: base, start.tokenizer, own, store, fingerprint=start.fingerprint)
    sets: list[Any] = [knowledge] if isinstance(knowledge, LanguageExamples) else list(knowledge or ())
    if not sets:
        raise DataError("knowledge", got="no texts", wanted="at least one", next_step="Fill the knowledge file.")
    known = [part for part in sets if isinstance(part, LanguageExamples)] or [knowledge_of(sets)]
    parts = [part.calibration(start.tokenizer, max_length=length) for part in known]
    data: dict[DataRole, Calibration] = {"knowledge": joined_knowledge(parts)}
    if task is not None:
        examples = knowledge_of(task, "task")
        if isinstance(examples, TaskExamples) and examples.prompts is not None:
            examples = replace(examples, end=options.end_token)
            if end := examples.end_of(start.tokenizer):
                _log.info("repair: each completion of the task ends with %s (end_token=False leaves it out)", end)
        data["task"] = examples.calibration(start.tokenizer, max_length=length)
    return data


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the mean over targets of each measure."""
    names = ("drift_before", "drift", "task_kept", "task_error", "norm_kept", "truncation")
    values = {name: [row[name] for row in rows if row[name] is not None] for name in names}
    return {name: sum(own) / len(own) if own else None for name, own in values.items()}


def _warn(total: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], start: FactoredModel, rank: int) -> None:
    """Logs what the result leaves out."""
    before, budget = total["drift_before"], total["budget"]
    if budget is not None and total["mu"] == 0:
        _log.warning("repair: the drift is %.2g, within the budget of %g: nothing changes", before, budget)
    cut = [row["truncation"] for row in rows if row["target"] not in start.exact]
    if cut:
        _log.warning(
            "repair: %d of %d changes have no low-rank form; rank %d cuts off %.3g of their size (mean; at most %.3g)",
            *(len(cut), len(rows), rank, sum(cut) / len(cut), max(cut)),
        )
    if start.dropped:
        told = named(start.dropped, 5)
        _log.warning("repair: trained besides linear maps, and no part of the result: %s", told)
    left = len(start.changes) - len(rows)
    if left:
        _log.warning("repair: no token of the data reached %d changed targets: they stay as they are", left)


def _repaired(
    start: FactoredModel,
    problem: RepairProblem,
    changes: Mapping[str, LowRank],
    options: Repair,
    mu: float,
    provenance: Mapping[str, Any],
) -> tuple[PeftModel, Plan]:
    """Returns the repaired model, and its plan, which starts from the repaired changes."""
    head = head_of(start.model)
    named = {"drift": options.budget, "rank": options.rank, "damping": options.damping, "rounds": options.rounds}
    plan = Plan(
        method="repair",
        options=named | {"mu": mu},
        targets=starting_from((*problem.targets, *problem.unseen), changes),
        peft={"modules_to_save": list(head)} if head else {},
        provenance=provenance,
    )
    tuned = install(start.trained.load_base(), plan)
    assert isinstance(tuned, PeftModel)
    put_head(tuned, plan, start.head_values())
    return tuned.eval(), plan


def _with(tuned: PeftModel, plan: Plan, problem: RepairProblem, mu: float, rank: int) -> PreTrainedModel:
    """Puts the repair of another μ into the installed model."""
    changes, _ = problem.solve(mu, rank)
    factors = {f"{name}.{side}": getattr(change, side) for name, change in changes.items() for side in "BA"}
    restore_state(tuned, plan, factors | trained_head(tuned, plan))
    inner: PreTrainedModel = tuned.get_base_model()
    return inner


def _score_models(
    base: PreTrainedModel,
    models: Mapping[str, Callable[[], PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
    seed: int,
) -> list[dict[str, Any]]:
    """Scores benchmarks with each model tuned from a base, one held at a time, against the base and the first model."""
    results = {}
    for label, load in models.items():
        pair = TwoModels(base, load())
        results[label] = [evaluate(pair, tokenizer, benchmark, Path(), seed=seed) for benchmark in benchmarks]
    rows = []
    for scored in zip(*results.values(), strict=True):
        first = scored[0]
        of_items = first.metric not in _OF_THE_WHOLE
        entries = [
            {
                "label": label,
                "score": result.after,
                "interval": list(result.interval),
                "kl_to_base": result.kl_to_base,
                "interval_to_first": list(interval_between(first, result, seed))
                if of_items and result is not first
                else None,
            }
            for label, result in zip(results, scored, strict=True)
        ]
        row = {"name": first.name, "role": first.role, "metric": first.metric, "n": first.n}
        rows.append(row | {"base": first.before, "models": entries})
    return rows
