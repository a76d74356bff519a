"""The account of training data: what is learned, what is lost, what may be a mistake."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from tests.training.support import TOKENIZER

from keeptune.data.completions import TaskExamples
from keeptune.data.examples import TokenRow, data_account, marked, shortened

TASK = TaskExamples(("Where?", "Who?", "Who?", "Why? " * 30, "When?"), (" Here.", " Me.", " Me.", " So.", "  "))


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=30), st.data())
def test_marked_stretches_are_the_whole_text(text: str, data: st.DataObject) -> None:
    ids = tuple(TOKENIZER(text)["input_ids"])
    masks = st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))
    parts = marked(TokenRow(ids, tuple(data.draw(masks))), TOKENIZER)
    whole = TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(part for part, _ in parts) == whole


def test_what_is_lost_and_what_may_be_a_mistake_are_named() -> None:
    account, rows = data_account(TASK, TOKENIZER, 40, show=1)
    assert (account["examples"], account["kept"], len(rows)) == (5, 4, 4)
    assert account["lost"] == {"left out: nothing to learn within 40 tokens": [4]}
    assert account["noted"] == {
        "equal to an example before them": [3],
        "answers without a word: only their end is learned": [5],
    }
    assert account["tokens"] == sum(len(row.ids) for row in rows)
    assert account["learned"] == sum(sum(row.learned) for row in rows)
    assert account["lengths"]["longest"] == max(len(row.ids) for row in rows)
    assert account["shown"] == [[("<s> Where?", False), (" Here.</s>", True)]]
    plain = json.loads(json.dumps(shortened(account, most=1)))
    assert plain["lost"] == {"left out: nothing to learn within 40 tokens": {"count": 1, "first": [4]}}
