"""The head gets contiguous states wherever something is scored or written: of a slice a frozen head may be copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.evaluation.test_generation import texts_of

from keeptune.core.eval_mode import in_evaluation
from keeptune.evaluation.model_pairs import TwoModels, scoring
from keeptune.evaluation.scored_tokens import Encoder, Passes, log_likelihoods, losses_and_divergence


@pytest.fixture
def given(stories: Any, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each of the head's inputs was contiguous."""
    head, seen = stories.get_output_embeddings(), []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda states: seen.append(states.is_contiguous()) or forward(states))
    return seen


def test_of_a_slice_it_gets_a_copy(stories: Any, tokenizer: Any, given: list[bool]) -> None:
    pair, passes = TwoModels(stories, stories), Passes(4, 0, "x")
    encoder = Encoder(tokenizer, 99)
    answers = [encoder.answer(prompt, " a cat.") for prompt in ("Once upon a time there was", "It was")]
    with scoring(pair, "after") as model:
        log_likelihoods(model, answers, passes)
        texts_of(model, tokenizer, 8)
    losses_and_divergence(pair, answers, passes)
    assert len(given) > 3 and all(given)
    assert not stories.get_output_embeddings()._forward_pre_hooks
    given.clear()
    stories(torch.ones(2, 4, dtype=torch.long), logits_to_keep=1)
    assert given == [False]  # as it is otherwise


def test_the_logits_are_the_same(stories: Any) -> None:
    stories.eval().requires_grad_(False)
    ids = torch.arange(12).view(3, 4)
    with in_evaluation(stories):
        copied = stories(ids, logits_to_keep=2).logits
    torch.testing.assert_close(copied, stories(ids, logits_to_keep=2).logits)
    assert not stories.training


def test_other_modules_are_in_their_mode_again() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with pytest.raises(KeyError), in_evaluation(model):
        assert not model.training and not model[0].training
        raise KeyError
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
