"""The problem that repair solves: changes as factors, the covariances of their inputs, and its solution."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import ModelError
from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target
from keeptune.core.weights import read_weight
from keeptune.data.calibration import Calibration
from keeptune.model.blocks import find_targets, head_of
from keeptune.model.head import body_fingerprint
from keeptune.model.runner import Runner
from keeptune.pipeline.scoring import result_fingerprint
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.posthoc.repair_equations import Curve, Solution, damped, directions, output_energy, white_like
from keeptune.statistics.collect import Statistics, collect
from keeptune.statistics.covariance import InputCovariance
from keeptune.statistics.request import DataRole
from keeptune.statistics.store import StatStore

_KEY = re.compile(r"^(.+?)\.(?:lora_A\.|lora_B\.(?!bias$)|lora_magnitude_vector\b|weight$)")


@dataclass(frozen=True, slots=True, eq=False)
class FactoredModel:
    """A trained model whose changes are all factors, with its base.

    Args:
        trained: The trained model on disk.
        model: The base, loaded.
        tokenizer: Its tokenizer.
        fingerprint: Of the base's weights.
        weights: Fingerprint of the adapter's, or the whole model's.
        changes: Target name to ΔW, float32: factors, or factors of full size where it has no low-rank form.
        exact: Names of the targets whose change has a low-rank form of its own.
        dropped: Names of what was trained besides linear maps: no part of the result.
    """

    trained: TrainedModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    weights: str
    changes: Mapping[str, LowRank]
    exact: frozenset[str]
    dropped: tuple[str, ...]

    @classmethod
    def of(cls, trained: TrainedModel) -> Self:
        """Loads a trained model's changes and its base.

        Raises:
            ModelError: It cannot be loaded, is of another base, changed none of the weights, or is not finite.
        """
        changes, exact = {}, set()
        for target, _, change in trained.changes():
            if change is None:
                continue
            if isinstance(change, LowRank):
                factors = change.to(torch.float32, "cpu")
            else:  # of full size: the identity on its longer side
                W, (m, n) = change.to("cpu", torch.float32), change.shape
                factors = LowRank(W, torch.eye(n)) if m >= n else LowRank(torch.eye(m), W)
            if not factors.is_zero:
                changes[target.name] = factors
                exact |= {target.name} if isinstance(change, LowRank) else set()
        if not changes:
            raise ModelError(
                trained.source,
                got="a model that changed no linear map of its base",
                wanted="an adapter or a model that was trained",
                next_step="Check that it is the trained model, and that --base is the model it started from.",
            )
        model = trained.load_base()
        return cls(
            trained=trained,
            model=model,
            tokenizer=trained.load_tokenizer(),
            fingerprint=body_fingerprint(model),
            weights=result_fingerprint(trained.folder),
            changes=changes,
            exact=frozenset(exact),
            dropped=(_trained_besides if trained.is_adapter else _moved_besides)(trained.folder, model),
        )

    def head_values(self) -> dict[str, Tensor]:
        """Returns a classifier's trained head, parameter names in the base to values; empty for a language model."""
        heads = tuple(f"{name}." for name in head_of(self.model))
        stored = _tensors_in(self.trained.folder) if heads else ()
        named = ((key.removeprefix("base_model.model."), value) for key, value in stored)
        return {name: value.float() for name, value in named if name.startswith(heads)}


