"""keeptune merge A B --weights: several adapters of one base joined into one, by PEFT's ``add_weighted_adapter``.

All but ``svd`` join the factors, A with A and B with B, so that even ``linear`` is not the sum of the changes:

    svd       sum_i w_i s_i B_i A_i, at a rank that holds all of it
    linear    (sum_i v_i B_i) (sum_i v_i A_i), v_i = sqrt(w_i s_i)
    ties      the same of the largest entries (``density``) whose sign most of them have (Yadav et al., 2023)
    dare_*    linear or ties, of entries drawn with probability ``density`` and divided by it (Yu et al., 2024)

Where ranks differ, or one is asked for, PEFT joins the changes so, and cuts the result by an SVD.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import PeftModel

from keeptune.adapter.export import export
from keeptune.adapter.install import install
from keeptune.adapter.load import SIDECAR, load_adapter, refuse_foreign
from keeptune.core.errors import ModelError, RecipeError, need_known
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Plan
from keeptune.model.blocks import find_targets
from keeptune.pipeline.machine import check_folder
from keeptune.pipeline.planning import starting_from
from keeptune.pipeline.trained_changes import TrainedModel
from keeptune.posthoc.repair_problem import FactoredModel

Scheme = Literal["svd", "linear", "ties", "dare_linear", "dare_ties"]


@dataclass(frozen=True, slots=True)
class Merging:
    """How adapters are joined.

    Args:
        weights: One for each adapter; negative ones subtract.
        scheme: ``"svd"``, the weighted sum of the changes; or another one of the module's.
        density: Share of the entries that TIES keeps, or DARE draws.
        rank: Of the result; None takes that of the adapters, or, of an SVD, the sum of their ranks.
        seed: Of what DARE draws.
    """

    weights: Sequence[float]
    scheme: Scheme = "svd"
    density: float = 0.5
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        need_known(self.scheme, get_args(Scheme), "--scheme", "a way to join adapters")
        if not 0 < self.density <= 1 or (self.rank is not None and self.rank < 1):
            got, wanted = f"{self.density} and {self.rank}", "a density in (0, 1], a rank of at least 1"
            raise RecipeError("--density, --rank", got=got, wanted=wanted, next_step="Change it.")


def merge(
    adapters: Sequence[Path | str], output: Path | str, options: Merging, *, base: str | None = None
) -> dict[str, Any]:
    """Joins LoRA adapters of one base into one adapter, checked on a freshly loaded base.

    Args:
        adapters: PEFT adapter folders, or run folders.
        output: Where the joined adapter goes.
        options: How they are joined.
        base: Path or hub id of the base; None takes what the first one names.

    Returns:
        ``distance`` (relative, Frobenius, to the weighted sum of the changes; None where that is zero), PEFT's
        ``scheme``, and ``export``.

    Raises:
        RecipeError: There is not one weight for each of at least two adapters.
        ModelError: An adapter is more than LoRA of linear maps, or of another base than the others.
        ExportError: The output holds something that keeptune did not write.
    """
    if len(adapters) < 2 or len(options.weights) != len(adapters):
        got, step = f"{len(options.weights)} for {len(adapters)} adapter(s)", "Example: merge a b --weights 0.7,0.3"
        raise RecipeError("--weights", got=got, wanted="at least two adapters, and a weight for each", next_step=step)
    refuse_foreign(output := Path(output))
    check_folder("--output", output)
    found = [TrainedModel.of(str(source), base=base) for source in adapters]
    first, starts = found[0], list[FactoredModel]()
    for one in found:
        wanted, start = f"an adapter for {first.base} (--base names one that two names stand for)", None
        if one.is_adapter and (one.base == first.base or (one.folder / SIDECAR).is_file()):
            start = FactoredModel.of(replace(one, base=first.base))
            wanted = "LoRA of linear maps alone: lengths, biases, heads, embeddings and experts are not joined"
        if start is None or start.changes.keys() != start.exact or start.dropped or start.head_values():
            raise ModelError(str(one.folder), got=f"another, for {one.base}", wanted=wanted, next_step="Leave it out.")
        starts.append(replace(start, model=starts[0].model) if starts else start)  # one base is held
    scheme, changes = _joined([one.folder for one in found], first, options)
    apart = whole = 0.0
    for name in {name for start in starts for name in start.changes}:
        own = [(start.changes.get(name), weight) for start, weight in zip(starts, options.weights, strict=True)]
        total = reduce(LowRank.plus, [change.to(torch.float64).scaled(w) for change, w in own if change is not None])
        rest = total.minus(changes[name].to(torch.float64)) if name in changes else total
        apart += float(rest.norm_squared().clamp_min(0))
        whole += float(total.norm_squared().clamp_min(0))
    distance = (apart / whole) ** 0.5 if whole else None
    made_from = [{"folder": str(one.trained.folder), "weights": one.weights} for one in starts]
    made_of = {"model": starts[0].fingerprint, "dtype": first.dtype, "seed": options.seed, "adapters": made_from}
    plan = Plan(
        method="merge",
        options=asdict(options) | {"weights": list(map(float, options.weights)), "scheme": scheme},
        targets=starting_from([t for t in find_targets(starts[0].model) if t.name in changes], changes),
        provenance=made_of | {"distance": distance},
    )
    tuned = install(first.load_base(), plan)
    assert isinstance(tuned, PeftModel)
    done = export(tuned.eval(), plan, output, base=first.export_base, tokenizer=starts[0].tokenizer)
    return {"scheme": scheme, "distance": distance, "export": asdict(done)}


def _joined(folders: Sequence[Path], first: TrainedModel, options: Merging) -> tuple[str, dict[str, LowRank]]:
    """Returns PEFT's name for the scheme, and the joined change of each target."""
    model = load_adapter(first.load_base(), folders[0])
    names, scheme = ["default", *map(str, range(1, len(folders)))], str(options.scheme)
    try:
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(str(folder), adapter_name=name)
        configs: list[Any] = [model.peft_config[name] for name in names]
        ranks = [max(config.r, *config.rank_pattern.values(), 0) for config in configs]
        if options.rank or len(set(ranks)) > 1 or any(config.rank_pattern for config in configs):
            scheme = "svd" if scheme in ("svd", "linear") else f"{scheme}_svd"
        how = {"combination_type": scheme, "svd_rank": options.rank or sum(ranks), "density": options.density}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            weights = list(map(float, options.weights))
            model.base_model.add_weighted_adapter(names, weights, "joined", svd_full_matrices=False, **how)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:  # what PEFT does not join
        got, where = " ".join(str(error).split())[:300], ", ".join(map(str, folders))
        raise ModelError(where, got=got, wanted="adapters that PEFT joins", next_step="Leave one out.") from error
    changes = dict[str, LowRank]()
    for name, layer in model.get_base_model().named_modules():
        if "joined" in getattr(layer, "lora_A", ()):
            # Not times the layer's scale, which is wrong where the first adapter has use_rslora: it is in the factors.
            B, A = (factor["joined"].weight.detach().float() for factor in (layer.lora_B, layer.lora_A))
            changes |= {} if LowRank(B, A).is_zero else {name: LowRank(B, A)}
    if not changes:
        raise ModelError("keeptune merge", got="a change of zero", wanted="another", next_step="Use other weights.")
    return scheme, changes
