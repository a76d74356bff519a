"""lm-eval's task objects: its own task files, with the data, the shots and the scoring that an entry names."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from keeptune.core.errors import DataError, ModelError, RecipeError, nearest
from keeptune.core.processes import by_first
from keeptune.data.sources import Row
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.language_model import INSTALL
from keeptune.evaluation.standard.local_data import files_of, local_rows
from keeptune.evaluation.standard.protocols import PROTOCOLS, overrides_of
from keeptune.evaluation.standard.sandbox import METRIC, Runs, open_sandbox, task_overrides

_LOG = logging.getLogger(__name__)
SEED = 1234  # lm-eval's own for drawing examples: prompts do not depend on the run's seed
_ROLLING = {
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    "metadata": {"version": 1.0},
}
# Of IFEval's checks, those that split a text into sentences or words with nltk's data.
BY_SENTENCE = ("length_constraints:number_sentences", "change_case:capital_word_frequency")

_Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Built:
    """The tasks of one benchmark."""

    tasks: Mapping[str, Any]  # lm-eval's name to its task object
    runs: Runs | None  # runs answers that are programs
    note: str = ""  # departure from lm-eval's task, for the record


def build_tasks(benchmark: NamedBenchmark, *, run: bool = True) -> Built:
    """Builds lm-eval's task objects, with their data; a sandbox is opened only if answers are to be scored (``run``).

    Raises:
        RecipeError: lm-eval or a library that the task needs is missing, or it has no such task.
        DataError: The data can neither be fetched nor read, or hold no examples for the prompt.
    """
    row, how = benchmark.row, benchmark.how
    name = benchmark.task or benchmark.name
    protocol = None if how is None or how.protocol is None else PROTOCOLS[how.protocol, name]
    task, folders = benchmark.lm_eval_task, () if row is None else row.folders
    code = row is not None and row.code
    runs = Runs(name, by_first(lambda: open_sandbox(benchmark.where))) if code and run else None
    overrides: _Config = {}
    if code:
        overrides |= task_overrides(name, (lambda *_: {METRIC: 0.0}) if runs is None else runs.process)
    if protocol is not None:
        task, folders = protocol.task or (task, folders)
        overrides |= overrides_of(protocol, METRIC, overrides.get("process_results"))
    if row is not None and not folders:
        configs: dict[str, _Config] = {task: {"task": task, **_ROLLING}}
    else:
        with _explained(benchmark):
            configs = _configs(benchmark, task, folders, resolve=not code)
    for leaf, config in configs.items():
        kept = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")} | overrides
        shots = kept.get("num_fewshot") or 0 if benchmark.shots is None else benchmark.shots
        configs[leaf] = kept | {"num_fewshot": shots}
    note = ""
    if benchmark.data is not None:
        configs, note = _with_data(benchmark, name, configs)
    tasks = {leaf: _task(benchmark, config) for leaf, config in configs.items()}
    if name == "ifeval":
        import nltk

        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError as error:
            rows = list(tasks[task].eval_docs)[: benchmark.examples]
            needing = sum(any(check in BY_SENTENCE for check in row["instruction_id_list"]) for row in rows)
            if needing:
                raise DataError(
                    benchmark.where,
                    got=f"no punkt_tab, nltk's data, which {needing} of {len(rows)} items need",
                    wanted="nltk's punkt_tab",
                    next_step="Run `python -m nltk.downloader punkt_tab` where there is a network, or set NLTK_DATA.",
                ) from error
    return Built(tasks, runs, note)


def _configs(benchmark: NamedBenchmark, task: str, folders: Sequence[str], *, resolve: bool) -> dict[str, _Config]:
    from lm_eval import tasks as shipped
    from lm_eval.tasks._yaml_loader import load_yaml

    # The index of all of lm-eval takes many seconds to make.
    paths = [str(Path(shipped.__file__).parent / folder) for folder in folders]
    manager = shipped.TaskManager(include_path=paths, include_defaults=False) if folders else shipped.TaskManager()
    index = manager.task_index
    if task not in index:
        # The nearest of thousands, without the list of the others.
        sentence = nearest(task, manager.all_tasks).partition(" Known:")[0]
        raise RecipeError(
            f"{benchmark.where}.task",
            got=f'"{task}"',
            wanted="a task of lm-eval",
            next_step=sentence if sentence.startswith("Did you") else "`lm_eval ls tasks` lists them.",
        )
    configs: dict[str, _Config] = {}
    for leaf in _leaves(task, index):
        path = index[leaf].yaml_path
        if path is None or "class" in (index[leaf].cfg or {}):
            raise RecipeError(
                f"{benchmark.where}.task",
                got=f'"{leaf}", which is written in Python',
                wanted="a task of lm-eval that a YAML file describes",
                next_step="Choose another task, or score your own file with `file` and `metric`.",
            )
        # IFEval's file fetches nltk's sentences when it is read, and prints how that went.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            configs[leaf] = load_yaml(path, resolve_func=resolve)
    return configs


def _leaves(task: str, index: Mapping[str, Any]) -> list[str]:
    entry = index[task]
    kind = entry.kind.name
    if kind not in ("TAG", "GROUP"):
        return [task]
    parts = sorted(entry.tags) if kind == "TAG" else entry.cfg["task"]
    names = [part if isinstance(part, str) else str(part.get("task") or part.get("group")) for part in parts]
    return [leaf for name in names for leaf in _leaves(name, index)]


def _scored_split(config: Mapping[str, Any]) -> str:
    return str(config.get("test_split") or config.get("validation_split"))


def _shot_split(config: Mapping[str, Any]) -> str | None:
    """Returns the split that examples are drawn from, by lm-eval's rule; None where the task lists them itself."""
    own = config.get("fewshot_config") or {}
    if own.get("split") or config.get("fewshot_split"):
        return str(own.get("split") or config.get("fewshot_split"))
    if own.get("samples") is not None:
        return None
    return str(config.get("training_split") or config.get("validation_split") or config.get("test_split"))