def _tensors_in(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                yield key, tensors.get_tensor(key)


def _trained_besides(folder: Path, base: PreTrainedModel) -> tuple[str, ...]:
    """Names what an adapter's file holds besides changes of linear maps and a head: biases, embeddings, norms."""
    targets = {name for target in find_targets(base) for name in (target.name, target.module)}
    heads = tuple(f"{name}." for name in head_of(base))
    besides = set()
    keys = [key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key, _ in _tensors_in(folder)]
    for name in keys:
        match = _KEY.match(name)
        if not name.startswith(heads) and not (match and match[1] in targets):
            besides.add(match[1] if match else name)
    return tuple(sorted(besides))


def _moved_besides(folder: Path, base: PreTrainedModel) -> tuple[str, ...]:
    """Names the parameters of a whole model that differ from the base's and are no weight of a linear map."""
    weights = {target.parameter for target in find_targets(base)}
    heads = tuple(f"{name}." for name in head_of(base))
    before = {name: value.cpu() for name, value in base.state_dict().items() if name not in weights}
    kept = ((name, after) for name, after in _tensors_in(folder) if name in before and not name.startswith(heads))
    return tuple(sorted(name for name, after in kept if not torch.equal(after.to(before[name].dtype), before[name])))


@dataclass(frozen=True, slots=True, eq=False)
class RepairProblem:
    """A trained model's changes with the covariances of their inputs.

    Args:
        start: The trained model.
        scales: Target name to ``tr(W Ω_k Wᵀ)``.
        targets: Those targets that the data reach, in model order.
        unseen: Changed targets that no token of the data reached: they stay as they are.
        statistics: Covariances of their inputs.
        one_sided: There are no task data.
        damping: Of Ω_t, a share of its mean eigenvalue.
    """

    start: FactoredModel
    scales: Mapping[str, float]
    targets: tuple[Target, ...]
    unseen: tuple[Target, ...]
    statistics: Statistics
    one_sided: bool
    damping: float

    def curves(self) -> list[Curve]:
        """Returns each target's drift as a function of μ, in order: one eigenproblem for each input group."""
        curves = []
        for members, omega_t, omega_k in self._groups("spectra"):
            along = directions(damped(omega_t, self.damping), omega_k)
            curves += [Curve.of(self._change(t), along, self.scales[t.name]) for t in members]
        return curves

    def solve(self, mu: float, rank: int) -> tuple[dict[str, LowRank], list[dict[str, Any]]]:
        """Repairs all changes with one μ: one Cholesky factorisation for each input group.

        Args:
            mu: μ.
            rank: Of the changes that have no low-rank form.

        Returns:
            Target name to the repaired change on the CPU, float32; and a row for each target seen: ``drift_before``,
            ``drift``, ``task_kept`` and ``task_error`` (of ``tr(ΔW Ω_t ΔWᵀ)``; None without task data), ``norm_kept``
            and ``truncation`` (what the rank cut off the change as it was, relative; 0 where it is exact).
        """
        unseen = {target.name: self.start.changes[target.name] for target in self.unseen}
        solved = {name: c.truncated(rank) if c.rank > rank else c for name, c in unseen.items()}
        rows = []
        for members, omega_t, omega_k in self._groups("repair"):
            repaired = Solution(damped(omega_t, self.damping), omega_k, mu)
            for target in members:
                change, exact = self._change(target), target.name in self.start.exact
                new = repaired.of(change) if exact else repaired.of_rank(change, rank)
                row: dict[str, Any] = {"target": target.name, "layer": target.layer, "role": target.role}
                row["rank"] = new.rank
                row["truncation"] = 0.0
                if not exact:  # what no change of this rank can hold, relative to its size
                    values = torch.linalg.svdvals(change.B.double() @ change.A.double()).square()
                    row["truncation"] = float((values[min(rank, new.rank) :].sum() / values.sum()).sqrt())
                scale, norm = self.scales[target.name], float(change.to(torch.float64).norm_squared())
                moved = LowRank(torch.cat([new.B, -change.B], 1), torch.cat([new.A, change.A])).to(torch.float64)
                before = math.nan if self.one_sided else output_energy(change, omega_t)
                row["drift_before"] = output_energy(change, omega_k) / scale
                row["drift"] = output_energy(new, omega_k) / scale
                row["task_kept"] = output_energy(new, omega_t) / before if before > 0 else None
                row["task_error"] = output_energy(moved, omega_t) / before if before > 0 else None
                row["norm_kept"] = float(new.to(torch.float64).norm_squared()) / norm
                rows.append(row)
                solved[target.name] = new.to(torch.float32, "cpu")
        return solved, rows

    def _change(self, target: Target) -> LowRank:
        change = self.start.changes[target.name]
        return change.to(change.A.dtype, self.start.trained.device)

    def _groups(self, title: str) -> Iterator[tuple[list[Target], Tensor, Tensor]]:
        groups: dict[str, list[Target]] = {}
        for target in self.targets:
            groups.setdefault(target.input_group, []).append(target)
        for members in tqdm(groups.values(), desc=title, delay=2, disable=None, leave=False):
            view = self.statistics.view(members[0])
            device = self.start.trained.device
            omega_k = view[InputCovariance("knowledge")].to(device, torch.float64)
            task = None if self.one_sided else view[InputCovariance("task")].to(device, torch.float64)
            yield members, white_like(omega_k) if task is None else task, omega_k


def repair_problem(
    start: FactoredModel,
    data: Mapping[DataRole, Calibration],
    store: StatStore,
    *,
    damping: float,
    running: PreTrainedModel | None = None,
    fingerprint: str = "",
) -> RepairProblem:
    """Collects the covariances of a trained model's inputs.

    Args:
        start: The trained model.
        data: Tokens: ``"knowledge"``, and ``"task"`` where there are such data.
        store: Where covariances are kept.
        damping: Of Ω_t, a share of its mean eigenvalue.
        running: The model whose inputs count; None is the base.
        fingerprint: Of that model's weights.

    Raises:
        StatisticsError: Activations are not finite.
    """
    every = [target for target in find_targets(start.model) if target.name in start.changes]
    requests = frozenset(InputCovariance(role) for role in data)
    statistics = collect(
        Runner(start.model if running is None else running),
        dict.fromkeys(every, requests),
        data,
        store,
        model_fingerprint=start.fingerprint if running is None else fingerprint,
    )
    scales = {}
    for target in every:
        if target.name not in statistics.unseen:
            omega_k = statistics.view(target).derive(InputCovariance("knowledge"), _in_float64)
            W = read_weight(start.model, target).to(omega_k.device, torch.float64)
            scales[target.name] = float(((W @ omega_k) * W).sum())
    return RepairProblem(
        start=start,
        scales=scales,
        targets=tuple(target for target in every if scales.get(target.name, 0.0) > 0),
        unseen=tuple(target for target in every if not scales.get(target.name, 0.0) > 0),
        statistics=statistics,
        one_sided="task" not in data,
        damping=damping,
    )


def _in_float64(omega: Tensor) -> Tensor:
    return omega.double()
