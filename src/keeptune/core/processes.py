"""The processes of one job: which of them this is, and the few ways in which they work together.

Under a launcher (torchrun, accelerate) every process runs the same stages on shared folders, and the first one writes.
What takes long is divided and joined here, through the CPU. With one process, outside of :func:`joined` and inside
:func:`by_first` all of this costs nothing and talks to nobody.
"""

import contextlib
import ctypes
import datetime
import itertools
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous
from tqdm.auto import tqdm

from keeptune.core.artefact import content_key, explain_full_disk
from keeptune.core.errors import KeeptuneError, ProcessError, RecipeError, named

T = TypeVar("T")
R = TypeVar("R")
TIMEOUT = "KEEPTUNE_TIMEOUT"  # minutes
LAUNCHER = "KEEPTUNE_LAUNCHER"  # number of the process that started this one
_MINUTES = 60
_TO_MEET = datetime.timedelta(minutes=5)  # that started processes have to find each other
_ALIKE = 20  # seconds that processes have to meet the same error
_JOINED: ContextVar[bool] = ContextVar("joined", default=False)
_OUTPUTS = (1, 2)  # stdout and stderr
_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG


def launched() -> int:
    """Returns how many processes a launcher started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def world() -> int:
    """Returns how many processes work together."""
    return dist.get_world_size() if _JOINED.get() else 1


def rank() -> int:
    """Returns the number of this process, from 0."""
    return dist.get_rank() if _JOINED.get() else 0


def is_first() -> bool:
    """Returns whether this process is the one that writes and is heard."""
    return rank() == 0


def on_machine() -> tuple[int, int]:
    """Returns the number of this process among those of its machine, and how many these are."""
    return (int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))) if _JOINED.get() else (0, 1)


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that a launcher started, and ends them together.

    An error of one ends all: the first to meet one raises it, the others leave with exit code 2 and say nothing. One
    that waits for another longer than ``KEEPTUNE_TIMEOUT`` minutes (60) takes it for hung. All end with the launcher.

    Raises:
        ProcessError: Another process ended or hung.
    """
    if launched() == 1 or dist.is_initialized():
        yield
        return
    _end_with_launcher()
    number, token, store = int(os.environ["RANK"]), None, None
    try:
        with _quiet() if number else contextlib.nullcontext():
            store, _, size = next(rendezvous("env://", timeout=_TO_MEET))
            waits = _waits()
            store.set_timeout(waits)
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            group = PrefixStore("group", store)
            dist.init_process_group(backend, store=group, rank=number, world_size=size, timeout=waits)
            token = _JOINED.set(True)
            yield
    except Exception as error:
        explained = _explained(error)
        if isinstance(explained, ProcessError):
            time.sleep(1)  # the launcher ends all as soon as one has left, which may have said why
        if not _is_first_to_end(store):
            time.sleep(1)  # let the other be heard
            raise SystemExit(2) from None
        if explained is error:
            raise
        raise explained from error
    finally:
        if token is not None:
            _JOINED.reset(token)
    dist.destroy_process_group()


