"""The weight changes of any trained model: an adapter, a run folder of keeptune, or a whole model beside its base.

The change of a LoRA is given by its factors: the product B A is never formed. That of DoRA, whose rows get new lengths,
is formed one target at a time. What has no such form (a whole model, an adapter of another kind, one that rewrites its
base when loaded: PiSSA) is compared weight by weight.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.export import Base
from keeptune.adapter.load import check_base, load_adapter, read_config, read_sidecar
from keeptune.adapter.merging import PLAIN_STARTS, merged_by_peft
from keeptune.core.artefact import checked
from keeptune.core.errors import ModelError, RecipeError
from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target
from keeptune.core.weights import is_linear_map, is_quantised, read_weight
from keeptune.data.chat_template import turn_ends
from keeptune.model.blocks import find_targets, head_of
from keeptune.model.head import Head, body_fingerprint
from keeptune.model.pretrained import Dtype, LoadOptions, load_floats, load_model, load_tokenizer
from keeptune.pipeline.scoring import find_result
from keeptune.recipe.paths import resolve_model

_log = logging.getLogger(__name__)
_TUNED = (BaseTunerLayer, ModulesToSaveWrapper)
Change = LowRank | Tensor
_Changes = Iterator[tuple[Target, Tensor, Change | None]]


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """A trained model on disk, with its base.

    Args:
        source: As the user named it: a PEFT adapter folder, a run folder of keeptune, or a whole model.
        folder: The adapter or the whole model.
        base: Path or hub id of the base.
        head: Of a classifier; None for a language model.
        dtype: That of the base in training; ``"auto"`` where keeptune did not train.
        device: Where models run.
        quantization: How the base was quantised as it was loaded for training; None where it was not, or as it is
            stored.
        original: Path or hub id of what a quantised base was before, as the export found it.
    """

    source: str
    folder: Path
    base: str
    head: Head | None
    dtype: Dtype
    device: str
    quantization: Mapping[str, Any] | None = None
    original: str | None = None

    @classmethod
    def of(cls, source: str, *, base: str | None = None, device: str = "cpu") -> Self:
        """Looks a trained model up, without loading it; a base of None is the one that the source names.

        Raises:
            ModelError: The source names no base, is a run that exported nothing yet, or a classifier of unknown labels.
        """
        folder = _result_of(source)
        config = read_config(folder) if (folder / "adapter_config.json").is_file() else {}
        record = read_sidecar(folder)
        base = base or (config.get("base_model_name_or_path") if config else record.get("base"))
        if not base:
            raise ModelError(
                source,
                got="a model or an adapter that names no base" if folder.is_dir() else "no such folder, and no --base",
                wanted="the base that it was tuned from",
                next_step="Name it with --base, or pass a run or an adapter folder.",
            )
        labels, provenance = record.get("labels"), record.get("provenance", {})
        if labels is None and config.get("task_type") == "SEQ_CLS":
            raise ModelError(
                f"adapter {folder}",
                got="a classifier without keeptune.json",
                wanted="the labels that it distinguishes",
                next_step="Merge it with PEFT: load the base with its number of labels, then merge_and_unload().",
            )
        packed = record.get("quantization") or provenance.get("quantization")
        return cls(
            source,
            folder,
            resolve_model(str(base)),
            None if labels is None else Head(tuple(labels)),  # the base's own may be any: it is replaced
            provenance.get("dtype") or "auto",
            device,
            None if "trained_on" in record else packed,  # merged into the original
            record.get("export", {}).get("original"),
        )

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, no whole model."""
        return (self.folder / "adapter_config.json").is_file()

    @property
    def whole(self) -> str:
        """The whole model's folder, or its hub id."""
        return str(self.folder) if self.folder.is_dir() else resolve_model(self.source)

    def load_base(self) -> PreTrainedModel:
        """Loads a fresh base, in evaluation mode."""
        return self._load(self.base, self.dtype)

    @property
    def export_base(self) -> Base:
        """The base as exports take it."""
        floats = LoadOptions(dtype=self.dtype, device=self.device, head=self.head)
        floats_of, ends = partial(load_floats, options=floats), turn_ends(self.load_tokenizer())
        return Base(self.base, self.load_base, floats_of, self.original, self.quantization, ends)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Loads the tokenizer that it was trained with, where that lies beside it, or the base's."""
        own = (self.folder / "tokenizer_config.json").is_file()
        return load_tokenizer(str(self.folder) if own else self.base)

    def load_tuned(self) -> PreTrainedModel:
        """Loads the adapter on a fresh base, or the whole model, in evaluation mode."""
        if not self.is_adapter:
            return self._load(self.whole, self.dtype)
        inner: PreTrainedModel = load_adapter(self.load_base(), self.folder).get_base_model()
        return inner.eval()

    def changes(self, roles: Sequence[str] | None = None) -> _Changes:
        """Loads the models, and yields the change of one target after the other.

        Args:
            roles: Roles of the targets; None is all linear maps but the head.

        Yields:
            The target, its W and its change (None for one left alone): factors where it has them, else the
            difference of the weights.

        Raises:
            ModelError: The source or its base cannot be loaded or do not belong together, or a change is not finite.
            PlanError: A role does not exist.
        """
        for target, W, change in self._compared(roles):
            parts = [change.B, change.A] if isinstance(change, LowRank) else [] if change is None else [change]
            if not all(bool(torch.isfinite(part).all()) for part in parts):
                raise ModelError(
                    f"{self.source}, {target.name}",
                    got="a change that is NaN or infinite",
                    wanted="finite weights",
                    next_step="Check the training's losses; the adapter or model is damaged.",
                )
            yield target, W, change

    def _compared(self, roles: Sequence[str] | None) -> _Changes:
        dtype = self.dtype if self.is_adapter else "auto"
        model = self._load(self.base, dtype)
        every, targets = find_targets(model), find_targets(model, roles)
        bar = tqdm(targets, desc="change", delay=2, disable=None, leave=False)
        if not self.is_adapter:
            return _between(model, self._load(self.whole, dtype), bar, self.source)
        check_base(self.folder, body_fingerprint(model), None if self.head is None else self.head.labels)
        wrapped = load_adapter(model, self.folder)
        layers = _layers_of(wrapped, self.folder, {target.name for target in every})
        if layers is not None:
            return _from_layers(layers, model, bar)
        _log.info("%s: not plain LoRA or DoRA; merged into its base to be measured", self.folder)
        return _between(self.load_base(), _merged(wrapped, self.folder), bar, str(self.folder))

    def _load(self, name: str, dtype: Dtype) -> PreTrainedModel:
        options = LoadOptions(dtype=dtype, device=self.device, head=self.head)
        return load_model(name, replace(options, quantization=self.quantization if name == self.base else None))


