"""Replay: how much knowledge, which of it, and where it is among the task."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeptune.data.completions import TaskExamples
from keeptune.data.knowledge import KnowledgeSet
from keeptune.data.replay import replayed, with_replay

TASK = TaskExamples(prompts=tuple(f"q{n}" for n in range(38)), completions=tuple(f"a{n}" for n in range(38)))
TEXTS = KnowledgeSet("knowledge", tuple(f"text {n}" for n in range(20)))
PAIRS = KnowledgeSet("knowledge", tuple(f" said {n}" for n in range(20)), tuple(f"read {n}" for n in range(20)))


@given(st.integers(1, 10_000), st.floats(0.001, 0.9))
def test_the_share_is_that_of_the_whole(task: int, share: float) -> None:
    count = replayed(task, share)
    assert abs(count - share * (task + count)) <= 1


def test_a_share_of_zero_is_the_task_itself() -> None:
    assert with_replay(TASK, [TEXTS], 0.0, seed=0) is TASK


def test_the_task_keeps_its_order_and_knowledge_is_spread() -> None:
    mixed = with_replay(TASK, [TEXTS], 0.05, seed=0)
    known = [place for place, read in enumerate(mixed.prompts) if not read]
    assert len(mixed) == 40
    assert len(known) == 2
    assert 0 < known[0] < 20 < known[1] < 39
    rest = [pair for pair in zip(mixed.prompts, mixed.completions, strict=True) if pair[0]]
    assert rest == list(zip(TASK.prompts, TASK.completions, strict=True))
    assert {mixed.completions[place] for place in known} <= set(TEXTS.completions)


def test_pairs_stay_pairs_and_sets_give_in_proportion() -> None:
    mixed = with_replay(TASK, [TEXTS, PAIRS], 0.5, seed=3)
    pairs = list(zip(mixed.prompts, mixed.completions, strict=True))
    assert len(mixed) == 76
    known = [pair for pair in pairs if not pair[0].startswith("q")]
    assert len(set(known)) == len(known) == 38
    assert all(said == f" said {read.removeprefix('read ')}" for read, said in known if read)
    assert 10 < sum(bool(read) for read, _ in known) < 28


def test_the_draw_follows_the_seed() -> None:
    first, same, other = (with_replay(TASK, [TEXTS], 0.2, seed=seed) for seed in (1, 1, 2))
    assert first == same
    assert first.fingerprint != other.fingerprint


def test_little_knowledge_comes_again(caplog: pytest.LogCaptureFixture) -> None:
    few = KnowledgeSet("knowledge", ("one", "two", "three"))
    with caplog.at_level(logging.WARNING):
        mixed = with_replay(TASK, [few], 0.175, seed=0)
    counts = [mixed.completions.count(text) for text in few.completions]
    assert sorted(counts) == [2, 3, 3]
    assert "8 of 3 knowledge examples" in caplog.text
