"""keeptune export --to gguf: what a run exported as files for llama.cpp, checked, with Ollama's Modelfile beside."""

import json
import logging
import re
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from jinja2 import TemplateError
from transformers import PreTrainedModel

from keeptune.adapter import gguf_files as files
from keeptune.adapter.gguf_files import Entry, Quantise, field_of, open_gguf
from keeptune.adapter.load import SIDECAR, read_config, read_sidecar, refuse_foreign
from keeptune.adapter.merging import is_streamed
from keeptune.adapter.probe import Gap, logits_of, random_probe
from keeptune.core.artefact import atomic_directory, checked, seal, write_json, write_text
from keeptune.core.errors import ExportError, need_known
from keeptune.core.offload import stored_value
from keeptune.data.chat_template import turn_ends
from keeptune.model.pretrained import LoadOptions, load_config, load_floats, load_model
from keeptune.model.quantization import check_gguf, is_gguf
from keeptune.pipeline.merge import merge_adapter
from keeptune.pipeline.scoring import result_fingerprint
from keeptune.pipeline.trained_changes import TrainedModel

_log = logging.getLogger(__name__)
_BOUNDS = {"f32": 1e-4, "f16": 2e-2, "q8_0": 3e-1}  # of logits on random tokens, relative
_FLOATS = LoadOptions(dtype="float32")
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")  # of texts, and of turns
NAME_IT = "Name it with --base: a file of the same base in any quantisation."


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


_DEFAULTS = GgufOptions()


def export_gguf(run: Path | str, options: GgufOptions = _DEFAULTS) -> dict[str, Any]:
    """Writes what a run exported as a GGUF LoRA, or as a whole model where it has no such form or ``merged`` is set.

    Args:
        run: A run folder, an adapter, or a whole model that keeptune wrote.
        options: What is written.

    Returns:
        ``file``; the ``base``'s file (None: nothing was checked against it); ``merged``; ``quantise``; ``error``, that
        of the numbers, relative (Frobenius), or of a whole model the largest difference of logits, as Transformers
        reads the file, to the merged model, over the largest logit; ``serve``, the command; ``weights``, the
        fingerprint of what was exported; and ``note``, why it is a whole model although an adapter was asked for.

    Raises:
        ExportError: The architecture or a module has no known GGUF form, the base's file has other weights, a whole
            model has no file of the base, or what is written does not compute what was trained.
        ModelError: Nothing was exported, or the base cannot be loaded.
        RecipeError: There is no such quantisation.
    """
    need_known(options.quantise or "f32", get_args(Quantise), "--quantise", "f32, f16 or q8_0")
    trained = TrainedModel.of(str(run))
    note, merged = "" if options.merged else _no_lora(trained), options.merged or bool(_no_lora(trained))
    base = options.base or (trained.base if is_gguf(trained.base) and Path(trained.base).is_file() else None)
    if base is None and merged:
        got = "no GGUF file of the base" + (f" ({note[0].lower()}{note[1:]})" if note else "")
        wanted = "one, whose tokenizer and other metadata the whole model takes"
        raise ExportError(f"export of {run} to GGUF", got=got, wanted=wanted, next_step=NAME_IT)
    if base is not None:
        check_gguf(base)
    if note:
        _log.warning("export %s: written as a whole model. %s", run, note)
    folder = options.output or Path(run) / ("gguf-merged" if merged else "gguf")
    refuse_foreign(folder)
    name: str = "model.gguf" if merged else "adapter.gguf"
    quantise: Quantise = options.quantise or ("f16" if merged else "f32")
    serve = ["-m", str(folder / name)] if merged else ["-m", base or "base.gguf", "--lora", str(folder / name)]
    lines = [f"FROM ./{name}"] if merged else [f"FROM {Path(base or 'base.gguf').absolute()}", f"ADAPTER ./{name}"]
    reader, tokenizer = open_gguf(base) if base else None, trained.load_tokenizer()
    template = tokenizer.chat_template
    new = reader is not None and template not in {None, field_of(reader, "tokenizer.chat_template")}
    chat = {"tokenizer.chat_template": template} if new else {}
    for end in turn_ends(tokenizer) - {None, *(field_of(reader, key) for key in _ENDS if reader is not None)}:
        chat[_ENDS[1]] = end
        lines.append(f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(end))}")
    with atomic_directory(folder) as fresh:
        if merged:
            error = _write_whole(trained, fresh / name, str(base), reader, quantise, chat)
        else:
            layout = files.layout_of(load_config(trained.base), f"base {trained.base}")
            error = files.write_lora_file(fresh / name, trained.folder, layout, quantise)
            if base not in {None, trained.base}:
                names = sorted(read_config(trained.folder)["target_modules"], reverse=True)
                first = {name.split(".")[-1]: f"{name}.weight" for name in names}.values()  # of each role
                entries = _entries(load_floats(trained.base, LoadOptions()))
                files.check_base(str(base), reader, layout, entries, [entry for entry in entries if entry[0] in first])
        if new:
            write_text(fresh / "chat_template.jinja", template)
            lines.append(f'TEMPLATE """{go_template(tokenizer, reader)}"""')
            serve += [] if merged else ["--chat-template-file", str(folder / "chat_template.jinja")]
        write_text(fresh / "Modelfile", "\n".join(lines) + "\n")
        done = {"file": str(folder / name), "base": base, "merged": merged, "quantise": quantise, "error": error}
        done |= {"serve": shlex.join(["llama-server", *serve, "--alias", "tuned"]), "note": note}
        done["weights"] = result_fingerprint(trained.folder)
        write_json(fresh / SIDECAR, {"base": trained.base, "gguf": done})
        seal(fresh, {"format": "gguf"})
    return done


