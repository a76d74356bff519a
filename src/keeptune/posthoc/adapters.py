"""What repair works on: a trained model's changes, and the covariances of the inputs that they act on."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.load import load_adapter
from keeptune.core.errors import ModelError
from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target, read_weight
from keeptune.data.calibration import Calibration
from keeptune.linalg.rescaled import Rescaled
from keeptune.model.blocks import find_targets, head_of
from keeptune.model.head import Head, body_fingerprint
from keeptune.model.pretrained import Dtype, load_model, load_tokenizer
from keeptune.model.runner import ResidentRunner
from keeptune.pipeline.merge import head_of_adapter, trained_in
from keeptune.pipeline.scoring import result_fingerprint
from keeptune.posthoc.repair_equations import Curve, damped, directions, drift_of, output_energy, solution, white_like
from keeptune.statistics.collect import Statistics, collect
from keeptune.statistics.covariance import InputCovariance
from keeptune.statistics.request import DataRole
from keeptune.statistics.store import StatStore
from keeptune.studies.change import open_changes, result_of

__all__ = ["Case", "Source", "case_of", "open_source"]

_log = logging.getLogger(__name__)
_KEY = re.compile(r"^(.+?)\.(?:lora_A\.|lora_B\.(?!bias$)|lora_magnitude_vector\b|weight$)")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A trained model beside its base.

    Args:
        folder: The adapter, or the whole model.
        base: Path or hub id of the base.
        model: The base, loaded.
        tokenizer: Its tokenizer.
        fingerprint: Of the base's weights.
        weights: Fingerprint of the adapter's.
        dtype: The dtype that the base is loaded in.
        head: Of a classifier; None for a language model.
        device: Where models run.
        changes: Target name to ΔW, float32: factors, or factors of full size where it has no low-rank form.
        exact: Names of the targets whose change has a low-rank form of its own.
        dropped: Names of what was trained besides linear maps: no part of the result.
    """

    folder: Path
    base: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    weights: str
    dtype: Dtype
    head: Head | None
    device: str
    changes: Mapping[str, LowRank]
    exact: frozenset[str]
    dropped: tuple[str, ...]

    def load_base(self) -> PreTrainedModel:
        """Load a fresh base.

        Returns:
            The model, in evaluation mode.
        """
        return load_model(self.base, dtype=self.dtype, device=self.device, head=self.head)

    def load_tuned(self) -> PreTrainedModel:
        """Load the trained model: the adapter on a fresh base, or the whole model.

        Returns:
            The model, in evaluation mode.
        """
        if not (self.folder / "adapter_config.json").is_file():
            return load_model(str(self.folder), dtype=self.dtype, device=self.device, head=self.head)
        inner: PreTrainedModel = load_adapter(self.load_base(), self.folder).get_base_model()
        return inner.eval()

    def head_values(self) -> dict[str, Tensor]:
        """Read a classifier's trained head.

        Returns:
            Parameter names in the base model to values; empty for a language model.
        """
        heads = tuple(f"{name}." for name in head_of(self.model))
        found = {}
        for file in sorted(self.folder.glob("*.safetensors")) if heads else []:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a mapping
                    name = key.removeprefix("base_model.model.")
                    if name.startswith(heads):
                        found[name] = tensors.get_tensor(key).float()
        return found


def open_source(source: str, base: str | None, device: str) -> Source:
    """Load a trained model's changes and its base.

    Args:
        source: A PEFT adapter folder, a run folder of keeptune, or a whole model.
        base: The base; None takes what the source names.
        device: Where models run.

    Returns:
        The changes, with what they act on.

    Raises:
        ModelError: It cannot be loaded, is of another base, changed none of the weights, or is not finite.
    """
    folder = result_of(source)
    head = head_of_adapter(folder)
    name, moved = open_changes(source, base=base, device=device)
    changes, exact = {}, set()
    for target, _, change in moved:
        if change is None:
            continue
        if isinstance(change, LowRank):
            factors = change.to(torch.float32, "cpu")
            exact.add(target.name)
        else:
            factors = _whole((change.dense() if isinstance(change, Rescaled) else change).to("cpu", torch.float32))
        if not (torch.isfinite(factors.B).all() and torch.isfinite(factors.A).all()):
            raise ModelError(
                f"{source}, {target.name}",
                got="a change that is NaN or infinite",
                wanted="finite weights",
                next_step="Check the training's losses; the adapter or model is damaged.",
            )
        if not factors.is_zero:
            changes[target.name] = factors
    if not changes:
        raise ModelError(
            source,
            got="a model that changed no linear map of its base",
            wanted="an adapter or a model that was trained",
            next_step="Check that it is the trained model, and that --base is the model it started from.",
        )
    dtype: Dtype = trained_in(folder) or "auto"
    model = load_model(name, dtype=dtype, device=device, head=head)
    besides = _besides if (folder / "adapter_config.json").is_file() else _moved_besides
    return Source(
        folder=folder,
        base=name,
        model=model,
        tokenizer=load_tokenizer(name),
        fingerprint=body_fingerprint(model),
        weights=result_fingerprint(folder),
        dtype=dtype,
        head=head,
        device=device,
        changes=changes,
        exact=frozenset(exact & changes.keys()),
        dropped=besides(folder, model),
    )


