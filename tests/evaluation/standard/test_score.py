"""Standard benchmarks on a tiny model: scores equal lm-eval's and hand computation, and nothing is left changed."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tests.assets import DATA
from tests.evaluation.standard.conftest import local

from keeptune.core.bootstrap import paired_interval
from keeptune.core.errors import DataError, RecipeError
from keeptune.evaluation import AdapterPair, BenchmarkResult, NamedBenchmark, TwoModels
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import KeptAnswers
from keeptune.evaluation.standard import language_model, score_named
from keeptune.evaluation.standard.language_model import restored_process, wrapped_model
from keeptune.evaluation.standard.lm_eval_tasks import build_tasks

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHORT: dict[str, dict[str, Any]] = {
    "gsm8k": {"shots": 1, "max_length": 64},
    "nq_open": {"max_length": 64},
    "efficientqa": {"max_length": 64},
    "webqs": {},
    "mmlu": {"shots": 1, "examples": 1, "max_length": 128},
    "arc_easy": {"shots": 2},
    "boolq": {},
    "openbookqa": {},
    "humaneval": {"max_length": 64},
    "mbpp": {"max_length": 64},
    "ifeval": {"max_length": 64},
    "tinystories": {},
    "c4_text": {"examples": 1},
}


@pytest.mark.parametrize("name", SHORT)
def test_local_data_run_by_lm_eval(pair: AdapterPair, tokenizer: Any, name: str) -> None:
    if name == "ifeval":
        pytest.importorskip("langdetect")
    benchmark = local(name, **SHORT[name])
    result = evaluate(pair, tokenizer, benchmark, Path())
    assert (result.name, result.metric, result.role) == (name, benchmark.metric, benchmark.role)
    assert result.n == (57 if name == "mmlu" else benchmark.examples)
    assert len(result.groups) == (57 if name == "mmlu" else 0)
    assert [item["index"] for item in result.items] == list(range(result.n))
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert BenchmarkResult.from_jsonl(summary, result.to_jsonl()) == result
    if result.metric != "cross_entropy":
        assert {item[side] for item in result.items for side in ("before", "after")} <= {0.0, 1.0}
        assert result.before == np.mean([item["before"] for item in result.items])
        assert result.interval == paired_interval(
            [item["before"] for item in result.items], [item["after"] for item in result.items], 0
        )
    assert all(len(item.get("shots", ())) == (benchmark.shots or 0) for item in result.items if name != "mbpp")


def empty() -> Any:
    """The index of all of lm-eval's tasks takes long to make, and none is wanted."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def simple_evaluate(model: Any, tokenizer: Any, tasks: Any, limit: int, **more: Any) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # What machine this is takes a minute to find out.
    with restored_process("test"), mock.patch("lm_eval.evaluator.add_env_info"):
        asked = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3, backend="causal", **more)
        results = simple_evaluate(asked, tasks=tasks, limit=limit, bootstrap_iters=0, task_manager=empty())
        assert results is not None
        return dict(results["results"])


COMPARED = [
    ("arc_easy", {"shots": 1, "examples": 4}, "acc_norm,none"),
    ("openbookqa", {"examples": 6, "scoring": "plain"}, "acc,none"),
    ("webqs", {"examples": 4}, "exact_match,none"),
    ("nq_open", {"examples": 3, "max_length": 300}, "exact_match,remove_whitespace"),
]


@pytest.mark.parametrize(("name", "more", "key"), COMPARED)
def test_scores_are_those_of_simple_evaluate(
    pair: AdapterPair, tokenizer: Any, name: str, more: dict[str, Any], key: str
) -> None:
    benchmark = local(name, **more)
    result = score_named(pair, tokenizer, benchmark)
    for side, score in (("before", result.before), ("after", result.after)):
        with restored_process("test"):
            tasks = list(build_tasks(benchmark).tasks.values())
        with pair.before() if side == "before" else pair.after() as model:
            found = simple_evaluate(model, tokenizer, tasks, benchmark.examples or 0)
        assert score == pytest.approx(found[tasks[0].task_name][key], abs=1e-12)


