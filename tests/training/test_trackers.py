"""Trackers of experiments have every number of ours: through the trainer's own log, before they end."""

from __future__ import annotations

import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.training.support import planned, trl_trainer, tuned

from keeptune.methods.lora import Lora
from keeptune.penalties.kl import Kl
from keeptune.penalties.l2 import L2
from keeptune.training.attach import attach

MEASURED = {"train/kl_to_base", "train/kl_budget", "train/multiplier", "train/penalty/kl"}
OURS = MEASURED | {"train/penalty/l2", "train/penalty_grad_norm", "train/drift/layer_0", "train/held_out/kl"}


def _tensorboard(folder: Path) -> dict[str, list[float]]:
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[float]] = {}
    for path in folder.rglob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            for value in Event.FromString(data[at + 12 : at + 12 + length]).summary.value:
                found.setdefault(value.tag, []).append(value.simple_value)
            at += length + 16
    return found


def _trackio(folder: Path) -> dict[str, list[float]]:
    from trackio.sqlite_storage import SQLiteStorage

    found: dict[str, list[float]] = {}
    for row in SQLiteStorage.get_logs("ours", SQLiteStorage.get_runs("ours")[0]):
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    return found


READ: dict[str, Callable[[Path], dict[str, list[float]]]] = {"tensorboard": _tensorboard, "trackio": _trackio}
MISSING = pytest.mark.skipif(find_spec("trackio") is None, reason="pip install trackio")


@pytest.mark.parametrize("tracker", ["tensorboard", pytest.param("trackio", marks=MISSING)])
def test_a_tracker_has_the_budget_what_is_measured_and_the_verdict(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "logs"))
    plan = planned(Lora(rank=2), [Kl(budget=0.5, batch_size=3), L2(strength=1.0)], store=tmp_path / "store")
    extra = {"project": "ours"} if tracker == "trackio" else {}
    made = trl_trainer(tuned(plan), tmp_path / "out", report_to=tracker, **extra)
    attach(made, plan)
    made.train()
    found = READ[tracker](tmp_path / "logs")
    assert found.keys() >= OURS
    assert found["train/kl_budget"] == [0.5, 0.5]
    rows = made.state.log_history
    for key in ("kl_to_base", "penalty/kl", "held_out/kl"):
        assert found[f"train/{key}"] == pytest.approx([row[key] for row in rows if key in row])
    assert rows[-1]["held_out/kl"] > 0
