"""keeptune export --to gguf: what a run exported, as files for llama.cpp, checked and with a Modelfile beside."""

from __future__ import annotations

import logging
import shlex
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor
from transformers import PreTrainedModel

from keeptune.adapter.gguf_layout import check_file, check_values, field_of, layout_of, open_gguf, values_of
from keeptune.adapter.gguf_write import Entry, Quantise, no_lora, read_lora, write_lora_file, write_whole_file
from keeptune.adapter.load import SIDECAR, refuse_foreign
from keeptune.adapter.merging import is_streamed
from keeptune.adapter.probe import Gap, logits_of, random_probe
from keeptune.core.artefact import atomic_directory, read_json, write_json, write_text
from keeptune.core.errors import ExportError, need_known
from keeptune.core.offload import stored_value
from keeptune.model.gguf import check_gguf, is_gguf
from keeptune.model.offloaded import load_floats
from keeptune.model.pretrained import LoadOptions, load_config, load_model, load_shapes, load_tokenizer
from keeptune.pipeline.merge import merge_adapter
from keeptune.pipeline.ollama import modelfile
from keeptune.pipeline.scoring import result_fingerprint
from keeptune.pipeline.trained_changes import TrainedModel

_log = logging.getLogger(__name__)
_BOUNDS = {"f32": 1e-4, "f16": 2e-2, "q8_0": 3e-1}  # of logits on random tokens, relative
_TEMPLATE = "tokenizer.chat_template"
_FLOATS = LoadOptions(dtype="float32")


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """What is written for llama.cpp.

    Args:
        base: The GGUF file of the base: an adapter is checked against it, a whole model takes its tokenizer and other
            metadata from it. None takes the base that was trained on where that is such a file.
        merged: Write the whole model.
        quantise: ``"f32"``, ``"f16"`` or ``"q8_0"``; None is f32 for an adapter and f16 for a whole model.
        output: The folder; None is ``gguf`` or ``gguf-merged`` in the run's folder.
    """

    base: str | None = None
    merged: bool = False
    quantise: Quantise | None = None
    output: Path | None = None


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What was written.

    Args:
        file: The file.
        base: The GGUF file of the base; None where none was at hand, so that nothing was checked against it.
        merged: It is a whole model.
        quantise: Of its matrices.
        error: Of an adapter: how far its change is from the trained one, relative (Frobenius). Of a whole model: the
            largest difference of logits, as Transformers reads the file, to the merged model, over the largest logit.
        weights: Fingerprint of the export it is made from.
        serve: The command that serves it.
        note: Why it is a whole model although an adapter was asked for; empty otherwise.
    """

    file: str
    base: str | None
    merged: bool
    quantise: Quantise
    error: float
    weights: str
    serve: str
    note: str = ""


_DEFAULTS = GgufOptions()


def export_gguf(run: Path | str, options: GgufOptions = _DEFAULTS) -> GgufFile:
    """Writes what a run exported as a GGUF LoRA, or as a whole model where it has no such form or ``merged`` is set.

    Args:
        run: A run folder, an adapter, or a whole model that keeptune wrote.
        options: What is written.

    Raises:
        ExportError: The architecture or a module has no known GGUF form, the base's file has other weights, a whole
            model has no file of the base, or what is written does not compute what was trained.
        ModelError: Nothing was exported, or the base cannot be loaded.
        RecipeError: There is no such quantisation.
    """
    trained = TrainedModel.of(str(run))
    if trained.head is not None:
        raise no_lora(trained.folder, "a classifier", "a language model")
    need_known(options.quantise or "f32", get_args(Quantise), "--quantise", "f32, f16 or q8_0")
    note = "" if options.merged else _no_lora(trained)
    merged = options.merged or bool(note)
    if note:
        _log.warning("export %s: written as a whole model. %s", run, note)
    base = options.base or (trained.base if is_gguf(trained.base) and Path(trained.base).is_file() else None)
    if base is None and merged:
        raise ExportError(
            f"export of {run} to GGUF",
            got="no GGUF file of the base" + (f" ({note[0].lower()}{note[1:]})" if note else ""),
            wanted="one, whose tokenizer and other metadata the whole model takes",
            next_step="Name it with --base: a file of the same base in any quantisation.",
        )
    folder = output_of(Path(run), merged) if options.output is None else options.output
    refuse_foreign(folder)
    file = None if base is None else _open(base)
    quantise = options.quantise or ("f16" if merged else "f32")
    tokenizer = None if file is None else _own_template(trained, file.reader)
    template = None if tokenizer is None else str(tokenizer.chat_template)
    name = "model.gguf" if merged else "adapter.gguf"
    with atomic_directory(folder) as fresh:
        if merged:
            assert file is not None
            error = _write_whole(trained, fresh / name, file, quantise, template)
        else:
            error = _write_adapter(trained, fresh / name, file, quantise)
        serve = _serve_line(folder / name, base, merged, template=template)
        weights = result_fingerprint(trained.folder)
        done = GgufFile(str(folder / name), base, merged, quantise, error, weights, serve, note)
        write_json(fresh / SIDECAR, {"base": trained.base, "gguf": asdict(done)})
        bos = "" if file is None or tokenizer is None else _added_first(file.reader, tokenizer)
        write_text(fresh / "Modelfile", modelfile(name, None if merged else base or "base.gguf", tokenizer, bos))
        if template is not None:
            write_text(fresh / "chat_template.jinja", template)
    return done


def output_of(run: Path, merged: bool) -> Path:
    """Returns where the files of a run go."""
    return run / ("gguf-merged" if merged else "gguf")


def written(folder: Path) -> GgufFile | None:
    """Returns what an earlier export wrote to a folder; None where there is nothing."""
    return GgufFile(**read_json(folder / SIDECAR)["gguf"]) if (folder / SIDECAR).is_file() else None


def _no_lora(trained: TrainedModel) -> str:
    if not trained.is_adapter:
        return "What was trained has no adapter form"
    if not is_streamed(trained.folder):
        return "Beside plain factors the adapter has other parts, which llama.cpp does not read"
    return ""


def _serve_line(file: Path, base: str | None, merged: bool, *, template: str | None) -> str:
    words = ["-m", str(file)] if merged else ["-m", base or "base.gguf", "--lora", str(file)]
    chat = [] if template is None or merged else ["--chat-template-file", str(file.with_name("chat_template.jinja"))]
    return shlex.join(["llama-server", *words, "--alias", "tuned", *chat])


@dataclass(frozen=True, slots=True, eq=False)
class _Base:
    """The GGUF file of the base, and the same, open."""

    path: Path
    reader: Any


def _open(name: str) -> _Base:
    check_gguf(name)
    return _Base(Path(name), open_gguf(Path(name)))


def _own_template(trained: TrainedModel, reader: Any) -> Any:
    """Returns the tokenizer that was trained with where its chat template is not that of the base's file, else None."""
    own = (trained.folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(trained.folder) if own else trained.base)
    template = tokenizer.chat_template
    return tokenizer if isinstance(template, str) and template != field_of(reader, _TEMPLATE) else None


