"""What a callback leaves: the plan, the adapter, checked on a fresh base, scores before and after, and the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from keeptune.adapter.export import Base, ExportOptions, export, format_for
from keeptune.adapter.install import install, restore_state, trained_state
from keeptune.adapter.load import load_adapter
from keeptune.api import base_of
from keeptune.core.artefact import content_key, write_bytes, write_json
from keeptune.core.plan import Plan
from keeptune.evaluation.benchmark_data import engine_of
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import AdapterPair, ModelPair, TwoModels
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.penalties.base import conclusions
from keeptune.pipeline.scoring import result_fingerprint
from keeptune.training.guard import divergence
from keeptune.training.trainer import loss_curve

_log = logging.getLogger(__name__)
# What of a trainer's arguments is in the report.
_ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "bf16", "fp16", "max_length"),
)


@dataclass(frozen=True)
class Result:
    """Where it goes, and what of it is known before training.

    Args:
        folder: A run folder, as `keeptune run` writes.
        base: Path or hub id of the base.
        export: What is written, and how it is checked.
        benchmarks: Scored before and after.
    """

    folder: Path
    base: str
    export: ExportOptions
    benchmarks: Sequence[Benchmark]

    @property
    def plan(self) -> Path:
        """Where the plan is kept, which checkpoints go on with."""
        return self.folder / "plan"

    def write(self, trainer: Any, plan: Plan, seconds: float) -> None:
        """Exports what was trained, checks it on a fresh base, scores it and writes the report; all processes call it.

        Raises:
            ExportError: What was written does not compute what the trained model does.
        """
        model = trainer.model
        sharded = trainer.is_fsdp_enabled
        state = trained_state(model, plan) if sharded else None
        if not trainer.accelerator.is_main_process:
            return
        base = base_of(model, self.base, self.export.original)
        if state is not None:
            model = install(base.load(), plan)
            restore_state(model, plan, state)
        format, _ = format_for(plan, self.export.format, self.export.rank)
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        folder = self.folder / ("merged" if format == "merged" else "adapter")
        with _as_loaded(model):
            done = export(model, plan, folder, self.export, base=base, tokenizer=tokenizer)
        record = self._trained(trainer, plan, seconds)
        write_json(self.folder / "trained" / "train.json", record)
        write_json(folder / "export.json", {"train": record["key"], **asdict(done)})
        if self.benchmarks:
            self._score(folder, base, tokenizer, trainer.args.seed)
        write_json(self.folder / "recipe.json", self._recipe(trainer, plan))
        from keeptune.pipeline.reporting import write_report  # loads plotly

        write_report([self.folder], self.folder)
        _log.info("keeptune: %s, checked on a fresh base; report in %s", folder, self.folder / "report.html")

    def _trained(self, trainer: Any, plan: Plan, seconds: float) -> dict[str, Any]:
        log, args = trainer.state.log_history, trainer.args
        loss = loss_curve(log, plan)
        diverged = divergence([row["loss"] for row in loss])
        trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
        record = {
            "plan": plan.key,
            "base": self.base,
            "arguments": {name: getattr(args, name) for name in _ARGUMENTS if hasattr(args, name)},
            "loss": loss,
            "notes": [*([diverged] if diverged else []), *(conclusions(plan, loss[-1]) if loss else [])],
            "seconds": seconds,
            "trained_parameters": sum(trained) - sum(t.held_back for t in plan.targets),
        }
        return {"key": content_key(record), **record}

    def _recipe(self, trainer: Any, plan: Plan) -> dict[str, Any]:
        """Returns what a recipe would say: the trainer is the user's own."""
        kind = type(trainer)
        return {
            "trainer": f"{kind.__module__.partition('.')[0]}.{kind.__name__}",
            "model": self.base,
            "method": {"name": plan.method, **plan.options},
            "penalties": [{"name": made.name, **made.options} for made in plan.penalties],
            "task": {},
            "evaluate": list(self.benchmarks),
        }

    def _score(self, folder: Path, base: Base, tokenizer: Any, seed: int) -> None:
        """Scores the result as a user will load it, and the base, on the same items."""
        pair: ModelPair
        if (folder / "adapter_config.json").is_file():
            pair = AdapterPair(load_adapter(base.load(), folder))
        else:
            pair = TwoModels(base.load(), load_model(str(folder), LoadOptions()))
        weights = result_fingerprint(folder)
        for one in self.benchmarks:
            started = time.perf_counter()
            found = evaluate(pair, tokenizer, one, Path(), seed=seed)
            record = {"weights": weights, "benchmark": one, "engine": engine_of(one), "seed": seed}
            record |= {"seconds": time.perf_counter() - started, "summary": found.summary()}
            path = self.folder / "evaluation" / f"{one.name}.json"
            write_bytes(path.with_suffix(".items.jsonl"), found.to_jsonl().encode())
            write_json(path, record)


@contextmanager
def _as_loaded(model: PeftModel) -> Iterator[None]:
    """Takes mixed precision, which accelerate puts around a model, off for a while."""
    within = vars(model)
    mixed = within.get("forward")
    if mixed is not None and "_original_forward" in within:
        model.forward = within["_original_forward"]
    try:
        yield
    finally:
        if mixed is not None:
            model.forward = mixed