def _with_data(benchmark: NamedBenchmark, name: str, configs: Mapping[str, _Config]) -> tuple[dict[str, _Config], str]:
    first = next(iter(configs.values()))
    if name == "math":
        # lm-eval has a task for each subject of the hub's data, alike but for their names.
        configs = {name: first | {"task": name}}
    splits = [_scored_split(first)]
    shot_split = _shot_split(first)
    if shot_split is not None and first["num_fewshot"] and shot_split not in splits:
        splits.append(shot_split)
    paths = files_of(name, Path(str(benchmark.data)), splits, where=benchmark.where)
    rows = {split: local_rows(name, split, path, where=benchmark.where) for split, path in paths.items()}
    parts = dict.fromkeys(configs, rows)
    if name == "mmlu":
        parts = {}
        for split, row in ((part, one) for part in splits for one in rows.get(part, ())):
            leaf = f"mmlu_{row['subject']}"
            if split == splits[0] and leaf not in configs:
                raise DataError(
                    f"{benchmark.where}.data",
                    got=f'the subject "{row["subject"]}"',
                    wanted="a subject of MMLU",
                    next_step=nearest(row["subject"], [known.removeprefix("mmlu_") for known in configs]),
                )
            if split == splits[0] or leaf in parts:
                parts.setdefault(leaf, {}).setdefault(split, []).append(row)
        if len(parts) < len(configs):
            _LOG.warning("%s: %d of %d subjects are in the data.", benchmark.where, len(parts), len(configs))
    if len(parts) > 1 and name != "mmlu":
        raise RecipeError(
            f"{benchmark.where}.data",
            got=f"local data for {len(parts)} tasks at once",
            wanted="one task",
            next_step=f"Name one of them by `task:`: {', '.join(sorted(parts)[:8])}.",
        )
    note, extra = "", {}
    if name == "boolq" and any("passage" not in row for row in rows[splits[0]]):
        note = "no passages in these rows: the question stands alone"
        extra = {"doc_to_text": "Question: {{question}}?\nAnswer:"}
        _LOG.warning("%s: %s.", benchmark.where, note)
    return {leaf: _local(configs[leaf] | extra, own, benchmark.where) for leaf, own in parts.items()}, note


