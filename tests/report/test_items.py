"""Which items were lost and gained."""

from __future__ import annotations

from typing import Any

from keeptune.report.pages.item_rows import lost_and_gained


def result(items: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    head = {"label": "lora", "seed": 0, "benchmark": "facts", "role": "knowledge", "metric": "exact_match"}
    return head | {"items": items} | more


def item(index: int, before: float, after: float, **more: Any) -> dict[str, Any]:
    return {"index": index, "group": "capital", "before": before, "after": after, **more}


def test_right_to_wrong_is_lost_and_the_same_is_left_out() -> None:
    texts = {"prompt": "Q", "answers": ["a", "b"], "text_before": "a", "text_after": "<script>"}
    found = lost_and_gained([result([item(0, 1, 0, **texts), item(1, 0, 1), item(2, 1, 1), item(3, 0, 0)])])
    assert [(row["kind"], row["index"]) for row in found["rows"]] == [("lost", 0), ("gained", 1)]
    assert (found["lost"], found["gained"], found["measured"]) == (1, 1, 4)
    row = found["rows"][0]
    assert (row["prompt"], row["wanted"], row["said_before"], row["said_after"]) == ("Q", "a | b", "a", "<script>")
    assert found["rows"][1]["prompt"] is None


def test_a_rising_cross_entropy_is_lost_the_largest_change_first() -> None:
    items = [item(0, 2.0, 2.1), item(1, 2.0, 1.0), item(2, 2.0, 2.5)]
    rows = lost_and_gained([result(items, metric="cross_entropy")])["rows"]
    assert [(row["index"], row["kind"]) for row in rows] == [(1, "gained"), (2, "lost"), (0, "lost")]


def test_choices_are_told_in_words() -> None:
    choices = {"label": 1, "choices": ["dog", "cat"], "loglikelihoods_before": [-2.0, -1.0]}
    (row,) = lost_and_gained([result([item(0, 1, 0, **choices, loglikelihoods_after=[-1.0, -2.0])])])["rows"]
    assert (row["wanted"], row["said_before"], row["said_after"]) == ("cat", "cat", "dog")
    labels = {"answer": "good", "label_before": "good", "label_after": "bad"}
    (row,) = lost_and_gained([result([item(0, 1, 0, **labels)], metric="accuracy")])["rows"]
    assert (row["wanted"], row["said_before"], row["said_after"]) == ("good", "good", "bad")


def test_rows_are_shared_out_and_all_are_counted() -> None:
    many = [item(index, 1, 0) for index in range(50)]
    found = lost_and_gained([result(many), result(many[:3], benchmark="sums"), result(many, label="full")], most=23)
    counts = [
        sum(row["label"] == a and row["benchmark"] == b for row in found["rows"])
        for a, b in (("lora", "facts"), ("lora", "sums"), ("full", "facts"))
    ]
    assert counts == [10, 3, 10]
    assert found["lost"] == 103
    assert len(lost_and_gained([result(many)], most=50)["rows"]) == 50
    assert lost_and_gained([])["rows"] == []


def test_long_texts_are_cut() -> None:
    (row,) = lost_and_gained([result([item(0, 1, 0, prompt="x" * 5000)])])["rows"]
    assert len(row["prompt"]) == 600
