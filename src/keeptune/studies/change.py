"""keeptune change: how far training moved each weight, for any adapter or tuned model (L2-LoRA Fig. 6)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keeptune.pipeline.trained_changes import TrainedModel, labels_of, size_of
from keeptune.report.estimates import totals
from keeptune.report.pages.study_charts import change_charts
from keeptune.studies.figure_files import check_figure_file, write_figure_files


def change(
    sources: Sequence[str],
    output: Path,
    *,
    base: str | None = None,
    roles: Sequence[str] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measures ``||dW||`` and ``||dW|| / ||W||`` of every linear map, for one or several trained models.

    Args:
        sources: Each a PEFT adapter folder, a run folder of keeptune, or a whole model.
        output: The figure, ``.png``; the numbers go beside it, into ``.json``.
        base: The base; None takes what each source names.
        roles: Roles of the targets; None is all linear maps but the head.
        device: ``auto`` is CUDA where there is a GPU.

    Returns:
        ``sources``: for each its ``label``, ``folder``, ``base``, ``rows`` (:func:`weight_changes`), and ``layers`` and
        ``roles``, the same put together (root of the sums of squares).

    Raises:
        RecipeError: The output is no PNG file, a source is given twice, or there is no such device.
        ModelError: A source or its base cannot be loaded or do not belong together, or a change is not finite.
        PlanError: A role does not exist.
    """
    device = check_figure_file(output, "change.png", device)
    entries = []
    for source, label in zip(sources, labels_of(sources), strict=True):
        name, rows = weight_changes(source, base=base, roles=roles, device=device)
        entry = {"label": label, "folder": source, "base": name, "rows": rows}
        entries.append(entry | {"layers": totals(rows, "layer"), "roles": totals(rows, "role")})
    record = {"sources": entries}
    write_figure_files(output, record, change_charts(record))
    return record


def weight_changes(
    source: str, *, base: str | None = None, roles: Sequence[str] | None = None, device: str = "cpu"
) -> tuple[str, list[dict[str, Any]]]:
    """Measures the change of every target of one trained model; arguments and errors of :func:`change`.

    Returns:
        The base, and for each target ``target``, ``layer``, ``role``, ``norm``, ``weight`` (``||W||``) and ``relative``
        (None where W is zero); 0 for a target that was left alone.
    """
    trained = TrainedModel.of(source, base=base, device=device)
    rows = []
    for target, W, moved in trained.changes(roles):
        norm, weight = 0.0 if moved is None else size_of(moved), float(W.double().norm())
        row = {"target": target.name, "layer": target.layer, "role": target.role}
        rows.append(row | {"norm": norm, "weight": weight, "relative": norm / weight if weight > 0 else None})
    return trained.base, rows
