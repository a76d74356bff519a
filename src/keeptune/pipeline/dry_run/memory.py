"""The memory of a run, stage by stage and part by part, and what it writes: bytes, from shapes alone.

A stage's parts are there at once at its peak; the run needs what its largest stage does. On the CPU it is the memory
of the process (``VmHWM``), on a GPU that of the device. ``benchmarks/account.py`` holds both against measured peaks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainingArguments

from keeptune.adapter.anchor import resolve
from keeptune.adapter.trained_head import trained_beside
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import Method, Size
from keeptune.model.quantization import stays_quantised
from keeptune.penalties.base import Penalty
from keeptune.penalties.kl import Kl
from keeptune.pipeline.dry_run import estimate
from keeptune.pipeline.dry_run.data_sizes import Lengths, Scored
from keeptune.pipeline.dry_run.estimate import ModelShape
from keeptune.pipeline.job import Job
from keeptune.pipeline.planning import penalties_of
from keeptune.statistics.request import ModelRequest, Request, RowRequest
from keeptune.statistics.self_generated import BATCH
from keeptune.statistics.store_use import refuse_larger
from keeptune.training.task_loss import AT_ONCE

# What Python and the libraries take by themselves; on a GPU their context and the kernels' work space.
_PROCESS = {"cpu": 650 * 10**6, "cuda": 700 * 10**6}
# What an allocator holds beside what is in use, as a share of what comes and goes: measured on the CPU (glibc), where
# many sizes below 32 MB leave holes.
_HOLES = {"cpu": 0.33, "cuda": 0.1}
_BATCH_TOKENS = 1024  # of a pass of statistics
_PROBE = (4, 256)  # examples and tokens that an export is checked on
# Of judged answers: sequences of an example that are learned, and those that are only read: by the reference, for KL.
JUDGED = {"preference": (2, 2), "unpaired_preference": (1, 3)}
_Stage = tuple[dict[str, int], dict[str, int]]  # bytes by part: of what lasts, and of what comes and goes
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


def plan_without_numbers(target: Target, size: Size) -> TargetPlan:
    """Returns a plan on the meta device: penalties choose their statistics by its shape."""
    with torch.device("meta"):
        init = LowRank(B=torch.zeros(target.out_features, size.rank), A=torch.zeros(size.rank, target.in_features))
    return TargetPlan(target, Decision(size.rank), init, 1.0, frozenset({"A", "B"}))


@dataclass(frozen=True)
class Footprint:
    """What a run trains, measures and scores, and what it holds for that in memory and on disk.

    Args:
        job: The run.
        shape: Of its base.
        lengths: Of its data.
    """

    job: Job
    shape: ModelShape
    lengths: Lengths

    @cached_property
    def _method(self) -> Method:
        return cast(Method, self.job.method.fitted(self.shape.blocks))

    @property
    def whole(self) -> bool:
        """Whether all weights are trained."""
        return bool(self.job.method.scope == "all")

    @cached_property
    def sizes(self) -> dict[Target, Size]:
        """What the method trains of each target; empty where all weights are trained."""
        if self.whole:
            return {}
        downs = self.shape.downs if self._method.rows_of_downs else frozenset[str]()
        targets = self.shape.targets(self.job.recipe.targets, self.job.recipe.layers)
        return {target: self._method.size(target, downs) for target in targets}

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return any(self.job.recipe.train.get(key) for key in _CHECKPOINTING)

    def argument(self, key: str) -> float:
        """Returns an argument of training, or its default."""
        given = self.job.recipe.arguments.get(key)
        return float(TrainingArguments.__dataclass_fields__[key].default if given is None else given)

    @property
    def used(self) -> list[Target]:
        """The targets that are trained."""
        return [target for target, size in self.sizes.items() if size.rank]

    @cached_property
    def sites(self) -> dict[tuple[Request, str], Target]:
        """The statistics that method and penalties need, once for each site."""
        needed: dict[tuple[Request, str], Target] = {}
        for target, size in self.sizes.items():
            requests: set[Request] = set(self._method.requests(target))
            for one in self._penalties if size.rank else ():
                requests |= one.requests(plan_without_numbers(target, size))
            for request in requests:
                needed.setdefault((request, request.site(target)), target)
        return needed

    @cached_property
    def score(self) -> tuple[Scored, ...]:
        """What is scored."""
        return tuple(self.lengths.scored(one) for one in self.job.recipe.evaluate)

    @cached_property
    def trained(self) -> int:
        """Numbers that are trained, those beside the factors among them; refuses modules that are not there."""
        if self.whole:
            return self.shape.parameters
        recipe, model = self.job.recipe, self.shape.model
        names = recipe.modules_to_save, recipe.trainable_token_indices
        fields = trained_beside(model, *names, [target.name for target in self.used]) if any(names) else {}
        modules = [model.get_submodule(name) for name in fields.get("modules_to_save", ())]
        tokens = fields.get("trainable_token_indices", {}).items()
        rows: int = sum(len(ids) * cast(Tensor, model.get_submodule(name).weight).shape[1] for name, ids in tokens)
        beside: int = rows + sum(parameter.numel() for module in modules for parameter in module.parameters())
        return sum(size.trained for size in self.sizes.values()) + self.shape.head_parameters + beside

    @property
    def _penalties(self) -> Sequence[Penalty]:
        return penalties_of(self.job.method, self.job.penalties)

    @cached_property
    def memory(self) -> dict[str, dict[str, int]]:
        """Returns the bytes of each stage by part, with what the process takes; stages that are not there are out."""
        stages = {
            "knowledge": self._knowledge(),
            "statistics": self._statistics(),
            "plan": self._plan(),
            "training": self._training(),
            "export": self._export(),
            "scoring": self._scoring(),
        }
        found = {}
        for name, stage in stages.items():
            if stage is not None:
                lasting, passing = stage
                holes = int(_HOLES[self._kind] * sum(passing.values()))
                parts = {"process": _PROCESS[self._kind], **lasting, **passing, "allocator": holes}
                found[name] = {part: number for part, number in parts.items() if number}
        return found

    def _knowledge(self) -> _Stage | None:
        own = self.job.generations.values()
        if not own:
            return None
        cache = estimate.cache_bytes(self.shape, batch=BATCH, length=max(2 * part.max_length for part in own))
        return {"weights": self._base}, {"cache": cache, "logits": estimate.logit_bytes(self.shape, BATCH, "writing")}

    @property
    def _kind(self) -> str:
        return "cuda" if self.job.device.startswith("cuda") else "cpu"

    @property
    def _merges(self) -> bool:
        """Whether the result is a whole model."""
        return self.whole or bool(self.job.recipe.export.format == "merged")

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """How the base's weights are packed: by the recipe, or as its checkpoint is."""
        return self.job.recipe.quantization or self.shape.quantization

    @cached_property
    def _base(self) -> int:
        return estimate.weight_bytes(self.shape, self.quantization)

    @cached_property
    def _factors(self) -> int:
        """Bytes of trained and frozen factors, and of the twins that take a start out of a 16-bit base."""
        frozen = sum(size.frozen for size in self.sizes.values())
        quantised = stays_quantised(self.quantization)
        if resolve(self.job.recipe.anchor, getattr(torch, self.shape.dtype), quantised=quantised) == "twin":
            sizes = self.sizes.items() if self._method.anchored else ()
            frozen += sum(size.rank * (target.out_features + target.in_features) for target, size in sizes)
        return 0 if self.whole else 4 * (self.trained + frozen)

    @property
    def _planned(self) -> int:
        """Bytes of the factors that the plan holds."""
        return self._factors + 4 * sum(size.kept - size.implied for size in self.sizes.values())

    @cached_property
    def penalties(self) -> dict[str, int]:
        """Bytes of the tensors of each penalty, which training holds."""
        held: dict[str, int] = {}
        for one in self._penalties:
            tensors: dict[str, int] = {}
            for target in self.used:
                tensors |= one.size(plan_without_numbers(target, self.sizes[target]))
            held[one.name] = held.get(one.name, 0) + sum(tensors.values())
        return held

    @property
    def _held(self) -> dict[str, int]:
        """What the plan holds from when it is made to the end of the run: on the CPU, where it is kept."""
        return {} if self._kind == "cuda" else {"plan": self._planned, "penalties": sum(self.penalties.values())}

    @cached_property
    def _placed(self) -> int:
        """Bytes of the base on the device while statistics and the plan are made: of its blocks one at a time, or all.

        On the CPU a quantised base is whole: its blocks are there already.
        """
        if self.job.recipe.memory != "blockwise" or (self._kind != "cuda" and stays_quantised(self.quantization)):
            return self._base
        maps = sum(target.out_features * target.in_features for target in self.shape.linear)
        in_blocks = self._base - self.shape.size * (self.shape.parameters - maps)
        return self._base - in_blocks + in_blocks // self.shape.blocks

    @cached_property
    def sums(self) -> int:
        """Bytes of the sums of statistics that are taken at once."""
        passes: dict[tuple[str, int | None, int | None], list[int]] = {}
        for (request, _), target in self.sites.items():
            if isinstance(request, RowRequest):
                block = target.layer if self.job.recipe.memory == "blockwise" else None
                passes.setdefault((request.data, request.examples, block), []).append(request.numbers(target))
        return max((8 * sum(numbers) for numbers in passes.values()), default=0)

    def _statistics(self) -> _Stage | None:
        if not self.sites:
            return None
        roles = {request.data for request, _ in self.sites}
        tokens = max(_BATCH_TOKENS, *(self.lengths.calibration(role).longest for role in roles))
        rows = dict.fromkeys(target for (r, _), target in self.sites.items() if isinstance(r, RowRequest))
        widest = max((max(t.in_features, t.out_features) for t in self.shape.linear), default=0)
        passing = {"activations": estimate.inference_bytes(self.shape, tokens), "rows": 8 * tokens * widest}
        through = any(isinstance(request, ModelRequest) for request, _ in self.sites)  # all blocks in one pass, always
        backward = any(isinstance(r, RowRequest) and r.loss is not None for r, _ in self.sites)
        if through or backward:
            tokens *= 2 if through else 1
            kept = estimate.activation_bytes(self.shape, tuple(rows), ranks=0, batch=1, length=tokens)
            passing["activations"] = (
                kept // self.shape.blocks if self.job.recipe.memory == "blockwise" and not through else kept
            )
            passing["logits"] = estimate.logit_bytes(self.shape, tokens if rows else 0, "statistics")
        return {"weights": self._placed, "sums": self.sums}, passing

    def _plan(self) -> _Stage | None:
        """The largest decomposition: ``16 m n`` of an SVD of W in float32, ``8 · 4 n²`` of eigenvectors in float64."""
        if self.whole:
            return None
        decomposes = self._method.anchored or any(size.kept for size in self.sizes.values()) or bool(self.sites)
        maps = self.used if decomposes else []
        work = [16 * t.in_features * t.out_features for t in maps]
        sums = [(r.numbers(t), t.in_features) for (r, _), t in self.sites.items() if isinstance(r, RowRequest)]
        if self.job.method.statistics and any(numbers == n**2 for numbers, n in sums):
            work += [32 * t.in_features**2 for t in maps]
        return {"weights": self._placed, **self._held}, {"decompositions": max(work, default=0)}

    def _activations(self, batch: int, length: int) -> int:
        return estimate.activation_bytes(
            self.shape,
            self.shape.linear if self.whole else self.used,
            ranks=sum(size.rank for size in self.sizes.values()),
            batch=batch,
            length=length,
            checkpointing=self.checkpointing,
            whole=self.whole,
        )

    def _training(self) -> _Stage:
        recipe, loss = self.job.recipe, self.job.loss
        written = getattr(loss, "max_completion_length", 0)  # of SDFT, after the prompt
        batch = JUDGED.get(recipe.task.kind, (1, 0))[0] * int(self.argument("per_device_train_batch_size"))
        # A batch is padded to its longest.
        length = max(self.lengths.task, default=self.lengths.most) + written
        lasting = {
            "weights": 4 * self.shape.parameters if self.whole else self._base,
            "adapter": self._factors,
            # On the CPU those of the plan.
            "directions": 4 * sum(size.kept for size in self.sizes.values()) if self._kind == "cuda" else 0,
            "reference": 4 * self.trained if written or recipe.task.kind in JUDGED else 0,
            "gradients": 4 * self.trained,
            "optimiser": self._states,
            **self._held,
            "penalties": sum(self.penalties.values()),
        }
        smoothed = bool(recipe.train.get("label_smoothing_factor"))
        head = estimate.head_bytes(self.shape, batch=batch, length=length, device=self._kind, smoothed=smoothed)
        if written:
            head = estimate.logit_bytes(self.shape, batch * written, "base")
        elif loss is not None:
            head = max(head, estimate.logit_bytes(self.shape, batch * length, loss.reads, AT_ONCE))
        passing = {"activations": self._activations(batch, length), "logits": head}
        answers = self._answers(int(self.argument("gradient_accumulation_steps")) * batch * length)
        return lasting, max(passing, answers, key=lambda parts: sum(parts.values()))

    def _answers(self, tokens: int) -> dict[str, int]:
        """Returns what penalties on answers hold in a pass of their own, after that of the task."""
        held = {"activations": 0, "logits": 0}
        data = self.lengths.calibration("knowledge")
        for one in self._penalties:
            if isinstance(one, Kl):
                batch = min(one.chosen(data.mean, tokens)[0], data.texts)
                held["activations"] = self._activations(batch, data.longest)
                held["logits"] = estimate.logit_bytes(self.shape, batch * data.longest, "base")
        return held

    def _export(self) -> _Stage:
        # A merged model is held as it was written and as it is loaded; else the trained one is free by then.
        merged = self._base if self._merges else 0
        tokens = _PROBE[0] * min(_PROBE[1], self.lengths.most)
        lasting = {"weights": self._base, "merged": merged, "adapter": 2 * self._factors, **self._held}
        activations = estimate.inference_bytes(self.shape, tokens)
        return lasting, {"logits": estimate.logit_bytes(self.shape, tokens, "answers"), "activations": activations}

    def _scoring(self) -> _Stage | None:
        found = []
        for one in self.score:
            batch = min(one.batch, one.items or one.batch)
            passing = {"activations": estimate.inference_bytes(self.shape, batch * one.longest)}
            if one.metric == "exact_match":
                passing["keys and values"] = estimate.cache_bytes(self.shape, batch=batch, length=one.longest)
            else:
                # Logits of one row, or 2**28 at most, once for each model compared (evaluation/scored_tokens);
                # logarithms, in float32, of 256 tokens at a time, with 24 bytes a number where two are compared.
                models, V, e = 2 if one.metric == "cross_entropy" else 1, self.shape.vocabulary, self.shape.size
                tokens = min(batch * one.longest, max(one.longest, 2**28 // max(V, 1)))
                each = 24 if models > 1 else e + 8
                passing["logits"] = V * (tokens * models * e + min(tokens, 256) * each)
            found.append(passing)
        if not found:
            return None
        models = 2 if self._merges else 1
        lasting = {"weights": models * self._base, "adapter": self._factors, **self._held}
        return lasting, max(found, key=lambda passing: sum(passing.values()))

    @property
    def _states(self) -> int:
        return estimate.optimizer_states(str(self.job.recipe.train.get("optim") or "adamw")) * self.trained

    @cached_property
    def disk(self) -> dict[str, dict[str, int]]:
        """Returns the bytes of what the run writes, by part."""
        store: dict[str, int] = {}
        for (request, _), target in self.sites.items():
            if isinstance(request, RowRequest):
                kept = request.kept(target)
                refuse_larger(kept, self.job.store.limit)
            else:  # an attribution has a number for each output of a down-projection
                nodes = sum(target.out_features for target in self.shape.linear if target.name in self.shape.downs)
                kept = 4 * self.lengths.calibration(request.data).texts * nodes
            store[type(request).__name__] = store.get(type(request).__name__, 0) + kept
        trained = 4 * self.trained
        copies = int(self.job.recipe.train.get("save_total_limit") or 2)
        return {
            "store": dict(sorted(store.items())),
            "plan": {"factors": self._planned, **self.penalties},
            "checkpoints": {
                "weights": copies * (trained if self.whole else self._factors),
                "optimiser": copies * self._states,
            },
            "results": {"trained": trained, "exported": self.shape.stored if self._merges else trained},
        }
