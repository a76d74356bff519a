from __future__ import annotations

from typing import Any

import pytest
import torch

from keeptune.core.errors import ModelError
from keeptune.evaluation import scored_tokens
from keeptune.evaluation.model_pairs import TwoModels
from keeptune.evaluation.scored_tokens import Encoder, Passes, log_likelihoods, losses_and_divergence

TEXTS = [
    "Once upon a time there was a big red cat.",
    "Tom ran.",
    "The sun was hot, so Lily sat down.",
    "A dog",
]


def sums_of(model: Any, sequences: Any, rows: int = 8, pad: int = 0) -> list[float]:
    return log_likelihoods(model, sequences, Passes(rows, pad, "x"))


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("pad", [0, 2, 77])
def test_batch_size_and_padding_do_not_matter(model: Any, tokenizer: Any, rows: int, pad: int) -> None:
    sequences = [Encoder(tokenizer, 99).document(text, "x") for text in TEXTS]
    assert sums_of(model, sequences, rows, pad) == pytest.approx(sums_of(model, sequences, 1), abs=2e-5)


def test_chunks_do_not_matter(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [Encoder(tokenizer, 99).document(text, "x") for text in TEXTS]
    whole = sums_of(model, sequences)
    monkeypatch.setattr(scored_tokens, "_CHUNK", 5)
    assert sums_of(model, sequences) == pytest.approx(whole, abs=1e-6)


def test_counting_padding_would_differ(tiny: Any, tokenizer: Any) -> None:
    """Negative control: the sum over padded rows is another number."""
    sequences = [Encoder(tokenizer, 99).document(text, "x") for text in TEXTS[:2]]
    width = max(len(sequence.ids) for sequence in sequences)
    ids = torch.tensor([list(s.ids) + [0] * (width - len(s.ids)) for s in sequences])
    with torch.no_grad():
        log_probabilities = tiny(input_ids=ids).logits.log_softmax(-1)[:, :-1]
    forgetful = log_probabilities.gather(-1, ids[:, 1:, None]).sum((1, 2)).tolist()
    found = sums_of(tiny, sequences)
    assert found[0] == pytest.approx(forgetful[0], abs=1e-4)
    assert abs(found[1] - forgetful[1]) > 1


def test_losses_and_divergence_match_the_reference(tiny: Any, other: Any, tokenizer: Any, reference: Any) -> None:
    sequences = [Encoder(tokenizer, 99).document(text, "x") for text in TEXTS]
    for rows in (1, 4):
        found = losses_and_divergence(TwoModels(tiny, other), sequences, Passes(rows, 0, "x"))
        for sequence, losses in zip(sequences, found, strict=True):
            count = losses["tokens"]
            assert count == len(sequence.ids) - 1
            assert losses["before"] * count == pytest.approx(-reference.log_likelihood(tiny, sequence.ids, 1), rel=1e-5)
            assert losses["after"] * count == pytest.approx(-reference.log_likelihood(other, sequence.ids, 1), rel=1e-5)
            assert losses["kl"] * count == pytest.approx(reference.divergence(tiny, other, sequence.ids), rel=1e-4)
            assert losses["kl"] > 0


def test_logits_are_those_that_are_needed_where_the_model_can(
    model: Any, tokenizer: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some architectures and of a forward that takes no such argument; the likelihoods are the same."""
    sequences = [Encoder(tokenizer, 99).choice(TEXTS[0], answer, "x") for answer in ("yes", "no, not at all")]
    wanted = [reference.log_likelihood(model, tokens.ids, tokens.start) for tokens in sequences]
    widths: list[int] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    needed, longest = scored_tokens._columns(sequences), max(len(tokens.ids) for tokens in sequences)
    assert sums_of(model, sequences) == pytest.approx(wanted, rel=1e-5)
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask)
    )
    assert sums_of(model, sequences) == pytest.approx(wanted, rel=1e-5)
    hook.remove()
    assert needed < longest
    assert widths == [needed, longest]


def test_a_model_that_gives_all_logits_is_compared_with_one_that_does_not(
    tiny: Any, other: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = [Encoder(tokenizer, 99).choice(TEXTS[0], answer, "x") for answer in ("yes", "no, not at all")]
    wanted = losses_and_divergence(TwoModels(tiny, other), sequences, Passes(2, 0, "x"))
    forward = other.forward
    monkeypatch.setattr(
        other, "forward", lambda input_ids, attention_mask, use_cache: forward(input_ids, attention_mask)
    )
    found = losses_and_divergence(TwoModels(tiny, other), sequences, Passes(2, 0, "x"))
    for one, same in zip(found, wanted, strict=True):
        assert one == pytest.approx(same, rel=1e-5)


def test_batches_are_as_large_as_their_logits_allow(tiny: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [Encoder(tokenizer, 99).choice(TEXTS[0], answer, "x") for answer in ("yes", "no", "maybe")]
    sizes: list[int] = []
    monkeypatch.setattr(scored_tokens, "LOGITS_AT_ONCE", 2 * 512 * scored_tokens._columns(sequences))
    log_likelihoods(tiny, sequences, Passes(8, 0, "x", sizes.append))
    assert sizes == [2, 1]


def test_a_model_does_not_diverge_from_itself(model: Any, tokenizer: Any) -> None:
    sequences = [Encoder(tokenizer, 99).document(text, "x") for text in TEXTS]
    found = losses_and_divergence(TwoModels(model, model), sequences, Passes(3, 0, "x"))
    assert all(losses["kl"] == 0 and losses["before"] == losses["after"] for losses in found)


def test_forbidden_tokens_do_not_spoil_the_divergence() -> None:
    base = torch.tensor([[0.0, 1.0, -torch.inf]]).log_softmax(-1)
    tuned = torch.tensor([[1.0, 1.0, -torch.inf]]).log_softmax(-1)
    expected = sum(float(p.exp() * (p - q)) for p, q in zip(base[0, :2], tuned[0, :2], strict=True))
    assert float(scored_tokens._divergence(base, tuned)) == pytest.approx(expected)


def test_nan_names_the_side(tiny: Any, other: Any, tokenizer: Any) -> None:
    other.lm_head.weight.data[3] = torch.nan
    sequences = [Encoder(tokenizer, 99).document(TEXTS[0], "x")]
    with pytest.raises(ModelError, match=r"stories \(after\): got NaN"):
        losses_and_divergence(TwoModels(tiny, other), sequences, Passes(1, 0, "stories"))
    with pytest.raises(ModelError, match="x: got NaN"):
        sums_of(other, sequences)


def test_vocabularies_must_agree(tiny: Any, other: Any, tokenizer: Any) -> None:
    other.resize_token_embeddings(520, mean_resizing=False)
    sequences = [Encoder(tokenizer, 99).document(TEXTS[0], "x")]
    with pytest.raises(ModelError, match="512 before and 520 after"):
        losses_and_divergence(TwoModels(tiny, other), sequences, Passes(1, 0, "x"))
