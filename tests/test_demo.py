"""The commands that start processes: what they print, and that nothing of them is left, Ctrl-C included."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.tiny import save, tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MARK = "TRANSFUSE_TEST_MARK"
COMMAND = (sys.executable, "-c", "from launch.cli import main; main()")
PROMISED = {"version", "reward", "logical_bytes", "wire_bytes", "seconds", "pause_s", "digest_verified"}


class Process:
    """A command in its own process group, as a terminal runs it; whatever it starts inherits a mark."""

    def __init__(self, tmp_path: Path, *args: str) -> None:
        self._mark = uuid.uuid4().hex
        self.scratch = tmp_path / "tmp"
        self.scratch.mkdir()
        # Ray's sockets need a short path.
        environment = {**os.environ, MARK: self._mark, "TMPDIR": str(self.scratch), "RAY_TMPDIR": "/tmp"}
        self.popen = subprocess.Popen(
            [*COMMAND, *args],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def interrupt(self, number: int) -> None:
        """A terminal's Ctrl-C goes to every process of the group, `kill` to one."""
        send = os.killpg if number == signal.SIGINT else os.kill
        send(self.popen.pid, number)

    def remains(self, within_s: float = 15.0) -> list[str]:
        """Command lines of its processes that are still there."""
        stop_s = time.monotonic() + within_s
        while (left := list(self._marked())) and time.monotonic() < stop_s:
            time.sleep(0.2)
        return left

    def _marked(self) -> Iterator[str]:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self._mark}".encode() in (path / "environ").read_bytes():
                    yield (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it ended meanwhile, or is another user's


def wait_for(stream: IO[str], text: str) -> None:
    """Read lines until one contains `text`."""
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"the command ended without saying {text!r}")


@pytest.mark.parametrize(("command", "image"), [("demo", "svg+xml"), ("demo-diffusion", "png")])
def test_demo_prints_one_object_a_step_and_leaves_nothing(tmp_path: Path, command: str, image: str) -> None:
    process = Process(tmp_path, command, "--steps", "2", "--json", "--out", str(tmp_path / "out"))
    out, err = process.popen.communicate(timeout=500)
    assert process.popen.returncode == 0, err
    steps = [json.loads(line) for line in out.splitlines()]
    assert [step["version"] for step in steps] == [steps[0]["version"], steps[0]["version"] + 1]
    for step in steps:
        assert step.keys() >= PROMISED
        assert step["digest_verified"] is True
        assert len(step["timings"]) == 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"data:image/{image}" in page and "2 of 2" in page
    assert process.remains() == []
    assert list(process.scratch.iterdir()) == []


@pytest.mark.parametrize("moment", ["start ranks", "push"])
def test_ctrl_c_leaves_nothing_running(tmp_path: Path, moment: str) -> None:
    process = Process(tmp_path, "demo", "--json", "--out", str(tmp_path / "out"))
    assert process.popen.stderr is not None
    wait_for(process.popen.stderr, moment)
    time.sleep(1.0)
    process.interrupt(signal.SIGINT)
    _, err = process.popen.communicate(timeout=120)
    assert process.popen.returncode == 130, err
    assert "Traceback" not in err
    assert process.remains() == []
    assert list(process.scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_well_on_a_signal(tmp_path: Path, number: int) -> None:
    model_dir = save(tiny_llama(seed=0), tmp_path / "model")
    process = Process(tmp_path, "serve", "--model", str(model_dir), "--listen", "127.0.0.1:0", "--json")
    assert process.popen.stdout is not None
    address = json.loads(process.popen.stdout.readline())["address"]
    status = subprocess.run([*COMMAND, "status", "--to", address, "--json"], capture_output=True, check=True)
    assert json.loads(status.stdout)["version"] == 1
    process.interrupt(number)
    _, err = process.popen.communicate(timeout=120)
    assert process.popen.returncode == 0, err
    assert process.remains() == []
    assert list(process.scratch.iterdir()) == []
