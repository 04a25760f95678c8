"""`python -m tests.bench.growth`: thousands of real pushes in a row, and whether anything grows.

One process holds coordinator, rank and trainer; a trainer pushes `EACH` times, then a new one comes, in turn over
shared memory and over gRPC. What the process holds is counted when no trainer is there: the first time once both kinds
of trainer have been. Memory is now and then 100 MiB higher for the time until the next trainer comes, by buffers that
are freed late, so start, middle and end are each the least of several counts: what leaks raises the least, too.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import psutil
import torch

from tests.local import LocalService, local_service
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher

PUSHES, EACH = 5_000, 100
FULL_EVERY = 10
GROWN_BYTES = 4096  # of memory a push, at most: SQLite's cache and Python's own pools grow slowly to their bounds
WINDOW = 5  # counts that are taken as one
TRANSPORTS = ("shared-memory", "grpc")


@dataclass(frozen=True, kw_only=True)
class Holds:
    """What a process holds. files: of the service and the trainer, temporary ones included."""

    pushes: int
    memory_bytes: int
    descriptors: int
    threads: int
    segments: int
    files: int
    state_bytes: int

    def as_text(self) -> str:
        """For people."""
        counts = ", ".join(f"{getattr(self, each.name)} {each.name}" for each in fields(self)[2:6])
        return (
            f"after {self.pushes:5d} pushes: {self.memory_bytes / 2**20:.2f} MiB of its own memory, {counts};"
            f" {self.state_bytes / 2**10:.0f} KiB of decisions and events on disk"
        )


def holds(pushes: int, folder: Path) -> Holds:
    """Of this process, now."""
    gc.collect()
    this = psutil.Process()
    segments = [each.path for each in this.memory_maps() if each.path.startswith(("/memfd:", "/dev/shm/"))]
    found = [path for path in folder.rglob("*") if path.is_file()]
    return Holds(
        pushes=pushes,
        memory_bytes=this.memory_full_info().uss,
        descriptors=this.num_fds(),
        threads=this.num_threads(),
        segments=len(segments),
        files=len(found),
        state_bytes=sum(path.stat().st_size for path in found if path.name.startswith("state.sqlite")),
    )


def pushed(service: LocalService, model: torch.nn.Module, folder: Path, pushes: int, each: int) -> Iterator[Holds]:
    """Push, and say what is held whenever a trainer has gone and both kinds have been."""
    parameters = list(model.parameters())
    for number in range(0, pushes, each):
        pusher = Pusher(service.address, transport=TRANSPORTS[number // each % 2])
        for i in range(number, number + each):
            with torch.no_grad():
                parameters[i % len(parameters)].view(-1)[i % 97] += 0.5
            pusher.mode = "full" if i % FULL_EVERY == 0 else "auto"
            assert pusher.push(model, step=i).digest_verified
        pusher.close()
        if number:
            yield holds(number + each, folder)


def least(seen: Sequence[Holds]) -> Holds:
    """The last of these counts, with the least memory of all of them."""
    return replace(seen[-1], memory_bytes=min(each.memory_bytes for each in seen))


def grown(first: Holds, middle: Holds, last: Holds) -> list[str]:
    """What grew from the middle to the end, and is more than at the start."""
    found = [
        f"{name}: {getattr(first, name)}, {getattr(middle, name)}, {getattr(last, name)}"
        for name in ("descriptors", "threads", "segments", "files")
        if getattr(last, name) > max(getattr(first, name), getattr(middle, name))
    ]
    rate = (last.memory_bytes - middle.memory_bytes) / (last.pushes - middle.pushes)
    return found if rate <= GROWN_BYTES else [*found, f"memory: {rate:.0f} bytes a push, at most {GROWN_BYTES}"]


def run(pushes: int = PUSHES, each: int = EACH) -> None:
    """Print start, middle, end and the verdict; SystemExit where something grew. pushes: at least four times `each`."""
    assert pushes >= 4 * each, "too few pushes for a start, a middle and an end"
    start_s, cpu_s = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="transfuse-growth-") as scratch:
        folder, before = Path(scratch), tempfile.tempdir
        tempfile.tempdir = scratch  # so that what is left there is counted
        model = tiny_llama(seed=0)
        (folder / "state").mkdir()
        with local_service(save(model, folder / "model"), folder / "state") as service:
            seen = list(pushed(service, model, folder, pushes, each))
            version = service.shell.index.decision().version
    tempfile.tempdir = before
    width = min(WINDOW, len(seen) // 3)
    middle = (len(seen) - width) // 2
    marks = least(seen[:width]), least(seen[middle : middle + width]), least(seen[-width:])
    problems = grown(*marks)
    print(f"{pushes} pushes in a row, {each} a trainer, in turn over {' and '.join(TRANSPORTS)}; version {version}")
    for mark in marks:
        print(f"  {mark.as_text()}")
    per_push = 1e3 * (time.process_time() - cpu_s) / pushes
    verdict = "; ".join(problems) or "nothing grew"
    print(f"  {time.monotonic() - start_s:.0f} s, {per_push:.1f} CPU ms a push; {verdict}")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pushes", type=int, default=PUSHES)
    parser.add_argument("--each", type=int, default=EACH)
    options = parser.parse_args()
    run(options.pushes, options.each)
