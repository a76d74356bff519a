"""Post-hoc variants of a finished run that need no training: its change scaled, or pruned, scored as a run of its own.

With W0 the base's weights and W1 the tuned ones, s in [0, 1],

    W_s = W0 + s (W1 - W0)                                                                                (1)

is the interpolation of WiSE-FT (Wortsman et al., CVPR 2022), averaging with the base (LM-Cocktail, 2311.13534). For a
LoRA, W1 - W0 = (alpha / r) B A, so that s is folded into B; the base stays as it is. A pruned change (``fapm.py``) is
of no low rank: the result is a whole model, of an adapter in float32. In 16 bits what is kept, on W's large numbers,
would be rounded away: relative steps are 0.004 there, and a LoRA's change can be smaller.

Beside the run, ``variants/<variant>/`` has a record and the items of each benchmark, and ``variant.json``: the variant,
the weights that it was made of, and why the result cannot have it where it cannot. The variant's weights are not kept:
they follow from the run's, and :func:`write_variant` writes those that are chosen.
"""

import logging
import shlex
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from keeptune.adapter.load import SIDECAR, load_adapter, refuse_foreign, write_tokenizer
from keeptune.adapter.probe import BOUNDS, gap_to, logits_of, random_probe
from keeptune.core.artefact import atomic_directory, content_key, read_json, seal, write_json, write_tensors, write_text
from keeptune.core.errors import ModelError
from keeptune.core.processes import by_first
from keeptune.core.weights import is_quantised
from keeptune.evaluation.model_pairs import AdapterPair, KeptAnswers, TwoModels
from keeptune.experiments.fapm import kept
from keeptune.model.blocks import head_of
from keeptune.model.pretrained import LoadOptions, load_model
from keeptune.pipeline.cache import Stored
from keeptune.pipeline.job import Job
from keeptune.pipeline.scoring import find_result, load_pair, result_fingerprint, score

_log = logging.getLogger(__name__)
VARIANTS = "variants"
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Variant:
    """A post-hoc variant: the change times a ``"scale"`` (eq. 1), or without a share of its numbers (``"pruned"``).

    The ``value`` is from 0 to 1; a scale of 1 and a share of 0 leave the result as it is.
    """

    kind: Literal["scale", "pruned"]
    value: float

    @property
    def slug(self) -> str:
        """Its name as a folder, in as many digits as separate it from every other value."""
        return f"{self.kind}-{repr(float(self.value)).removesuffix('.0')}"

    @property
    def record(self) -> dict[str, float]:
        """Itself as records have it, such as ``{"scale": 0.5}``."""
        return {self.kind: self.value}

    def between(self, start: Tensor, end: Tensor) -> Tensor:
        """Returns a weight of the variant, given the base's and the tuned one; exact at both ends."""
        if self.kind == "scale":
            return torch.lerp(start, end, self.value)
        return torch.where(kept(start, end - start, self.value), end, start)


class _Loaded:
    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder, self.pair = job, folder, load_pair(job, folder)
        if isinstance(self.pair, AdapterPair):
            self.tensors = load_file(folder / _WEIGHTS)
        else:
            self.tensors = {name: weight.detach().clone() for name, weight in self.pair.tuned.named_parameters()}

    def refusal(self, variant: Variant) -> str:
        """Returns why the result cannot have a variant; empty where it can."""
        if not isinstance(self.pair, AdapterPair):
            return ""
        if variant.kind == "pruned" and is_quantised(self.pair.peft_model):
            return "its base is quantised, and a pruned change has no other form than a whole model"
        return refusal(self.tensors, self.pair.peft_model.peft_config["default"])

    def make(self, variant: Variant) -> AdapterPair | TwoModels:
        """Returns the models before and after, with a variant."""
        pair, tensors = self.pair, self.tensors
        if isinstance(pair, AdapterPair) and variant.kind == "scale":
            set_peft_model_state_dict(pair.peft_model, scaled_adapter(tensors, variant))
            return pair
        if isinstance(pair, AdapterPair):
            pair = TwoModels(self.job.base(), load_adapter(self.job.base().float(), self.folder).merge_and_unload())
            tensors = dict(pair.tuned.named_parameters())
        put_between(pair.tuned, pair.base, tensors, variant.between, head_of(pair.tuned))
        return pair


def refusal(tensors: Mapping[str, Tensor], config: Any = None) -> str:
    """Returns why an adapter, of these tensors, cannot have a variant; empty where it can."""
    if any("lora_magnitude_vector" in name for name in tensors):
        return "a DoRA adapter sets the lengths of rows, which no factor on its change takes back; export it merged"
    if getattr(config, "task_type", None) == "CAUSAL_LM" and not all("lora_" in name for name in tensors):
        return "modules or rows of tokens were trained in full beside the adapter's factors; export it merged"
    return ""


def scaled_adapter(tensors: Mapping[str, Tensor], variant: Variant) -> dict[str, Tensor]:
    """Computes the tensors of an adapter's variant, under the same names.

    Laws: with a scale s the adapter's change is s times what it was; with 1 it is the same.
    """
    return {
        # B and its bias hold the factor of a change; A and what is no change stay.
        name: value * variant.value if "lora_B" in name or "lora_embedding_B" in name else value.clone()
        for name, value in tensors.items()
    }


