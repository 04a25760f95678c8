"""The flight recorder, and the replay that says at which step digests part."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.local import LocalService, local_service
from tests.test_cli import Shell
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.errors import PlanError
from weight_update.flight import Flight, Recorder
from weight_update.replay import replay

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalService, Path]]:
    """A full push and a delta, recorded."""
    model_dir = save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))
    records = tmp_path_factory.mktemp("records")
    with local_service(
        model_dir, tmp_path_factory.mktemp("state"), layouts=("trtllm", "cutlass"), record_dir=records
    ) as service:
        pusher = Pusher(service.address)
        model = tiny_llama(seed=1)
        pusher.push(model)
        with torch.no_grad():
            model.get_parameter("model.norm.weight")[3] += 1
        assert pusher.push(model).mode == "delta"
        pusher.close()
        yield service, records


@pytest.fixture
def full(recorded: tuple[LocalService, Path], tmp_path: Path) -> Path:
    """A copy of the full push's files, to break."""
    first = min(recorded[1].iterdir(), key=lambda path: int(path.name))
    return Path(shutil.copytree(first, tmp_path / first.name))


def execute(path: Path, statement: str, *values: object) -> None:
    db = sqlite3.connect(path)
    with db:
        db.execute(statement, values)
    db.close()


def test_what_was_recorded_agrees_from_the_trainer_to_the_live_bytes(
    recorded: tuple[LocalService, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    service, records = recorded
    shell = Shell(capsys, service.address)
    found = []
    for folder in sorted(records.iterdir(), key=lambda path: int(path.name)):
        assert sorted(path.name for path in folder.iterdir()) == ["0.0.sqlite", "1.0.sqlite", "coordinator.sqlite"]
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir())
        code, out, err = shell("replay", str(folder), "--json")
        assert code == 0, err
        found.append(json.loads(out))
        assert "all digests agree" in shell("replay", str(folder))[1]
    assert [(each["version"], each["is_delta"]) for each in found] == [(2, False), (3, True)]
    assert all(each["partings"] == each["broken"] == each["missing"] == [] for each in found)
    assert all(set(each["outcomes"].values()) == {"committed"} for each in found)


def test_the_digests_are_those_of_the_commit(recorded: tuple[LocalService, Path]) -> None:
    service, records = recorded
    first = min(records.iterdir(), key=lambda path: int(path.name))
    flight, decision = Flight(first / "1.0.sqlite"), service.shell.index.decision(2)
    at = [service.shell.manifest.index[name] for name, _ in flight.facts["tensors"]]
    for step in ("staged", "installed"):
        assert np.array_equal(flight.digests[step], decision.digests[at])
    assert flight.facts["timing"]["pause_stop_s"] > flight.facts["timing"]["stage_start_s"]


@pytest.mark.parametrize(
    "step, before, path", [("installed", "staged", "1.0"), ("staged", "sent", "1.0"), ("sent", "meant", "coordinator")]
)
def test_the_step_at_which_digests_part_is_named(full: Path, step: str, before: str, path: str) -> None:
    """Steps that come after are changed alike: what was damaged once stays so."""
    file = full / f"{path}.sqlite"
    at = [name for name, _ in Flight(full / "1.0.sqlite").facts["tensors"]].index(NAME)
    changed = {"installed": ("installed",), "staged": ("staged", "installed"), "sent": ("meant",)}[step]
    for each in changed:
        lanes = Flight(file).digests[each].copy()
        lanes[at, 0] ^= np.uint64(4)
        execute(file, "UPDATE digests SET lanes = ? WHERE step = ?", lanes.tobytes(), each)
    found = replay(full)
    replicas = [0, 1] if step == "sent" else [1]
    assert [(each.replica, each.step, each.before, each.tensors) for each in found.partings] == [
        (replica, step, before, (NAME,)) for replica in replicas
    ]


def test_a_bit_that_flipped_in_a_recorded_chunk_is_found(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (_, _, message), *_ = Flight(full / "0.0.sqlite").chunks()
    broken = bytearray(message)
    broken[len(broken) // 2] ^= 1
    execute(full / "0.0.sqlite", "UPDATE chunks SET message = ? WHERE rowid = 1", bytes(broken))
    code, out, _ = Shell(capsys, "")("replay", str(full))
    assert code == 1 and "broken: rank 0.0, trainer rank 0" in out and "replica 0: sent is not what was meant" in out


def test_what_is_missing_is_said(full: Path, tmp_path: Path) -> None:
    (full / "coordinator.sqlite").unlink()
    execute(full / "0.0.sqlite", "UPDATE facts SET json = '2' WHERE name = 'world'")
    found = replay(full)
    assert found.missing == ("coordinator: what the trainer meant", "replica 0: 1 of 2 ranks") and not found.partings
    with pytest.raises(PlanError, match="no rank's file"):
        replay(tmp_path / "nowhere")
    (full / "1.0.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(PlanError, match="no file of the flight recorder"):
        replay(full)


def test_only_the_last_transactions_stay(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "0.0", keep=2)
    for transaction in (9, 10, 11):
        recorder.begin(transaction, {"transaction": transaction})
        recorder.end(transaction, {"outcome": "committed"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]


def test_a_recorder_that_cannot_write_fails_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    recorder = Recorder(tmp_path / "file", "0.0")
    recorder.begin(1, {})
    recorder.chunk(1, 0, b"x")
    recorder.digests(1, "staged", np.zeros((1, 2), np.uint64))
    recorder.end(1, {})
    assert "is not recorded" in caplog.text
