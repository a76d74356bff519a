"""Job: what every stage of a run needs - recipe, tokenizer, base, data, folders and keys."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import platformdirs
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from keeptune.core.artefact import content_key
from keeptune.core.errors import RecipeError
from keeptune.core.target import Target
from keeptune.data.calibration import Calibration
from keeptune.data.completions import TaskExamples
from keeptune.data.disjoint import Corpus
from keeptune.data.knowledge import KnowledgeSet, joined_knowledge, knowledge_calibration, knowledge_set
from keeptune.data.labelled import LabelledExamples, Texts
from keeptune.data.multiple_choice import choose_rows, lettered_rows
from keeptune.data.replay import with_replay
from keeptune.data.sources import Row, read_jsonl
from keeptune.evaluation.benchmark_data import refuse_used
from keeptune.methods.combined import parts_of
from keeptune.model.head import Head, body_fingerprint
from keeptune.model.pretrained import load_model, load_positions, load_tokenizer
from keeptune.penalties.base import PenaltySpec
from keeptune.pipeline.planning import asked_penalties, refuse_layers, refuse_penalties
from keeptune.pipeline.task_kinds import Examples, check_benchmark, read_task, sample, used_texts
from keeptune.recipe.construct import make_method, make_penalties
from keeptune.recipe.schema import Recipe
from keeptune.statistics.collect import source_name
from keeptune.statistics.request import DataRole, Request
from keeptune.statistics.store import StatStore
from keeptune.training.trainer import check_arguments, sft_config

__all__ = ["Job", "check_device", "check_folder", "device_named"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe with the things it names, each loaded when it is first needed.

    Args:
        recipe: The recipe.
    """

    recipe: Recipe

    @property
    def output(self) -> Path:
        """The run folder."""
        return self.recipe.output

    @property
    def device(self) -> str:
        """Where the model runs; ``auto`` is CUDA where there is a GPU."""
        return device_named(self.recipe.device)

    @property
    def seed(self) -> int:
        """The training seed, recorded with every result."""
        return int(check_arguments(self.recipe.train).get("seed", 0))

    @property
    def store(self) -> StatStore:
        """The store of statistics; one for all runs of a user unless the recipe names another."""
        folder = self.recipe.store or Path(platformdirs.user_cache_dir("keeptune")) / "statistics"
        return StatStore(folder)

    @cached_property
    def positions(self) -> int | None:
        """How many positions the base has, from its config; None where it names no limit."""
        recipe = self.recipe
        return load_positions(
            recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, head=self.head
        )

    @cached_property
    def method(self) -> Any:
        """The method, with its seed."""
        return make_method(self.recipe.method, seed=self.seed)

    @cached_property
    def penalties(self) -> tuple[PenaltySpec, ...]:
        """The penalties that the recipe adds to the method's own."""
        return make_penalties(self.recipe.penalties)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        recipe = self.recipe
        return load_tokenizer(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)

    def base(self) -> PreTrainedModel:
        """Load a fresh base.

        Returns:
            The model, in evaluation mode.
        """
        recipe = self.recipe
        return load_model(
            recipe.model,
            dtype=recipe.dtype,
            device=self.device,
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
            allow_pickle=recipe.allow_pickle,
            head=self.head,
        )

    @cached_property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base's weights."""
        return body_fingerprint(self.base())

    @cached_property
    def knowledge_rows(self) -> list[list[Row]]:
        """The knowledge rows that are used, of each set."""
        found = []
        for index, part in enumerate(self.recipe.knowledge_sets):
            where = f"{self._where(index)}.file"
            rows = read_jsonl(part.file, where=where)
            found.append(choose_rows(rows, part.examples, by=part.by, seed=part.seed, where=where))
        return found

    @cached_property
    def knowledge(self) -> list[KnowledgeSet]:
        """The knowledge sets as texts, or as prompts and completions."""
        return [
            knowledge_set(
                rows if part.choices is None else lettered_rows(rows, part.choices, where=self._where(index)),
                text=part.text,
                prompt=part.prompt,
                completion=part.completion,
                chat=part.chat,
                where=self._where(index),
            )
            for index, (part, rows) in enumerate(zip(self.recipe.knowledge_sets, self.knowledge_rows, strict=True))
        ]

    def _where(self, index: int) -> str:
        return f"knowledge.{index}" if isinstance(self.recipe.knowledge, list) else "knowledge"

    @cached_property
    def calibration(self) -> Calibration | None:
        """The knowledge data as tokens, those of all sets."""
        if not self.knowledge:
            return None
        lengths = [part.max_length for part in self.recipe.knowledge_sets]
        return joined_knowledge(
            [
                knowledge_calibration(part, self.tokenizer, max_length=min(length, self.positions or length))
                for part, length in zip(self.knowledge, lengths, strict=True)
            ]
        )

    @property
    def data(self) -> dict[DataRole, Calibration]:
        """The tokens that statistics are taken over, per data role."""
        found: dict[DataRole, Calibration] = {}
        if self.calibration is not None:
            found["knowledge"] = self.calibration
        if "task" in self.needs:
            found["task"] = self.task_calibration
        return found

    @cached_property
    def requests(self) -> frozenset[Request]:
        """The statistics that the method takes of some target."""
        some = Target("", 0, "", out_features=1, in_features=1, input_group="")
        return frozenset().union(*(part.method.requests(some) for part in parts_of(self.method)))

    @cached_property
    def needs(self) -> set[DataRole]:
        """Which data the method and the penalties take statistics over."""
        asked = asked_penalties(self.method, self.penalties)
        return {request.data for request in self.requests}.union(*(one.penalty.data for one in asked))

    @cached_property
    def task_calibration(self) -> Calibration:
        """A sample of the task as tokens, for statistics of inputs and gradients."""
        return sample(self.task, self.tokenizer, self.recipe.task.calibration, self.positions)

    @cached_property
    def task_rows(self) -> list[Row]:
        """The task rows that are used."""
        return read_jsonl(self.recipe.task.train, where="task.train")[: self.recipe.task.examples]

    @cached_property
    def task(self) -> Examples:
        """The task as prompts and completions, or as texts with labels or scores."""
        return read_task(self.recipe.task, self.task_rows)

    @cached_property
    def trained_examples(self) -> Examples:
        """What is trained on: the task, with knowledge among it where the recipe asks for replay."""
        if not self.recipe.replay:
            return self.task
        assert isinstance(self.task, TaskExamples)
        return with_replay(self.task, self.knowledge, self.recipe.replay, self.seed)

    @cached_property
    def head(self) -> Head | None:
        """The classification head, drawn with the run's seed where the base has none; None for a language model."""
        return Head(self.task.names, self.seed) if isinstance(self.task, LabelledExamples) else None

    def config(self, name: str, dtype: torch.dtype) -> SFTConfig:
        """Make the trainer's config.

        Args:
            name: Folder of the checkpoints.
            dtype: The base's dtype.

        Returns:
            The config; it takes ``train.seed``, else 0.

        Raises:
            RecipeError: A field of ``train`` does not exist or has a wrong value.
        """
        arguments = {"seed": 0, **self.recipe.train}
        checkpoints = self.output / "checkpoints" / name
        return sft_config(arguments, checkpoints, dtype=dtype, device=self.device, positions=self.positions)

    def check(self) -> None:
        """Check all there is to check before anything is computed or written.

        Raises:
            DataError: A file is missing or malformed, or an evaluation set overlaps the data that are used.
            RecipeError: The method needs knowledge data and there are none, there is no such device, or the
                output cannot be a folder.
            PlanError: The method cannot be confined to some layers.
            ModelError: The model's folder cannot be used.
        """
        check_folder("output", self.output)
        check_folder("store", self.store.folder)
        check_device(self.device)
        self.check_needs()
        used = [Corpus("task.train", self.task_rows, used_texts(self.task))]
        for part, rows in zip(self.knowledge, self.knowledge_rows, strict=True):
            texts = part.texts if self.head is None else Texts(tuple(part.texts)).whole
            used.append(Corpus(f"{part.where}.file", rows, texts))
        for benchmark in self.recipe.evaluate:
            check_benchmark(self.recipe.task.kind, self.task, benchmark)
            refuse_used(used, benchmark)
        self.config("", torch.float32)

    def _check_replay(self) -> None:
        if self.recipe.replay and self.recipe.task.kind != "completion":
            raise RecipeError(
                "replay",
                got=f"{self.recipe.replay} with task.kind {self.recipe.task.kind}",
                wanted="none: knowledge has no labels that a classifier could learn",
                next_step="Leave it out; a penalty on the weight change holds a classifier, such as laplace.",
            )
        if self.recipe.replay and self.recipe.knowledge is None:
            raise RecipeError(
                "replay",
                got=f"{self.recipe.replay} without a `knowledge` section",
                wanted="the examples to mix into the task",
                next_step='Add for example knowledge: {file: calibration.jsonl, text: "{question} {answer}"}.',
            )

    def check_needs(self) -> None:
        """Check what shows without the data: that method, penalties and sections fit together.

        Raises:
            RecipeError: Knowledge data are needed and there are none.
            PlanError: The method cannot be confined to some layers, or takes no penalties.
        """
        self._check_replay()
        refuse_layers(self.method, self.recipe.layers)
        refuse_penalties(self.method, asked_penalties(self.method, self.penalties))
        if "knowledge" in self.needs and self.recipe.knowledge is None:
            raise RecipeError(
                " and ".join(
                    [f"method {self.method.name}", *(f"penalty {penalty.name}" for penalty in self.penalties)]
                ),
                got="no `knowledge` section in the recipe",
                wanted="data that hold what the model should keep",
                next_step='Add for example knowledge: {file: calibration.jsonl, text: "{question} {answer}"}.',
            )

    @property
    def plan_key(self) -> str:
        """Key of all that the plan depends on."""
        return content_key(self.plan_inputs)

    @cached_property
    def plan_inputs(self) -> dict[str, Any]:
        """What the plan is made from."""
        more: dict[str, Any] = {"task": self.task_calibration.fingerprint} if "task" in self.needs else {}
        if self.head is not None:
            more["head"] = self.head
        # Which examples come first depends on sets and order; all together do not.
        for request in self.requests:
            if request.examples is not None and request.data in self.data:
                more[source_name(request)] = self.data[request.data].first(request.examples).fingerprint
        if self.penalties:
            more["penalties"] = [[penalty.name, penalty] for penalty in self.penalties]
        if self.calibration is not None and any(
            "knowledge" in one.penalty.data for one in asked_penalties(self.method, self.penalties)
        ):
            more["knowledge in order"] = content_key([self.calibration.sequences, self.calibration.sets])
        return more | {
            "model": self.base_fingerprint,
            "method": [self.method.name, self.method],
            "targets": self.recipe.targets,
            "layers": None if self.recipe.layers is None else sorted(set(self.recipe.layers)),
            "knowledge": None if self.calibration is None else self.calibration.fingerprint,
            "dtype": self.recipe.dtype,
        }


def check_folder(where: str, folder: Path) -> None:
    """Check that a folder is there or can be made.

    Args:
        where: The recipe key or option.
        folder: The folder.

    Raises:
        RecipeError: The path or one above it is a file.
    """
    present = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if present.exists() and not present.is_dir():
        raise RecipeError(
            where, got=f"{folder}, where {present} is a file", wanted="a folder", next_step=f"Choose another {where}."
        )


def device_named(name: str) -> str:
    """Say which device a name stands for.

    Args:
        name: Of a device, or ``auto``: CUDA where there is a GPU.

    Returns:
        The device.
    """
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> None:
    """Check that this machine has a device.

    Args:
        name: Such as ``cuda:0``.

    Raises:
        RecipeError: It is no device, or not here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(
            "device", got=name, wanted="auto, cpu, cuda or cuda:0", next_step="Correct the value."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            "device",
            got=f"{name}, with {torch.cuda.device_count()} CUDA devices at hand",
            wanted="a device that this machine has",
            next_step="Set `device: auto` or `device: cpu`.",
        )
