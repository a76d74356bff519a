"""The ``published`` section of a recipe: a paper's table, which a comparison's page shows beside its own numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from keeptune.core.errors import need_known
from keeptune.recipe.sections import Section


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

    def check_scores(self, benchmarks: Iterable[str], where: str) -> None:
        """Raises RecipeError where a score is of no benchmark in ``evaluate``."""
        known, wanted = list(benchmarks), "a benchmark in `evaluate`; other columns go under `others`"
        for number, row in enumerate(self.rows):
            for name in row.scores:
                need_known(name, known, f"{where}, key published.rows.{number}.scores.{name}", wanted)

    def check_labels(self, labels: Iterable[str], where: str) -> None:
        """Raises RecipeError where a label is that of no entry of the comparison."""
        known = list(labels)
        for number, row in enumerate(self.rows):
            if row.label is not None:
                need_known(
                    row.label, known, f"{where}, key published.rows.{number}.label", "a label in compare.methods"
                )

    def scores(self) -> list[dict[str, Any]]:
        """Returns the scores of lines that have a label, as shares where the table is in per cent."""
        scale = 100 if self.unit == "percent" else 1
        return [
            {
                "label": row.label,
                "benchmark": name,
                "score": score / scale,
                "source": self.source,
                "note": f"({row.method}{', ' + row.parameters if row.parameters else ''})",
            }
            for row in self.rows
            if row.label is not None
            for name, score in row.scores.items()
        ]
