"""The tables at the end of the page: options, divergence from the base, runs, and what methods say of their plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from keeptune.report.records import Report, Run
from keeptune.report.summary import mean_of, methods
from keeptune.report.wording import duration, gap, number

__all__ = ["Grid", "divergence", "notes", "options", "runs"]


@dataclass(frozen=True)
class Grid:
    """A plain table on the page: headings and rows of text."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def notes(report: Report) -> list[tuple[str, tuple[str, ...]]]:
    """Collect what methods have to say about their plans.

    Args:
        report: The report.

    Returns:
        The notes of each method that has any, each note once.
    """
    found = [
        (method.label, tuple(dict.fromkeys(note for run in method.runs for note in run.notes)))
        for method in methods(report)
    ]
    return [(label, notes) for label, notes in found if notes]


def options(report: Report) -> tuple[str, Grid | None]:
    """Tabulate the options of the methods; what few methods have goes into one column, what is the same above.

    Args:
        report: The report.

    Returns:
        What all methods have in common, empty for one method; and one row for each method, None without options.
    """
    found = methods(report)
    keys = list(dict.fromkeys(key for run in report.runs for key in run.options))
    texts = {(m.label, key): _values([run.options.get(key) for run in m.runs]) for m in found for key in keys}
    having = {key: [m.label for m in found if any(key in run.options for run in m.runs)] for key in keys}
    same = [key for key in keys if len(found) > 1 and len(having[key]) == len(found) and _alike(texts, key)]
    rare = [key for key in keys if key not in same and len(found) > 4 and 3 * len(having[key]) <= len(found)]
    shown = [key for key in keys if key not in same and key not in rare]
    common = ", ".join(f"{_words(key)} {texts[found[0].label, key]}" for key in same)
    heads = ("method", *map(_words, shown), *(["its own"] if rare else []))
    if len(heads) == 1:
        return common, None
    rows = []
    for method in found:
        own = "; ".join(f"{_words(key)} {texts[method.label, key]}" for key in rare if method.label in having[key])
        rows.append((method.label, *(texts[method.label, key] for key in shown), *([own or "–"] if rare else [])))
    return common, Grid(heads, tuple(rows))


def _alike(texts: Mapping[tuple[str, str], str], key: str) -> bool:
    """Tell whether all methods have the same value of an option.

    Args:
        texts: Label and option to printed value.
        key: The option.

    Returns:
        True when they have.
    """
    return len({text for (_, name), text in texts.items() if name == key}) == 1


def _words(key: str) -> str:
    """Print the name of an option.

    Args:
        key: The name.

    Returns:
        The name with spaces for underscores.
    """
    return key.replace("_", " ")


def _values(values: Sequence[object]) -> str:
    """Print an option, all its values where seeds differ.

    Args:
        values: The values.

    Returns:
        The text.
    """
    return ", ".join(dict.fromkeys(map(_value, values)))


def _value(item: object) -> str:
    if isinstance(item, list):
        return " ".join(map(_value, item))
    return "–" if item is None else f"{item:g}" if isinstance(item, float) else str(item)


def divergence(report: Report) -> Grid | None:
    """Tabulate the divergence from the base model.

    Args:
        report: The report.

    Returns:
        One row for each method, one column for each benchmark; None when it was not measured.
    """
    names = list(dict.fromkeys(item.name for run in report.runs for item in run.benchmarks if item.kl is not None))
    if not names:
        return None
    rows = []
    for method in methods(report):
        found = [mean_of(method, _on(name)) for name in names]
        rows.append((method.label, *("–" if item is None else number(item.mean) for item in found)))
    return Grid(("method", *names), tuple(rows))


def _on(name: str) -> Callable[[Run], float | None]:
    """Make a reader of the divergence on one benchmark.

    Args:
        name: The benchmark.

    Returns:
        A function of a run.
    """
    return lambda run: next((item.kl for item in run.benchmarks if item.name == name), None)


def runs(report: Report) -> Grid:
    """Tabulate the runs.

    Args:
        report: The report.

    Returns:
        One row for each run.
    """
    stages = list(dict.fromkeys(key for run in report.runs for key in run.seconds))
    heads = ("method", "seed", "K", "T", "KT", "average forgetting", *stages, "export gap", "adapter")
    rows = tuple(
        (
            run.label,
            str(run.seed),
            number(run.K),
            number(run.T),
            number(run.KT),
            "–" if run.average_forgetting is None else f"{number(100 * run.average_forgetting, 2)}%",
            *(duration(run.seconds[key]) if key in run.seconds else "–" for key in stages),
            gap(run.export_gap),
            run.adapter,
        )
        for run in report.runs
    )
    return Grid(heads, rows)
