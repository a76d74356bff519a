"""keeptune energy: where along the depth the weights' energy is concentrated (FARSS Fig. 1)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from keeptune.core.weights import read_weight
from keeptune.linalg.decompositions import top_energy
from keeptune.model.blocks import find_targets
from keeptune.model.pretrained import LoadOptions, load_model, refuse_not_finite
from keeptune.recipe.paths import resolve_model
from keeptune.report.estimates import layer_means
from keeptune.report.pages.study_charts import energy_charts
from keeptune.studies.figure_files import check_figure_file, write_figure_files


def energy(
    model: str, output: Path, *, top: int = 5, roles: Sequence[str] | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Measures the share of the squared singular values in the ``top`` few, for every target of a model.

    The figure goes to ``output``, and the numbers beside it; ``roles`` of None are all linear maps but the head.

    Returns:
        ``model``, ``top``, ``rows`` (``target``, ``layer``, ``role``, ``energy``) and ``mean``, layer to energy.

    Raises:
        RecipeError: The output is no PNG file, or there is no such device.
        ModelError: The model cannot be loaded, or a weight is not finite.
        PlanError: A role does not exist.
    """
    device = check_figure_file(output, "energy.png", device)
    base = load_model(resolve_model(model), LoadOptions(device=device))
    refuse_not_finite(base)
    rows = []
    for target in tqdm(find_targets(base, roles), desc="energy", delay=2, disable=None, leave=False):
        share = top_energy(read_weight(base, target), top)
        row = {"target": target.name, "layer": target.layer, "role": target.role}
        rows.append(row | {"energy": None if math.isnan(share) else share})
    means = {str(layer): value for layer, value in layer_means(rows).items()}
    record = {"model": model, "top": top, "rows": rows, "mean": means}
    write_figure_files(output, record, energy_charts(rows, top, Path(model).name))
    return record
