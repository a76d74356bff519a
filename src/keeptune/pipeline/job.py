"""Job: what every stage of a run needs - recipe, tokenizer, base, data, folders and keys."""

import dataclasses
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from keeptune.adapter.anchor import resolve
from keeptune.adapter.export import Base
from keeptune.core.artefact import checked, content_key
from keeptune.core.processes import same_everywhere, world
from keeptune.core.weights import refuse_quantised
from keeptune.data.calibration import Calibration
from keeptune.data.chat_template import turn_ends, with_template
from keeptune.data.completions import joined_knowledge, with_replay
from keeptune.data.examples import LanguageExamples, TokenRow, data_account
from keeptune.data.labelled import LabelledExamples, Texts, choose_rows
from keeptune.data.sources import Row, read_jsonl
from keeptune.evaluation.benchmark_data import Corpus, refuse_used, used_rows
from keeptune.model.head import Head, body_fingerprint, refuse_unknown_tokens
from keeptune.model.pretrained import (
    LoadOptions,
    load_config,
    load_floats,
    load_model,
    load_positions,
    load_shapes,
    load_tokenizer,
    quantised_loading,
)
from keeptune.model.quantization import goes_with_shards, stays_quantised
from keeptune.penalties.base import Penalty
from keeptune.pipeline import task_kinds
from keeptune.pipeline.machine import check_device, check_folder, device_named, statistics_store
from keeptune.pipeline.originals import check_original, is_packed, load_base, original_of
from keeptune.pipeline.planning import PlanOptions, penalties_of, refuse_scope
from keeptune.recipe.schema import Recipe, make_loss, make_method, make_penalties
from keeptune.statistics.collect import source_name
from keeptune.statistics.request import DataRole
from keeptune.statistics.self_generated import SelfGeneration, SelfWritten, write_texts
from keeptune.statistics.store import StatStore
from keeptune.training.arguments import CONFIGS, divide_step, example_length, sft_config, with_tokens
from keeptune.training.losses.base import TaskLoss
from keeptune.training.self_distillation import refuse_sdft
from keeptune.training.sharding import asks, load_to_share, refuse_launcher
from keeptune.training.task_loss import refuse_loss

