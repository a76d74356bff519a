"""Say in plain words what a comparison shows, and no more than its intervals support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from keeptune.core.intervals import Estimate, clearly_above, combine
from keeptune.report.records import Report, ReportLike, as_report
from keeptune.report.summary import Method, Series, change, learned, lost, methods, series
from keeptune.report.wording import interval, listing, loss_text, number, points

__all__ = ["method_sentences", "verdict", "yardstick"]

_MOST_NAMED: Final = 5


@dataclass(frozen=True)
class _Standing:
    """Where one method stands: its knowledge loss and its task score and gain."""

    label: str
    loss: Estimate | None
    score: Estimate | None
    gain: Estimate | None


def yardstick(report: ReportLike, role: str) -> tuple[Series, ...]:
    """Choose the benchmarks of one unit that a role is judged by.

    Args:
        report: The report.
        role: "knowledge" or "task".

    Returns:
        All accuracies of the role; when there is none, the first cross entropy; empty when there is
        no benchmark of the role.
    """
    found = series(as_report(report), role)
    accuracies = tuple(item for item in found if not item.lower_is_better)
    return accuracies or found[:1]


def verdict(report: ReportLike) -> str:
    """Sum up the comparison in one sentence.

    Args:
        report: The report.

    Returns:
        The sentence; it calls a difference a difference only where 95% intervals do not overlap.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed = as_report(report)
    standings = _standings(parsed)
    if not standings:
        return "The report holds no runs."
    knowledge, task = yardstick(parsed, "knowledge"), yardstick(parsed, "task")
    if len(standings) == 1:
        return _sentence(standings[0], knowledge, task, _thing(knowledge))
    keeper, keeping = _keeping(standings, knowledge)
    learning = _learning(standings, task, keeper)
    clauses = [clause for clause in (keeping, learning) if clause]
    text = "; ".join(clauses) if clauses else "Nothing was measured that the methods could be compared by"
    return text + "."