def test_a_task_file_of_lm_eval_on_its_own(pair: AdapterPair, tokenizer: Any, tmp_path: Path) -> None:
    """Not through our tasks: lm-eval's file with its own reader of JSON files."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.tasks.__file__).parent / "gsm8k/gsm8k.yaml")
    files = {split: str(DATA / f"gsm8k/{split}.jsonl") for split in ("train", "test")}
    config |= {"dataset_path": "json", "dataset_name": None, "num_fewshot": 1}
    config["dataset_kwargs"] = {"data_files": files, "cache_dir": str(tmp_path)}
    config["generation_kwargs"] |= {"max_gen_toks": 48}
    del config["tag"]
    benchmark = local("gsm8k", shots=1, max_length=96, scoring="flexible")
    result = score_named(pair, tokenizer, benchmark)
    with pair.before() as model, restored_process("test"), mock.patch("lm_eval.evaluator.add_env_info"):
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        asked = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), max_length=96, backend="causal")
        found = simple_evaluate(asked, tasks=[config], limit=2, bootstrap_iters=0, task_manager=empty())
    assert found is not None
    own = [row for row in found["samples"]["gsm8k"] if row["filter"] == "flexible-extract"]
    assert [item["text_before"] for item in result.items] == [row["resps"][0][0] for row in own]
    assert [item["before"] for item in result.items] == [row["exact_match"] for row in own]
    assert result.before == found["results"]["gsm8k"]["exact_match,flexible-extract"]


@pytest.mark.parametrize(
    ("name", "more"),
    [("gsm8k", {"shots": 0}), ("openbookqa", {"role": "task"}), ("ifeval", {}), ("mbpp", {}), ("tinystories", {})],
)
def test_a_tasks_divergence_is_that_of_its_right_answers(
    pair: AdapterPair, tokenizer: Any, reference: Any, name: str, more: dict[str, Any]
) -> None:
    result = score_named(pair, tokenizer, local(name, max_length=400, **more))
    if name not in ("gsm8k", "openbookqa"):
        assert result.kl_to_base is None
        return
    total, tokens = 0.0, 0
    for item in result.items:
        right = item["answers"][0]
        whole, start = (tokenizer(item["prompt"] + text)["input_ids"] for text in (f" {right}", ""))
        places = []
        for side in ("before", "after"):
            with pair.before() if side == "before" else pair.after() as model:
                model.eval()
                places.append(reference.logits_after(model, whole[:400])[len(start) - 1 : -1].log_softmax(-1))
        total += float((places[0].exp() * (places[0] - places[1])).sum())
        tokens += len(whole) - len(start)
    assert result.kl_to_base == pytest.approx(total / tokens, rel=1e-3)


def test_choices_by_hand(pair: AdapterPair, tokenizer: Any) -> None:
    result = score_named(pair, tokenizer, local("openbookqa", examples=3))
    for item in result.items:
        for side in ("before", "after"):
            with pair.before() if side == "before" else pair.after() as model, torch.no_grad():
                model.eval()
                sums = [_sum(model, tokenizer, item["prompt"], f" {choice}") for choice in item["choices"]]
            assert item[f"loglikelihoods_{side}"] == pytest.approx(sums, abs=1e-3)
            rates = [sum_ / len(choice) for sum_, choice in zip(sums, item["choices"], strict=True)]
            assert item[side] == float(rates.index(max(rates)) == item["label"])
            assert item["metrics"]["acc_norm"][side == "after"] == item[side]
            assert item["metrics"]["acc"][side == "after"] == float(sums.index(max(sums)) == item["label"])


def _sum(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
    logs = model(ids).logits.log_softmax(-1)[0, :-1]
    return float(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def test_lm_eval_gets_the_logits_that_it_reads(stories: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are the same, to rounding, also after a text that ends in token 0, with which it pads."""
    from lm_eval.models.huggingface import HFLM

    draw = random.Random(0)
    lengths = [(30, 2), (29, 5), (12, 1), (11, 3), (3, 1)]
    requests = [(("", ""), *([draw.randrange(3, 500) for _ in range(n)] for n in pair)) for pair in lengths]
    requests += [(("", ""), [*context, 0, 0], [0, 0, 7]) for _, context, _ in requests[:2]]
    options: dict[str, Any] = {"pretrained": stories, "max_length": 96, "backend": "causal", "batch_size": 4}
    with restored_process("test"):
        plain = HFLM(tokenizer=copy.deepcopy(tokenizer), **options)
        ours = wrapped_model(stories, tokenizer, local("arc_easy", batch_size=4), length=96, kept=None)
        wanted = plain._loglikelihood_tokens(requests, disable_tqdm=True)
        columns: list[int] = []
        hook = stories.lm_head.register_forward_hook(lambda _, inputs, __: columns.append(inputs[0].shape[1]))
        found = ours._loglikelihood_tokens(requests, disable_tqdm=True)
        monkeypatch.setattr(language_model, "LOGITS_AT_ONCE", 2 * 5 * 512)  # two rows of five tokens
        again = ours._loglikelihood_tokens(requests, disable_tqdm=True)
        hook.remove()
    assert [total for total, _ in again] == pytest.approx([total for total, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], rel=1e-5)
    assert columns[:2] == [10, 13]  # 34 - 29 + 5, and all of 13: the least is 3
    assert len(columns[2:]) == 4  # of seven rows


