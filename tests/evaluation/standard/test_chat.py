"""Standard benchmarks through a chat template: prompts and answers are those of lm-eval's own wrapper."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.evaluation.standard.conftest import local
from transformers import AutoModelForCausalLM, AutoTokenizer

from keeptune.core.errors import DataError, RecipeError
from keeptune.evaluation import AdapterPair, NamedBenchmark, TwoModels
from keeptune.evaluation.benchmark_data import data_fingerprint
from keeptune.evaluation.benchmarks import asking, ends_of_turns
from keeptune.evaluation.model_pairs import KeptAnswers
from keeptune.evaluation.standard import score_named
from keeptune.evaluation.standard.language_model import restored_process
from keeptune.evaluation.standard.lm_eval_tasks import build_tasks

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TURNS = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% if enable_thinking %}Let me think.{% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    own = copy.deepcopy(tokenizer)
    own.chat_template = TURNS
    return own


def asked(model: Any, tokenizer: Any, benchmark: NamedBenchmark, **wrapper: Any) -> list[dict[str, Any]]:
    """The samples of lm-eval's own evaluation with its own wrapper."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with restored_process("test"), torch.no_grad():
        tasks = build_tasks(benchmark).tasks
        for task in tasks.values():
            if benchmark.max_new_tokens is not None:
                task.set_config("generation_kwargs", {"max_gen_toks": benchmark.max_new_tokens}, update=True)
        own = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=8, **wrapper)
        found = evaluate(
            own,
            {"tasks": dict(tasks), "groups": {}, "group_map": {}},
            limit=benchmark.examples,
            bootstrap_iters=0,
            system_instruction=benchmark.system,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
    (rows,) = found["samples"].values()
    key = rows[0]["filter"]
    return [row for row in rows if row["filter"] == key]


def ours(pair: Any, tokenizer: Any, benchmark: NamedBenchmark) -> tuple[Any, list[tuple[str, ...]]]:
    """The result, and every text that lm-eval's wrapper was given."""
    from lm_eval.models import huggingface

    texts: list[tuple[str, ...]] = []
    kinds = ("generate_until", "loglikelihood")

    def noting(name: str) -> Any:
        run = getattr(huggingface.HFLM, name)

        def noted(self: Any, requests: Any, *more: Any) -> Any:
            texts.extend(tuple(map(str, request.args)) for request in requests)
            return run(self, requests, *more)

        return noted

    with mock.patch.multiple(huggingface.HFLM, **{name: noting(name) for name in kinds}):
        return score_named(pair, tokenizer, benchmark), texts


COMPARED = [
    ("gsm8k", {"shots": 2, "max_length": 480, "scoring": "flexible", "system": "You count.", "max_new_tokens": 24}),
    ("nq_open", {"max_length": 300, "max_new_tokens": 20}),
    ("arc_easy", {"shots": 1, "chat": True}),
]


@pytest.mark.parametrize(("name", "more"), COMPARED)
def test_prompts_and_answers_are_those_of_lm_eval(
    pair: AdapterPair, chatty: Any, name: str, more: dict[str, Any]
) -> None:
    benchmark = local(name, **more)
    result, texts = ours(pair, chatty, benchmark)
    assert result.chat
    for side, half in (("before", texts[: len(texts) // 2]), ("after", texts[len(texts) // 2 :])):
        with pair.before() if side == "before" else pair.after() as model:
            model.eval()
            rows = asked(model, chatty, benchmark, max_length=more.get("max_length", 512))
        theirs = [request for row in rows for request in row["arguments"]]
        assert [text[0] for text in half] == [str(request[0]) for request in theirs]
        assert all(text[0].startswith("[") and "[assistant]" in text[0] for text in half)
        if name == "arc_easy":
            sums = [float(value[0][0]) for row in rows for value in row["resps"]]
            assert [value for item in result.items for value in item[f"loglikelihoods_{side}"]] == pytest.approx(sums)
        else:
            assert [item[f"text_{side}"] for item in result.items] == [row["resps"][0][0] for row in rows]
    if name == "gsm8k":
        first = texts[0][0]
        assert first.startswith("[system] You count.") and first.count("[user]") == 3 == first.count("[assistant]")


@pytest.mark.parametrize(
    ("name", "more", "used"),
    [
        ("nq_open", {}, True),
        ("nq_open", {"chat": False}, False),
        ("arc_easy", {}, False),
        ("gsm8k", {"scoring": "metamath"}, False),
        ("humaneval", {}, False),
    ],
)
def test_only_generative_tasks_are_chats_by_themselves(
    pair: AdapterPair, chatty: Any, tokenizer: Any, name: str, more: dict[str, Any], used: bool
) -> None:
    benchmark = local(name, max_length=128, examples=1, **more)
    result, texts = ours(pair, chatty, benchmark)
    assert (result.chat, texts[0][0].startswith("[")) == (used, used)
    assert result.summary()["chat"] is used
    assert (data_fingerprint(benchmark, chatty) != data_fingerprint(benchmark)) is used
    if not used:
        assert result == score_named(pair, tokenizer, benchmark)


def test_answers_stand_after_the_thought(pair: AdapterPair, chatty: Any, tmp_path: Path) -> None:
    """What this model writes is told as a story; "a" ends every thought of it."""
    more: dict[str, Any] = {"shots": 0, "max_length": 300, "max_new_tokens": 40}
    benchmark = local("gsm8k", enable_thinking=True, think_end_token="a", **more)
    kept = KeptAnswers(tmp_path, "base")
    plain = score_named(pair, chatty, local("gsm8k", **more), kept=kept)
    result, texts = ours(pair, chatty, benchmark)
    assert all(text[0].endswith("Let me think.") for text in texts)
    with pair.after() as model:
        model.eval()
        rows = asked(model, chatty, benchmark, max_length=300, enable_thinking=True, think_end_token="a")
    answers = [item["text_after"] for item in result.items]
    assert answers == [row["resps"][0][0] for row in rows]
    assert not any("a" in text for text in answers)
    assert any("a" in item["text_after"] for item in plain.items)  # else nothing was shown
    again = score_named(pair, chatty, benchmark, kept=kept)
    assert again.items == result.items  # kept answers without a thought are others


REFUSED = [
    ("gsm8k", {"chat": True}, None, "evaluate.gsm8k.chat.*without a chat template"),
    ("gsm8k", {"system": "Be brief."}, None, "evaluate.gsm8k.system.*not asked through"),
    ("arc_easy", {"enable_thinking": False}, TURNS, "evaluate.arc_easy.enable_thinking"),
    ("tinystories", {"chat": True}, TURNS, "true for whole texts"),
    ("nq_open", {"enable_thinking": True, "think_end_token": "</t>"}, TURNS, r"answers that end at '\\n'"),
    ("gsm8k", {"enable_thinking": True}, TURNS, "evaluate.gsm8k.think_end_token"),
    ("arc_easy", {"chat": True, "enable_thinking": True, "think_end_token": "x"}, TURNS, "a task of log-likelihoods"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "more", "template", "words"), REFUSED)
def test_what_cannot_be_asked_is_refused_before_training(
    tokenizer: Any, name: str, more: dict[str, Any], template: str | None, words: str
) -> None:
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    with pytest.raises((DataError, RecipeError), match=words):
        data_fingerprint(local(name, **more), own)


def test_templates_that_refuse_turns(pair: AdapterPair, chatty: Any) -> None:
    chatty.chat_template = NO_SYSTEM
    more: dict[str, Any] = {"shots": 0, "max_length": 128, "examples": 1}
    with pytest.raises(RecipeError, match="evaluate.gsm8k.system.*does not write"):
        score_named(pair, chatty, local("gsm8k", system="You count.", **more))
    chatty.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(DataError, match=r"evaluate.gsm8k.chat.*user; the chat template: never"):
        data_fingerprint(local("gsm8k"), chatty)
    chatty.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + TURNS
    with pytest.raises(DataError, match=r"evaluate.gsm8k.chat.*user, assistant, user; the chat template: one question"):
        score_named(pair, chatty, local("gsm8k", shots=1, max_length=128))


def test_what_ends_a_turn_ends_a_text(stories: Any, chatty: Any) -> None:
    """The template's token, where the model's own settings name another."""
    assert ends_of_turns(asking(local("nq_open"), chatty)) == {chatty.eos_token_id}
    stories.generation_config.eos_token_id = None
    benchmark = local("nq_open", max_length=300)
    seen = []

    def generate(self: Any, **options: Any) -> None:
        seen.append(self.generation_config.eos_token_id)
        raise ArithmeticError

    for entry in (benchmark, local("nq_open", max_length=300, chat=False)):
        with mock.patch.object(type(stories), "generate", generate), pytest.raises(ArithmeticError):
            score_named(TwoModels(stories, stories), chatty, entry)
    assert seen == [[chatty.eos_token_id], None]
    assert stories.generation_config.eos_token_id is None


@pytest.mark.real
def test_smollm2_is_asked_as_lm_eval_asks_it(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    benchmark = local("ifeval", max_length=512, max_new_tokens=8, examples=2)
    result, texts = ours(TwoModels(model, model), tokenizer, benchmark)
    rows = asked(model, tokenizer, benchmark, max_length=512)
    assert [text[0] for text in texts[:2]] == [row["arguments"][0][0] for row in rows]
    assert texts[0][0].startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert texts[0][0].endswith("<|im_start|>assistant\n")
    assert [item["text_before"] for item in result.items] == [row["resps"][0][0] for row in rows]
