"""Whatever a recipe, a data file or a model's config holds: a result or a KeeptuneError, within seconds.

The gate tries a few, the same ones each time; `KEEPTUNE_EXAMPLES=10000 pytest -n0 tests/pipeline/test_any_input.py`
tries so many of each kind (`make attack`), and `-k rows` one kind.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tests.models import MODELS, save
from tests.pipeline.support import recipe_of, values

from keeptune.cli import main as cli
from keeptune.core.errors import KeeptuneError
from keeptune.model.pretrained import load_model
from keeptune.pipeline import task_kinds
from keeptune.pipeline.job import Job
from keeptune.recipe.schema import Recipe, load_recipe, parse_overrides

EXAMPLES = int(os.environ.get("KEEPTUNE_EXAMPLES", "0"))
Edit = Callable[[Any, Any, Any], Any]
NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**53,
    2**63,
    2**70,
    -(2**70),
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
]
TEXTS = [
    *("", " ", "\0", "\ud800", "\n", "null", "None", "1e400", "9" * 5000, "x" * 300, "~nobody/x", "/dev/null", "a/b"),
    *("{q}", "{", "{}", "{{q}}", "{messages}", "{q.0.x}", "../..", "meta", "cuda:7", "2026-01-01", "atlas:x", "hf://x"),
    *("=", "*a", "&a", "!!x", "\x1b[31m", "﷽" * 40, "user", "assistant", "[1", '{"a": NaN}', "[" * 3000, "lora"),
]
BYTES = [b"1e400", b"9" * 5000, b"\\ud800", b"NaN", b"\xef\xbb\xbf", b"\xff", b"\0", b'"', b"\n", b"[" * 3000]
LEAVES = st.sampled_from([None, True, False, *NUMBERS, *TEXTS]) | st.text(max_size=5) | st.integers() | st.floats()
KEYS = st.sampled_from(["name", "file", "text", "q", "role", "content", "0", "", "a b"]) | st.text(max_size=3)
ANY = st.recursive(LEAVES, lambda a: st.lists(a, max_size=3) | st.dictionaries(KEYS, a, max_size=3), max_leaves=6)
# Of a part of plain values, what it was, another value and a key: what it becomes.
EDITS: list[Edit] = [
    lambda old, new, key: new,
    lambda old, new, key: [old],
    lambda old, new, key: {**old, key: new} if isinstance(old, dict) else {key: old},
    lambda old, new, key: old * 2 if isinstance(old, str | list) else old,
    lambda old, new, key: old[:-1] if isinstance(old, str | list) else None,
    lambda old, new, key: dict(list(old.items())[1:]) if isinstance(old, dict) else str(old),
]


def often(count: int) -> Callable[[Any], Any]:
    """Tries a count of examples in the gate, always the same ones; each of them must end in time."""
    return settings(
        max_examples=EXAMPLES or count,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=30),
        suppress_health_check=list(HealthCheck),
    )


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of each part of plain values."""
    yield above
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*above, key))


