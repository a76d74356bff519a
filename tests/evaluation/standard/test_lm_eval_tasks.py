"""The table and the prompts are lm-eval's own, and what goes wrong is told with what to do."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.assets import DATA
from tests.evaluation.standard.conftest import local

from keeptune.core.errors import DataError, RecipeError
from keeptune.evaluation.benchmark_data import load_documents
from keeptune.evaluation.standard import NAMES, NamedBenchmark
from keeptune.evaluation.standard.language_model import restored_process
from keeptune.evaluation.standard.lm_eval_tasks import build_tasks
from keeptune.evaluation.standard.local_data import files_of, local_rows


def engine_folder() -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def configs_of(task: str, folders: tuple[str, ...]) -> list[dict[str, Any]]:
    from keeptune.evaluation.standard.lm_eval_tasks import _configs

    benchmark = NamedBenchmark(name="x", task="some_task")
    return list(_configs(benchmark, task, folders, resolve=False).values())


@pytest.mark.parametrize("name", [name for name, row in NAMES.items() if row.folders])
def test_the_table_is_lm_evals(name: str) -> None:
    row = NAMES[name]
    for config in configs_of(row.task, row.folders):
        assert (config.get("num_fewshot") or 0) == {"gsm8k": 5, "math": 4, "mbpp": 3}.get(name, 0)
        metrics = {str(entry["metric"]).rpartition(".")[2] for entry in config["metric_list"]}
        filters = {entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]}
        for how in row.scorings.values():
            if how.key is not None:
                metric, _, chosen = how.key.partition(",")
                assert metric in metrics
                assert chosen in filters
        assert bool(config.get("unsafe_code")) == row.code


PROMPTS = {
    "gsm8k": "Question: Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes "
    "muffins for her friends every day with four. She sells the remainder at the farmers' market daily for $2 per "
    "fresh duck egg. How much in dollars does she make every day at the farmers' market?\nAnswer:",
    "nq_open": "Answer these questions:\n\nQ: when was the last time anyone was on the moon?\nA:",
    "webqs": "Question: what does jamaican people speak?\nAnswer:",
    "mmlu": "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
    "Statement 1 | A factor group of a non-Abelian group is non-Abelian. Statement 2 | If K is a normal subgroup of "
    "H and H is a normal subgroup of G, then K is a normal subgroup of G.\n"
    "A. True, True\nB. False, False\nC. True, False\nD. False, True\nAnswer:",
    "arc_easy": "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\n"
    "Answer:",
    "boolq": "Question: does ethanol take more energy make that produces?\nAnswer:",
    "openbookqa": "A person wants to start saving money so that they can afford a nice vacation at the end of the "
    "year. After looking over their budget and expenses, they decide the best way to save money is to",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_by_hand(name: str) -> None:
    with restored_process("test"):
        task = next(iter(build_tasks(local(name, shots=0)).tasks.values()))
        assert task.fewshot_context(task.task_docs[0], 0) == PROMPTS[name]


def test_prompts_of_programs_are_lm_evals_templates() -> None:
    from lm_eval.utils import apply_template

    for name in ("humaneval", "mbpp"):
        with restored_process("test"):
            task = build_tasks(local(name), run=False).tasks[name]
            config = configs_of(name, (name,))[0]
            rows = list(task.task_docs)[:20]
            assert [task.doc_to_text(row) for row in rows] == [apply_template(config["doc_to_text"], r) for r in rows]
            assert task.config.generation_kwargs["until"] == config["generation_kwargs"]["until"]
            assert [row["task_id"] for row in rows][:2] == (
                ["HumanEval/0", "HumanEval/1"] if name == "humaneval" else [11, 12]
            )
            assert len(task.task_docs) == (20 if name == "humaneval" else 30)


def test_examples_of_mbpp_are_lm_evals() -> None:
    """Its list stands in a file that runs ``code_eval`` when it is imported, so it is read, not run."""
    tree = ast.parse((engine_folder() / "mbpp/utils.py").read_text(encoding="utf-8"))
    listed = next(node for node in tree.body if getattr(node, "name", "") == "list_fewshot_samples")
    samples = ast.literal_eval(next(n.value for n in ast.walk(listed) if isinstance(n, ast.Return) and n.value))
    with restored_process("test"):
        task = build_tasks(local("mbpp"), run=False).tasks["mbpp"]
        prompt = task.fewshot_context(task.task_docs[0], 3)
    assert [{key: row[key] for key in samples[0] if key != "is_fewshot"} for row in task.sampler.df] == [
        {key: value for key, value in sample.items() if key != "is_fewshot"} for sample in samples
    ]
    for sample in samples:
        assert f"{sample['test_list'][2]}\n[BEGIN]\n{sample['code']}\n[DONE]\n\n" in prompt
    assert "code_eval" not in str(sys.modules.get("lm_eval.tasks.mbpp.utils", ""))


def test_examples_are_drawn_as_lm_eval_draws_them() -> None:
    """Seeded, from the training split, others for every item; the seed is lm-eval's own."""
    import random

    with restored_process("test"):
        task = build_tasks(local("gsm8k", shots=2)).tasks["gsm8k"]
        rows = [json.loads(line) for line in (DATA / "gsm8k/train.jsonl").read_text("utf-8").split("\n") if line]
        drawn = random.Random(1234)
        for item in range(2):
            first, second = drawn.sample(rows, 2)
            assert task.fewshot_context(task.task_docs[item], 2).startswith(
                f"Question: {first['question']}\nAnswer: {first['answer']}\n\nQuestion: {second['question']}\nAnswer:"
            )


def test_a_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r'evaluate.gsm8k.*without lm-eval.*pip install "keeptune\[benchmarks\]"'):
        load_documents(NamedBenchmark(name="gsm8k"))