def _whole(change: Tensor) -> LowRank:
    """Write a matrix as a product, with the identity on its longer side."""
    m, n = change.shape
    return LowRank(change, torch.eye(n)) if m >= n else LowRank(torch.eye(m), change)


def _besides(folder: Path, base: PreTrainedModel) -> tuple[str, ...]:
    """Name what an adapter's file holds besides changes of linear maps and a head: biases, embeddings, norms."""
    targets = {target.name for target in find_targets(base)}
    heads = tuple(f"{name}." for name in head_of(base))
    found = set()
    for name in _names_in(folder):
        match = _KEY.match(name)
        if not (heads and name.startswith(heads)) and not (match and match[1] in targets):
            found.add(match[1] if match else name)
    return tuple(sorted(found))


def _names_in(folder: Path) -> list[str]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        return [key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in tensors.keys()]  # noqa: SIM118 - not a mapping


def _moved_besides(folder: Path, base: PreTrainedModel) -> tuple[str, ...]:
    """Name the parameters of a whole model that differ from the base's and are no weight of a linear map."""
    weights = {f"{target.name}.weight" for target in find_targets(base)}
    heads = tuple(f"{name}." for name in head_of(base))
    mine = {name: value for name, value in base.state_dict().items() if name not in weights}
    found = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                if key in mine and not (heads and key.startswith(heads)):
                    after = tensors.get_tensor(key).to(mine[key].dtype)
                    if after.shape != mine[key].shape or not torch.equal(after, mine[key].cpu()):
                        found.add(key)
    return tuple(sorted(found))


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """An adapter's changes with what repair needs to know of them.

    Args:
        changes: Target name to ΔW; factors of full size where there is no low-rank form.
        exact: Names of the targets whose change has a low-rank form of its own.
        scales: Target name to ``tr(W Ω_k Wᵀ)``.
        targets: Those targets that the data reach, in model order.
        unseen: Changed targets that no token of the data reached: nothing is guessed, they stay as they are.
        statistics: Covariances of their inputs.
        one_sided: There are no task data.
        damping: Of Ω_t, a share of its mean eigenvalue.
        device: Where the algebra is done.
    """

    changes: Mapping[str, LowRank]
    exact: frozenset[str]
    scales: Mapping[str, float]
    targets: tuple[Target, ...]
    unseen: tuple[Target, ...]
    statistics: Statistics
    one_sided: bool
    damping: float
    device: str

    def curves(self) -> list[Curve]:
        """Give each target's drift as a function of μ: one eigenproblem for each input group.

        Returns:
            The curves, in the order of the targets.
        """
        found = []
        for members, omega_t, omega_k in self._groups("spectra"):
            along = directions(damped(omega_t, self.damping), omega_k)
            found += [Curve.of(self._change(t), along, self.scales[t.name]) for t in members]
        return found

    def solve(self, mu: float, rank: int) -> tuple[dict[str, LowRank], list[dict[str, Any]]]:
        """Repair all changes with one μ: one Cholesky factorisation for each input group.

        Args:
            mu: μ.
            rank: Of the changes that have no low-rank form.

        Returns:
            Target name to the repaired change on the CPU, float32; and a row for each target seen: ``drift_before``,
            ``drift``, ``task_kept`` and ``task_error`` (of ``tr(ΔW Ω_t ΔWᵀ)``; None without task data), ``norm_kept``
            and ``truncation`` (what the rank cut off the change as it was, relative; 0 where it is exact).
        """
        solved = {t.name: c.truncated(rank) if c.rank > rank else c for t in self.unseen if (c := self.changes[t.name])}
        rows = []
        for members, omega_t, omega_k in self._groups("repair"):
            mended = solution(damped(omega_t, self.damping), omega_k, mu)
            for target in members:
                change, exact = self._change(target), target.name in self.exact
                new = mended.of(change) if exact else mended.of_rank(change, rank)
                row = {"target": target.name, "layer": target.layer, "role": target.role, "rank": new.rank}
                row |= {"truncation": 0.0 if exact else _cut(change, min(rank, new.rank))}
                rows.append(row | self._account(target, change, new, omega_t, omega_k))
                solved[target.name] = new.to(torch.float32, "cpu")
        return solved, rows

    def _account(
        self, target: Target, change: LowRank, new: LowRank, omega_t: Tensor, omega_k: Tensor
    ) -> dict[str, float | None]:
        scale = self.scales[target.name]
        moved = LowRank(torch.cat([new.B, -change.B], 1), torch.cat([new.A, change.A])).to(torch.float64)
        before = math.nan if self.one_sided else output_energy(change, omega_t)
        known = before > 0
        norm = float(change.to(torch.float64).norm_squared())
        return {
            "drift_before": drift_of(change, omega_k, scale),
            "drift": drift_of(new, omega_k, scale),
            "task_kept": output_energy(new, omega_t) / before if known else None,
            "task_error": output_energy(moved, omega_t) / before if known else None,
            "norm_kept": float(new.to(torch.float64).norm_squared()) / norm,
        }

    def _change(self, target: Target) -> LowRank:
        change = self.changes[target.name]
        return change.to(change.A.dtype, self.device)

    def _groups(self, title: str) -> Iterator[tuple[list[Target], Tensor, Tensor]]:
        groups: dict[str, list[Target]] = {}
        for target in self.targets:
            groups.setdefault(target.input_group, []).append(target)
        for members in tqdm(groups.values(), desc=title, delay=2, disable=None, leave=False):
            view = self.statistics.view(members[0])
            omega_k = view[InputCovariance("knowledge")].to(self.device, torch.float64)
            task = None if self.one_sided else view[InputCovariance("task")].to(self.device, torch.float64)
            yield members, white_like(omega_k) if task is None else task, omega_k


