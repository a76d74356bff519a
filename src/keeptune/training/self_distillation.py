"""TRL's SDFTTrainer for ``task.loss: sdft`` (losses/sdft.py), with a teacher that fits every method and anchor."""

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from keeptune.core.errors import DataError, TrainError
from keeptune.core.eval_mode import whole_states
from keeptune.data.completions import Conversations, TaskExamples
from keeptune.data.examples import Conversation
from keeptune.model.head import refuse_unknown_tokens
from keeptune.training.losses.sdft import Sdft
from keeptune.training.preference_trainers import Start

_log = logging.getLogger(__name__)
_CHAT = (
    "{prompt}\n\nThis is an example for a response to the question:\n{privileged_context}\n\n"
    "Now answer with a response of your own, including the thinking process."
)
_TEXT = "{prompt}{privileged_context}\n\n{prompt}"


def refuse_sdft(loss: Any, examples: Any, args: Any, stm_threshold: float | None) -> None:
    """Raises TrainError for data or arguments that TRL's SDFTTrainer has no place for, where it is asked for."""
    if not isinstance(loss, Sdft):
        return
    asked = isinstance(examples, Conversations) or (isinstance(examples, TaskExamples) and examples.prompts is not None)
    for got, refused in {
        "several processes": args.world_size > 1,
        "train.packing": args.packing,
        "task.stm_threshold, which masks tokens of answers": stm_threshold is not None,
        "whole texts, several files or replay": not asked,
    }.items():
        if refused:
            wanted, next_step = "prompts with answers of one file, in one process", "Change it, or take another loss."
            raise TrainError("task.loss sdft", got=got, wanted=wanted, next_step=next_step)


def sdft_trainer(loss: Sdft, examples: Any, *, model: Any, args: Any, processing_class: Any, **_: Any) -> Any:
    """Returns TRL's trainer of prompts with their answers; :func:`teach` comes next."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is experimental
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    logging.getLogger(SDFTTrainer.__module__).setLevel(logging.ERROR)  # it warns of adapters for a teacher not taken
    talk = examples if isinstance(examples, Conversations) and processing_class.chat_template else None
    step, written = args.per_device_train_batch_size * args.gradient_accumulation_steps, loss.max_completion_length
    given = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)} | {
        "teacher_prompt_template": loss.teacher_prompt_template or (_CHAT if talk else _TEXT),
        "temperature": loss.temperature or 1.0,
        "generation_kwargs": None if loss.temperature else {"do_sample": False, "top_k": None},
        "chat_template_kwargs": dict(talk.options.chat_template_kwargs) if talk else {},
        "num_generations": 1,
        "max_prompt_length": None,
        "distillation_mode": "full_logits",
        "teacher_model_kind": "live",  # until teach
        "shuffle_dataset": True,
        "steps_per_generation": args.gradient_accumulation_steps,
        "generation_batch_size": step,
    }
    config = object.__new__(SDFTConfig)  # the fields of another config, as its __init__ left them
    vars(config).update({**{f.name: f.default for f in dataclasses.fields(SDFTConfig)}, **vars(args), **given})
    texts: Any = getattr(examples, "plain", None) or examples
    pairs = map(_asked, talk.conversations) if talk else zip(texts.prompts, texts.completions, strict=True)
    kept = [(prompt, answer) for prompt, answer in pairs if answer]
    rows = {"prompt": [prompt for prompt, _ in kept], "privileged_context": [answer for _, answer in kept]}
    data = Dataset.from_dict(rows)
    trainer = SDFTTrainer(model=model, args=config, train_dataset=data, processing_class=processing_class)
    shown = trainer.teacher_context_builder.select_generation_prompts(*rows.values())
    read = trainer._tokenize_prompts(shown) if shown else []
    refuse_unknown_tokens(model, read, "task.train")
    fits = [n for n, ids in enumerate(read) if args.max_length is None or len(ids) + written <= args.max_length]
    if len(fits) < step:
        got = f"{len(fits)} of {len(examples)} examples with an answer in text, and room for {written} tokens beside it"
        next_step = "Raise train.max_length, or lower max_completion_length or train.per_device_train_batch_size."
        raise DataError("task.loss sdft", got=got, wanted=f"{step}, as many as a step has", next_step=next_step)
    if len(fits) < len(examples):
        _log.warning("training: %d examples are left out: tools, no answer, or too long", len(examples) - len(fits))
    trainer.train_dataset = data.select(fits)
    sampler = trainer._get_train_sampler()
    # TRL draws an epoch's order after that of the epoch before, which a run that goes on has not drawn.
    sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(args.seed + epoch)
    trainer._get_train_sampler = lambda *_: sampler
    return trainer


def _asked(one: Conversation) -> tuple[list[dict[str, str]], str]:
    """Returns what comes before the last answer, and that; nothing where a template needs more than texts."""
    said = [{"role": m["role"], "content": m.get("content")} for m in one.messages]
    fits = all(m["content"] for m in said) and [m["role"] for m in said[-2:]] == ["user", "assistant"]
    return (said[:-1], said[-1]["content"]) if fits and not one.tools else ([], "")


def teach(trainer: Any, loss: Sdft) -> None:
    """Makes the model as it is now the teacher, once its parameters are what training starts from."""
    whole_states(trainer.model)  # TRL asks for the logits of what is written alone
    trainer.teacher_model = Start(trainer.model)
    trainer.add_callback(_Teacher(trainer.teacher_model.values, loss.teacher_update_rate))


class _Teacher(TrainerCallback):
    """Moves the teacher after the model, and keeps it in checkpoints."""

    def __init__(self, values: Any, rate: float) -> None:
        self._values, self._rate = values, rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter, value in self._values.items():
            value.lerp_(parameter.detach(), self._rate)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save_file({str(n): value for n, value in enumerate(self._values.values())}, _kept(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            kept = load_file(_kept(args, state))  # the checkpoint's checksums have been compared
            for n, value in enumerate(self._values.values()):
                value.copy_(kept[str(n)])


def _kept(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / "teacher.safetensors"
