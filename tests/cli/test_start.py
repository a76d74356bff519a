"""What a start loads and sets: importing keeptune is cheap and sets nothing; the command line turns telemetry off."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from keeptune.cli.shared import ExitCode

HEAVY = ("torch", "plotly", "ray", "lm_eval", "matplotlib")
FOUND = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"


@pytest.mark.parametrize(
    "statements",
    [
        {"import keeptune; dir(keeptune)": []},
        {
            "import keeptune; [getattr(keeptune, name) for name in [*dir(keeptune), 'Keep', 'L2']]": ["torch"],
            "import keeptune.report.figures": ["torch", "plotly", "matplotlib"],  # the control
        },
    ],
)
def test_what_an_import_loads(statements: dict[str, list[str]]) -> None:
    code = "".join(f"{statement}\n{FOUND}\n" for statement in statements)
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(loaded) for loaded in statements.values()]


TELEMETRY = ("HF_HUB_DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS", "RAY_USAGE_STATS_ENABLED")
SETTINGS = f"""
import os, sys
sys.argv = ["keeptune", "--help"]
import keeptune.cli.main
print([os.environ.get(name) for name in {TELEMETRY}])
try:
    keeptune.cli.main.main()
except SystemExit:
    print([os.environ.get(name) for name in {TELEMETRY}])
"""


@pytest.mark.parametrize(("own", "then"), [({}, "['1', '0', '0']"), ({TELEMETRY[0]: "0"}, "['0', '0', '0']")])
def test_telemetry_is_off_unless_the_user_sets_it(own: dict[str, str], then: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in TELEMETRY}
    done = subprocess.run(
        [sys.executable, "-c", SETTINGS], capture_output=True, text=True, check=True, env=kept | own
    ).stdout.splitlines()
    assert (done[0], done[-1]) == (str([own.get(name) for name in TELEMETRY]), then)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("keeptune che", ["check"]), ("keeptune store cl", ["clear"]), ("keeptune plan --js", ["--json"])],
)
def test_a_shell_completes_commands_and_options_without_torch(typed: str, offered: list[str]) -> None:
    own = {"_KEEPTUNE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = [sys.executable, "-X", "importtime", "-m", "keeptune"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | own)
    assert done.stdout.split() == offered
    assert not re.search(r"\btorch$", done.stderr, re.MULTILINE)


def test_the_exit_codes_of_the_guide_are_those_of_the_code() -> None:
    guide = (Path(__file__).parents[2] / "docs/guides/commands.md").read_text(encoding="utf-8")
    table = guide.partition("## Exit codes")[2].partition("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == set(ExitCode)
