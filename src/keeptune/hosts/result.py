"""What a callback leaves: the plan, the adapter, checked on a fresh base, scores before and after, and the report."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from keeptune.adapter.export import export, format_for
from keeptune.adapter.install import install, restore_state, trained_state
from keeptune.adapter.load import load_adapter
from keeptune.api import base_of
from keeptune.core.artefact import content_key, write_json
from keeptune.core.plan import Plan
from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.model_pairs import AdapterPair, ModelPair, TwoModels
from keeptune.model.pretrained import load_model
from keeptune.penalties.base import conclusions
from keeptune.pipeline.planning import penalties_of
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.scoring import result_fingerprint, score
from keeptune.recipe.schema import make_method
from keeptune.training.evaluations import Evaluations, evaluated
from keeptune.training.guard import divergence
from keeptune.training.trainer import loss_curve

_log = logging.getLogger(__name__)
_ARGUMENTS = ("learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "num_train_epochs", "max_steps", "seed")
_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "bf16", "fp16")


def result_folder(trainer: Any) -> Path:
    """Returns where the plan, the result and the report go: a run folder, as `keeptune run` writes."""
    return Path(trainer.args.output_dir) / "keeptune"


def tokenizer_of(trainer: Any) -> Any:
    """Returns the tokenizer of a trainer, or of its processor; None without one."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def write_result(
    trainer: Any, plan: Plan, benchmarks: Sequence[Benchmark], seconds: float, evaluations: Evaluations
) -> None:
    """Exports what was trained, checks it on a fresh base, scores it and writes the report; all processes call it.

    Raises:
        ExportError: What was written does not compute what the trained model does.
    """
    model, tokenizer, output = trainer.model, tokenizer_of(trainer), result_folder(trainer)
    state = trained_state(model, plan) if trainer.is_fsdp_enabled else None
    if not trainer.accelerator.is_main_process:
        return
    base = base_of(model, model.get_base_model().name_or_path)
    if state is not None:
        model = install(base.load(), plan)
        restore_state(model, plan, state)
    format, _ = format_for(plan, "portable")
    folder = output / ("merged" if format == "merged" else "adapter")
    within = dict(vars(model))
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # as it is loaded: without mixed precision
    done = export(model, plan, folder, base=base, tokenizer=tokenizer)
    vars(model).update(within)
    record, kind = _trained(trainer, plan, base.name, seconds, evaluations), type(trainer)
    name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    recipe: dict[str, Any] = {"trainer": name, "model": base.name, "task": {}, "evaluate": list(benchmarks)}
    recipe["method"] = {"name": plan.method, **plan.options}
    own = len(penalties_of(make_method(recipe["method"], seed=0)))  # the method's, which stand first
    recipe["penalties"] = [{"name": made.name, **made.options} for made in plan.penalties[own:]]
    write_json(output / "trained" / "train.json", record)
    write_json(folder / "export.json", {"train": record["key"], **asdict(done)})
    write_json(output / "recipe.json", recipe)
    pair: Callable[[], ModelPair] = cache(lambda: AdapterPair(load_adapter(base.load(), folder)))
    if format == "merged":
        pair = cache(lambda: TwoModels(base.load(), load_model(str(folder))))
    of: Any = SimpleNamespace(tokenizer=tokenizer, seed=trainer.args.seed, base_fingerprint=plan.provenance["model"])
    weights = result_fingerprint(folder)
    for one in benchmarks:
        score(of, one, pair, output / "evaluation", weights, None)

    write_report([output], output)
    _log.info("keeptune: %s, checked on a fresh base; report in %s", folder, output / "report.html")


def _trained(trainer: Any, plan: Plan, base: str, seconds: float, evaluations: Evaluations) -> dict[str, Any]:
    log, args = trainer.state.log_history, trainer.args
    loss, chosen = loss_curve(log, plan), evaluations.notes(log)
    diverged = divergence([row["loss"] for row in loss])
    notes = [*([diverged] if diverged else []), *(conclusions(plan, loss[-1]) if loss else []), *chosen]
    arguments = {name: getattr(args, name) for name in (*_ARGUMENTS, *_SIZES) if hasattr(args, name)}
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    record = {"plan": plan.key, "base": base, "arguments": arguments, "loss": loss, "notes": notes, "seconds": seconds}
    record |= {"trained_parameters": trained - sum(t.held_back for t in plan.targets)}
    record |= {"evaluations": evaluated(log)} if chosen else {}
    return {"key": content_key(record), **record}
