"""Files, rows and tokens of the data that a recipe names, as far as they are on this machine; None is not known."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from keeptune.data import hub
from keeptune.data.examples import LanguageExamples
from keeptune.data.sources import read_jsonl
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.evaluation.items import load_items
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.model.pretrained import LoadOptions, load_tokenizer
from keeptune.pipeline.job import Job
from keeptune.recipe.schema import Recipe

_SAMPLE = 256  # rows whose tokens are counted, to estimate those of all
_POSITIONS = 2048  # tokens of an item of a benchmark at most, where neither recipe nor model says


@dataclass(frozen=True)
class Need:
    """A model, data file or benchmark that a run needs; what is not ``at_hand`` is fetched."""

    what: str  # model, task, knowledge or benchmark
    name: str  # its path, or its name on the hub
    at_hand: bool
    size: int | None = None  # bytes
    revision: str | None = None  # on the hub; None is the newest


@dataclass(frozen=True)
class Scored:
    """A benchmark that would be scored."""

    name: str
    role: str
    items: int | None
    metric: str
    length: float  # tokens of an item, all its choices together: a mean where ``measured``, else the most
    longest: int  # tokens of the longest sequence
    batch: int  # sequences in a forward pass, at most
    measured: bool


def rows_of(name: str, limit: int | None) -> int | None:
    """Counts the rows that are used of a data file, at most ``limit``; of a file on the hub only the limit is known."""
    return limit if name.startswith(hub.PREFIX) else len(read_jsonl(name, where=name)[:limit])


def on_the_hub(recipe: Recipe) -> bool:
    """Returns whether a file of the task is on the hub."""
    return any(part.file.startswith(hub.PREFIX) for part in recipe.task.files)


def data_needs(recipe: Recipe) -> tuple[list[Need], list[Need]]:
    """Returns the data files that a recipe names, and the benchmarks that lm-eval would fetch, each once."""
    named = [("task", part.file) for part in recipe.task.files]
    named += [("knowledge", file) for file in recipe.knowledge_files]
    fetched = []
    for one in recipe.evaluate:
        path = one.file if isinstance(one, FileBenchmark) else one.data
        if path is not None:
            named.append(("benchmark", path))
        elif isinstance(one, NamedBenchmark):
            fetched.append(Need("benchmark", f"{one.name} (lm-eval: {one.lm_eval_task})", at_hand=False))
    return [_file(what, name) for what, name in dict.fromkeys(named)], fetched


def _file(what: str, name: str) -> Need:
    if name.startswith(hub.PREFIX):
        return Need(what, name, at_hand=False, revision=name.partition("@")[2].partition("/")[0] or None)
    path = Path(name)
    return Need(what, name, at_hand=path.exists(), size=path.stat().st_size if path.exists() else None)


@dataclass(frozen=True)
class Sampled:
    """Texts that statistics are taken over."""

    texts: int  # how many
    mean: float  # tokens of a text: a mean where ``measured``, else the most there can be
    longest: int  # tokens of the longest
    measured: bool


@dataclass(frozen=True)
class Lengths:
    """Tokens of a recipe's data: means over what is on this machine, bounds elsewhere."""

    job: Job
    positions: int | None  # of the model; None is without limit

    @property
    def most(self) -> int:
        """Tokens of a training example at most."""
        given = self.job.recipe.train.get("max_length")
        return int(given or min(1024, self.positions or 1024))

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        model = Path(self.job.recipe.model).expanduser()
        if not model.exists() or (model.is_dir() and not any(model.glob("tokenizer*"))):
            return None
        return load_tokenizer(str(model), LoadOptions(trust_remote_code=self.job.recipe.trust_remote_code))

    def _counts(self, texts: Sequence[str], most: int) -> list[int]:
        if self._tokenizer is None or not texts:
            return []
        # 1: the end of text that is learned after each.
        return [min(len(ids) + 1, most) for ids in self._tokenizer(list(texts))["input_ids"]]

    @cached_property
    def rows(self) -> int | None:
        """The training examples; of files on the hub only the limit is known, if there is one."""
        return self.job.recipe.task.examples if on_the_hub(self.job.recipe) else len(self.job.task)

    @cached_property
    def task(self) -> list[int]:
        """Tokens of the first training examples; empty where they or the tokenizer are not on this machine."""
        if on_the_hub(self.job.recipe):
            return []
        examples = self.job.task
        if isinstance(examples, LanguageExamples):
            if self._tokenizer is None:
                return []
            rows = examples.token_rows(self._tokenizer, range(min(_SAMPLE, len(examples))))
            return [min(len(row.ids), self.most) for row in rows]
        return self._counts(examples.texts.whole[:_SAMPLE], self.most)

    def calibration(self, role: str) -> Sampled:
        """Returns the texts that the statistics of a role are taken over: as they are, or bounds of them."""
        recipe, parts = self.job.recipe, self.job.recipe.knowledge_sets.values()
        own = self.job.generations.values() if role == "knowledge" else ()
        files = [part.file for part in (recipe.task.files if role == "task" else parts)]
        if self._tokenizer is not None and files and not own and not any(file.startswith(hub.PREFIX) for file in files):
            found = self.job.task_calibration if role == "task" else self.job.calibration
            counts = [len(ids) for ids in found.sequences] if found is not None else []
            return Sampled(len(counts), sum(counts) / max(len(counts), 1), max(counts, default=0), True)
        if role == "task":
            wanted = recipe.task.calibration
            most = self._capped(wanted.max_length)
            return Sampled(min(wanted.examples, self.rows or wanted.examples), most, most, False)
        texts = sum(part.examples for part in parts) + sum(part.count for part in own)
        most = self._capped(max([part.max_length for part in parts] + [part.max_length for part in own], default=0))
        return Sampled(texts, most, most, False)

    def _capped(self, length: int) -> int:
        return min(length, self.positions or length)

    def scored(self, benchmark: FileBenchmark | NamedBenchmark) -> Scored:
        """Returns the account of a benchmark; of items that are at hand the first ones are counted."""
        most = self._capped(benchmark.max_length or _POSITIONS)
        counts: list[list[int]] = []  # of an item each of its sequences: a choice is one of its own
        items, new = benchmark.examples, 0
        if isinstance(benchmark, FileBenchmark):
            items = rows_of(benchmark.file, benchmark.examples)
            # A generated answer is counted at its longest.
            new = benchmark.max_new_tokens if benchmark.metric == "exact_match" else 0
            if not benchmark.file.startswith(hub.PREFIX) and self._tokenizer is not None:
                for item in load_items(benchmark, Path())[:_SAMPLE]:
                    plain = item.prompt or item.text + (item.text_pair or "")
                    texts = [item.prompt + choice for choice in item.choices] or [plain]
                    counts.append(self._counts(texts, most))
        elif benchmark.data is None and benchmark.row is not None and benchmark.row.items is not None:
            items = min(benchmark.row.items, benchmark.examples or benchmark.row.items)
        return Scored(
            name=benchmark.name,
            role=str(benchmark.role),
            items=items,
            metric=str(benchmark.metric),
            length=sum(map(sum, counts)) / len(counts) + new if counts else float(most),
            longest=min(max(map(max, counts)) + new, most) if counts else most,
            batch=benchmark.batch_size,
            measured=bool(counts),
        )
