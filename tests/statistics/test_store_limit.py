"""The store holds at most its limit: the least recently used entries go first, and none that a living process uses."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.forks import Forks
from tests.models import MODELS, Bench, counted_passes, full_disk

from keeptune.core import artefact
from keeptune.core.artefact import content_key
from keeptune.core.errors import ArtefactError, StatisticsError
from keeptune.methods.lora_null import LoraNull
from keeptune.pipeline.planning import plan_for
from keeptune.statistics import store_use
from keeptune.statistics.store import StatStore
from keeptune.statistics.store_use import entries, recorded

NUMBERS = 25_000  # of an entry, 100 kB
ENTRY = 4 * NUMBERS
THREE = 3 * ENTRY + 10_000


def recipe(number: int) -> dict[str, int]:
    return {"number": number}


def put(folder: Path, *numbers: int, limit: int = THREE) -> None:
    """Puts entries as a process of its own would, which is gone at the end; the first was used the longest ago."""
    for number in numbers:
        StatStore(folder, limit).put(recipe(number), torch.full((NUMBERS,), float(number)))


def held(folder: Path) -> set[int]:
    return {number for number in range(50) if (folder / (key := content_key(recipe(number)))[:2] / key).is_dir()}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*/*"))


def put_here(folder: str, first: str, last: str, how: str) -> None:
    """Puts entries and reads each; then holds them, or has a new store for each and ends."""
    store = StatStore(Path(folder), THREE)
    for number in range(int(first), int(last)):
        if how == "each":
            store = StatStore(Path(folder), THREE)
        value = torch.full((NUMBERS,), float(number))
        store.put(recipe(number), value)
        found = store.get(recipe(number))
        assert torch.equal(found, value)
    print("put", flush=True)
    if how == "hold":
        signal.pause()


def start(forks: Forks, folder: Path, numbers: range, how: str) -> tuple[int, Path]:
    """Starts a process that puts entries; returns its number, and the file of what it says."""
    said = folder.with_name(f"said-{numbers.start}")
    return forks.call(put_here, folder, numbers.start, numbers.stop, how, out=said), said


@contextmanager
def another(forks: Forks, folder: Path, numbers: range) -> Iterator[Callable[[], None]]:
    """A process that has put entries and still uses them; what is given kills it."""
    pid, said = start(forks, folder, numbers, "hold")
    while not said.exists() or said.read_text(encoding="utf-8") != "put\n":
        assert forks.code(pid) is None
        time.sleep(0.01)
    ended: list[int] = []

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)
        ended.append(forks.wait(pid))

    yield kill
    if not ended:
        kill()
    assert ended == [-signal.SIGKILL]


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    put(tmp_path, 0, 1, 2)
    assert held(tmp_path) == {0, 1, 2}
    StatStore(tmp_path).get(recipe(0))
    put(tmp_path, 3)
    assert held(tmp_path) == {0, 2, 3}
    put(tmp_path, 4)
    assert held(tmp_path) == {0, 3, 4}
    assert size(tmp_path) <= THREE


def test_without_the_limit_nothing_goes(tmp_path: Path) -> None:
    put(tmp_path, *range(6), limit=20 * 10**9)
    assert held(tmp_path) == set(range(6))


def test_full_stores_are_not_looked_through_at_every_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the limit goes at once."""
    store, limit = StatStore(tmp_path, 200 * 5_000), 200 * 5_000
    for number in range(200):
        store.put(recipe(number), torch.zeros(1000))
    store, looks = StatStore(tmp_path, limit), []
    monkeypatch.setattr(store_use, "entries", lambda folder: looks.append(1) or entries(folder))
    for number in range(200, 240):
        store.put(recipe(number), torch.zeros(1000))
    assert 1 < len(looks) < 30
    assert size(tmp_path) <= limit


def test_a_smaller_limit_holds_from_the_next_put(tmp_path: Path) -> None:
    put(tmp_path, *range(6), limit=20 * 10**9)
    put(tmp_path, 6)
    assert held(tmp_path) == {4, 5, 6}


@pytest.mark.parametrize("use", ["get", "holds", "put"])
def test_what_is_in_use_stays_and_the_excess_is_told(
    use: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, 0, 1, 2)
    user = StatStore(tmp_path, THREE)
    for number in (0, 1, 2):
        found = getattr(user, use)(recipe(number), *([torch.ones(NUMBERS)] if use == "put" else []))
        assert use == "put" or found is not None
    with caplog.at_level(logging.WARNING):
        put(tmp_path, 3)
    assert held(tmp_path) == {0, 1, 2, 3}
    assert "more than `store_limit` (310.0 KB)" in caplog.text
    del user
    put(tmp_path, 4)
    assert held(tmp_path) == {2, 3, 4}


def test_what_another_process_uses_stays_until_it_is_gone(forks: Forks, tmp_path: Path) -> None:
    tmp_path /= "store"
    with another(forks, tmp_path, range(2)) as kill:
        put(tmp_path, 2, 3, 4)
        assert held(tmp_path) == {0, 1, 4}
        kill()
        put(tmp_path, 5)
        assert held(tmp_path) == {1, 4, 5}


