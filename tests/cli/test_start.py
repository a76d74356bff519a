"""What a start loads: importing keeptune is cheap, and its public names draw no figures and start no workers."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "plotly", "ray", "lm_eval", "matplotlib")
FOUND = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import keeptune; dir(keeptune)", []),
        ("import keeptune; [getattr(keeptune, name) for name in [*dir(keeptune), 'Keep', 'L2']]", ["torch"]),
        ("import keeptune.report.figures", ["torch", "plotly", "matplotlib"]),  # the control
    ],
)
def test_what_an_import_loads(statement: str, loaded: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", f"{statement}\n{FOUND}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(loaded)
