"""The ``published`` section of a recipe: what a paper's table says, to stand beside our own numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from keeptune.core.errors import RecipeError, nearest
from keeptune.recipe.sections import Section

__all__ = ["Published", "PublishedRow", "beside", "check_labels", "check_scores"]


class PublishedRow(Section):
    """One line of a table.

    ``method`` is the name in the paper and ``label`` the entry of ``compare.methods`` that stands for it, if one
    does; ``scores`` are by benchmark of the recipe, ``others`` are columns that no benchmark of ours measures.
    """

    method: str
    label: str | None = None
    parameters: str | None = None
    scores: dict[str, float] = Field(default_factory=dict)
    others: dict[str, float] = Field(default_factory=dict)


class Published(Section):
    """A table: where it stands, its unit, its lines, and what is known to differ from our run or is not known."""

    source: str
    unit: str = "percent"
    rows: list[PublishedRow] = Field(min_length=1)
    differs: list[str] = Field(default_factory=list)
    unknown: list[str] = Field(default_factory=list)


def check_scores(published: Published, benchmarks: Iterable[str], where: str) -> None:
    """Check that every published score has a benchmark beside it.

    Args:
        published: The section.
        benchmarks: Names in ``evaluate``.
        where: For error messages.

    Raises:
        RecipeError: One has none; the message shows the nearest name.
    """
    known = list(benchmarks)
    for number, row in enumerate(published.rows):
        for name in row.scores:
            if name not in known:
                raise RecipeError(
                    f"{where}, key published.rows.{number}.scores.{name}",
                    got="a score of no benchmark of the recipe",
                    wanted="a name in `evaluate`; other columns go under `others`",
                    next_step=nearest(name, known),
                )


def check_labels(published: Published, labels: Iterable[str], where: str) -> None:
    """Check that every label stands for an entry of the comparison.

    Args:
        published: The section.
        labels: Those of the comparison.
        where: For error messages.

    Raises:
        RecipeError: One does not; the message shows the nearest label.
    """
    known = list(labels)
    for number, row in enumerate(published.rows):
        if row.label is not None and row.label not in known:
            raise RecipeError(
                f"{where}, key published.rows.{number}.label",
                got=f'"{row.label}"',
                wanted="the label of an entry of compare.methods",
                next_step=nearest(row.label, known),
            )


def beside(published: Published | None) -> list[dict[str, Any]]:
    """List the published scores that stand beside ours in a comparison.

    Args:
        published: The section, if there is one.

    Returns:
        ``label``, ``benchmark``, ``score`` (a share where the table is in per cent), ``source`` and ``note`` (the
        paper's name of the method, and its parameters) of each score of a line that has a label.
    """
    if published is None:
        return []
    scale = 100 if published.unit == "percent" else 1
    return [
        {
            "label": row.label,
            "benchmark": name,
            "score": score / scale,
            "source": published.source,
            "note": f"({row.method}{', ' + row.parameters if row.parameters else ''})",
        }
        for row in published.rows
        if row.label is not None
        for name, score in row.scores.items()
    ]