def test_a_missing_library_of_a_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langdetect", None)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RecipeError, match=r'needs a library.*langdetect.*pip install "keeptune\[benchmarks\]"'):
        load_documents(local("ifeval"))


@pytest.mark.parametrize("name", ["triviaqa", "hellaswag", "mmlu", "mbpp", "cola"])
def test_without_the_hub_the_error_names_the_way_out(name: str) -> None:
    """The real path to the hub: lm-eval asks for the data, and the tests are offline."""
    with pytest.raises(DataError, match=r"no data for lm-eval's .*Hub.*give `data: folder`") as raised:
        load_documents(NamedBenchmark(name=name, run_code=name == "mbpp"))
    assert raised.value.where == f"evaluate.{name}"


def test_an_unknown_task_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks

    manager = tasks.TaskManager  # of a part: the index of all of lm-eval takes many seconds
    folder = str(engine_folder() / "gsm8k")
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager(include_path=folder, include_defaults=False))
    with pytest.raises(RecipeError, match='evaluate.x.task: got "gsm8k_cott".*Did you mean "gsm8k_cot"'):
        load_documents(NamedBenchmark(name="x", task="gsm8k_cott"))
    with pytest.raises(RecipeError, match="lm_eval ls tasks"):
        load_documents(NamedBenchmark(name="x", task="zzzzzz"))


def test_examples_for_the_prompt_need_a_split_of_their_own(tmp_path: Path) -> None:
    lines = (DATA / "gsm8k/test.jsonl").read_text("utf-8").splitlines(keepends=True)[:6]
    (tmp_path / "test.jsonl").write_text("".join(lines), "utf-8")
    assert len(load_documents(NamedBenchmark(name="gsm8k", data=str(tmp_path), shots=0)).parts) == 6
    with pytest.raises(DataError, match=r"evaluate.gsm8k.shots.*drawn from the items that are scored.*shots: 0"):
        load_documents(NamedBenchmark(name="gsm8k", data=str(tmp_path), shots=1))
    (tmp_path / "train.jsonl").write_text("".join(lines[4:]), "utf-8")
    with pytest.raises(DataError, match=r"evaluate.gsm8k.shots.*2 of the 2 examples of gsm8k that are scored too"):
        load_documents(NamedBenchmark(name="gsm8k", data=str(tmp_path), shots=1))
    assert len(load_documents(NamedBenchmark(name="gsm8k", data=str(tmp_path), shots=2, examples=4)).parts) == 4
    with pytest.raises(DataError, match=r"3, with 2 examples to draw from"):
        load_documents(NamedBenchmark(name="gsm8k", data=str(tmp_path), shots=3, examples=4))
    with pytest.raises(DataError, match=r"evaluate.humaneval.shots.*shots: 0"):
        load_documents(local("humaneval", shots=1))


def test_files_and_folders(tmp_path: Path) -> None:
    for file in ("dev.jsonl", "other.jsonl"):
        (tmp_path / file).write_text("{}\n", "utf-8")
    found = files_of("nq_open", tmp_path, ["validation", "train"], where="x")
    assert found == {"validation": tmp_path / "dev.jsonl"}
    found = files_of("nq_open", tmp_path / "other.jsonl", ["validation"], where="x")
    assert found == {"validation": tmp_path / "other.jsonl"}
    with pytest.raises(DataError, match=r"x.data.*none of its files.*test.jsonl"):
        files_of("gsm8k", tmp_path, ["test"], where="x")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("gsm8k", {"question": "q"}),
        ("mmlu", {"subject": "anatomy", "question": "q", "choices": ["a", "b"], "answer": "C"}),
        ("mmlu", {"subject": "anatomy", "question": "q", "choices": ["a", "b"], "answer": 2}),
        ("arc_easy", {"instruction": "Choose!", "answer": "answer1"}),
        ("openbookqa", {"question_stem": "q"}),
        ("boolq", {"question": "q"}),
        ("triviaqa", {"question": "q", "answer": "a"}),
    ],
)
def test_rows_in_no_known_form_are_named(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    with pytest.raises(DataError, match=r"evaluate.x.data.*rows.jsonl row 1.*cannot be read"):
        local_rows(name, "test", path, where="evaluate.x")


@pytest.mark.parametrize(
    ("name", "row", "read"),
    [
        ("triviaqa", {"question": "q", "answers": ["a"]}, {"question": "q", "answer": {"aliases": ["a"]}}),
        (
            "triviaqa",
            {"question": "q", "answer": {"aliases": ["a"], "value": "a"}},
            {"question": "q", "answer": {"aliases": ["a"]}},
        ),
        ("boolq", {"passage": "p", "question": "q", "answer": True}, {"passage": "p", "question": "q", "label": 1}),
        (
            "boolq",
            {"passage": "p", "question": "q", "label": 0, "idx": 3},
            {"passage": "p", "question": "q", "label": 0},
        ),
        ("hellaswag", {"anything": 1}, {"anything": 1}),
    ],
)
def test_forms_of_rows(tmp_path: Path, name: str, row: dict[str, Any], read: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    assert local_rows(name, "test", path, where="x") == [read]


def test_a_passage_is_in_the_prompt_where_there_is_one(tmp_path: Path) -> None:
    row = {"passage": "Water is wet.", "question": "is water wet", "label": 1}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    with restored_process("test"):
        built = build_tasks(NamedBenchmark(name="boolq", data=str(tmp_path)))
        task = built.tasks["boolq"]
        assert task.fewshot_context(task.task_docs[0], 0) == "Water is wet.\nQuestion: is water wet?\nAnswer:"
    assert built.note == ""