def method_sentences(report: ReportLike) -> list[str]:
    """Say for every method what it learned and what it lost.

    Args:
        report: The report.

    Returns:
        One sentence for each method.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed = as_report(report)
    knowledge, task = yardstick(parsed, "knowledge"), yardstick(parsed, "task")
    # The verdict above these sentences spells out which benchmarks "knowledge" is the mean of.
    thing = _thing(knowledge) if len(knowledge) < 2 else "knowledge"
    return [_sentence(standing, knowledge, task, thing) for standing in _standings(parsed)]


def _standings(report: Report) -> list[_Standing]:
    """Work out where every method stands.

    Args:
        report: The report.

    Returns:
        One standing for each method.
    """
    knowledge, task = yardstick(report, "knowledge"), yardstick(report, "task")
    return [
        _Standing(
            label=method.label,
            loss=lost(method, knowledge) if knowledge else None,
            score=learned(method, task) if task else None,
            gain=_gain(method, task),
        )
        for method in methods(report)
    ]


def _gain(method: Method, task: Sequence[Series]) -> Estimate | None:
    """Average the improvement on the task, positive when it got better.

    Args:
        method: The method.
        task: The task benchmarks of one unit.

    Returns:
        The gain, None when nothing was measured.
    """
    if len(task) == 1:
        found = change(method, task[0].name)
        if found is None or not task[0].lower_is_better:
            return found
        return Estimate(-found.mean, -found.high, -found.low, tuple(-value for value in found.values))
    loss = lost(method, task) if task else None
    if loss is None:
        return None
    return combine([(-loss.mean / 100, -loss.high / 100, -loss.low / 100)])


def _thing(knowledge: Sequence[Series]) -> str:
    """Name what was or was not forgotten.

    Args:
        knowledge: The benchmarks.

    Returns:
        The benchmark, or "knowledge" with the list of benchmarks.
    """
    names = [item.name for item in knowledge]
    if not names:
        return "knowledge"
    return names[0] if len(names) == 1 else f"knowledge (mean of {listing(names)})"


def _sentence(standing: _Standing, knowledge: Sequence[Series], task: Sequence[Series], thing: str) -> str:
    """Say what one method learned and lost.

    Args:
        standing: Where the method stands.
        knowledge: The knowledge benchmarks of one unit.
        task: The task benchmarks of one unit.
        thing: How to name the knowledge benchmarks.

    Returns:
        The sentence.
    """
    parts = [_learned_words(standing, task), _lost_words(standing, knowledge, thing)]
    said = [part for part in parts if part]
    return f"{standing.label} {' and '.join(said) if said else 'has no measurements'}."


def _learned_words(standing: _Standing, task: Sequence[Series]) -> str:
    """Say what one method learned.

    Args:
        standing: Where the method stands.
        task: The task benchmarks of one unit.

    Returns:
        A phrase with a verb, empty when there is no task.
    """
    gain, score = standing.gain, standing.score
    if gain is None or score is None:
        return ""
    names = listing([item.name for item in task])
    if not gain.has_interval:
        return f"went from {number(score.mean - _towards(gain.mean, task))} to {number(score.mean)} on {names}"
    reached = f"({names} {number(score.mean - _towards(gain.mean, task))} → {number(score.mean)})"
    if gain.low > 0:
        return f"learned the task {reached}"
    if gain.high < 0:
        return f"got worse at the task {reached}"
    return f"did not clearly learn the task {reached}"


def _towards(gain: float, task: Sequence[Series]) -> float:
    """Turn a gain back into a difference of scores.

    Args:
        gain: The gain, positive when better.
        task: The task benchmarks of one unit.

    Returns:
        After minus before.
    """
    return -gain if task[0].lower_is_better else gain


def _lost_words(standing: _Standing, knowledge: Sequence[Series], thing: str) -> str:
    """Say what one method lost.

    Args:
        standing: Where the method stands.
        knowledge: The knowledge benchmarks of one unit.
        thing: How to name them.

    Returns:
        A phrase with a verb, empty when no knowledge was measured.
    """
    loss = standing.loss
    if loss is None:
        return ""
    kind = knowledge[0]
    joint = "on" if kind.lower_is_better else "of"
    size = f"{loss_text(abs(loss.mean), kind)} {joint} {thing}"
    verb = "lost" if loss.mean >= 0 else "gained"
    if not loss.has_interval:
        return f"{verb} {size} (no interval)"
    if loss.low > 0 or loss.high < 0:
        bounds = loss if loss.low > 0 else Estimate(-loss.mean, -loss.high, -loss.low, loss.values)
        return f"{verb} {size} (95% interval {interval(bounds, kind)})"
    unit = " nats/token" if kind.lower_is_better else " points"
    return f"showed no clear change on {thing} (95% interval {interval(loss, kind)}{unit} lost)"


def _keeping(standings: Sequence[_Standing], knowledge: Sequence[Series]) -> tuple[str | None, str]:
    """Compare how much the methods lost.

    Args:
        standings: Where the methods stand.
        knowledge: The knowledge benchmarks of one unit.

    Returns:
        The method that kept most, None when none is clearly ahead of any other; and a clause.
    """
    found = [(item, item.loss) for item in standings if item.loss is not None]
    if not found or not knowledge:
        return None, ""
    kind, thing = knowledge[0], _thing(knowledge)
    first, least = min(found, key=lambda pair: pair[1].mean)
    others = [(item, loss) for item, loss in found if item is not first]
    worse = [(item, loss) for item, loss in others if clearly_above(loss, least)]
    same = [(item, loss) for item, loss in others if not clearly_above(loss, least)]
    if not others:
        return None, f"Only {first.label} was measured on {thing}: it {_lost_words(first, knowledge, thing)}"
    if not worse:
        most = max(loss.mean for _, loss in others)
        bounds = f"{_bare(least.mean, kind)} to {loss_text(most, kind)} lost"
        return (
            None,
            f"No method is clearly ahead in keeping {thing}: no clear difference to the best ({bounds})",
        )
    lead = f"{first.label} lost the least of {thing} ({loss_text(least.mean, kind)})"
    whole = "all " if len(worse) > _MOST_NAMED else ""
    middle = f", with no clear difference to {_rivals(same, kind)}, and" if same else ","
    return first.label, f"{lead}{middle} clearly less than {'' if same else whole}{_rivals(worse, kind)}"


def _rivals(others: Sequence[tuple[_Standing, Estimate]], kind: Series) -> str:
    """Name methods with their losses, or count them when there are many.

    Args:
        others: The methods and their losses.
        kind: The benchmark.

    Returns:
        For example "lora (27) and pissa (41)", or "12 others (20 to 59)".
    """
    if len(others) <= _MOST_NAMED:
        return listing([f"{item.label} ({_bare(loss.mean, kind)})" for item, loss in others])
    means = sorted(loss.mean for _, loss in others)
    return f"{len(others)} others ({_bare(means[0], kind)} to {_bare(means[-1], kind)})"


def _bare(value: float, kind: Series) -> str:
    """Print a loss without its unit.

    Args:
        value: The loss.
        kind: The benchmark.

    Returns:
        The number.
    """
    return number(value) if kind.lower_is_better else points(value)


def _learning(standings: Sequence[_Standing], task: Sequence[Series], keeper: str | None) -> str:
    """Compare what the methods learned, seen from the one that kept most.

    Args:
        standings: Where the methods stand.
        task: The task benchmarks of one unit.
        keeper: The method that kept most, if one is clearly ahead.

    Returns:
        A clause, empty when there is no task.
    """
    found = [(item, item.score) for item in standings if item.score is not None]
    if not task or len(found) < 2:
        return ""
    sign = -1.0 if task[0].lower_is_better else 1.0
    best, top = max(found, key=lambda pair: sign * pair[1].mean)
    names = listing([item.name for item in task])
    seen = next(((item, score) for item, score in found if item.label == keeper), None)
    better = _better(sign)
    if seen is None:
        behind = [item.label for item, score in found if item is not best and better(top, score)]
        if not behind:
            ahead = f"{best.label}, the best ({number(top.mean)})"
            return f"on the task ({names}) there is no clear difference to {ahead}"
        whom = listing(behind) if len(behind) <= _MOST_NAMED else f"{len(behind)} others"
        return f"on the task ({names}) {best.label} ({number(top.mean)}) is clearly ahead of {whom}"
    item, score = seen
    unlearned = item.gain is not None and not (item.gain.has_interval and item.gain.low > 0)
    warning = ", and it did not clearly learn the task" if unlearned else ""
    if item is best:
        return f"it also has the best mean on the task ({names}, {number(score.mean)}){warning}"
    if better(top, score):
        worse = f"on the task ({names}) it is clearly behind {best.label}"
        return f"{worse} ({number(score.mean)} against {number(top.mean)}){warning}"
    return (
        f"on the task ({names}) there is no clear difference between it ({number(score.mean)}) "
        f"and the best, {best.label} ({number(top.mean)}){warning}"
    )


def _better(sign: float) -> Callable[[Estimate, Estimate], bool]:
    """Make the test "clearly better" for scores.

    Args:
        sign: 1 when higher is better, -1 when lower is.

    Returns:
        A function of two scores that tells whether the first is clearly better.
    """
    if sign > 0:
        return clearly_above
    return lambda one, other: clearly_above(other, one)