def _added_first(reader: Any, tokenizer: Any) -> str:
    return str(tokenizer.bos_token) if field_of(reader, "tokenizer.ggml.add_bos_token") else ""


def _write_adapter(trained: TrainedModel, file: Path, base: _Base | None, quantise: Quantise) -> float:
    layout = layout_of(load_config(trained.base), f"base {trained.base}")
    error = write_lora_file(file, trained.folder, layout, quantise)
    if base is not None and str(base.path) != trained.base:
        shapes = {key: value.shape for key, value in load_shapes(trained.base, LoadOptions()).state_dict().items()}
        check_file(base.path, base.reader, layout, shapes)
        first = {name.split(".")[-1]: f"{name}.weight" for name in reversed(read_lora(trained.folder))}
        model = load_floats(trained.base, LoadOptions())
        check_values(base.path, base.reader, layout, {key: _value(model, key) for key in first.values()})
    return error


def _write_whole(trained: TrainedModel, file: Path, base: _Base, quantise: Quantise, template: str | None) -> float:
    with tempfile.TemporaryDirectory(prefix="keeptune-", dir=file.parent) as scratch:
        whole = trained.folder
        if trained.is_adapter:
            whole = Path(scratch) / "merged"
            merge_adapter(trained.folder, whole, dtype="float32")  # in 16 bits a small change would be rounded away
        layout = layout_of(load_config(str(whole)), f"model {trained.folder}")
        model = load_floats(str(whole), _FLOATS)
        tied = model.all_tied_weights_keys
        shapes = {key: value.shape for key, value in model.state_dict().items() if key not in tied}
        beside = check_file(base.path, base.reader, layout, shapes)
        entries = [Entry(key, shape, partial(_value, model, key)) for key, shape in shapes.items()]
        entries += [Entry(one.name, one.shape.tolist(), partial(values_of, one)) for one in beside]
        write_whole_file(file, layout, base.reader, entries, template=template, quantise=quantise)
        probe = random_probe(model)
        wanted = logits_of(model, probe)
        del model
        gap = Gap.between(logits_of(load_model(str(file), _FLOATS), probe), wanted)
        gap.refuse_above(_BOUNDS[quantise], f"export {file}", "the merged model", "Export with --quantise f16 or f32.")
        return gap.relative


def _value(model: PreTrainedModel, key: str) -> Tensor:
    return stored_value(model, key, model.state_dict()[key])
