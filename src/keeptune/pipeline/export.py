"""The export stage: the trained change as an adapter or a merged model, checked on a fresh base."""

from __future__ import annotations

import logging
from typing import Any

from keeptune.adapter.export import Exported, ExportOptions, export, format_for
from keeptune.adapter.load import SIDECAR
from keeptune.core.artefact import EXPORT, content_key, read_json
from keeptune.core.out_of_memory import out_of_memory
from keeptune.core.plan import Plan
from keeptune.core.processes import by_first
from keeptune.pipeline.cache import Stored
from keeptune.pipeline.job import Job
from keeptune.pipeline.machine import release_memory
from keeptune.pipeline.scoring import find_result
from keeptune.pipeline.training import load_trained, trained_result

_log = logging.getLogger(__name__)


@out_of_memory("export")
def export_stage(job: Job, plan: Plan) -> Exported:
    """Writes the adapter and checks it on a fresh base, where that is not done.

    Raises:
        TrainError: Nothing was trained with this recipe.
        ExportError: The result does not reproduce the trained model.
    """
    wanted = job.recipe.export
    format, _ = format_for(plan, wanted.format, wanted.rank)
    folder = job.output / ("merged" if format == "merged" else "adapter")
    trained = trained_result(job, plan).key
    made_of = [trained, wanted.model_dump(exclude={"check_original"}), *filter(None, [job.original])]
    result = Stored("export", folder / EXPORT, content_key(made_of))

    def write() -> dict[str, Any]:
        export(
            load_trained(job, plan),
            plan,
            folder,
            ExportOptions(wanted.format, wanted.rank, job.probe, wanted.max_gap),
            base=job.export_base,
            tokenizer=job.tokenizer,
        )
        return dict(read_json(result.path)) | {"train": trained}

    def exported() -> None:
        result.get(write)
        if find_result(job.output) != folder:
            result.path.touch()  # the newer of `adapter` and `merged` is the run's result

    by_first(exported)
    release_memory()
    done = Exported(**read_json(folder / SIDECAR)["export"])
    if done.original_gap is not None:
        way = "the adapter on the original" if format == "merged" else "training on the quantised base"
        _log.info(
            "export: logits of the result differ by %.1e from those of %s; on the original %s logits differ by %.1e "
            "(relative %.1e) from those in training",
            *(done.gap, way, done.original, done.original_gap, done.original_relative_gap),
        )
    return done