def test_documents_by_hand(pair: AdapterPair, tokenizer: Any) -> None:
    benchmark = local("tinystories", examples=2)
    result = score_named(pair, tokenizer, benchmark)
    rows = [json.loads(line) for line in (DATA / "tinystories/stories.jsonl").read_text("utf-8").split("\n")[:2]]
    # lm-eval predicts every token that the tokenizer gives, its start token too, after one more start token; what is
    # left of a longer text is predicted after as much as the model can read before it.
    lengths = []
    with pair.before() as model, torch.no_grad():
        model.eval()
        for row, item in zip(rows, result.items, strict=True):
            ids, total = [tokenizer.bos_token_id, *tokenizer(row["text"])["input_ids"]], 0.0
            lengths.append(len(ids) - 1)
            for end in {min(len(ids), 513), len(ids)}:
                part = torch.tensor([ids[max(end - 513, 0) : end]])
                logs = model(part[:, :-1]).logits.log_softmax(-1)[0].gather(1, part[0, 1:, None])
                total -= float(logs[-(end - 513 if end > 513 else end - 1) :].sum())
            assert item["tokens"] == lengths[-1]
            assert item["before"] == pytest.approx(total / lengths[-1], abs=1e-4)
    assert lengths[0] < 512 < lengths[1] < 1024
    weights = [item["tokens"] for item in result.items]
    mean = sum(item["before"] * item["tokens"] for item in result.items) / sum(weights)
    assert result.before == pytest.approx(mean, abs=1e-12)
    assert [item["bytes"] for item in result.items] == [len(row["text"].encode()) for row in rows]
    assert result.kl_to_base is None


@pytest.mark.parametrize(
    ("name", "more"),
    [("arc_easy", {"examples": 4}), ("nq_open", {"examples": 3, "max_length": 60}), ("tinystories", {})],
)
def test_batch_size_does_not_matter(pair: AdapterPair, tokenizer: Any, name: str, more: dict[str, Any]) -> None:
    results = [score_named(pair, tokenizer, local(name, batch_size=size, **more)) for size in (1, 3)]
    for other in results[1:]:
        assert other.before == pytest.approx(results[0].before, abs=1e-5)
        assert other.after == pytest.approx(results[0].after, abs=1e-5)
        for one, two in zip(results[0].items, other.items, strict=True):
            assert one.get("text_after") == two.get("text_after")
            sums = (one.get("loglikelihoods_after", []), two.get("loglikelihoods_after", []))
            assert sums[0] == pytest.approx(sums[1], abs=1e-3)


def test_a_model_beside_itself_does_not_change(stories: Any, tokenizer: Any) -> None:
    result = score_named(TwoModels(stories, stories), tokenizer, local("arc_easy", shots=0))
    assert result.before == result.after
    assert result.interval == (0.0, 0.0)


