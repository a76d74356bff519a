"""keeptune merge: an adapter and its base to one whole model."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast, get_args

from keeptune.adapter.load import SIDECAR, check_base
from keeptune.adapter.merging import is_streamed, merge
from keeptune.adapter.probe import Gap
from keeptune.core.errors import ModelError, need_known
from keeptune.data.chat_template import turn_ends
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import Dtype, LoadOptions, load_config, load_floats, load_model
from keeptune.model.quantization import stays_quantised
from keeptune.pipeline.machine import device_named
from keeptune.pipeline.trained_changes import TrainedModel


def merge_adapter(
    adapter: Path, output: Path, *, base: str | None = None, dtype: str = "auto", original: str | None = None
) -> Gap:
    """Merges an adapter into its base and writes the whole model, with its tokenizer.

    One that was trained on a quantised base is merged into the original weights, never into those of four bits.

    Args:
        adapter: A LoRA adapter folder, or the folder of a run that has one.
        output: Where the model goes.
        base: Path or hub id; None takes what the adapter names.
        original: Path or hub id of what a quantised base was before; None takes what the adapter names, or the base
            where it was quantised as it was loaded.
        dtype: Of the merged model, ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Returns:
        The gap in logits between adapter on base and merged model.

    Raises:
        ModelError: The folder is not an adapter, or is one for another base; or its base is stored quantised and the
            original is not known.
        ExportError: The output holds something else, or the merged model does not compute what the adapter does.
        RecipeError: The dtype is unknown.
    """
    need_known(dtype, get_args(Dtype), "--dtype", ", ".join(get_args(Dtype)))
    trained = TrainedModel.of(str(adapter), base=base)
    if not trained.is_adapter:
        where, step = f"adapter {adapter}", "Pass the `adapter` folder of a run; --base names the base."
        raise ModelError(where, got="no adapter_config.json", wanted="a PEFT adapter folder", next_step=step)
    name, head, fields = trained.base, trained.head, trained.quantization
    options = LoadOptions(dtype=cast(Dtype, dtype), head=head)
    load = load_floats if is_streamed(trained.folder) else load_model
    quantised = stays_quantised(fields, load_config(name, options))
    whole = (original or trained.original or (name if fields is not None else None)) if quantised else name
    if whole is None:
        raise ModelError(
            f"adapter {adapter}",
            got=f"an adapter for {name}, which is stored quantised",
            wanted="the original weights: a merge in four bits would round the change away",
            next_step="Name the model that was quantised with --original.",
        )
    if (trained.folder / SIDECAR).is_file():
        source = replace(options, dtype=trained.dtype, quantization=fields)
        if quantised:
            source = replace(source, device=device_named("auto"))
        trained_on = (load_model if quantised else load)(name, source)
        check_base(trained.folder, body_fingerprint(trained_on), None if head is None else head.labels)
    from_floats, tokenizer = partial(load, options=options), trained.load_tokenizer()
    ends = turn_ends(tokenizer)
    return merge(trained.folder, output, base=whole, load=from_floats, tokenizer=tokenizer, ends=ends)