@torch.no_grad()
def put_between(
    model: nn.Module,
    base: nn.Module,
    tuned: Mapping[str, Tensor],
    between: Callable[[Tensor, Tensor], Tensor],
    whole: Collection[str] = (),
) -> None:
    """Sets each weight of a model to what is ``between`` the base's and the ``tuned`` one, in float32 at least.

    Modules in ``whole``, which the base does not have, such as a drawn head, stay as tuned.
    """
    heads = tuple(f"{name}." for name in whole)
    for (name, weight), (_, start) in zip(model.named_parameters(), base.named_parameters(), strict=True):
        exact = torch.promote_types(weight.dtype, torch.float32)
        end = tuned[name].to(weight.device, exact)
        weight.copy_(end if name.startswith(heads) else between(start.to(exact), end))


def score_variants(job: Job, variants: Sequence[Variant], *, kept: KeptAnswers | None = None) -> dict[str, str]:
    """Scores the variants of a finished run that are not scored yet; returns why it lacks some, by folder name."""
    folder = by_first(lambda: find_result(job.output))
    weights = by_first(lambda: result_fingerprint(folder))
    loaded = cache(lambda: _Loaded(job, folder))  # not loaded where every variant is scored
    names = [benchmark.name for benchmark in job.recipe.evaluate]
    refused = {}
    for variant in variants:
        place = job.output / VARIANTS / variant.slug
        stored = Stored(variant.slug, place / "variant.json", content_key([weights, names, variant.record]))
        record = stored.read()
        why = loaded().refusal(variant) if record is None else record["message"]
        if why:
            refused[variant.slug] = why
        pair = cache(lambda variant=variant: loaded().make(variant))
        for benchmark in () if why else job.recipe.evaluate:
            score(job, benchmark, pair, place, weights, kept, variant.record)
        if record is None:  # last: it is the mark of what is finished
            if why:
                _log.warning("%s: %s is left out: %s", job.output.name, variant.slug, why)
            stored.write({"variant": variant.record, "weights": weights, "benchmarks": names, "message": why})
    return refused


def write_variant(job: Job, variant: Variant, output: Path) -> Path:
    """Writes a variant of a run's result, whole or not at all, and checks it on a freshly loaded base.

    Raises:
        ModelError: The result cannot have the variant.
        ExportError: What was written does not reproduce the variant, or the folder holds something else.
    """
    folder = find_result(job.output)
    refuse_foreign(output)
    loaded = _Loaded(job, folder)
    if why := loaded.refusal(variant):
        raise ModelError(
            f"variant {variant.slug}", got=why, wanted="a result that can have it", next_step="Choose another run."
        )
    pair = loaded.make(variant)
    with pair.after() as model:
        probe = random_probe(model)
        wanted = logits_of(model, probe)
    with atomic_directory(output) as fresh:
        adapter = ["adapter_config.json"] if isinstance(pair, TwoModels) else []
        copy_result(folder, fresh, output, "*.safetensors", "*.safetensors.index.json", *adapter)
        if isinstance(pair, AdapterPair):
            tensors = scaled_adapter(load_file(folder / _WEIGHTS), variant)
            write_tensors(fresh / _WEIGHTS, tensors, {"format": "pt"})
            written: Any = load_adapter(job.base(), fresh)
        else:
            pair.tuned.save_pretrained(fresh)
            write_tokenizer(job.tokenizer, pair.tuned, fresh, job.export_base.ends)
            dtype: Any = str(pair.tuned.dtype).removeprefix("torch.")
            written = load_model(str(fresh), LoadOptions(dtype=dtype, device=job.device, head=job.head))
        gap = gap_to(logits_of(written, probe), wanted, written.dtype, None, f"export {output}")
        sidecar = read_json(fresh / SIDECAR)
        checked = {"gap": gap.gap, "relative_gap": gap.relative, "bound": BOUNDS[written.dtype]}
        export = sidecar["export"] | checked
        if isinstance(pair, TwoModels):
            load = f'AutoModelForSequenceClassification.from_pretrained("{output}")'
            serve = load if job.head else shlex.join(["vllm", "serve", str(output)])
            export |= {"format": "merged", "rank": 0, "serve": serve, "vllm": ""}
        write_json(fresh / SIDECAR, sidecar | {"export": export, "variant": variant.record})
        seal(fresh, export)
    return output


def copy_result(folder: Path, fresh: Path, output: Path, *without: str) -> None:
    """Copies an exported result; the folder that its texts name becomes ``output``, where it will be in the end."""
    shutil.copytree(folder, fresh, ignore=shutil.ignore_patterns("export.json", *without), dirs_exist_ok=True)
    was = read_json(folder / SIDECAR)["export"]["folder"]
    for name in (SIDECAR, "README.md"):
        text = (fresh / name).read_text(encoding="utf-8")
        write_text(fresh / name, text.replace(was, str(output)))
    seal(fresh, read_json(fresh / SIDECAR)["export"])
