"""A first recipe: from a model, data and what to keep to a commented YAML file that runs as it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from jinja2 import Environment
from pydantic import ByteSize, TypeAdapter, ValidationError

from keeptune.core.errors import RecipeError
from keeptune.data import hub
from keeptune.pipeline.dry_run.data_sizes import Lengths
from keeptune.pipeline.dry_run.describe import DryRun, describe
from keeptune.pipeline.job import Job
from keeptune.pipeline.machine import device_named
from keeptune.pipeline.originals import free_bytes
from keeptune.recipe.reading import set_value
from keeptune.recipe.schema import make_recipe
from keeptune.statistics.store_use import size_text

_FREE: Final = 0.95  # of a card's memory
_NF4: Final = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
_SAVING: Final = {"activation_checkpointing": True}
_PAGED: Final = _SAVING | {"optim": "paged_adamw_8bit"}
# From the fastest to the thriftiest: texts at once, of 16 a step; more of `train`; of the recipe, on a GPU.
_SETTINGS: Final[tuple[tuple[int, dict[str, Any], dict[str, Any]], ...]] = (
    (8, {}, {}),
    (4, _SAVING, {}),
    (1, _SAVING, {}),
    (4, _PAGED, {"quantization": _NF4}),
    (1, _PAGED, {"quantization": _NF4}),
)
_JINJA: Final = Environment(trim_blocks=True, keep_trailing_newline=True)


def first_recipe(given: Mapping[str, Any], *, keep: str = "own", card: str = "auto") -> tuple[str, str]:
    """Writes a recipe that runs as it is: in the fastest of a few settings that fit.

    Args:
        given: Dotted key to value: ``model``, ``task.train``, ``output``, and others that are to differ.
        keep: ``own``, the base's own texts; ``general``, the mixture that ships; or a data file.
        card: Memory of the GPU, such as ``24GB``; ``auto`` is what is free here.

    Returns:
        The YAML text, and the memory that it takes, in words.

    Raises:
        KeeptuneError: The recipe would not run, or fits in no setting.
    """
    device = device_named(given.get("device", "auto")) if card == "auto" else "cuda"
    try:
        room = free_bytes(torch.device(device)) if card == "auto" else TypeAdapter(ByteSize).validate_python(card)
    except ValidationError as error:
        wanted = "a size such as 24GB, or auto"
        raise RecipeError("init --card", got=card, wanted=wanted, next_step="Correct it.") from error
    need, shape = 0, None
    for batch, train, more in _SETTINGS:
        if more and device == "cpu":
            break
        values: dict[str, Any] = {"model": None, "task": {"train": None}}
        values |= {} if keep == "own" else {"knowledge": keep if keep == "general" else {"file": keep}}
        values |= {"method": {"name": "keep", "rank": 8, "nats": 0.01}, **more}
        values["train"] = {"learning_rate": 2e-4, "num_train_epochs": 1, "per_device_train_batch_size": batch}
        values["train"] |= {"gradient_accumulation_steps": 16 // batch, **train}
        for key, value in sorted(given.items(), key=lambda item: item[0].count(".")):
            set_value(values, key, value, where=f"init --{key}")
        recipe = make_recipe(values, folder=Path(), where="init", fetch=hub.cached)
        shape = describe(recipe, shape).shape
        job = Job(recipe.model_copy(update={"device": device}))  # a card that is named need not be in this machine
        account = DryRun(job, shape, Lengths(job, shape.positions))
        need = sum(account.memory[account.peak].values())
        if need <= _FREE * room:
            template = _JINJA.from_string(Path(__file__).with_suffix(".yaml.j2").read_text("utf-8"))
            told = f"{size_text(need)} at its peak ({account.peak}), of {size_text(room)}"
            return template.render(values=values, yaml=_yaml), told
    raise RecipeError(
        "init --card",
        got=f"{size_text(room)}, where {size_text(need)} are needed",
        wanted="memory for the model",
        next_step="Take a smaller model, `--train.max_length 512`, or several cards (`keeptune launch`).",
    )


def _yaml(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=100)
