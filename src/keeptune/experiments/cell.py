"""A run of a comparison in several processes: what starts them, and what each does (python -m ... TASK)."""

import pickle
import sys
import tempfile
from pathlib import Path

from keeptune.core.artefact import write_json
from keeptune.core.errors import KeeptuneError
from keeptune.core.processes import is_first, joined
from keeptune.experiments.single_run import MARK, Outcome, RunTask, attempt
from keeptune.pipeline.launching import Launch, configured, start


def attempt_together(task: RunTask, launch: Launch) -> Outcome:
    """Does a run in processes of its own on this machine; a failure is recorded in its folder until the next try."""
    with tempfile.TemporaryDirectory() as own:
        path, ended = Path(own, "task"), Path(own, "outcome")
        path.write_bytes(pickle.dumps(task))
        try:
            checked = launch.checked()
            with configured(checked, path.parent) as config:
                code = start(checked, config, [__name__, str(path)])
            outcome = Outcome("failed", f"its processes ended with exit code {code}")
        except KeeptuneError as error:
            outcome = Outcome("failed", str(error))
        if ended.is_file():
            outcome = pickle.loads(ended.read_bytes())  # noqa: S301 - of our own process
    if outcome.status == "failed":
        write_json(task.recipe.output / MARK, {"key": task.key, "status": "failed", "message": outcome.message})
    return outcome


def main(path: Path) -> None:
    """Does a run as one of its processes; the first writes its outcome, or the one that ends all."""
    task: RunTask = pickle.loads(path.read_bytes())  # noqa: S301 - of our own process
    ended = path.with_name("outcome")
    try:
        with joined():
            outcome = attempt(task)
            if is_first():
                ended.write_bytes(pickle.dumps(outcome))
    except (KeeptuneError, RuntimeError, ValueError, OSError) as error:
        kind = "" if isinstance(error, KeeptuneError) else f"{type(error).__name__}: "
        ended.write_bytes(pickle.dumps(Outcome("failed", f"{kind}{error}")))
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
