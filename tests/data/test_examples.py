"""Examples as the model sees them: what is learned of each, cut to a length, counted where something is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.test_calibration import words
from tokenizers import processors

from keeptune.core.errors import DataError
from keeptune.data.calibration import Calibration, after
from keeptune.data.completions import TaskExamples
from keeptune.data.examples import Mixed, TokenRow, fit, labels_of
from keeptune.evaluation.scored_tokens import Encoder

TURNS = TokenRow((1, 2, 3, 4, 5, 6), (False, True, False, False, True, True))
READ = TokenRow((1, 2, 3, 4), (False,) * 4)
rows = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12).map(
    lambda pairs: TokenRow(tuple(token for token, _ in pairs), tuple(own for _, own in pairs))
)


@given(st.lists(rows, min_size=1, max_size=6), st.integers(2, 8), st.sampled_from(["right", "left", "drop"]))
def test_each_example_is_kept_or_lost_for_one_reason(made: list[TokenRow], length: int, truncate: str) -> None:
    try:
        kept, lost = fit(made, length, truncate, where="x")  # type: ignore[arg-type]
    except DataError:  # only where each of them alone is refused too
        for row in made:
            with pytest.raises(DataError):
                fit([row], length, truncate, where="x")  # type: ignore[arg-type]
        return
    left = sum(len(numbers) for reason, numbers in lost.items() if not reason.startswith("cut"))
    assert len(kept) + left == len(made)
    for row in kept:
        assert len(row.ids) <= length
        assert any(label != -100 for label in labels_of(row))


def test_ends_are_cut_as_told() -> None:
    assert fit([TURNS], 3, "right", where="x") == (
        [TokenRow((1, 2, 3), (False, True, False))],
        {"cut to 3 tokens": [1]},
    )
    assert fit([TURNS], 3, "left", where="x")[0] == [TokenRow((4, 5, 6), (False, True, True))]
    kept, lost = fit([TURNS, TokenRow((1, 2), (False, True))], 3, "drop", where="x")
    assert (len(kept), lost) == (1, {"left out: longer within 3 tokens": [1]})
    assert fit([TURNS], None, "right", where="x") == ([TURNS], {})


def test_what_teaches_nothing_is_left_out_and_nothing_at_all_is_refused() -> None:
    kept, lost = fit([READ, TURNS], 9, "right", where="x")
    assert (kept, lost) == ([TURNS], {"left out: nothing in them is learned": [1]})
    late = TokenRow(TURNS.ids, after(4, 6))
    assert fit([late, TURNS], 4, "right", where="x")[1]["left out: nothing to learn within 4 tokens"] == [1]
    with pytest.raises(DataError, match=r"task\.train: got 2 examples, all left out: nothing .* \(1\); "):
        fit([READ, late], 4, "right", where="task.train")


@pytest.mark.parametrize("ends", [False, True])
def test_a_text_begins_and_ends_once(ends: bool) -> None:
    read = words()
    read.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    start, end = read.convert_tokens_to_ids(["<s>", "</s>"])
    single = "<s> $A </s>" if ends else "<s> $A"
    known = [("<s>", start), ("</s>", end)]
    read.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    (plain,) = TaskExamples(("a",), (" b",)).token_rows(read)
    assert plain.ids == (start, *read("a b", add_special_tokens=False)["input_ids"], end)
    assert TaskExamples(("<s>a",), (" b</s>",)).token_rows(read) == [plain]
    assert TaskExamples(None, ("<s>a b</s>",), end=False).calibration(read, max_length=9).sequences == (plain.ids,)
    assert Encoder(read, 9).prompt("<s>a", "x").ids == Encoder(read, 9).prompt("a", "x").ids == plain.ids[:2]


def test_statistics_see_what_is_trained() -> None:
    read = words()
    read.add_special_tokens({"eos_token": "</s>"})
    task = TaskExamples(("a b", "b"), (" c", " a c"))
    (dataset, lost), data = task.dataset(read, 9), task.calibration(read, max_length=9)
    assert not lost
    assert sorted(map(tuple, dataset["input_ids"])) == sorted(data.sequences)
    masks = dict(zip(data.sequences, data.learned or (), strict=True))
    for ids, labels in zip(dataset["input_ids"], dataset["labels"], strict=True):
        assert [label != -100 for label in labels] == list(masks[tuple(ids)])
        assert ids[-1] == labels[-1] == read.eos_token_id
    whole = TaskExamples(None, ("a b", "b"))
    trained = sorted(map(tuple, whole.dataset(read, 9)[0]["input_ids"]))
    assert sorted(whole.calibration(read, max_length=9).sequences) == trained


def test_a_text_that_writes_its_end_has_one_end() -> None:
    read = words()
    read.add_special_tokens({"eos_token": "</s>"})
    rows = TaskExamples(("a",) * 3, (" c", " c</s>", " c</s>\n")).token_rows(read)
    assert [row.ids.count(read.eos_token_id) for row in rows] == [1, 1, 1]


def test_several_answers_of_a_text() -> None:
    """The last answer is what is left to say; all count as learned; a text of one answer has the key it always had."""
    data = Calibration((TURNS.ids, (1, 2, 3)), 0, (TURNS.learned, after(1, 3)))
    assert data.prompts == (4, 1)
    assert data.learned_tokens == 3 + 2
    (batch,) = data.batches()
    assert batch.loss_mask is not None and batch.loss_mask.tolist() == [[0, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0]]
    one = Calibration.of_answers(data.sequences, 0, (4, 1))
    assert one.fingerprint != data.fingerprint != Calibration(data.sequences[::-1], 0).fingerprint
    assert data.fingerprint == Calibration(data.sequences[::-1], 0, (data.learned or ())[::-1]).fingerprint


def test_a_mixture_gives_its_parts_in_order() -> None:
    read = words()
    first, second = TaskExamples(("a",), (" b",), end=False), TaskExamples(None, ("c d", "d"), end=False)
    mixed = Mixed((first, second), ((1, 1), (0, 0), (1, 0), (1, 1)))
    own = [*second.token_rows(read), *first.token_rows(read)]
    assert mixed.token_rows(read) == [own[1], own[2], own[0], own[1]]
    assert mixed.token_rows(read, [2]) == [own[0]]
    assert mixed.read_texts == ["d", "a b", "c d", "d"]
    assert mixed.fingerprint != Mixed((first, second), mixed.order[::-1]).fingerprint