def _waits() -> datetime.timedelta:
    given = os.environ.get(TIMEOUT, str(_MINUTES))
    with contextlib.suppress(ValueError, OverflowError):
        if (waits := datetime.timedelta(minutes=float(given))) > datetime.timedelta():
            return waits
    raise RecipeError(TIMEOUT, got=given, wanted="minutes, more than 0", next_step=f"Leave it out for {_MINUTES}.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Sends what this process prints to nowhere, that of libraries in C++ included."""
    kept = [os.dup(number) for number in _OUTPUTS]
    with Path(os.devnull).open("w") as nowhere:
        for number in _OUTPUTS:
            os.dup2(nowhere.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for copy, number in zip(kept, _OUTPUTS, strict=True):
            os.dup2(copy, number)


def end_with_parent() -> None:
    """Has Linux end this process with the one that started it, which nothing else does if it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_WITH_PARENT, signal.SIGKILL)


def _end_with_launcher() -> None:
    end_with_parent()
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):  # it was killed before
        raise SystemExit(2)


def _is_first_to_end(store: Store | None) -> bool:
    with contextlib.suppress(RuntimeError):  # it is gone, with the machine that held it
        if store is not None:
            return bool(PrefixStore("keeptune", store).add("ended", 1) == 1)
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _explained(error: Exception) -> Exception:
    """Returns the error, or what it means where another process did not answer."""
    if isinstance(error, KeeptuneError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return error
    return ProcessError(
        f"process {os.environ['RANK']} of {launched()}",
        got=f"no answer of another process ({str(error).splitlines()[0]})",
        wanted="all of them at work",
        next_step="See why the other one ended (killed, out of memory) or hung; the same command goes on from here.",
    )


def gathered(value: T) -> list[T]:
    """Returns the value of each process, in their order."""
    if world() == 1:
        return [value]
    every: list[Any] = [None] * world()
    dist.all_gather_object(every, value)
    return every


def by_first(make: Callable[[], T]) -> T:
    """Has the first process alone make something, while the others wait; all return it, or raise its KeeptuneError."""
    if world() == 1:
        return make()
    made: list[Any] = [None, None]
    if is_first():
        token = _JOINED.set(False)
        try:
            made[0] = make()
        except KeeptuneError as error:
            made[1] = error
        finally:
            _JOINED.reset(token)
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    value: T = made[0]
    return value


def met_by_all(what: str) -> bool:
    """Returns whether all processes come here with the same words, such as an error's, within some seconds.

    Those that wait for this one elsewhere do not: it alone has met the error.
    """
    if world() == 1:
        return True
    store, key = _get_default_store(), content_key(what)
    met = store.add(key, 1)
    for _ in range(10 * _ALIKE):
        if met == world():
            return True
        time.sleep(0.1)
        met = store.add(key, 0)
    return False


def held_by_first(lock: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    """Returns a lock as the processes of a job hold it: the first one for all."""
    return lock if is_first() else contextlib.nullcontext()


def share(items: Sequence[T]) -> Sequence[T]:
    """Returns this process's part of some items: every ``world()``-th."""
    return items[rank() :: world()]


def divided(items: Sequence[T], compute: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """Divides items, the same on all, among the processes; ``compute`` returns one result for each that it is given.

    Returns:
        The results of all items in their order, on each process.
    """
    joined_results: list[Any] = [None] * len(items)
    for number, part in enumerate(gathered(list(compute(share(items))))):
        joined_results[number :: world()] = part
    return joined_results


def divided_in_groups(
    items: Sequence[T], group_of: Callable[[T], Any], compute: Callable[[T], R], *, title: str
) -> list[R]:
    """Divides items as :func:`divided`, those that follow each other in one group together; ``title`` shows a bar."""
    groups = [list(own) for _, own in itertools.groupby(items, key=group_of)]

    def some(own: Sequence[list[T]]) -> list[list[R]]:
        items = [one for group in own for one in group]
        done = map(compute, tqdm(items, desc=title, delay=2, disable=None, leave=False))
        return [list(itertools.islice(done, len(group))) for group in own]

    return [one for group in divided(groups, some) for one in group]


def add_up(total: Tensor) -> None:
    """Adds up a tensor over the processes, in float64 and in place; each has the sum, equal to the last bit."""
    if world() > 1:
        whole = total.detach().to("cpu", torch.float64).contiguous()
        dist.all_reduce(whole)
        total.copy_(whole)


def same_everywhere(where: str, value: str) -> None:
    """Refuses what is not the same on all processes, such as the key of a recipe; says which differ.

    Raises:
        RecipeError: It differs.
    """
    every = gathered(value)
    others = [str(number) for number, one in enumerate(every) if one != every[0]]
    if others:
        raise RecipeError(
            where,
            got=f"another on process {named(others)} of {world()} than on the first",
            wanted="the same on all",
            next_step="Start all machines with the same command, on the same files.",
        )


def refuse_unshared(where: str, folder: Path) -> None:
    """Refuses a folder that not all processes see.

    Raises:
        RecipeError: What the first one writes there is not seen by another.
    """
    if world() == 1:
        return
    made = by_first(lambda: not folder.exists())
    mark = folder / f".seen-{by_first(lambda: secrets.token_hex(8))}"
    if is_first():
        with explain_full_disk(mark):
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
    gathered(None)
    blind = [str(number) for number, seen in enumerate(gathered(mark.exists())) if not seen]
    if is_first():
        mark.unlink()
        if made and blind:
            folder.rmdir()
    if blind:
        raise RecipeError(
            where,
            got=f"{folder}, which process {named(blind)} of {world()} does not share with the first",
            wanted="a folder that all machines see",
            next_step=f"Put `{where}` on a shared file system.",
        )
