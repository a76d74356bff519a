"""Which items of the benchmarks were lost and which were gained, as rows that a page can search."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from keeptune.core.intervals import lower_is_better
from keeptune.report.numbers import short

ROWS: Final = 2000  # that a page holds at most
_LONGEST: Final = 600  # characters of a text
_TEXTS: Final = ("prompt", "text", "question")
_ANSWERS: Final = ("answers", "answer", "label")
_SAID: Final = ("text", "label", "choice", "response")


def lost_and_gained(results: Iterable[Mapping[str, Any]], most: int = ROWS) -> dict[str, Any]:
    """Returns the items whose score changed.

    An item is lost where its score after is worse than before: lower, or of a cross entropy higher. Where there are
    more than fit, every benchmark of every run has the same number of places, and what changed most comes first.

    Args:
        results: Of every run and benchmark ``label``, ``seed``, ``benchmark``, ``role``, ``metric`` and ``items``,
            the records as in ``evaluation/<benchmark>.items.jsonl``.
        most: How many rows at most.

    Returns:
        ``rows`` (``kind`` lost or gained, ``label``, ``seed``, ``benchmark``, ``role``, ``group``, ``index``,
        ``before``, ``after``, ``prompt``, ``wanted``, ``said_before``, ``said_after``), how many items were ``lost``
        and ``gained`` in all, and how many were ``measured``.
    """
    changes: list[list[tuple[float, dict[str, Any]]]] = []
    measured = 0
    for result in results:
        sign = -1.0 if lower_is_better(result["metric"]) else 1.0
        changed = []
        for item in result["items"]:
            measured += 1
            change = sign * (float(item["after"]) - float(item["before"]))
            if change != 0 and change == change:
                changed.append((abs(change), _row(result, item, "gained" if change > 0 else "lost")))
        changes.append(sorted(changed, key=lambda pair: -pair[0]))
    kinds = [row["kind"] for changed in changes for _, row in changed]
    # One of each in turn, as long as there is room.
    places = sorted((place, index) for index, changed in enumerate(changes) for place in range(len(changed)))[:most]
    kept = Counter(index for _, index in places)
    rows = [row for index, changed in enumerate(changes) for _, row in changed[: kept[index]]]
    return {"rows": rows, "lost": kinds.count("lost"), "gained": kinds.count("gained"), "measured": measured}


def _row(result: Mapping[str, Any], item: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "label": str(result["label"]),
        "seed": result["seed"],
        "benchmark": str(result["benchmark"]),
        "role": str(result["role"]),
        "group": None if item.get("group") is None else str(item["group"]),
        "index": item.get("index"),
        "before": float(item["before"]),
        "after": float(item["after"]),
        "prompt": _first(item, _TEXTS),
        "wanted": _wanted(item),
        "said_before": _said(item, "before"),
        "said_after": _said(item, "after"),
    }


def _wanted(item: Mapping[str, Any]) -> str | None:
    choices = item.get("choices")
    label = item.get("label")
    if isinstance(choices, Sequence) and isinstance(label, int) and 0 <= label < len(choices):
        return _cut(choices[label])
    return _first(item, _ANSWERS)


def _said(item: Mapping[str, Any], side: str) -> str | None:
    """Returns what the model said: its text or label; of choices the likeliest, and of equal ones the first."""
    sums, choices = item.get(f"loglikelihoods_{side}"), item.get("choices")
    if sums and choices and len(sums) == len(choices):
        return _cut(choices[max(range(len(sums)), key=sums.__getitem__)])
    return _first(item, [f"{name}_{side}" for name in _SAID])


def _first(item: Mapping[str, Any], names: Sequence[str]) -> str | None:
    for name in names:
        value = item.get(name)
        if value is not None:
            return _cut(" | ".join(map(str, value)) if isinstance(value, list | tuple) else value)
    return None


def _cut(value: object) -> str:
    return short(str(value), _LONGEST)


def read_items(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the items of a run of ``runs.json``, read from its run folder, as :func:`lost_and_gained` takes them.

    Benchmarks whose items are not there, as in a folder that was moved, are left out.
    """
    results = []
    for benchmark in row["benchmarks"]:
        path = Path(str(row["folder"])) / "evaluation" / f"{benchmark['name']}.items.jsonl"
        if not path.is_file():
            continue
        # Not splitlines: it also splits at U+2028, which may stand inside a JSON string.
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        head = {"label": row["name"], "seed": row["seed"], "benchmark": benchmark["name"]}
        results.append({**head, "role": benchmark["role"], "metric": benchmark["metric"], "items": items})
    return results
