"""keeptune repair: an adapter that has forgotten, repaired after training (equations: ``repair_equations.py``).

One forward pass over knowledge and task data for the covariances, then one solve for each group of targets that share
an input. The result is a plain LoRA for the untouched base: of a LoRA, its own B with another A.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import platformdirs
from peft import PeftModel
from transformers import PreTrainedModel

from keeptune.adapter.export import export
from keeptune.adapter.install import install, restore_state
from keeptune.adapter.load import load_adapter, refuse_foreign
from keeptune.adapter.trained_head import restore_head, trained_head
from keeptune.core.artefact import remove_leftovers, write_json
from keeptune.core.errors import DataError, RecipeError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan
from keeptune.data.calibration import Calibration
from keeptune.data.completions import TaskExamples, task_calibration
from keeptune.data.knowledge import KnowledgeSet, joined_knowledge, knowledge_calibration, knowledge_of
from keeptune.evaluation.kinds import AnyBenchmark
from keeptune.model.blocks import head_of, positions
from keeptune.pipeline.job import check_device, check_folder, device_named
from keeptune.pipeline.planning import starting_from
from keeptune.posthoc.adapters import Case, Source, case_of, open_source
from keeptune.posthoc.repair_equations import mu_for_drift
from keeptune.posthoc.repair_scores import score_models
from keeptune.report.repair import repair_figure
from keeptune.report.style import png
from keeptune.statistics.request import DataRole
from keeptune.statistics.store import StatStore

__all__ = ["DAMPING", "DRIFT", "RANK", "repair"]

_log = logging.getLogger(__name__)
DRIFT, RANK, DAMPING = 0.005, 64, 1e-3
RECORD = "repair.json"
Examples = Sequence[str] | Sequence[tuple[str, str]]
Knowledge = Examples | KnowledgeSet | Sequence[KnowledgeSet]


def repair(
    adapter: Path | str,
    output: Path | str,
    *,
    knowledge: Knowledge,
    task: Examples | None = None,
    drift: float | None = None,
    mu: float | None = None,
    base: str | None = None,
    rank: int = RANK,
    damping: float = DAMPING,
    rounds: int = 1,
    max_length: int = 1024,
    store: Path | str | None = None,
    device: str = "auto",
    benchmarks: Sequence[AnyBenchmark] = (),
    sweep: Sequence[float] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Keep what a finished adapter does on the task, and undo what it does to the knowledge.

    Args:
        adapter: A PEFT adapter folder, a run folder of keeptune, or a whole model tuned from the base.
        output: Where the repaired adapter goes: a plain LoRA; it appears whole or not at all.
        knowledge: Texts that hold what the model should keep, or prompts and completions.
        task: Prompts and completions of the task, or texts; a few hundred do. Without them every direction counts as
            equally needed by the task.
        drift: Relative feature drift that is left, the mean over targets; 0.005 unless μ is given.
        mu: The weight of the knowledge against the task; None finds the one that meets ``drift``.
        base: The base; None takes what the adapter names.
        rank: Of the result, for changes that are not of low rank (DoRA, whole models).
        damping: How much the task uses every direction, as a share of the mean (``repair_equations.damped``).
        rounds: 2 repairs once more with the inputs that the repaired model sees, in place of the base's: one more pass
            over the data, for a little more of the task (``docs/guides/repair.md``).
        max_length: Texts are cut to this many tokens, or to the model's positions.
        store: Folder where covariances are kept; None takes the user's own store.
        device: ``auto`` is CUDA where there is a GPU.
        benchmarks: Scored with the base, the adapter and the repaired adapter.
        sweep: Further values of μ, of which drift, what is kept of the task and the benchmarks are told.
        seed: Of the bootstrap intervals; nothing else is random.

    Returns:
        The record that lies beside the adapter as ``repair.json``: ``mu``, ``drift_before``, ``drift``, ``task_kept``,
        ``task_error``, ``targets``, ``dropped``, ``seconds``, ``export``, ``scores``, ``sweep``.

    Raises:
        RecipeError: Both ``drift`` and ``mu`` are given, or a value is out of range.
        ModelError: There is no such adapter, it is of another base, or it changed none of the weights.
        DataError: There are no texts.
        StatisticsError: Activations are not finite.
        ExportError: The output holds something that keeptune did not write.
    """
    output, clock = Path(output), _Clock()
    _check(drift, mu, {"rank": rank, "rounds": rounds}, damping, sweep)
    refuse_foreign(output)
    check_folder("--output", output)
    check_device(device := device_named(device))
    source = open_source(str(adapter), base, device)
    data = _tokens(source, knowledge, task, max_length)
    clock.lap("load")
    folder = Path(platformdirs.user_cache_dir("keeptune")) / "statistics" if store is None else Path(store)
    budget = (DRIFT if drift is None else drift) if mu is None else None
    options = {"drift": budget, "rank": rank, "damping": damping, "rounds": rounds}
    case = case_of(source, data, StatStore(folder), damping=damping)
    clock.lap("statistics")
    weight, changes, rows = _solved(case, mu, budget, rank)
    clock.lap("solve")
    for _ in range(rounds - 1):
        plan = _plan(source, case, changes, options | {"mu": weight})
        running: PreTrainedModel = _installed(source, plan).get_base_model()
        case = case_of(
            source, data, StatStore(folder), damping=damping, running=running, fingerprint=plan.key + source.fingerprint
        )
        clock.lap("statistics")
        weight, changes, rows = _solved(case, mu, budget, rank)
        clock.lap("solve")
    total = {"mu": weight, "budget": budget} | _means(rows)
    _tell(total, rows, source, rank)
    made_from = {
        "model": source.fingerprint,
        "dtype": source.dtype,
        "seed": seed,
        "adapter": source.weights,
        "data": {role: tokens.fingerprint for role, tokens in data.items()},
        "examples": {role: len(tokens.sequences) for role, tokens in data.items()},
        "repair": total | {"targets": rows, "dropped": list(source.dropped)},
    }
    plan = replace(_plan(source, case, changes, options | {"mu": weight}), provenance=made_from)
    tuned = _installed(source, plan)
    remove_leftovers(output)
    done = export(tuned, plan, output, base=source.base, load_base=source.load_base, tokenizer=source.tokenizer)
    clock.lap("export")
    record = total | {"targets": rows, "dropped": list(source.dropped), "examples": made_from["examples"]}
    record |= {"export": asdict(done), "seconds": clock.seconds}
    if sweep:
        record["sweep"] = [_means(case.solve(other, rank)[1]) | {"mu": other} for other in sorted(set(sweep))]
    if benchmarks:
        models: dict[str, Callable[[], PreTrainedModel]] = {"adapter": source.load_tuned}
        models["repaired"] = lambda: load_adapter(source.load_base(), output).get_base_model()
        models |= {_label(other): partial(_with, tuned, plan, case, other, rank) for other in sorted(set(sweep))}
        record["scores"] = score_models(source.load_base(), models, source.tokenizer, benchmarks, seed=seed)
        clock.lap("evaluate")
    write_json(output / RECORD, record)
    figure = repair_figure(record)
    if figure is not None:
        png(figure, output / "repair.png")
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


