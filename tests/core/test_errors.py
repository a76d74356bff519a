from __future__ import annotations

import inspect

import pytest

from keeptune.core import errors
from keeptune.core.errors import KeeptuneError, nearest

KINDS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, KeeptuneError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_where_what_was_wanted_and_what_to_do(kind: type[KeeptuneError]) -> None:
    error = kind("file.yaml", got="3", wanted="4", next_step="Write 4.")
    assert str(error) == "file.yaml: got 3, wanted 4. Write 4."
    assert (error.where, error.got, error.wanted, error.next_step) == ("file.yaml", "3", "4", "Write 4.")


@pytest.mark.parametrize(
    ("name", "meant"), [("down_prj", "down_proj"), ("q_porj", "q_proj"), ("gate", "gate_proj"), ("Q_proj", "q_proj")]
)
def test_the_nearest_name_is_offered(name: str, meant: str) -> None:
    assert nearest(name, ["q_proj", "gate_proj", "down_proj"]).startswith(f'Did you mean "{meant}"?')


def test_a_name_like_no_other_gets_the_list_only() -> None:
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."
