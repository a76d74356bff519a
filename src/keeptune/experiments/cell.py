"""A run of a comparison in several processes: what starts them, and what each of them does.

python -m keeptune.experiments.cell TASK, as :func:`attempt_together` starts it.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
from pathlib import Path

from keeptune.core.artefact import write_json
from keeptune.core.errors import KeeptuneError
from keeptune.core.processes import is_first, joined
from keeptune.experiments.single_run import MARK, Outcome, RunTask, attempt
from keeptune.pipeline.launching import Launch, configured, start

_OUTCOME, _MESSAGE = "outcome", "message"


def attempt_together(task: RunTask, launch: Launch) -> Outcome:
    """Does a run in processes of its own on this machine; a failure is recorded in its folder until the next try."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        own = Path(name)
        (own / "task").write_bytes(pickle.dumps(task))
        try:
            checked = launch.checked()
            with configured(checked, own) as config:
                code = start(checked, config, [__name__, str(own / "task")])
            if (own / _OUTCOME).is_file():
                outcome: Outcome = pickle.loads((own / _OUTCOME).read_bytes())  # noqa: S301 - of our own process
                return outcome
            said = own / _MESSAGE
            message = said.read_text(encoding="utf-8") if said.is_file() else f"its processes ended with code {code}"
        except KeeptuneError as error:
            message = str(error)
    write_json(task.recipe.output / MARK, {"key": task.key, "status": "failed", "message": message})
    return Outcome("failed", message, time.perf_counter() - started)


def main(path: Path) -> None:
    """Does a run as one of its processes; the first writes its outcome, the one that ends all why it did."""
    task: RunTask = pickle.loads(path.read_bytes())  # noqa: S301 - of our own process
    try:
        with joined():
            outcome = attempt(task)
            if is_first():
                path.with_name(_OUTCOME).write_bytes(pickle.dumps(outcome))
    except (KeeptuneError, RuntimeError, ValueError, OSError) as error:
        kind = "" if isinstance(error, KeeptuneError) else f"{type(error).__name__}: "
        path.with_name(_MESSAGE).write_text(f"{kind}{error}", encoding="utf-8")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
