"""keeptune curvature: where updates go against the curvature that a run's plan holds (after LaLoRA Fig. 3a).

    E = W' - W                         the change of a weight, by any training of the same base
    Ω = U diag(λ) Uᵀ, Γ = V diag(γ) Vᵀ   the curvature of its input and output side, from the plan
    ||E u_i||², ||Eᵀ v_j||²              how much of the change lies along each direction

Directions are ordered from the stiffest to the most flexible and cut into tenths, of the curvature (the sum of the
eigenvalues) and of the directions (their number). A change that knows nothing of the curvature puts a tenth into each
tenth of the directions; one in proportion to it, a tenth into each tenth of the curvature.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from keeptune.core.errors import ArtefactError, ModelError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan
from keeptune.linalg.curvature_profile import Directions, directions, energies, profile
from keeptune.pipeline.trained_changes import TrainedModel, labels_of, size_of
from keeptune.report.pages.study_charts import curvature_charts
from keeptune.studies.figure_files import check_figure_file, write_figure_files

Side = Literal["input", "output"]
_NAMES: Mapping[Side, str] = {"input": "Omega", "output": "Gamma"}
_SHARES = ("curvature", "directions", "isotropic")

_NOTE = "1: the stiffest, 10: the most flexible; means over targets"


def curvature(
    run: Path, others: Sequence[str], output: Path, *, base: str | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Compares where the updates of a run and of others on the same base lie against the run's curvature.

    Args:
        run: A run folder whose plan has a penalty with curvature; its own updates are measured too.
        others: Run folders, adapters or models on the same base, such as plain LoRA.
        output: The figure, ``.png``; the numbers go beside it, into ``.json``.
        base: The base; None takes what the run names.
        device: ``auto`` is CUDA where there is a GPU.

    Returns:
        ``run``, ``penalty`` (its name and options), and ``sources``: for each its ``label`` and ``folder``, ``targets``
        and their mean ``sides``: per side ``curvature`` and ``directions`` (shares of the update per tenth, from the
        stiffest), ``isotropic`` (the share of the directions in each tenth of the curvature) and ``felt`` (curvature
        per unit of the update, over that of an update that knows nothing of it).

    Raises:
        ArtefactError: The run's plan holds no curvature.
        RecipeError: The output is no PNG file, a source is given twice, or there is no such device.
        ModelError: A source cannot be loaded, is of another base, or changed none of the weights.
    """
    device = check_figure_file(output, "curvature.png", device)
    plan = Plan.load(run / "plan")
    kinds = tuple(f"{name}:" for name in _NAMES.values())
    penalty = next((one for one in plan.penalties if any(name.startswith(kinds) for name in one.tensors)), None)
    if penalty is None:
        raise ArtefactError(
            str(run),
            got=f"a plan of {plan.method} without the curvature of inputs or outputs",
            wanted="a run with it, such as {name: lalora, curvature: delta-act} or delta-kfac, b-kfac, b-tri-kfac",
            next_step="Name such a run first, and this one after it, to see both against its curvature.",
        )
    sources = [str(run), *others]
    labels = labels_of(sources)
    base = TrainedModel.of(str(run), base=base).base
    curves = {side: _factors(penalty.tensors, side, plan) for side in _NAMES}
    entries = []
    for source, label in zip(sources, labels, strict=True):
        targets = profiles_of(source, curves, base=base, device=device)
        if not targets:
            raise ModelError(
                source,
                got="no change of a weight that the run's curvature is known for",
                wanted="a training of some of the same targets",
                next_step="Compare a run that trained, with the same `targets` and `layers`.",
            )
        entries.append({"label": label, "folder": source, "targets": targets, "sides": _means(targets)})
    named = {"name": penalty.name, "options": dict(penalty.options)}
    record = {"run": str(run), "penalty": named, "sources": entries}
    write_figure_files(output, record, curvature_charts(record), _NOTE, across=2)
    return record


def profiles_of(
    source: str, curves: Mapping[Side, Mapping[str, Tensor]], *, base: str | None, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Measures where the change of each target of a trained model lies.

    ``curves`` are side to target's name to curvature; targets that share one share the object. A base of None is that
    which the source names.

    Returns:
        For each target that changed ``target``, ``layer``, ``role``, ``norm`` and ``sides`` (:func:`curvature`).
    """
    known: dict[int, Directions] = {}  # one decomposition for the targets of a block that share a factor
    rows: list[dict[str, Any]] = []
    layer = -1
    for target, W, change in TrainedModel.of(source, base=base, device=device).changes():
        if target.layer != layer:
            known, layer = {}, target.layer
        factors = {side: own[target.name] for side, own in curves.items() if target.name in own}
        if change is None or not factors or not size_of(change) > 0:
            continue
        sides: dict[str, Any] = {}
        for side, factor in factors.items():
            if len(factor) != (target.in_features if side == "input" else target.out_features):
                raise ModelError(
                    f"{source}, {target.name}",
                    got=f"a weight of shape {tuple(W.shape)}",
                    wanted="the shape that the run's curvature was measured for",
                    next_step="Compare trainings of one base.",
                )
            if id(factor) not in known:
                known[id(factor)] = directions(factor.to(W.device))
            along = known[id(factor)]
            turned = LowRank(change.A.T, change.B.T) if isinstance(change, LowRank) else change.T
            if float(along.values.sum()) > 0:
                sides[side] = _side(change if side == "input" else turned, along)
        if sides:
            row = {"target": target.name, "layer": target.layer, "role": target.role}
            rows.append(row | {"norm": size_of(change), "sides": sides})
    return rows


def _side(change: LowRank | Tensor, along: Directions) -> dict[str, Any]:
    energy, values = energies(change, along), along.values
    each = torch.ones_like(values)
    shares = (profile(values, energy), profile(each, energy), profile(values, each))
    felt = float((energy * values).sum() / energy.sum()) / float(values.mean())
    return {name: share.tolist() for name, share in zip(_SHARES, shares, strict=True)} | {"felt": felt}


def _means(targets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for side in _NAMES:
        own = [row["sides"][side] for row in targets if side in row["sides"]]
        if own:
            tenths = {name: zip(*(one[name] for one in own), strict=True) for name in _SHARES}
            shares = {name: [math.fsum(values) / len(own) for values in each] for name, each in tenths.items()}
            means[side] = shares | {"felt": math.fsum(one["felt"] for one in own) / len(own), "targets": len(own)}
    return means


def _factors(tensors: Mapping[str, Tensor], side: Side, plan: Plan) -> dict[str, Tensor]:
    """Returns the curvature of each target that has one; targets fed by one tensor share that of their inputs."""
    targets = [planned.target for planned in plan.targets]
    names = {t.name: f"{_NAMES[side]}:{t.input_group if side == 'input' else t.name}:matrix" for t in targets}
    return {name: tensors[at] for name, at in names.items() if at in tensors}
