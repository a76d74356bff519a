"""What recipes are read from: YAML as plain values, within limits."""

from __future__ import annotations

import contextlib

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from keeptune.recipe.reading import parse_yaml

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(PLAIN)
def test_plain_values_survive(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True)) == value


def test_small_floats_are_numbers_and_dates_are_text() -> None:
    assert parse_yaml("{a: 1e-4, b: 2026-11-29, c: &x [1], d: *x}") == {
        "a": 1e-4,
        "b": "2026-11-29",
        "c": [1],
        "d": [1],
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "more than 100000 values"),
        ("[" * 200_001, "more than 200,000 characters"),
        ("[" * 3000 + "]" * 3000, "more than 32 levels"),
        ("{a: " * 3000 + "}" * 3000, "more than 32 levels"),
        ("a0: &a0 []\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)), "more than 32 levels"),
        ("a: 1\nb: 2\na: 3", 'the key "a" twice'),
        ("a: &a [*a]", "an alias of something that it is part of"),
        ("a: .nan", "the number .nan"),
        ("a: -.inf", "the number -.inf"),
        ("a: 1e999", "the number 1e999"),
        (f"a: {2**70}", "the number 118"),
        (f"a: {'9' * 5000}", "digits"),
        ('a: "\\0"', "a NUL"),
        ('"\\0": a', "a NUL"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        ("{1: a}", "a key that is no text"),
        ("{[1]: a}", "a key that is no text"),
        ("a: !!binary aGk=", "the tag"),
        ("a: !!python/object/apply:os.system [x]", "the tag"),
    ],
    ids=lambda value: value[:16],
)
def test_what_no_recipe_holds_is_refused_where_it_stands(text: str, told: str) -> None:
    with pytest.raises(yaml.YAMLError, match=r"line|characters") as caught:
        parse_yaml(text)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 500


@given(st.text(st.sampled_from("{}[]:,&*!-? \n\"'#|>%@`ab1.e\0\t\ufeff\ud800"), max_size=40))
def test_any_text_is_a_value_or_one_kind_of_error(text: str) -> None:
    with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
        parse_yaml(text)
