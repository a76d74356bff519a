"""Job: what every stage of a run needs - recipe, tokenizer, base, data, folders and keys."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any

import platformdirs
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.artefact import content_key, model_fingerprint
from keeptune.core.errors import RecipeError
from keeptune.data.calibration import Calibration, tokenize_calibration
from keeptune.data.overlap import Corpus, refuse_overlap
from keeptune.data.prompts import render
from keeptune.data.sft import TaskExamples, task_examples
from keeptune.data.sources import Row, read_jsonl
from keeptune.model.load import load_model, load_tokenizer
from keeptune.recipe import Recipe, make_method
from keeptune.stats.request import DataRole
from keeptune.stats.store import StatStore

__all__ = ["Job"]


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
        if self.recipe.device != "auto":
            return self.recipe.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def seed(self) -> int:
        """The training seed, recorded with every result."""
        return int(self.recipe.train.get("seed", 0))

    @property
    def store(self) -> StatStore:
        """The store of statistics; one for all runs of a user unless the recipe names another."""
        folder = self.recipe.store or Path(platformdirs.user_cache_dir("keeptune")) / "statistics"
        return StatStore(folder)

    @cached_property
    def method(self) -> Any:
        """The method, with its seed."""
        return make_method(self.recipe.method, seed=self.seed)

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
        )

    @cached_property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base's weights."""
        return model_fingerprint(self.base())

    @cached_property
    def knowledge_rows(self) -> list[Row]:
        """The knowledge rows that are used."""
        knowledge = self.recipe.knowledge
        if knowledge is None:
            return []
        return read_jsonl(knowledge.file, where="knowledge.file")[: knowledge.examples]

    @cached_property
    def knowledge_texts(self) -> list[str]:
        """The knowledge rows as text."""
        if self.recipe.knowledge is None:
            return []
        return _render_all(self.knowledge_rows, self.recipe.knowledge.text, "knowledge")

    @cached_property
    def calibration(self) -> Calibration | None:
        """The knowledge data as tokens."""
        if self.recipe.knowledge is None:
            return None
        length = self.recipe.knowledge.max_length
        return tokenize_calibration(self.knowledge_texts, self.tokenizer, max_length=length, where="knowledge")

    @property
    def data(self) -> dict[DataRole, Calibration]:
        """The tokens that statistics are taken over, per data role."""
        return {} if self.calibration is None else {"knowledge": self.calibration}

    @cached_property
    def task_rows(self) -> list[Row]:
        """The task rows that are used."""
        return read_jsonl(self.recipe.task.train, where="task.train")[: self.recipe.task.examples]

    @cached_property
    def task(self) -> TaskExamples:
        """The task as prompts and completions."""
        task = self.recipe.task
        return task_examples(self.task_rows, prompt=task.prompt, completion=task.completion, where="task.train")

    def check(self) -> None:
        """Check all data before anything is computed: files, fields, and that evaluation data are disjoint.

        Raises:
            DataError: A file is missing or malformed, or an evaluation set overlaps the data that are used.
            RecipeError: The method needs knowledge data and there is none.
        """
        used = [Corpus("task.train", self.task_rows, self.task.prompts)]
        if self.recipe.knowledge is not None:
            used.append(Corpus("knowledge.file", self.knowledge_rows, self.knowledge_texts))
        for benchmark in self.recipe.evaluate:
            where = f"evaluate.{benchmark.name}"
            rows = read_jsonl(benchmark.file, where=f"{where}.file")[: benchmark.examples]
            template = benchmark.text if benchmark.prompt is None else benchmark.prompt
            assert template is not None
            scored = Corpus(where, rows, _render_all(rows, template, where))
            for corpus in used:
                refuse_overlap(corpus, scored)
        if not self.output.is_dir() and self.output.exists():
            raise RecipeError(
                "output", got=f"{self.output}, a file", wanted="a folder", next_step="Choose another output."
            )

    @property
    def plan_key(self) -> str:
        """Key of all that the plan depends on."""
        return content_key(self.plan_inputs)

    @cached_property
    def plan_inputs(self) -> dict[str, Any]:
        """What the plan is made from."""
        return {
            "model": self.base_fingerprint,
            "method": [self.method.name, self.method],
            "targets": self.recipe.targets,
            "knowledge": None if self.calibration is None else self.calibration.fingerprint,
            "dtype": self.recipe.dtype,
        }


def _render_all(rows: list[Row], template: str, where: str) -> list[str]:
    return [render(template, row, where=f"{where} row {n}") for n, row in enumerate(rows, start=1)]
