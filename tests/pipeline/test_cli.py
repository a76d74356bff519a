"""The command line: its commands alone and in order, and what they say off a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import METHODS, keeptune, write_recipe

Values = Callable[..., dict[str, Any]]
COMMANDS = [
    "demo",
    "run",
    "stats",
    "plan",
    "train",
    "check",
    "evaluate",
    "export",
    "merge",
    "report",
    "sweep",
    "energy",
    "store",
    "data",
]
HELP = """
import sys
sys.argv = ["keeptune", *{words}]
from keeptune.cli.main import main
try:
    main()
except SystemExit as ended:
    print("code", ended.code)
heavy = [name for name in ("torch", "transformers", "datasets", "peft", "trl") if name in sys.modules]
print("heavy", heavy)
"""


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["store", "clear", "--help"], []])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    command = [sys.executable, "-c", HELP.format(words=words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "100"})
    assert "heavy []" in done.stdout, done.stdout + done.stderr
    if words == ["--help"]:
        listed = re.findall(r"^\W+(\w+)  ", done.stdout, flags=re.MULTILINE)
        assert set(COMMANDS) <= set(listed)
        assert "code 0" in done.stdout


def test_a_run_off_a_terminal_is_quiet(recipe_values: Values, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(method=METHODS["lora-null-v2"]))
    command = [str(Path(sys.executable).with_name("keeptune")), "run", str(recipe), "--train.max_steps", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for stream in (done.stdout, done.stderr):
        assert "\r" not in stream
        assert "\x1b" not in stream
        assert not re.search(r"it/s|s/it|examples/s|%\|", stream)
    assert "lora-null-v2" in done.stdout
    assert done.stdout.rstrip().endswith(f"report: {tmp_path / 'out' / 'report.html'}")
    for line in done.stderr.splitlines():
        assert re.match(r"(stats|statistics|plan|training|train|export|evaluate|report|lora-null)\b", line), line


def test_the_data_shown_are_those_trained_on(
    recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(replay=0.2, train={"max_length": 40, "max_steps": 1}))
    rows = tmp_path / "rows.jsonl"
    said = keeptune("data", recipe, "--show", "1", "--rows", rows, capsys=capsys)
    assert said.code == 0
    assert "── example 1 ──" in said.out and "⟦" in said.out
    (counts,) = re.findall(r"^(\d+) of (\d+) examples, (\d+) tokens, (\d+) of them learned", said.out, re.MULTILINE)
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert [len(lines), sum(len(line["labels"]) for line in lines)] == [int(counts[0]), int(counts[2])]
    assert sum(label != -100 for line in lines for label in line["labels"]) == int(counts[3])
    assert not (tmp_path / "out").exists()
    assert keeptune("run", recipe, capsys=capsys).code == 0
    recorded = json.loads((tmp_path / "out" / "trained" / "train.json").read_text())["data"]
    assert [recorded["kept"], recorded["learned"]] == [int(counts[0]), int(counts[3])]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Training data" in page and "<mark>" in page


def test_every_stage_alone_in_order(recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = recipe_values(method=METHODS["lora-null-v1"], store=tmp_path / "store")
    recipe, out = write_recipe(tmp_path / "recipe.yaml", given), tmp_path / "out"
    said = keeptune("stats", recipe, capsys=capsys)
    assert said.code == 0
    assert said.out == f"20 statistics for 35 targets in {tmp_path / 'store'}\n"
    assert not (out / "plan").exists()

    said = keeptune("plan", recipe, capsys=capsys)
    assert said.code == 0
    assert "start error: at most" in said.out
    assert "35 targets, 23,120 trained parameters" in said.out
    assert "q_proj" in said.out and len(re.findall(r"^ *\d( +4)+ *$", said.out, re.MULTILINE)) == 5
    assert {path.name for path in out.iterdir()} == {"plan", "recipe.json"}

    assert keeptune("train", recipe, capsys=capsys).out == f"trained factors in {out / 'trained'}\n"
    said = keeptune("export", recipe, capsys=capsys)
    assert said.out.startswith(f"portable in {out / 'adapter'}, rank 8\ngap to the trained model")
    assert "vllm serve" in said.out
    said = keeptune("evaluate", recipe, capsys=capsys)
    assert said.code == 0
    assert all(name in said.out for name in ("stories", "sums", "animals"))
    assert not (out / "report.json").exists()
    said = keeptune("report", out, capsys=capsys)
    assert said.out.rstrip().endswith(f"report: {out / 'report.html'}")
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["methods"][0]["name"] == "lora-null-v1"


def test_plan_of_full_fine_tuning(recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(method=METHODS["full"]))
    assert "every weight is trained" in keeptune("plan", recipe, capsys=capsys).out


def test_a_method_in_short_and_its_options(
    recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values())
    said = keeptune("plan", recipe, "--method", "lora", "--method.rank", 2, "--layers", "[1]", capsys=capsys)
    assert said.code == 0
    assert "7 targets, 2,312 trained parameters" in said.out


def test_an_adapter_of_another_run_is_scored_apart(
    recipe_values: Values, finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values())
    said = keeptune("evaluate", recipe, "--adapter", finished("lora") / "adapter", capsys=capsys)
    assert said.code == 0
    (folder,) = (tmp_path / "out").glob("evaluation-*")
    theirs = finished("lora") / "evaluation"
    for name in ("stories", "sums", "animals"):
        assert (folder / f"{name}.items.jsonl").read_bytes() == (theirs / f"{name}.items.jsonl").read_bytes()
    said = keeptune("evaluate", recipe, "--adapter", finished("full") / "merged", capsys=capsys)
    assert said.code == 0
    assert len(list((tmp_path / "out").glob("evaluation-*"))) == 2