def test_two_models_equal_the_adapter(pair: AdapterPair, stories: Any, tokenizer: Any) -> None:
    benchmark = local("openbookqa")
    adapted = score_named(pair, tokenizer, benchmark)
    merged = copy.deepcopy(pair.peft_model).merge_and_unload()
    with pair.before() as model:
        base = copy.deepcopy(model)
    found = score_named(TwoModels(base, merged), tokenizer, benchmark)
    for one, two in zip(adapted.items, found.items, strict=True):
        assert one["loglikelihoods_after"] == pytest.approx(two["loglikelihoods_after"], abs=1e-3)
    assert adapted.items[0]["loglikelihoods_before"] != adapted.items[0]["loglikelihoods_after"]


def state(pair: AdapterPair, tokenizer: Any) -> dict[str, Any]:
    model = pair.peft_model
    loggers = {name: logging.getLogger(name).level for name in ("", "lm_eval", "datasets", "transformers", "httpx")}
    return {
        "modes": [module.training for module in model.modules()],
        "grads": [weight.requires_grad for weight in model.parameters()],
        "weights": [weight.detach().clone() for weight in model.parameters()],
        "adapters": (
            model.active_adapters,
            [module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)],
        ),
        "generation": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "tokenizer": {key: repr(value) for key, value in vars(tokenizer).items()}
        | {"pad": tokenizer.pad_token, "side": tokenizer.padding_side},
        "python": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "torch": torch.get_rng_state(),
        "environment": dict(os.environ),
        "loggers": loggers,
        "handlers": [id(handler) for handler in logging.getLogger().handlers],
        "bars": datasets.is_progress_bar_enabled(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "methods": "tie_weights" in vars(model.get_base_model()),
    }


@pytest.mark.parametrize("name", ["nq_open", "arc_easy", "tinystories"])
def test_everything_is_restored(pair: AdapterPair, tokenizer: Any, name: str) -> None:
    own = copy.deepcopy(tokenizer)
    own.padding_side = "right"
    before = state(pair, own)
    score_named(pair, own, local(name, max_length=80, examples=1))
    after = state(pair, own)
    for key, value in before.items():
        same = all(map(torch.equal, value, after[key])) if key == "weights" else None
        assert (
            same
            if same is not None
            else (torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key])
        ), key