def _no_lora(trained: TrainedModel) -> str:
    if trained.head is not None:
        raise files.no_lora(trained.folder, "a classifier", "a language model")
    if not trained.is_adapter:
        return "What was trained has no adapter form"
    more = "Beside plain factors the adapter has other parts, which llama.cpp does not read"
    return "" if is_streamed(trained.folder) else more


def written(run: Path | str, base: str | None) -> dict[str, Any] | None:
    """Returns what was written of a run as it is now and for a base's file (None: any); None where that is not done."""
    weights = result_fingerprint(TrainedModel.of(str(run)).folder)
    for folder in (Path(run) / name for name in ("gguf", "gguf-merged")):
        done: dict[str, Any] = read_sidecar(checked(folder)).get("gguf", {})
        if done.get("weights") == weights and done["base"] and base in {None, done["base"]}:
            return done
    return None


def _write_whole(
    trained: TrainedModel, file: Path, base: str, reader: Any, quantise: Quantise, chat: Mapping[str, Any]
) -> float:
    with tempfile.TemporaryDirectory(prefix="keeptune-", dir=file.parent) as scratch:
        whole = trained.folder
        if trained.is_adapter:
            whole = Path(scratch) / "merged"
            merge_adapter(trained.folder, whole, dtype="float32")  # in 16 bits a small change would be rounded away
        layout, model = files.layout_of(load_config(str(whole)), f"model {whole}"), load_floats(str(whole), _FLOATS)
        entries, probe = _entries(model), random_probe(model)
        files.check_base(base, reader, layout, entries)
        files.write_whole_file(file, layout, reader, entries, quantise, chat)
        wanted = logits_of(model, probe)
        del model, entries
        gap = Gap.between(logits_of(load_model(str(file), _FLOATS), probe), wanted)
        gap.refuse_above(_BOUNDS[quantise], f"export {file}", "the merged model", "Take --quantise f32.")
        return gap.relative


def _entries(model: PreTrainedModel) -> list[Entry]:
    """Returns a model's parameters, without those that are tied to others."""
    state = {key: value for key, value in model.state_dict().items() if key not in model.all_tied_weights_keys}
    return [(key, value.shape, partial(stored_value, model, key, value)) for key, value in state.items()]


def go_template(tokenizer: Any, reader: Any) -> str:
    """Returns a chat template in Ollama's language (Go's), read off conversations that the tokenizer renders.

    Law: with or without a system prompt, of users and answers in turn, it writes what the chat template writes, but for
    the first token where the server adds it, as the base's open file says.
    """
    bos = tokenizer.bos_token if field_of(reader, "tokenizer.ggml.add_bos_token") else ""

    def between(*roles: str) -> list[str]:
        turns = [{"role": role, "content": "<<said>>"} for role in roles]
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        parts = re.split("<<said>>", text.removeprefix(bos))
        if len(parts) != len(turns) + 1:
            got, wanted = "a template that repeats or leaves out what is said", "one that writes each message once"
            raise ExportError(
                "the chat template", got=got, wanted=wanted, next_step="Serve with llama.cpp, not Ollama."
            )
        return parts

    def chosen(condition: str, then: str, otherwise: str) -> str:
        return f"{{{{ if {condition} }}}}{then}{{{{ else }}}}{otherwise}{{{{ end }}}}"

    start, to_answer, to_next, to_end = between("user", "assistant", "user")
    user = chosen('eq $last "assistant"', to_next, start)
    try:
        before, after, _ = between("system", "user")
    except TemplateError:  # it takes no system prompt
        said = chosen('eq .Role "user"', user, to_answer)
    else:
        user = chosen('eq $last "system"', after, user)
        said = chosen('eq .Role "system"', before, chosen('eq .Role "user"', user, to_answer))
    return '{{ $last := "" }}{{ range .Messages }}' + said + "{{ .Content }}{{ $last = .Role }}{{ end }}" + to_end