def _solved(
    case: Case, mu: float | None, budget: float | None, rank: int
) -> tuple[float, dict[str, LowRank], list[dict[str, Any]]]:
    """Repair with the μ that is given, or with the one that meets the budget."""
    weight = mu_for_drift(case.curves(), budget or DRIFT) if mu is None else mu
    return weight, *case.solve(weight, rank)


def _check(
    drift: float | None, mu: float | None, counts: Mapping[str, int], damping: float, sweep: Sequence[float]
) -> None:
    if drift is not None and mu is not None:
        raise RecipeError(
            "repair",
            got=f"both drift {drift:g} and mu {mu:g}",
            wanted="one of them: mu is the weight, or drift is the budget that the weight is found for",
            next_step="Leave one out.",
        )
    for name, value, right in (
        ("drift", drift, drift is None or 0 < drift < math.inf),
        ("mu", mu, mu is None or 0 <= mu < math.inf),
        *((name, count, count >= 1) for name, count in counts.items()),
        ("damping", damping, 0 < damping < math.inf),
        ("sweep", list(sweep), all(0 <= other < math.inf for other in sweep)),
    ):
        if not right:
            wanted = {"drift": "a number above 0", "damping": "a number above 0"} | dict.fromkeys(counts, "at least 1")
            raise RecipeError(
                f"repair, {name}",
                got=str(value),
                wanted=wanted.get(name, "numbers, 0 or above"),
                next_step="Example: --drift 0.005, or --mu 0.3.",
            )