def test_processes_that_evict_at_once(forks: Forks, tmp_path: Path) -> None:
    """Each reads what it has just written; together they stay within the limit, but for what is in use."""
    tmp_path /= "store"
    several = [start(forks, tmp_path, range(10 * i, 10 * i + 10), "each") for i in range(2)]
    for pid, said in several:
        assert (forks.wait(pid), said.read_text(encoding="utf-8")) == (0, "put\n")
    put(tmp_path, 40)
    assert len(held(tmp_path)) == 3
    assert size(tmp_path) <= THREE
    assert recorded(tmp_path) == (pytest.approx(size(tmp_path), rel=0.05), THREE)


def test_a_limit_smaller_than_an_entry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match=r"store_limit: got 50\.0 KB .*one entry of 10\d\.\d KB") as caught:
        put(tmp_path, 0, limit=50_000)
    assert "Raise `store_limit`" in caught.value.next_step
    assert not held(tmp_path)


def leftover(folder: Path, number: int) -> Path:
    """A folder as a killed write leaves it behind."""
    key = content_key(recipe(number))
    left = folder / key[:2] / f".{key}.abcdef"
    left.mkdir(parents=True)
    (left / "value.safetensors").write_bytes(bytes(ENTRY))
    return left


def test_leftovers_of_killed_writes_go_at_the_next_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, 0)
    left = leftover(tmp_path, 1)
    with caplog.at_level(logging.INFO, logger="keeptune"):
        assert StatStore(tmp_path).get(recipe(0)) is not None
    assert not left.exists()
    assert f"{left}: left over by a killed run, removed" in caplog.text


def test_what_another_process_is_writing_is_no_leftover(forks: Forks, tmp_path: Path) -> None:
    tmp_path /= "store"
    with another(forks, tmp_path, range(1)):
        writing = leftover(tmp_path, 0)
        put(tmp_path, 1)
        assert writing.exists()
    put(tmp_path, 2)
    assert not writing.exists()


def test_a_killed_write_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It announces its bytes beforehand; the next user counts what is there."""
    with monkeypatch.context() as patch:
        patch.setattr("keeptune.statistics.store.write_tensors", full_disk)
        for number in range(3):
            with pytest.raises(ArtefactError):
                put(tmp_path, number)
    put(tmp_path, 3, 4, 5)
    assert held(tmp_path) == {3, 4, 5}


def test_a_full_disk_is_told_with_the_sizes_and_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(artefact, "_beside", full_disk)
        with pytest.raises(ArtefactError, match="No space left on device for an entry of 10") as caught:
            put(tmp_path, 1)
    assert f"store {tmp_path}" in str(caught.value)
    for part in ("are free", "the store has 100.", "of at most 310.0 KB", "`store_limit`", "`store`"):
        assert part in str(caught.value)
    assert held(tmp_path) == {0}
    assert not list(tmp_path.glob("??/.*"))
    put(tmp_path, 1)
    assert held(tmp_path) == {0, 1}


def test_a_store_that_cannot_be_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 0)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "utime", full_disk)
    monkeypatch.setattr(artefact, "_beside", full_disk)
    assert StatStore(tmp_path).get(recipe(0)) is not None


def plan_of(made: Bench, limit: int) -> str:
    return plan_for(made.model, LoraNull(rank=2), StatStore(made.folder, limit), data={"knowledge": made.data}).key


def test_evicted_statistics_are_computed_again(tmp_path: Path) -> None:
    """Eight entries of a plan where two have room: they stay while it is made, and go with the next put."""
    made = Bench(MODELS["llama"](), tmp_path / "store")
    first = plan_of(made, 25_000)
    assert len(entries(made.folder)) == 8
    put(made.folder, 0, limit=110_000)
    assert len(entries(made.folder)) < 5
    with counted_passes(made.model) as passes:
        assert plan_of(made, 25_000) == first
    assert passes[0] >= 1


def test_a_limit_that_has_room_for_no_statistic_stops_a_plan(tmp_path: Path) -> None:
    """Before any pass over the data."""
    made = Bench(MODELS["llama"](), tmp_path / "store")
    made.targets()
    with counted_passes(made.model) as passes, pytest.raises(StatisticsError, match="store_limit: got 5.0 KB") as told:
        plan_of(made, 5_000)
    assert "room for one entry of 18.4 KB (18432 bytes)" in str(told.value)
    assert passes[0] <= 1  # which finds the input groups


def test_statistics_in_use_are_not_removed(tmp_path: Path) -> None:
    made = Bench(MODELS["llama"](), tmp_path / "store")
    wanted, (knowledge,) = made.collect(LoraNull(rank=1)), LoraNull(rank=1).statistics
    value = wanted.view(made.targets()[0])[knowledge]
    gone, kept = StatStore(made.folder).use.remove(lambda _: True)
    assert (len(gone), len(kept)) == (0, 8)
    del wanted
    gone, kept = StatStore(made.folder).use.remove(lambda _: True)
    assert (len(gone), len(kept)) == (8, 0)
    assert torch.equal(made.collect(LoraNull(rank=1)).view(made.targets()[0])[knowledge], value)


def test_what_is_not_the_store_s_own_is_left_alone(tmp_path: Path) -> None:
    """A folder of the user's, taken for a store: nothing of theirs is an entry, a leftover or a user."""
    own = [tmp_path / place for place in ("ab/.git/config", "ab/cd/notes", "users/ann", "size", "locks/mine", "use/x")]
    for file in own:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine", encoding="utf-8")
    put(tmp_path, 0, 1, 2, 3)
    StatStore(tmp_path).use.remove(lambda _: True)
    assert not held(tmp_path)
    assert all(file.read_text(encoding="utf-8") == "mine" for file in own)