def changed(value: Any, path: tuple[Any, ...], edit: Callable[[Any], Any]) -> Any:
    """Returns plain values with one part edited."""
    if not path:
        return edit(value)
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], edit)
    return copy


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """Draws plain values with a few parts replaced, removed, wrapped, doubled, or with a key that they had not."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))[1:] or [()]))
        edit, new, key = draw(st.sampled_from(EDITS)), draw(ANY), draw(KEYS)
        value = changed(value, path, lambda old, edit=edit, new=new, key=key: edit(old, new, key))
    return value


WHOLE: Mapping[str, Any] = {
    "knowledge": [{"file": "k.jsonl", "prompt": "{q}", "completion": "{a}"}, {"generate": 4}, "general"],
    "penalties": ["l2", {"name": "kl", "strength": 0.1}],
    "method": {"name": "keep", "rank": 4},
    "train": {
        **{"max_steps": 1, "seed": 0, "data_seed": 1, "learning_rate": 1e-3, "optim": "adamw_torch", "max_length": 32},
        **{"report_to": "none", "push_to_hub": False, "lr_scheduler_kwargs": {}, "eval_strategy": "no", "bf16": False},
    },
    "layers": [0],
    "targets": ["q_proj"],
    "trainable_token_indices": [1],
    "export": {"format": "portable", "max_gap": 0.1},
    "published": {"source": "x", "rows": [{"method": "a", "label": "b", "scores": {"sums": 1}}]},
    "store_limit": "1GB",
    "replay": 0.1,
    "device_map": {"": "cpu"},
    "quantization": {"load_in_4bit": True},
}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "train": True}]
CALLS = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "1", "tool_call_id": "x", "name": "f"},
    {"role": "assistant", "content": "Yes", "reasoning_content": "So"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
TASKS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"chat_template": "chatml"}, [{"messages": TALK}]),
    ({"chat_template": "chatml", "turns": "each"}, [{"messages": CALLS, "tools": TOOLS}]),
    (
        {"chat_template": "chatml"},
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Y"}]}],
    ),
    ({}, [{"prompt": "Hi", "completion": "Yes"}, {"prompt": "Hi", "completion": "No"}]),
    ({}, [{"instruction": "Do", "input": "this", "output": "Done", "system": "S", "history": []}]),
    ({}, [{"text": "Once upon a time."}]),
    ({"prompt": "{q}", "completion": "{a.0}"}, [{"q": "Hi", "a": ["Yes", 1, None]}]),
    ({"kind": "preference"}, [{"prompt": "Hi", "chosen": "Yes", "rejected": "No"}] * 2),
    ({"kind": "preference"}, [{"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No"}]}]),
    ({"kind": "unpaired_preference"}, [{"prompt": "a", "completion": "b", "label": x} for x in (True, False)]),
    ({"kind": "classification", "text": "{t}", "label": "{l}"}, [{"t": "a", "l": "x"}, {"t": "b", "l": "y"}]),
    ({"kind": "regression", "text": "{t}", "label": "{l}"}, [{"t": "a", "l": 1}, {"t": "b", "l": 0.5}]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


def recipe_in(folder: Path, **changes: Any) -> dict[str, Any]:
    return values(folder, folder / "out", folder / "store", **changes)


def used(recipe: Recipe) -> None:
    """Takes what a run takes of a recipe before it loads a model."""
    Job(recipe).config(recipe.output / "checkpoints", torch.float32)
    recipe.written()


@often(80)
@given(data=st.data())
def test_any_recipe(folder: Path, data: st.DataObject) -> None:
    some = data.draw(st.sets(st.sampled_from(sorted(WHOLE)), max_size=4))
    recipe = recipe_in(folder, **{key: value for key, value in WHOLE.items() if key in some})
    with contextlib.suppress(KeeptuneError):
        used(recipe_of(data.draw(mutated(recipe))))


@often(60)
@given(data=st.data())
def test_any_text_of_a_recipe(folder: Path, data: st.DataObject) -> None:
    text = yaml.safe_dump(recipe_in(folder, **WHOLE))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.integers(0, 9))
        text = text[:start] + data.draw(st.sampled_from(TEXTS) | st.text("{}[]:,&*!-? \n\"'#|>%@`a1.e\t")) + text[end:]
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(KeeptuneError):
        load_recipe(path)


@often(30)
@given(st.lists(st.sampled_from(["--train.seed", "--a.b.c", "--evaluate.0", "--task", "--method.rank", *TEXTS])))
def test_any_words_of_a_command(folder: Path, words: list[str]) -> None:
    recipe = folder / "words.yaml"
    recipe.write_text(json.dumps(recipe_in(folder)), encoding="utf-8")
    with contextlib.suppress(KeeptuneError):
        load_recipe(recipe, parse_overrides(words))


def written(rows: Any, form: str) -> bytes:
    """Writes rows in the form of a file's ending; what that form cannot hold is left out."""
    if form in (".jsonl", ".json"):
        return ("\n".join(map(json.dumps, rows)) if form == ".jsonl" else json.dumps(rows, indent=1)).encode()
    rows = [row for row in rows if isinstance(row, dict)]
    if form in (".csv", ".tsv"):
        out, names = io.StringIO(), list(dict.fromkeys(str(key) for row in rows for key in row))
        writer = csv.writer(out, csv.excel_tab if form == ".tsv" else csv.excel)
        writer.writerows([names, *[[str(row.get(name, "")) for name in names] for row in rows]])
        return out.getvalue().encode("utf-8", "surrogatepass")
    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    if form == ".parquet":
        parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_file(sink, table.schema) as to:
            to.write_table(table)
    return sink.getvalue()


def draw_file(data: st.DataObject, folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes mutated rows in some form, half of them with other bytes in some place."""
    form = data.draw(st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"]))
    try:
        content = written(data.draw(mutated(rows)), form)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError, csv.Error):  # nothing that it can hold
        content, form = b"", ".jsonl"
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(content)))
        bits = data.draw(st.binary(max_size=3) | st.sampled_from(BYTES))
        content = content[:start] + bits + content[start + data.draw(st.integers(0, 3)) :]
    file = folder / f"rows{form}"
    file.write_bytes(content)
    return file


@often(120)
@given(data=st.data())
def test_any_rows(folder: Path, data: st.DataObject) -> None:
    task, rows = data.draw(st.sampled_from(TASKS))
    file = draw_file(data, folder, rows)
    with contextlib.suppress(KeeptuneError):
        job = Job(recipe_of(recipe_in(folder, task={"train": str(file), **task}, evaluate=[])))
        job.kind.examples(job.recipe.task, task_kinds.task_files(job.recipe.task), 0).dataset(job.tokenizer, 64)


@often(10)
@given(data=st.data())
def test_any_rows_that_are_shown(folder: Path, data: st.DataObject) -> None:
    """`keeptune data`, which prints what it reads."""
    task, rows = data.draw(st.sampled_from(TASKS))
    recipe = folder / "shown.yaml"
    shown = recipe_in(folder, task={"train": str(draw_file(data, folder, rows)), **task}, evaluate=[])
    recipe.write_text(json.dumps(shown), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["keeptune", "data", str(recipe), "--rows", str(folder / "rows.txt")])
        cli.main()
    assert ended.value.code in (None, 0, 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(MODELS["llama"](), tmp_path_factory.mktemp("model") / "llama").folder


@often(20)
@given(data=st.data())
def test_any_config(model: Path, data: st.DataObject) -> None:
    file = model / "config.json"
    whole = file.read_text(encoding="utf-8")
    try:
        file.write_text(json.dumps(data.draw(mutated(json.loads(whole)))), encoding="utf-8")
        with contextlib.suppress(KeeptuneError):
            load_model(str(model))
    finally:
        file.write_text(whole, encoding="utf-8")
