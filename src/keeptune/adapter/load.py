"""Adapters on disk: loaded on a base, checked against it; and folders that keeptune may write to."""

import copy
import shlex
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.expert_layers import patterns_of_parameters
from keeptune.core.artefact import as_written, read_json, write_text
from keeptune.core.errors import ExportError, ModelError
from keeptune.core.offload import device_of, is_offloaded

SIDECAR = "keeptune.json"
_AGAIN = "Export it again, or fetch it again."
GENERATION = "generation_config.json"


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """Loads an adapter on its base by stock PEFT, from safetensors only; ModelError where it does not fit.

    The base's weights may be on disk, and stay there, where the adapter only adds to what is computed.
    """
    tensor_names(folder)
    on_disk = is_offloaded(model)
    places = model.__dict__.pop("hf_device_map", None)  # PEFT would place the modules anew
    try:
        with patterns_of_parameters():
            warnings.filterwarnings("ignore", message="target_parameters=.* no parameter was matched")
            wrapped = PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=on_disk)
        if on_disk:
            _read_values(wrapped, folder)
    # RuntimeError: other shapes; ValueError: other module names; TypeError and KeyError: another config.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"adapter {folder}",
            got=" ".join(str(error).split())[:300],
            wanted=f"a PEFT adapter for this base ({model.name_or_path})",
            next_step="Pass the base that the adapter was trained on.",
        ) from error
    if places is not None:
        model.hf_device_map = places
    assert isinstance(wrapped, PeftModel)
    # PEFT only warns, or says nothing where other targets are found: these experts would stay as they are.
    wanted = getattr(wrapped.peft_config["default"], "target_parameters", None) or ()
    found = [f".{name}" for name in wrapped.base_model.targeted_parameter_names] if wanted else []
    missing = sorted(name for name in wanted if not any(key.endswith(f".{name}") for key in found))
    if missing:
        raise ModelError(
            f"adapter {folder}",
            got=f"a base without the parameter {missing[0]}: its experts, if any, are packed otherwise",
            wanted="the parameters that the adapter was trained on",
            next_step="Pass that base, loaded as it was for training (of gpt-oss dequantised, for one).",
        )
    return wrapped


def _read_values(wrapped: PeftModel, folder: Path) -> None:
    """Reads an adapter's values again: PEFT has put them where the base's weights are, which is nowhere."""
    values = load_peft_weights(str(folder), device=str(device_of(wrapped)))
    names = [name for name, parameter in wrapped.named_parameters() if ".default" in name and parameter.is_meta]
    stored = {name: values[name.replace(".modules_to_save.default", "").replace(".default", "")] for name in names}
    wrapped.load_state_dict(stored, strict=False, assign=True)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns PEFT's config of an adapter, whose ranks and alphas are numbers."""
    path = folder / "adapter_config.json"
    config: dict[str, Any] = read_json(path, _AGAIN)
    with as_written(path, "the config of a PEFT adapter", _AGAIN):
        numbers = {key: config[key] for key in ("r", "lora_alpha") if key in config}
        for pattern in ("rank_pattern", "alpha_pattern"):
            numbers |= dict(config.get(pattern) or {})
        for name, value in numbers.items():
            if not isinstance(value, int | float):
                raise ValueError(f"{name}: {value!r}, no number")
    return config


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Returns keeptune's own record beside an export, for where that is now; empty where there is none."""
    path = folder / SIDECAR
    record: dict[str, Any] = read_json(path, _AGAIN) if path.is_file() else {}
    with as_written(path, again=_AGAIN):
        for key, kind in {"provenance": dict, "export": dict, "gguf": dict, "labels": list | None}.items():
            if not isinstance(record.get(key, None if key == "labels" else {}), kind):
                raise ValueError(f"{key}: {record[key]!r}")
        if "folder" in (export := record.get("export", {})):
            was, now = str(export["folder"]), str(folder)
            export |= {"folder": now, "serve": _at(str(export["serve"]), was, now)}
    return record


def _at(line: str, was: str, now: str) -> str:
    """Returns the line that serves an export, or loads a classifier, for another place of it."""
    if not line.startswith(("vllm ", "keeptune ")):
        return line.replace(f'"{was}"', f'"{now}"')
    places = {was: now, f"tuned={was}": f"tuned={now}"}
    return " && ".join(shlex.join(places.get(word, word) for word in shlex.split(one)) for one in line.split(" && "))


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, model: Any, folder: Path, ends: Collection[Any] = ()) -> None:
    """Writes a tokenizer beside a model that was loaded afresh.

    Law: what is generated from the folder ends at every token that ends a text in training: where the model's own
    settings name fewer, they are written with the tokenizer's end and the further ``ends``.
    """
    tokenizer.save_pretrained(folder)
    config = copy.deepcopy(getattr(model, "generation_config", None))
    named = getattr(config, "eos_token_id", None)
    known = named if isinstance(named, list) else [named]
    new = sorted({tokenizer.eos_token_id, *ends} - {None, *known})
    if config is not None and new:
        config.eos_token_id, config._from_model_config = [token for token in known if token is not None] + new, False
        write_text(folder / GENERATION, config.to_json_string())


def check_base(adapter: Path | str, fingerprint: str, labels: Sequence[str] | None = None) -> None:
    """Raises ModelError for an adapter that was made for another base, or a classifier of other labels.

    Args:
        adapter: The adapter's folder; one without keeptune's sidecar is not checked.
        fingerprint: Of the base at hand, without a classifier's head.
        labels: Of the classifier at hand, in the order of its outputs; empty for scores, None for a language model.
    """
    record = read_sidecar(Path(adapter))
    if not record:
        return
    made_for = record.get("provenance", {}).get("model")
    if made_for is not None and made_for != fingerprint:
        raise ModelError(
            f"adapter {adapter}",
            got="a base whose weights are not the ones it was made for",
            wanted=f"{record['base']} (fingerprint {made_for[:12]}, not {fingerprint[:12]})",
            next_step="Pass the base that the adapter was trained on, in the dtype it was trained in.",
        )
    learned = record.get("labels")
    if learned != (None if labels is None else list(labels)):
        raise ModelError(
            f"adapter {adapter}",
            got=_kind(labels),
            wanted=_kind(learned),
            next_step="Use the task.kind and the task.labels, in this order, that the adapter was trained with.",
        )


def _kind(labels: Sequence[str] | None) -> str:
    if labels is None:
        return "a language model"
    return f"a classifier of {', '.join(labels)}" if labels else "a model that gives a score"


def refuse_foreign(folder: Path) -> None:
    """Raises ExportError for a folder with something that keeptune did not write; its own results have a sidecar."""
    if not folder.exists() or (folder / SIDECAR).is_file() or (folder.is_dir() and not any(folder.iterdir())):
        return
    raise ExportError(
        str(folder),
        got="something that keeptune did not write",
        wanted="a new or an empty folder",
        next_step="Choose another folder, or remove this one.",
    )


def tensor_names(folder: Path) -> list[str]:
    """Returns the names of what an adapter's file holds; ModelError where it is no whole adapter of safetensors."""
    wanted = ("adapter_config.json", "adapter_model.safetensors")
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"adapter {folder}",
            got=f"no {missing[0]}" if folder.is_dir() else "no such folder",
            wanted="a PEFT adapter with safetensors weights; pickled ones are not loaded",
            next_step="Give the `adapter` folder of a run.",
        )
    try:
        with safe_open(folder / wanted[1], "pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        got, step = f"{wanted[1]}: {error}", "Export it again, or copy it again from where it was made."
        raise ModelError(f"adapter {folder}", got=got, wanted="a whole file", next_step=step) from error