def size_of(change: Change) -> float:
    """Computes the Frobenius norm of a change, in float64, from its factors where it has them."""
    if isinstance(change, LowRank):
        return float(change.to(torch.float64).norm_squared().clamp_min(0).sqrt())
    return float(change.double().norm())


def labels_of(sources: Sequence[str]) -> list[str]:
    """Names each source by its folder, or by the run's that it is in; by its whole path where two would be alike.

    Args:
        sources: Adapters, run folders, or models.

    Raises:
        RecipeError: One is given twice.
    """
    paths = [_result_of(source).absolute() for source in sources]
    twice = next((source for source, path in zip(sources, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise RecipeError(
            "command line", got=f"{twice} twice", wanted="each adapter or model once", next_step="Leave one out."
        )
    short = [path.parent.name if path.name in ("adapter", "merged") else path.name for path in paths]
    return [label if short.count(label) == 1 else source for label, source in zip(short, sources, strict=True)]


def _layers_of(wrapped: PeftModel, folder: Path, known: Set[str]) -> dict[str, Any] | None:
    """Returns the layers of a plain LoRA or DoRA by target; None for an adapter that is more than that."""
    inner, config = wrapped.get_base_model(), wrapped.peft_config["default"]
    tuned = {name: layer for name, layer in inner.named_modules() if isinstance(layer, _TUNED)}
    if any(isinstance(layer, ParamWrapper) for layer in tuned.values()):
        return None
    outside = sorted(tuned.keys() - known - set(head_of(inner)))
    if outside:
        _log.warning("%s: %s is no linear map of the model's body; left out", folder, ", ".join(outside))
    layers: dict[str, Any] = {name: layer for name, layer in tuned.items() if name in known}
    for layer in layers.values():  # LoRA's or DoRA's, over a linear map
        variant = getattr(layer, "lora_variant", {}).get("default")
        is_lora = isinstance(layer, LoraLayer) and is_linear_map(layer.get_base_layer())
        if not is_lora or not isinstance(variant, DoraLinearVariant | None):
            return None
    return layers if config.peft_type == "LORA" and config.init_lora_weights in PLAIN_STARTS else None


def _from_layers(layers: Mapping[str, Any], model: PreTrainedModel, targets: Iterable[Target]) -> _Changes:
    """Yields the factors of each target that has a layer, and of DoRA the difference of the weights."""
    for target in targets:
        W, layer, change = read_weight(model, target), layers.get(target.name), None
        if layer is not None:
            factors = LowRank(layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach())
            change = factors.to(torch.float64).scaled(layer.scaling["default"])
            if "default" in layer.lora_variant:
                tuned = W.double() + change.dense()
                lengths = layer.lora_magnitude_vector["default"].weight.detach().double()
                change = tuned * (lengths / tuned.norm(dim=1))[:, None] - W.double()
        yield target, W, change


def _between(base: PreTrainedModel, tuned: PreTrainedModel, targets: Iterable[Target], where: str) -> _Changes:
    """Yields the difference of two whole models, weight by weight."""
    for target in targets:
        before = read_weight(base, target)
        try:
            after = read_weight(tuned, target)
        except (AttributeError, IndexError) as error:
            raise _other_base(where, base, f"no module {target.name}") from error
        if after.shape != before.shape:
            raise _other_base(where, base, f"{target.name} of shape {tuple(after.shape)}, not {tuple(before.shape)}")
        yield target, before, after.double() - before.double()


def _merged(wrapped: PeftModel, folder: Path) -> PreTrainedModel:
    if is_quantised(wrapped):
        raise ModelError(
            f"adapter {folder}",
            got="an adapter on a quantised base that is not plain LoRA or DoRA",
            wanted="LoRA or DoRA, whose change shows in its factors: merged, all of W would be quantised again",
            next_step="Merge it into the original weights, and measure the whole model with --base.",
        )
    return merged_by_peft(wrapped, folder)


def _other_base(where: str, base: PreTrainedModel, got: str) -> ModelError:
    return ModelError(
        where, got=got, wanted=f"a model tuned from {base.name_or_path}", next_step="Name its own base with --base."
    )


def _result_of(source: str) -> Path:
    """Returns the adapter or model that a source stands for, itself or what a run exported; it may not exist."""
    folder = Path(source).expanduser()
    is_run = (folder / "plan").is_dir() and not (folder / "config.json").is_file()
    return find_result(folder) if is_run else checked(folder)
