"""Programs that a model might write: what they cannot do, and that right ones pass."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from pathlib import Path

import pytest
from tests.assets import DATA

from keeptune.evaluation.standard import sandbox
from keeptune.evaluation.standard.sandbox import Runs, Sandbox, open_sandbox, program_of


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return open_sandbox("evaluate.x")


@pytest.fixture(scope="module")
def bare() -> Sandbox:
    """Without namespaces, as where the kernel gives none."""
    return Sandbox(())


@pytest.mark.parametrize(
    "program",
    [
        "x = 1\nassert x == 1",
        "open('a', 'w').write('x')\nassert open('a').read() == 'x'",
        "import os\nassert os.listdir('.') == [] and dict(os.environ) == {}",
        "import math, heapq, re, collections, itertools, typing, functools",
        "import numpy\nassert numpy.ones((2, 2)).sum() == 4",
        "assert __name__ == '__main__'",
        "print('a' * 10**6)",
        "import tempfile\nwith tempfile.TemporaryDirectory(dir='.') as d:\n    open(d + '/a', 'w').write('x')",
        "class A:\n    def f(self):\n        return g()\ndef g():\n    return 3\nassert A().f() == 3",
    ],
)
def test_right_programs_pass(box: Sandbox, program: str) -> None:
    assert box.run(program) == ""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import sys\nsys.exit()", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os\nos._exit(0)", "stopped"),
        ("import os, signal\nos.abort()", "stopped"),
        ("x = bytearray(3 * 10**9)", "MemoryError"),
        ("x = []\nwhile True:\n    x.append(bytearray(10**7))", "MemoryError"),
        ("def f():\n    return f()\nf()", "RecursionError"),
        ("input()", "EOFError"),
        ("open('big', 'wb').write(b'x' * 10**7)", "File too large"),
        ("a\0b", ""),
        ("x = '\ud800'", ""),
    ],
)
def test_wrong_programs_fail(box: Sandbox, program: str, said: str) -> None:
    stopped = box.run(program)
    assert stopped
    assert said in stopped


FORBIDDEN = [
    "import socket\nsocket.create_connection(('127.0.0.1', {port}))",
    "import _socket\n_socket.socket().connect(('127.0.0.1', {port}))",
    "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
    "import os\nos.fork()",
    "import os\nwhile True:\n    os.fork()",
    "import subprocess\nsubprocess.run(['true'])",
    "import os\nos.system('true')",
    "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()\np.join()\nassert p.exitcode == 0",
    "import os\nos.kill(os.getppid(), 9)",
    "import ctypes\nctypes.CDLL(None)",
    "open('{outside}', 'w').write('x')",
    "open('{outside}', 'a')",
    "open('{present}', 'r+')",
    "import pathlib\npathlib.Path('{outside}').touch()",
    "import os\nos.open('{outside}', os.O_CREAT | os.O_WRONLY)",
    "import os\nos.mkdir('{outside}')",
    "import os\nos.remove('{present}')",
    "import os\nos.rename('{present}', 'here')",
    "import os\nos.truncate('{present}', 0)",
    "import shutil\nshutil.rmtree('{folder}')",
    "import os\nos.remove('present', dir_fd=os.open('{folder}', os.O_RDONLY))",
    "import os\nopen('here', 'w').close()\nos.rename('here', '{outside}')",
    "import os\nos.symlink('{present}', 'l')\nopen('l', 'w')",
]


@pytest.mark.parametrize("kind", ["box", "bare"])
def test_what_programs_are_kept_from(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    held: Sandbox = request.getfixturevalue(kind)
    present = tmp_path / "present"
    present.write_text("stays", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"port": server.getsockname()[1], "outside": tmp_path / "new", "present": present, "folder": tmp_path}
        for program in FORBIDDEN:
            assert held.run(program.format(**names)), program
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["present"]
    assert present.read_text(encoding="utf-8") == "stays"


def test_an_endless_loop_is_stopped_by_its_processor_time(box: Sandbox) -> None:
    assert "over 1 s" in Sandbox(box.prefix, seconds=1).run("while True:\n    pass")


def test_a_sleeper_is_stopped_by_the_clock(box: Sandbox) -> None:
    started = time.monotonic()
    assert Sandbox(box.prefix, wall=1.0).run("import time\ntime.sleep(600)")
    assert time.monotonic() - started < box.wall


def test_a_thread_does_not_outlive_the_program(box: Sandbox) -> None:
    assert box.run("import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()") == ""


def test_no_folder_is_left_behind(box: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    box.run("open('a', 'w').write('x')\nimport os\nos.mkdir('b')")
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_not_passed_on(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert box.run("import os\nassert 'HF_TOKEN' not in os.environ") == ""
    assert box.run("assert b'secret' not in open('/proc/self/environ', 'rb').read()") == ""


def test_the_kernel_holds_programs_that_python_does_not(
    box: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the audit hooks, as for a program that gets past them."""
    source = Path(sandbox.__file__).with_name("confined.py").read_text(encoding="utf-8")
    unhooked = tmp_path / "unhooked.py"
    unhooked.write_text(source.replace("    sys.addaudithook(refuse)\n", ""), encoding="utf-8")
    monkeypatch.setattr(sandbox, "_CONFINED", unhooked)
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert Sandbox(()).run(connect) == ""
        if not box.prefix:
            pytest.skip("neither bubblewrap nor namespaces here")
        assert box.run(connect)
    assert box.run("open('a', 'w').write('x')\nopen('/dev/null', 'w').write('x')") == ""
    if "--ro-bind" not in box.prefix:
        pytest.skip("no bubblewrap here: files are kept by the hooks alone")
    assert box.run(f"open({str(tmp_path / 'a')!r}, 'w')")
    assert box.run(f"import os\nos.remove({str(unhooked)!r})")
    assert (
        box.run("import os\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['sleep', '987.5'])") == ""
    )
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"987.5" in _read(path)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ((), "bubblewrap: no network, and no changes outside"),
        (("bwrap",), "no network; files are kept by"),
        (("bwrap", "unshare"), "network and files are kept by Python's audit hooks alone"),
    ],
)
def test_the_log_names_what_holds_programs(
    missing: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    which = shutil.which
    monkeypatch.setattr("shutil.which", lambda name: None if name in missing else which(name))
    with caplog.at_level(logging.INFO):
        opened = open_sandbox("evaluate.humaneval")
    if len(missing) < 2 and ("--ro-bind" not in opened.prefix if not missing else not opened.prefix):
        pytest.skip("this machine has no such confinement")
    assert f"evaluate.humaneval: programs run with limits of time and memory, and {said}" in caplog.text


def test_programs_of_lm_eval() -> None:
    row = {"prompt": "def f():\n", "test": "def check(g):\n    assert g() == 1", "entry_point": "f"}
    assert program_of("humaneval", row, "    return 1") == (
        "def f():\n    return 1\ndef check(g):\n    assert g() == 1\ncheck(f)"
    )
    assert program_of("mbpp", {"test_list": ["assert a", "assert b", "assert c"]}, "a=b=c=1") == (
        "a=b=c=1\nassert a\nassert b\nassert c"
    )


@pytest.mark.parametrize(
    ("name", "file", "field"),
    [
        ("humaneval", "humaneval/HumanEval.jsonl", "canonical_solution"),
        ("mbpp", "mbpp/mbpp.jsonl", "code"),
    ],
)
def test_reference_solutions_pass_and_empty_ones_fail(box: Sandbox, name: str, file: str, field: str) -> None:
    rows = [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]
    runs = Runs(name, box)
    chosen = rows[::6]
    assert [runs.process(row, [row[field]])["pass_at_1"] for row in chosen] == [1.0] * len(chosen)
    assert runs.process(rows[0], ["    pass\n"]) == {"pass_at_1": 0.0}
    assert len(runs.stopped) == len(chosen) + 1