def case_of(
    source: Source,
    data: Mapping[DataRole, Calibration],
    store: StatStore,
    *,
    damping: float,
    running: PreTrainedModel | None = None,
    fingerprint: str = "",
) -> Case:
    """Collect the covariances of a trained model's inputs.

    Args:
        source: The trained model.
        data: Tokens: ``"knowledge"``, and ``"task"`` where there are such data.
        store: Where covariances are looked up and kept.
        damping: Of Ω_t, a share of its mean eigenvalue.
        running: The model whose inputs count; None is the base.
        fingerprint: Of that model's weights.

    Returns:
        The case.

    Raises:
        StatisticsError: Activations are not finite.
    """
    every = [target for target in find_targets(source.model) if target.name in source.changes]
    asked = frozenset(InputCovariance(role) for role in data)
    statistics = collect(
        ResidentRunner(source.model if running is None else running),
        every,
        {target.name: asked for target in every},
        data,
        store,
        model_fingerprint=source.fingerprint if running is None else fingerprint,
    )
    seen = [target for target in every if target.name not in statistics.unseen]
    scales = {}
    for target in seen:
        omega_k = statistics.view(target).derive(InputCovariance("knowledge"), _doubled)
        W = read_weight(source.model, target).to(omega_k.device, torch.float64)
        scales[target.name] = float(((W @ omega_k) * W).sum())
    return Case(
        changes=source.changes,
        exact=source.exact,
        scales=scales,
        targets=tuple(target for target in seen if scales[target.name] > 0),
        unseen=tuple(target for target in every if not scales.get(target.name, 0.0) > 0),
        statistics=statistics,
        one_sided="task" not in data,
        damping=damping,
        device=source.device,
    )


def _doubled(omega: Tensor) -> Tensor:
    return omega.double()


def _cut(change: LowRank, rank: int) -> float:
    """Say how much of a change no change of this rank can hold, relative to its size."""
    values = torch.linalg.svdvals(change.B.double() @ change.A.double()).square()
    return float((values[rank:].sum() / values.sum()).sqrt())