_PROBES, _PROBE_LENGTH = 8, 256
_BESIDE = ("modules_to_save", "trainable_token_indices")


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe with the things it names, each loaded when it is first needed."""

    recipe: Recipe

    @property
    def output(self) -> Path:
        """The run folder."""
        return self.recipe.output

    @property
    def device(self) -> str:
        """Where the model runs."""
        return device_named(self.recipe.device)

    @property
    def seed(self) -> int:
        """The training seed, recorded with every result."""
        return int(self.recipe.arguments.get("seed", 0))

    @property
    def store(self) -> StatStore:
        """The store of statistics."""
        return statistics_store(self.recipe.store, self.recipe.store_limit)

    @cached_property
    def method(self) -> Any:
        """The method, with its seed."""
        return make_method(self.recipe.method, seed=self.seed)

    @cached_property
    def penalties(self) -> tuple[Penalty, ...]:
        """The penalties that the recipe adds to the method's own."""
        return make_penalties(self.recipe.penalties)

    @cached_property
    def loss(self) -> TaskLoss | None:
        """What is learned of each token; None for nll."""
        return make_loss(self.recipe.task.loss)

    # The base

    def _source(self, head: Head | None = None) -> LoadOptions:
        recipe = self.recipe
        return LoadOptions(
            dtype=recipe.dtype,
            device=self.device,
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
            allow_pickle=recipe.allow_pickle,
            head=head,
            quantization=recipe.quantization,
        )

    @cached_property
    def positions(self) -> int | None:
        """How many positions the base has, from its config; None where it names no limit."""
        return load_positions(self.recipe.model, self._source(self.head))

    def _cut(self, length: int) -> int:
        return min(length, self.positions or length)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer; the task's chat template and its end become its own, in all stages."""
        tokenizer = with_template(load_tokenizer(self.recipe.model, self._source()), self.recipe.task.chat_template)
        return with_tokens(tokenizer, self.recipe.training)

    def base(self) -> PreTrainedModel:
        """Returns a freshly loaded base, in evaluation mode, on one device or several (``device_map``)."""
        source = dataclasses.replace(self._source(self.head), device_map=self.recipe.device_map)
        return load_model(self.recipe.model, source)

    def base_to_train(self) -> PreTrainedModel:
        """Returns the base as training takes it: on the CPU where FSDP2 shares its weights out."""
        source, beside = self._source(), self.recipe.modules_to_save or self.head
        if not asks("FSDP") or beside or is_packed(self.recipe.model, source):  # read by every process
            return self.base()
        return load_to_share(self.recipe.model, source)

    def planning_base(self) -> PreTrainedModel:
        """Returns the base for statistics and plans: whole, or block by block (``memory``)."""
        return load_base(self.recipe.model, self._source(self.head), self.recipe.memory)

    @property
    def export_base(self) -> Base:
        """The base as exports take it."""
        recipe, ends = self.recipe, turn_ends(self.tokenizer)
        return Base(recipe.model, self.base, self.load_floats, self.original, recipe.quantization, ends)

    @cached_property
    def original(self) -> str | None:
        """What a quantised base was before, by path or hub id; None where it is not quantised or not at hand."""
        return original_of(self.recipe, load_config(self.recipe.model, self._source()))

    def load_original(self) -> PreTrainedModel:
        """Loads the original of a quantised base whole."""
        assert self.original is not None
        return load_model(self.original, self.float_source(self.original, self.head))

    def load_floats(self, name: str) -> PreTrainedModel:
        """Loads a model of floats as the base is loaded, with its weights left on disk."""
        return load_floats(name, self.float_source(name, self.head))

    def float_source(self, name: str, head: Head | None = None) -> LoadOptions:
        """Returns how a model of floats is loaded: the base, its original or a merged one."""
        revision = self.recipe.revision if name == self.recipe.model else None
        return dataclasses.replace(self._source(head), quantization=None, revision=revision)

    @cached_property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base's weights."""
        fingerprint = body_fingerprint(self.planning_base())
        same_everywhere(f"model {self.recipe.model}", fingerprint)
        return fingerprint

    @cached_property
    def head(self) -> Head | None:
        """The classification head, drawn with the run's seed where the base has none; None for a language model."""
        return self.kind.head(self.task, self.seed)

    # What is to be kept

    @cached_property
    def knowledge_rows(self) -> list[list[Row]]:
        """The knowledge rows that are used, of each set."""
        sets = [(f"{where}.file", part) for where, part in self.recipe.knowledge_sets.items()]
        rows = [(where, part, read_jsonl(part.file, where=where, **part.origin)) for where, part in sets]
        return [choose_rows(own, part.examples, by=part.by, seed=part.seed, where=at) for at, part, own in rows]

    @cached_property
    def filed_knowledge(self) -> list[LanguageExamples]:
        """The knowledge sets of files as texts, or as prompts and completions."""
        sets = zip(self.recipe.knowledge_sets.items(), self.knowledge_rows, strict=True)
        return [task_kinds.read_knowledge(part, rows, where) for (where, part), rows in sets]

    @cached_property
    def generations(self) -> dict[str, SelfGeneration]:
        """What the base writes as knowledge, by place; a RecipeError says that a classifier cannot."""
        return task_kinds.own_generations(self.recipe, self.needs)

    @cached_property
    def written_knowledge(self) -> list[SelfWritten]:
        """What the base wrote itself, or writes now, without texts that are scored."""
        sets, key = [], self.base_fingerprint if self.generations else ""
        for where, part in self.generations.items():
            texts = write_texts(self.base, self.tokenizer, part, self.store, fingerprint=key, where=where)
            for benchmark in self.recipe.evaluate:
                rows = [{"prompt": text.prompt, "completion": text.completion} for text in texts.texts]
                scored = used_rows(Corpus(where, rows, texts.read_texts), benchmark, self.tokenizer)
                texts = texts.without(dict.fromkeys(scored, f"with items of {benchmark.name}"))
            sets.append(texts)
        return sets

    @property
    def knowledge(self) -> list[LanguageExamples]:
        """All knowledge sets: those of files, then those that the base writes."""
        return [*self.filed_knowledge, *self.written_knowledge]

    @cached_property
    def calibration(self) -> Calibration | None:
        """The knowledge data as tokens, those of all sets."""
        filed = [part.max_length for part in self.recipe.knowledge_sets.values()]
        lengths = filed + [sys.maxsize] * len(self.generations)
        sets = zip(self.knowledge, map(self._cut, lengths), strict=True)
        tokens = [part.calibration(self.tokenizer, max_length=length) for part, length in sets]
        return joined_knowledge(tokens) if tokens else None

    # What is to be learned

    @property
    def kind(self) -> task_kinds.TaskKind:
        """What the task's rows mean."""
        return task_kinds.KINDS[self.recipe.task.kind]

    @cached_property
    def _task_files(self) -> list[list[Row]]:
        return task_kinds.task_files(self.recipe.task)

    @cached_property
    def task(self) -> Any:
        """The task's examples."""
        return self.kind.examples(self.recipe.task, self._task_files, self.seed)

    @cached_property
    def task_calibration(self) -> Calibration:
        """A sample of the task as tokens, for statistics of inputs and gradients."""
        wanted = self.recipe.task.calibration
        length = self._cut(wanted.max_length)
        drawn = {"max_length": length, "examples": wanted.examples, "seed": wanted.seed}
        sample: Calibration = self.task.calibration(self.tokenizer, **drawn)
        return sample

    @cached_property
    def trained_examples(self) -> Any:
        """What is trained on: the task, with knowledge among it where the recipe has replay."""
        if not self.recipe.replay:
            return self.task
        assert isinstance(self.task, LanguageExamples)
        return with_replay(self.task, self.knowledge, self.recipe.replay, self.seed)

    def data_account(self, show: int = 3) -> tuple[dict[str, Any], list[TokenRow]]:
        """Returns what a language model learns of the data, with some examples written out, and their tokens.

        Raises:
            DataError: Nothing is left to learn.
        """
        length = example_length(self.config(self.output / "checkpoints", torch.float32))
        return data_account(self.trained_examples, self.tokenizer, length, show=show)

    @property
    def probe(self) -> Tensor:
        """Token ids that the check of an export compares logits on, ``(batch, length)``."""
        rows = self.task.first_tokens(_PROBES, self.tokenizer, self._cut(_PROBE_LENGTH))
        length = min(map(len, rows))
        return torch.tensor([row[:length] for row in rows])

    def config(self, checkpoints: Path, dtype: torch.dtype, **changes: Any) -> Any:
        """Returns the trainer's config for a base of a dtype, with changed fields; it takes ``train.seed``, else 0.

        A step has the examples that the recipe gives one process, whatever the number of processes.

        Raises:
            RecipeError: A field of ``train`` does not exist or has a wrong value, or a step cannot be divided.
        """
        arguments = {"seed": 0, **self.recipe.training, **changes}
        kind = CONFIGS.get(self.recipe.task.kind, SFTConfig)  # a classifier's has max_length too
        how = {"dtype": dtype, "device": self.device, "positions": self.positions, "kind": kind}
        return divide_step(sft_config(arguments, checkpoints, **how), world())

    # What the plan is made from

    @cached_property
    def _penalty_data(self) -> set[DataRole]:
        return set().union(*(one.data for one in penalties_of(self.method, self.penalties)))

    @cached_property
    def needs(self) -> set[DataRole]:
        """Which data the method and the penalties take statistics over."""
        return {request.data for request in self.method.statistics} | self._penalty_data

    @property
    def data(self) -> dict[DataRole, Calibration]:
        """The tokens that statistics are taken over, per data role."""
        data: dict[DataRole, Calibration] = {}
        if self.calibration is not None:
            data["knowledge"] = self.calibration
        if "task" in self.needs:
            data["task"] = self.task_calibration
        return data

    @property
    def plan_options(self) -> PlanOptions:
        """Which targets are planned, and how."""
        recipe, original = self.recipe, self.original if self.recipe.start_from == "original" else None
        options = PlanOptions(recipe.targets, recipe.layers, recipe.memory, self.device, start_from=recipe.start_from)
        floats = None if original is None else self.load_floats(original)
        beside = {name: getattr(recipe, name) for name in _BESIDE}
        return dataclasses.replace(options, fingerprint=self.base_fingerprint, original=floats, **beside)

    @cached_property
    def plan_inputs(self) -> dict[str, Any]:
        """What the plan is made from; its key is made of it."""
        recipe, calibration = self.recipe, self.calibration
        inputs: dict[str, Any] = {
            "model": self.base_fingerprint,
            "method": [self.method.name, self.method],
            "targets": recipe.targets,
            "layers": None if recipe.layers is None else sorted(set(recipe.layers)),
            "knowledge": None if calibration is None else calibration.fingerprint,
            "dtype": recipe.dtype,
        }
        if "task" in self.needs:
            inputs["task"] = self.task_calibration.fingerprint
        if recipe.start_from == "original":
            assert self.original is not None
            inputs["start_from"] = body_fingerprint(self.load_floats(self.original))
        if self.head is not None:
            inputs["head"] = self.head
        inputs |= {name: value for name in ("quantization", *_BESIDE) if (value := getattr(recipe, name)) is not None}
        # Which examples come first depends on sets and order; all together do not.
        for request in self.method.statistics:
            if request.examples is not None and request.data in self.data:
                inputs[source_name(request)] = self.data[request.data].first(request.examples).fingerprint
        if self.penalties:
            inputs["penalties"] = [[penalty.name, penalty] for penalty in self.penalties]
        if calibration is not None and "knowledge" in self._penalty_data:
            inputs["knowledge in order"] = content_key([calibration.sequences, calibration.sets])
        return inputs

    def check(self) -> None:
        """Checks all there is to check before anything is computed or written.

        Raises:
            DataError: A file is missing or malformed, or an evaluation set overlaps the data that are used.
            RecipeError: There is no such device, or the output cannot be a folder; or as of :meth:`check_needs`.
            ModelError: The model's folder cannot be used.
        """
        recipe = self.recipe
        check_folder("output", self.output)
        check_folder("store", self.store.folder)
        check_device(self.device)
        checked(Path(recipe.model))
        config = load_config(recipe.model, self._source())
        self.check_needs(config)
        rows, shards = recipe.trainable_token_indices, goes_with_shards(recipe.quantization, config)
        refuse_launcher(recipe.task.kind, len(self.task), self.loss, recipe.device_map, rows, shards=shards)
        quantised_loading(recipe.model, self._source())
        # What a chat template refuses is refused here, and tokens that the base has no rows for.
        more = len(self.tokenizer) > (getattr(config.get_text_config(), "vocab_size", None) or sys.maxsize)
        read = self.task.first_tokens(len(self.task) if more else 1, self.tokenizer, sys.maxsize if more else 1)
        if more:
            refuse_unknown_tokens(load_shapes(recipe.model, self._source()), read, "task.train")
        used = [Corpus("task.train", [row for rows in self._task_files for row in rows], self.task.read_texts)]
        for part, own in zip(self.filed_knowledge, self.knowledge_rows, strict=True):
            labelled = isinstance(self.task, LabelledExamples)
            texts = Texts(tuple(part.read_texts)).whole if labelled else part.read_texts
            used.append(Corpus(f"{part.where}.file", own, texts))
        for benchmark in recipe.evaluate:
            self.kind.check_benchmark(self.task, benchmark)
            refuse_used(used, benchmark, self.tokenizer)
        dtype = config.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        arguments = self.config(self.output / "checkpoints", dtype or torch.float32)
        beside = [*(recipe.modules_to_save or ()), *map(str, recipe.trainable_token_indices or ())]
        refuse_loss(self.loss, arguments, self.method.name, self.method.scope, beside)
        refuse_sdft(self.loss, None if recipe.replay else self.task, arguments, recipe.task.stm_threshold)

    def check_needs(self, config: Any = None) -> None:
        """Checks what shows without the data: that method, penalties, sections and the base's config fit together.

        Raises:
            RecipeError: A classifier's recipe needs texts that it cannot have.
            PlanError: The method cannot be confined to some layers, or takes no penalties.
        """
        recipe = self.recipe
        task_kinds.own_generations(recipe, self.needs)
        if stays_quantised(recipe.quantization, config):  # whose weights no method and no anchor changes
            refuse_quantised(self.method.scope, self.method.name)
            resolve(recipe.anchor, torch.bfloat16, quantised=True)
        check_original(recipe, config, self.float_source(recipe.original or recipe.model))
        refuse_scope(self.method, penalties_of(self.method, self.penalties), recipe.layers)
