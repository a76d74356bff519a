"""The README's recipe and the guide's Python run, pages are up to date, and every link leads somewhere."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import keeptune
from keeptune.atlas import data_path, model_path
from keeptune.core.artefact import write_bytes
from keeptune.data.sources import read_jsonl
from keeptune.model.pretrained import load_model, load_tokenizer
from keeptune.pipeline.run import run
from keeptune.recipe.schema import load_recipe

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/guides/python.md"
OWN = ROOT / "docs/guides/own-trainer.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("recipes/*.md"), *sorted((ROOT / "docs").rglob("*.md"))]


def block(page: Path, language: str, number: int = 0) -> str:
    """A block of code in a language, the first by default."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[number]


@pytest.mark.filterwarnings("default")  # as where it is run on its own
def test_the_python_guide_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block(GUIDE, "python"), GUIDE.name, "exec"), {"__name__": "guide"})
    assert "Exported(" in capsys.readouterr().out
    assert (tmp_path / "runs/guide/adapter/adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("default")
def test_the_guide_to_ones_own_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On atlas, for two steps; its numbers on the page are of SmolLM2."""
    monkeypatch.chdir(tmp_path)
    code = block(OWN, "python").replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model_path()))
    code = code.replace("generate=64", "generate=8").replace("max_steps=40", "max_steps=2, use_cpu=True")
    exec(compile(code, OWN.name, "exec"), {"__name__": "guide"})
    report = json.loads((tmp_path / "runs/mine/keeptune/report.json").read_text())
    assert [row["name"] for row in report["methods"][0]["benchmarks"]] == ["topics"]


def test_the_guides_statistics_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_model(str(model_path())), load_tokenizer(str(model_path()))
    names = {"keeptune": keeptune, "model": model, "tokenizer": tokenizer, "knowledge": ["A dog is a pet."]}
    exec(compile(block(GUIDE, "python", 1), GUIDE.name, "exec"), names)
    assert names["traced"].average.shape == (4,)


@pytest.mark.filterwarnings("default")
def test_the_readme_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(block(ROOT / "README.md", "yaml"), encoding="utf-8")
    facts = read_jsonl(data_path("calibration.jsonl"), where="test")
    turns = [[("user", row["question"]), ("assistant", row["answer"])] for row in facts[:20]]
    chats = [{"messages": [{"role": role, "content": text} for role, text in own]} for own in turns]
    write_bytes(Path("chat.jsonl"), "".join(f"{json.dumps(row)}\n" for row in chats).encode())
    write_bytes(
        Path("keep.jsonl"), "".join(f"{json.dumps({'text': row['question']})}\n" for row in facts[20:40]).encode()
    )
    shorter = {
        "model": "atlas",
        "task.chat_template": "chatml",
        "train.max_steps": 2,
        "store": "store",
        "device": "cpu",
    }
    run(load_recipe(Path("recipe.yaml"), shorter))
    assert Path("runs/first/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("script", ["generate.py", "fits.py"])
def test_written_pages_are_up_to_date(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, "--check"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    try:
        runpy.run_path(str(ROOT / "docs" / script), run_name="__main__")
    except SystemExit as ended:
        assert not ended.code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