def test_everything_is_restored_after_an_error(
    pair: AdapterPair, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(pair, tokenizer)

    def fail(*_: Any, **__: Any) -> None:
        os.environ["KEEPTUNE_TEST"] = "1"
        random.seed(0)
        raise ArithmeticError

    monkeypatch.setattr("lm_eval.evaluator.evaluate", fail)
    with pytest.raises(ArithmeticError):
        score_named(pair, tokenizer, local("arc_easy"))
    after = state(pair, tokenizer)
    for key in ("modes", "grads", "generation", "tokenizer", "python", "environment", "loggers", "bars", "methods"):
        assert before[key] == after[key], key


def test_nothing_is_written_to_the_terminal(
    pair: AdapterPair, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("nq_open", "tinystories", "arc_easy"):
        score_named(pair, tokenizer, local(name, max_length=200, examples=1))
    told = capfd.readouterr()
    assert told.out == ""
    assert [
        line for line in told.err.splitlines() if "cut to their ends" not in line and "new tokens" not in line
    ] == []


def test_prompts_that_do_not_fit_are_logged(
    pair: AdapterPair, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    score_named(pair, tokenizer, local("gsm8k", shots=0, max_length=60))
    assert "evaluate.gsm8k: 30 new tokens at most, not 256" in caplog.text
    assert "evaluate.gsm8k: 2 of 2 prompts were cut to their ends, to fit 60 tokens" in caplog.text


def test_a_choice_longer_than_the_model_is_refused(pair: AdapterPair, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="evaluate.arc_easy request.*a choice of"):
        score_named(pair, tokenizer, local("arc_easy", max_length=8))


def test_the_seed_of_the_run_changes_neither_prompts_nor_answers(pair: AdapterPair, tokenizer: Any) -> None:
    first, second = (score_named(pair, tokenizer, local("arc_easy", shots=2), seed=s) for s in (0, 7))
    assert [item["shots"] for item in first.items] == [item["shots"] for item in second.items]
    assert first.items == second.items
    assert len({tuple(item["shots"]) for item in first.items}) == 2


def test_the_base_is_run_once_where_its_answers_are_kept(
    pair: AdapterPair, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    asked: list[int] = []
    own = HFLM._loglikelihood_tokens

    def counted(self: Any, requests: Any, **more: Any) -> Any:
        asked.append(len(requests))
        return own(self, requests, **more)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", counted)
    kept = KeptAnswers(tmp_path, "base")
    benchmark = local("arc_easy", shots=1)
    plain = score_named(pair, tokenizer, benchmark)
    first = score_named(pair, tokenizer, benchmark, kept=kept)
    assert len(asked) == 4
    second = evaluate(pair, tokenizer, benchmark, Path(), kept=kept)
    assert len(asked) == 5
    assert plain == first == second
    score_named(pair, tokenizer, local("arc_easy", shots=2), kept=kept)
    assert len(asked) == 7


def test_a_classifier_is_refused(tokenizer: Any) -> None:
    from tests.models import roberta

    from keeptune.model.head import Head

    model = roberta()
    assert Head.of(model) is not None
    with pytest.raises(RecipeError, match="a standard benchmark for a classifier"):
        score_named(TwoModels(model, model), tokenizer, local("arc_easy"))


def test_answers_of_programs_are_run_and_recorded(
    pair: AdapterPair, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base writes nothing of use, the tuned model the reference solution."""
    from lm_eval.models.huggingface import HFLM

    rows = [json.loads(line) for line in (DATA / "humaneval/HumanEval.jsonl").read_text("utf-8").split("\n")[:2]]
    written = iter([["    pass\n"] * 2, [row["canonical_solution"] for row in rows]])
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, quiet: next(written))
    result = score_named(pair, tokenizer, local("humaneval", max_length=64))
    assert (result.before, result.after, result.metric) == (0.0, 1.0, "pass_at_1")
    assert [item["program_after"] for item in result.items] == ["", ""]
    assert all(item["program_before"].startswith("AssertionError") for item in result.items)


def test_tasks_outside_the_table(pair: AdapterPair, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A task of lm-eval's own, on rows in the form of the hub."""
    from lm_eval import tasks

    manager = tasks.TaskManager
    folder = str(Path(tasks.__file__).parent / "sciq")
    monkeypatch.setattr(tasks, "TaskManager", lambda: manager(include_path=folder, include_defaults=False))
    rows = [
        {"support": "Water boils.", "question": "What boils?", "distractor1": "a", "distractor2": "b",
         "distractor3": "c", "correct_answer": "water"},
    ]  # fmt: skip
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    benchmark = NamedBenchmark(name="science", task="sciq", role="task", data=str(tmp_path))
    result = score_named(pair, tokenizer, benchmark)
    assert (result.name, result.metric, result.role, result.n) == ("science", "accuracy", "task", 1)
    assert result.items[0]["choices"] == ["a", "b", "c", "water"]


def test_filters_and_instructions_are_kept_apart(
    pair: AdapterPair, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    written = ["She makes 18 dollars.", "The answer: 3\n#### 3"]  # right are 18 and 3
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, quiet: written)
    strict = score_named(pair, tokenizer, local("gsm8k", shots=0))
    flexible = score_named(pair, tokenizer, local("gsm8k", shots=0, scoring="flexible"))
    assert [item["after"] for item in strict.items] == [0.0, 1.0]
    assert [item["after"] for item in flexible.items] == [1.0, 1.0]

    pytest.importorskip("langdetect")
    written = ["no comma here", ""]  # of three instructions the first, then of one none
    result = score_named(pair, tokenizer, local("ifeval", scoring="instruction-strict"))
    counts = [item["instructions"] for item in result.items]
    assert result.items[0]["after"] == pytest.approx(1 / counts[0])
    assert result.after == pytest.approx(1 / sum(counts))


def test_weights_that_were_trained_apart_are_not_tied(stories: Any, tokenizer: Any) -> None:
    tuned = copy.deepcopy(stories)
    tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.detach() * 2)
    result = score_named(TwoModels(stories, tuned), tokenizer, local("openbookqa"))
    assert tuned.lm_head.weight is not tuned.get_input_embeddings().weight
    assert result.items[0]["loglikelihoods_before"] != result.items[0]["loglikelihoods_after"]
