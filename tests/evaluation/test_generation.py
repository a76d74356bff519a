from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from keeptune.core.errors import ModelError
from keeptune.evaluation.scored_tokens import Encoder, Passes, greedy_texts

PROMPTS = [
    "Once upon a time",
    "Tom",
    "The sun was hot, so Lily and her mom went to the",
    "One day, a big dog",
    "She said:",
    "The little girl had a box with a red ball in it. She",
]


def texts_of(model: Any, tokenizer: Any, rows: int, **extra: Any) -> list[str]:
    settings: dict[str, Any] = {"new_tokens": 16, "stops": ("\n",)} | extra
    passes = Passes(rows, settings.pop("pad", 0), settings.pop("where", "x"))
    prompts = [Encoder(tokenizer, 99).prompt(text, "x") for text in PROMPTS]
    with torch.no_grad():
        return greedy_texts(model, tokenizer, prompts, passes, **settings)


def ends_of(model: Any) -> set[int]:
    named = model.generation_config.eos_token_id
    return set(named) if isinstance(named, list) else {named}


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_texts_match_the_reference(model: Any, tokenizer: Any, reference: Any, rows: int) -> None:
    expected = [reference.greedy_text(model, tokenizer, text, new_tokens=16, ends=ends_of(model)) for text in PROMPTS]
    assert texts_of(model, tokenizer, rows) == expected
    assert any(expected)


@pytest.mark.parametrize("pad", [0, 2, 300])
def test_the_padding_token_does_not_matter(model: Any, tokenizer: Any, pad: int) -> None:
    assert texts_of(model, tokenizer, 8, pad=pad) == texts_of(model, tokenizer, 1)


def test_forgetting_the_mask_differs(stories: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    right = texts_of(stories, tokenizer, 8)
    generate = stories.generate

    def forgetful(attention_mask: torch.Tensor, **given: Any) -> Any:
        return generate(attention_mask=torch.ones_like(attention_mask), **given)

    monkeypatch.setattr(stories, "generate", forgetful)
    assert texts_of(stories, tokenizer, 8) != right


@pytest.mark.parametrize("stops", [(), (".",), (" the", "."), ("a",)])
def test_stop_strings_only_cut(stories: Any, tokenizer: Any, reference: Any, stops: tuple[str, ...]) -> None:
    expected = [
        reference.greedy_text(stories, tokenizer, text, new_tokens=16, ends=ends_of(stories), stops=stops)
        for text in PROMPTS
    ]
    assert texts_of(stories, tokenizer, 4, stops=stops) == expected


def test_stop_strings_save_steps(stories: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    forward = stories.forward

    def counting(*args: Any, **given: Any) -> Any:
        steps.append(1)
        return forward(*args, **given)

    monkeypatch.setattr(stories, "forward", counting)
    texts_of(stories, tokenizer, 8, new_tokens=64, stops=(" ", "."))
    assert len(steps) < 20


def test_end_tokens_end(tiny: Any, tokenizer: Any) -> None:
    free = texts_of(tiny, tokenizer, 8, stops=())
    prompts = [Encoder(tokenizer, 99).prompt(text, "x").ids for text in PROMPTS]
    with torch.no_grad():
        first = int(tiny(input_ids=torch.tensor([prompts[0]])).logits[0, -1].argmax())
    tiny.generation_config.eos_token_id = [2, first]
    ended = texts_of(tiny, tokenizer, 8, stops=())
    assert ended[0] == "" != free[0]
    assert ended == texts_of(tiny, tokenizer, 1, stops=())


def test_the_models_own_settings_do_not_apply_and_stay(
    stories: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = texts_of(stories, tokenizer, 8)
    make: Any = GenerationConfig
    own = make(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=3.0, num_beams=3, eos_token_id=[1, 2])
    stories.generation_config = own
    with caplog.at_level(logging.WARNING):
        assert texts_of(stories, tokenizer, 8) == plain
    assert caplog.text == ""
    assert stories.generation_config is own


def test_nan_is_an_error_that_names_the_benchmark(tiny: Any, tokenizer: Any) -> None:
    tiny.lm_head.weight.data[3] = torch.nan
    own = tiny.generation_config
    with pytest.raises(ModelError, match=r"facts \(after\): got NaN"):
        texts_of(tiny, tokenizer, 8, where="facts (after)")
    assert tiny.generation_config is own