def _local(config: Mapping[str, Any], rows: Mapping[str, list[Row]], where: str) -> _Config:
    from datasets import Dataset

    if _scored_split(config) not in rows:
        raise DataError(where, got="no rows", wanted=f"rows of {config['task']}", next_step="Fill the file.")
    data = {split: Dataset.from_list([dict(row) for row in own]) for split, own in rows.items()}
    splits = ("training_split", "validation_split", "test_split", "fewshot_split")
    drop = {key: None for key in splits if config.get(key) not in rows}
    if config.get("fewshot_config") and not config["num_fewshot"]:
        drop["fewshot_config"] = None
    return {**config, **drop, "custom_dataset": lambda **_: data, "dataset_kwargs": None}


def _task(benchmark: NamedBenchmark, config: _Config) -> Any:
    from lm_eval.api.task import ConfigurableTask

    shots, scored, source = config["num_fewshot"], _scored_split(config), _shot_split(config)
    if shots and source in (scored, "None"):
        raise DataError(
            f"{benchmark.where}.shots",
            got=f"{shots} examples that would be drawn from the items that are scored",
            wanted="examples from another split",
            next_step="Set `shots: 0`, or let `data` name a folder that has the training split as well.",
        )
    with _explained(benchmark):
        task = ConfigurableTask(config=config)
    task.set_fewshot_seed(SEED)
    if shots and len(task.sampler.df) < shots:
        raise DataError(
            f"{benchmark.where}.shots",
            got=f"{shots}, with {len(task.sampler.df)} examples to draw from",
            wanted="no more than there are",
            next_step="Lower shots.",
        )
    return task


@contextmanager
def recorded_shots(built: Built) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Notes which examples lm-eval draws for each prompt.

    Yields:
        Task to the examples of each of its prompts in turn, as rows of their split from 0.
    """
    noted: dict[str, list[tuple[int, ...]]] = {}
    with ExitStack() as stack:
        for leaf, task in built.tasks.items():
            if task.config.num_fewshot:
                noted[leaf] = []
                places = {id(row): place for place, row in enumerate(task.sampler.df)}
                sample = partial(_noted, noted[leaf], places, task.sampler.sample)
                stack.enter_context(mock.patch.object(task.sampler, "sample", sample))
        yield noted


def _noted(noted: list[tuple[int, ...]], places: Mapping[int, int], draw: Any, *given: Any, **options: Any) -> Any:
    rows = draw(*given, **options)
    noted.append(tuple(places[id(row)] for row in rows))
    return rows


@contextmanager
def _explained(benchmark: NamedBenchmark) -> Iterator[None]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except ModuleNotFoundError as error:
        raise RecipeError(
            benchmark.where,
            got=f"a task of lm-eval that needs a library which is missing ({' '.join(str(error).split())})",
            wanted="the libraries of the benchmarks",
            next_step=f"Run `{INSTALL}`.",
        ) from error
    except (OSError, DatasetsError, HfHubHTTPError) as error:
        raise DataError(
            benchmark.where,
            got=f"no data for lm-eval's {benchmark.lm_eval_task}: {' '.join(str(error).split())[:300]}",
            wanted="a connection to the hub, or the data on this machine",
            next_step="Run once where the hub can be reached, or give `data: folder` with the JSONL files that "
            "docs/guides/benchmarks.md names.",
        ) from error
    except AssertionError as error:
        raise ModelError(
            benchmark.where, got=f"lm-eval refuses: {error}", wanted="a task it can build", next_step="Report it."
        ) from error