def _tokens(
    source: Source, knowledge: Knowledge, task: Examples | None, max_length: int
) -> dict[DataRole, Calibration]:
    length = min(max_length, positions(source.model) or max_length)
    sets = [knowledge] if isinstance(knowledge, KnowledgeSet) else list(knowledge)
    if not sets:
        raise DataError("knowledge", got="no texts", wanted="at least one", next_step="Fill the knowledge file.")
    known = [part for part in sets if isinstance(part, KnowledgeSet)] or [knowledge_of(sets)]  # type: ignore[arg-type]
    parts = [knowledge_calibration(part, source.tokenizer, max_length=length) for part in known]
    data: dict[DataRole, Calibration] = {"knowledge": joined_knowledge(parts)}
    if task is None:
        return data
    pairs = knowledge_of(task)
    if pairs.prompts is None:
        data["task"] = knowledge_calibration(replace(pairs, where="task"), source.tokenizer, max_length=length)
    else:
        examples = TaskExamples(pairs.prompts, pairs.completions)
        data["task"] = task_calibration(examples, source.tokenizer, max_length=length, examples=len(task), seed=0)
    return data


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Take the mean over targets of each figure."""
    names = ("drift_before", "drift", "task_kept", "task_error", "norm_kept", "truncation")
    found: dict[str, float | None] = {}
    for name in names:
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = sum(values) / len(values) if values else None
    return found


def _tell(total: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], source: Source, rank: int) -> None:
    """Say what the user would else have to find out."""
    if total["budget"] is not None and total["mu"] == 0:
        _log.warning(
            "repair: the drift is %.2g, within the budget of %g: nothing changes",
            total["drift_before"],
            total["budget"],
        )
    cut = [row["truncation"] for row in rows if row["target"] not in source.exact]
    if cut:
        _log.warning(
            "repair: %d of %d changes have no low-rank form; rank %d cuts off %.3g of their size (mean; at most %.3g)",
            *(len(cut), len(rows), rank, sum(cut) / len(cut), max(cut)),
        )
    if source.dropped:
        names = ", ".join(source.dropped[:5]) + (f" and {len(source.dropped) - 5} more" if source.dropped[5:] else "")
        _log.warning("repair: trained besides linear maps, and no part of the result: %s", names)
    left = len(source.changes) - len(rows)
    if left:
        _log.warning("repair: no token of the data reached %d changed targets: they stay as they are", left)


def _plan(source: Source, case: Case, changes: Mapping[str, LowRank], options: Mapping[str, Any]) -> Plan:
    """Write the repaired changes as a plan that starts from them: installing it gives the repaired model."""
    head = head_of(source.model)
    return Plan(
        method="repair",
        options=options,
        targets=starting_from((*case.targets, *case.unseen), changes),
        peft={"modules_to_save": list(head)} if head else {},
    )


def _installed(source: Source, plan: Plan) -> PeftModel:
    tuned = install(source.load_base(), plan)
    assert isinstance(tuned, PeftModel)
    restore_head(tuned, plan, source.head_values())
    return tuned.eval()


def _with(tuned: PeftModel, plan: Plan, case: Case, mu: float, rank: int) -> PreTrainedModel:
    """Put the repair of another μ into the installed model."""
    changes, _ = case.solve(mu, rank)
    factors = {f"{name}.{side}": getattr(change, side) for name, change in changes.items() for side in "BA"}
    restore_state(tuned, plan, factors | trained_head(tuned, plan))
    inner: PreTrainedModel = tuned.get_base_model()
    return inner


def _label(mu: float) -> str:
    return f"mu {mu:g}"
