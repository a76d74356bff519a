"""What a comparison shows, in plain words, and no more than its intervals support."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from keeptune.core.intervals import Estimate, clearly_above
from keeptune.report.estimates import Series, methods, over, yardstick
from keeptune.report.numbers import listing, loss_text, number, points
from keeptune.report.records import Report, ReportLike, as_report

_MOST_NAMED: Final = 5


@dataclass(frozen=True)
class _Standing:
    """Where one method stands: its knowledge loss and its task score and gain."""

    label: str
    loss: Estimate | None
    score: Estimate | None
    gain: Estimate | None


def verdict(report: ReportLike) -> str:
    """Returns the comparison summed up in one sentence."""
    parsed = as_report(report)
    standings = _standings(parsed)
    if not standings:
        return "The report holds no runs."
    knowledge, task = yardstick(parsed, "knowledge"), yardstick(parsed, "task")
    if len(standings) == 1:
        return _sentence(standings[0], knowledge, task, _thing(knowledge))
    keeper, keeping = _keeping(standings, knowledge)
    clauses = [clause for clause in (keeping, _learning(standings, task, keeper)) if clause]
    return f"{'; '.join(clauses) or 'Nothing was measured that the methods could be compared by'}."


def method_sentences(report: ReportLike) -> list[str]:
    """Returns for every method what it learned and what it lost."""
    parsed = as_report(report)
    knowledge, task = yardstick(parsed, "knowledge"), yardstick(parsed, "task")
    # The verdict above these sentences spells out which benchmarks "knowledge" is the mean of.
    thing = _thing(knowledge) if len(knowledge) < 2 else "knowledge"
    return [_sentence(standing, knowledge, task, thing) for standing in _standings(parsed)]


def _standings(report: Report) -> list[_Standing]:
    knowledge, task = yardstick(report, "knowledge"), yardstick(report, "task")
    return [
        _Standing(one.label, over(one, "lost", knowledge), over(one, "learned", task), over(one, "gained", task))
        for one in methods(report)
    ]


def _thing(knowledge: Sequence[Series]) -> str:
    """Returns the name of what was or was not forgotten."""
    names = [item.name for item in knowledge]
    return f"knowledge (mean of {listing(names)})" if len(names) > 1 else names[0] if names else "knowledge"


def _sentence(standing: _Standing, knowledge: Sequence[Series], task: Sequence[Series], thing: str) -> str:
    parts = [part for part in (_learned_words(standing, task), _lost_words(standing, knowledge, thing)) if part]
    return f"{standing.label} {' and '.join(parts) or 'has no measurements'}."


def _learned_words(standing: _Standing, task: Sequence[Series]) -> str:
    gain, score = standing.gain, standing.score
    if gain is None or score is None:
        return ""
    names = listing([item.name for item in task])
    before = score.mean - (-gain.mean if task[0].lower_is_better else gain.mean)
    if not gain.has_interval:
        return f"went from {number(before)} to {number(score.mean)} on {names}"
    reached = f"({names} {number(before)} → {number(score.mean)})"
    verb = "learned" if gain.low > 0 else "got worse at" if gain.high < 0 else "did not clearly learn"
    return f"{verb} the task {reached}"


def _lost_words(standing: _Standing, knowledge: Sequence[Series], thing: str) -> str:
    loss = standing.loss
    if loss is None:
        return ""
    nats = knowledge[0].lower_is_better
    size = f"{loss_text(abs(loss.mean), nats)} {'on' if nats else 'of'} {thing}"
    verb = "lost" if loss.mean >= 0 else "gained"
    if not loss.has_interval:
        return f"{verb} {size} (no interval)"
    if loss.low > 0 or loss.high < 0:
        low, high = sorted((abs(loss.low), abs(loss.high)))
        return f"{verb} {size} (95% interval {_bare(low, nats)} to {_bare(high, nats)})"
    ends = f"{_bare(loss.low, nats)} to {loss_text(loss.high, nats)} lost"
    return f"showed no clear change on {thing} (95% interval {ends})"


def _keeping(standings: Sequence[_Standing], knowledge: Sequence[Series]) -> tuple[str | None, str]:
    """Returns the method that clearly lost least, if there is one, and how much the methods lost in words."""
    known = [(item, item.loss) for item in standings if item.loss is not None]
    if not known or not knowledge:
        return None, ""
    nats, thing = knowledge[0].lower_is_better, _thing(knowledge)
    first, least = min(known, key=lambda pair: pair[1].mean)
    others = [(item, loss) for item, loss in known if item is not first]
    worse = [(item, loss) for item, loss in others if clearly_above(loss, least)]
    same = [(item, loss) for item, loss in others if not clearly_above(loss, least)]
    if not others:
        return None, f"Only {first.label} was measured on {thing}: it {_lost_words(first, knowledge, thing)}"
    if not worse:
        bounds = f"{_bare(least.mean, nats)} to {loss_text(max(loss.mean for _, loss in others), nats)} lost"
        return None, f"No method is clearly ahead in keeping {thing}: no clear difference to the best ({bounds})"
    lead = f"{first.label} lost the least of {thing} ({loss_text(least.mean, nats)})"
    whole = "all " if len(worse) > _MOST_NAMED and not same else ""
    middle = f", with no clear difference to {_rivals(same, nats)}, and" if same else ","
    return first.label, f"{lead}{middle} clearly less than {whole}{_rivals(worse, nats)}"


def _rivals(others: Sequence[tuple[_Standing, Estimate]], nats: bool) -> str:
    """Returns methods with their losses, or their number when there are many."""
    if len(others) <= _MOST_NAMED:
        return listing([f"{item.label} ({_bare(loss.mean, nats)})" for item, loss in others])
    means = sorted(loss.mean for _, loss in others)
    return f"{len(others)} others ({_bare(means[0], nats)} to {_bare(means[-1], nats)})"


def _bare(value: float, nats: bool) -> str:
    """Returns a loss without its unit."""
    return number(value) if nats else points(value)


def _learning(standings: Sequence[_Standing], task: Sequence[Series], keeper: str | None) -> str:
    """Returns how the methods learned, seen from the one that kept most."""
    known = [(item, item.score) for item in standings if item.score is not None]
    if not task or len(known) < 2:
        return ""
    lower = task[0].lower_is_better

    def better(one: Estimate, other: Estimate) -> bool:
        return clearly_above(other, one) if lower else clearly_above(one, other)

    best, top = max(known, key=lambda pair: -pair[1].mean if lower else pair[1].mean)
    names = listing([item.name for item in task])
    seen = next(((item, score) for item, score in known if item.label == keeper), None)
    if seen is None:
        behind = [item.label for item, score in known if item is not best and better(top, score)]
        if not behind:
            return f"on the task ({names}) there is no clear difference to {best.label}, the best ({number(top.mean)})"
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
