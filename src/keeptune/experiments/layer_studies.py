"""keeptune layers: what tuning one layer at a time, or the lowest or highest few, gains and costs (L2-LoRA).

    single   one layer at a time (Fig. 4), and all of them to compare with
    bottom   the lowest 1, 2, ... layers (Table 5)
    top      the highest 1, 2, ... layers (Table 6)

Each point is an ordinary run of one recipe with other ``layers``, and studies share their runs: the lowest is layer 0
alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from keeptune.core.artefact import content_key
from keeptune.core.errors import PlanError, RecipeError, need_known
from keeptune.experiments.plan_runs import Comparison, sweep_of
from keeptune.model.blocks import find_targets
from keeptune.pipeline.job import Job
from keeptune.recipe.reading import read_values
from keeptune.recipe.schema import make_recipe

Study = Literal["single", "bottom", "top"]
_MOST = 8  # numbers of layers that are tried by default


def load_layer_study(
    path: Path | str, study: str, overrides: Mapping[str, Any] | None = None, numbers: Iterable[int] | None = None
) -> Comparison:
    """Reads an ordinary recipe as a study of its layers, whose records go into a folder below the recipe's output.

    Its ``layers`` are those that are studied, all by default, and it may list ``seeds``. ``numbers`` are how many of
    them to train, for bottom and top; None is every number up to eight, else eight of them.

    Raises:
        KeeptuneError: What the user can correct; nothing was written then.
    """
    path = Path(path)
    need_known(study, get_args(Study), "--study", ", ".join(get_args(Study)))
    if study == "single" and numbers is not None:
        raise RecipeError(
            "--numbers",
            got="numbers of layers for the study single",
            wanted="them for bottom or top",
            next_step="Leave it out; `--layers [0, 4, 8]` chooses which layers are tuned.",
        )
    values = read_values(path, overrides)
    where = f"recipe {path}"
    recipe = make_recipe({k: v for k, v in values.items() if k != "seeds"}, folder=path.parent, where=where)
    job = Job(recipe)
    job.check()
    layers = sorted({t.layer for t in find_targets(job.base(), recipe.targets, recipe.layers) if t.layer >= 0})
    if not layers:
        raise PlanError(
            where,
            got="a model without numbered blocks",
            wanted="layers to choose from",
            next_step="Studies of layers need a model with a stack of blocks.",
        )
    if study == "single":
        points = [{**_point([layer]), "x": layer} for layer in layers]
        points += [_point(layers)] if len(layers) > 1 else []
    else:
        counts = _numbers(layers, numbers)
        points = [{**_point(layers[:n] if study == "bottom" else layers[-n:]), "x": n} for n in counts]
    about = {"study": study, "layers": layers, "axis": "layer" if study == "single" else "number of trainable layers"}
    return sweep_of(path, values, points, about, kind="layers", below=study)


def _numbers(layers: Sequence[int], numbers: Iterable[int] | None) -> list[int]:
    """Returns how many layers to train: the numbers given, or evenly spaced ones from one to all.

    >>> _numbers(range(4), None), _numbers(range(32), None), _numbers(range(32), [6, 2, 4])
    ([1, 2, 3, 4], [4, 8, 12, 16, 20, 24, 28, 32], [2, 4, 6])
    """
    count = len(layers)
    if numbers is None:
        return [max(round(step * count / min(count, _MOST)), 1) for step in range(1, min(count, _MOST) + 1)]
    wanted = sorted(set(numbers))
    wrong = [number for number in wanted if not 1 <= number <= count]
    if wrong or not wanted:
        raise RecipeError(
            "--numbers",
            got=", ".join(map(str, wrong)) or "none",
            wanted=f"numbers from 1 to {count}, the layers there are (none at all is the base model)",
            next_step="Example: --numbers 2,4,6",
        )
    return wanted


def _point(layers: Sequence[int]) -> dict[str, Any]:
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    text = "+".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
    if len(text) > 40:  # a folder's name
        text = f"{len(layers)} of {layers[0]}-{layers[-1]} {content_key(list(layers))[:8]}"
    return {"name": f"layer {text}" if len(layers) == 1 else f"layers {text}", "layers": list(layers)}
