"""Replay: how much knowledge, which of it, and where it is among the task."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.test_calibration import words

from keeptune.core.errors import RecipeError
from keeptune.data.completions import TaskExamples, mixture, replayed, with_replay

TASK = TaskExamples(prompts=tuple(f"q{n}" for n in range(38)), completions=tuple(f"a{n}" for n in range(38)))
TEXTS = TaskExamples(None, tuple(f"text {n}" for n in range(20)), end=False)
PAIRS = TaskExamples(tuple(f"read {n}" for n in range(20)), tuple(f" said {n}" for n in range(20)), end=False)


@given(st.integers(1, 10_000), st.floats(0.001, 0.9))
def test_the_share_is_that_of_the_whole(task: int, share: float) -> None:
    count = replayed(task, share)
    assert abs(count - share * (task + count)) <= 1


def test_a_share_of_zero_is_the_task_itself() -> None:
    assert with_replay(TASK, [TEXTS], 0.0, seed=0) is TASK


def test_the_task_keeps_its_order_and_knowledge_is_spread() -> None:
    mixed = with_replay(TASK, [TEXTS], 0.05, seed=0)
    known = [place for place, text in enumerate(mixed.read_texts) if text.startswith("text")]
    assert len(mixed) == 40
    assert len(known) == 2
    assert 0 < known[0] < 20 < known[1] < 39
    assert [text for text in mixed.read_texts if text.startswith("q")] == TASK.read_texts
    assert {mixed.read_texts[place] for place in known} <= set(TEXTS.completions)


def test_pairs_stay_pairs_and_sets_give_in_proportion() -> None:
    mixed = with_replay(TASK, [TEXTS, PAIRS], 0.3, seed=3)
    assert len(mixed) == 54
    known = [text for text in mixed.read_texts if not text.startswith("q")]
    assert len(set(known)) == len(known) == 16
    assert set(known) <= {*TEXTS.read_texts, *PAIRS.read_texts}
    assert 4 < sum(text.startswith("read") for text in known) < 12  # of 16, with 20 of each kind to draw from


@pytest.mark.parametrize("knowledge", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_what_is_replayed_is_learned_to_its_end(knowledge: TaskExamples) -> None:
    """After texts of knowledge the end of text is learned as after answers of the task; in statistics it is not."""
    read = words()
    read.add_special_tokens({"eos_token": "</s>"})
    mixed = with_replay(TASK, [knowledge], 0.5, seed=0)
    rows = mixed.token_rows(read)
    assert all(row.ids[-1] == read.eos_token_id and row.learned[-1] for row in rows)
    assert rows[3:5] == mixed.token_rows(read, [3, 4])
    assert all(row.ids[-1] != read.eos_token_id for row in knowledge.token_rows(read))


def test_the_draw_follows_the_seed() -> None:
    first, same, other = (with_replay(TASK, [TEXTS], 0.2, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first.fingerprint != other.fingerprint


def test_little_knowledge_comes_again(caplog: pytest.LogCaptureFixture) -> None:
    few = TaskExamples(None, ("one", "two", "three"), end=False)
    with caplog.at_level(logging.WARNING):
        mixed = with_replay(TASK, [few], 0.175, seed=0)
    counts = [list(mixed.read_texts).count(text) for text in few.completions]
    assert sorted(counts) == [2, 3, 3]
    assert "8 of 3 knowledge examples" in caplog.text


# Several files


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=3),
    weights=st.lists(st.floats(0.1, 9), min_size=3, max_size=3),
)
def test_weights_are_the_ratio_of_the_counts_and_no_example_comes_twice(sizes: list[int], weights: list[float]) -> None:
    parts = [TaskExamples(None, tuple(f"{number}/{row}" for row in range(size))) for number, size in enumerate(sizes)]
    mixed = mixture(parts, weights[: len(sizes)], seed=1)
    assert len(set(mixed.order)) == len(mixed.order)
    counts = [sum(number == part for part, _ in mixed.order) for number in range(len(sizes))]
    scale = min(size / weight for size, weight in zip(sizes, weights, strict=False))
    assert any(count == size for count, size in zip(counts, sizes, strict=True))
    for count, weight in zip(counts, weights, strict=False):
        assert count == max(round(scale * weight), 1)


def test_without_weights_all_files_are_shuffled_whole() -> None:
    first, same, other = (mixture([TASK, TEXTS], [None, None], seed=seed) for seed in (1, 1, 2))
    every = [(0, row) for row in range(len(TASK))] + [(1, row) for row in range(len(TEXTS))]
    assert sorted(first.order) == every
    assert first.order not in (tuple(every), other.order)
    assert first.fingerprint == same.fingerprint != other.fingerprint
    with pytest.raises(RecipeError, match="1 weights for 2 files"):
        mixture([TASK, TEXTS], [1.0, None], seed=0)
