"""Events for whoever watches: `transfuse watch`, tests, a supervisor."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from protos import transfuse_pb2 as pb
from weight_update.versions import Record

POLL_S = 0.5


def event_of(record: Record) -> pb.Event:
    """A recorded event for the wire."""
    event = record.event
    return pb.Event(
        number=record.number,
        time_s=record.time_s,
        kind=event.kind,
        version=event.version,
        transaction=event.transaction,
        text=event.text,
        who=record.who,
        peer=record.peer,
    )


class Watchers:
    """Those who watch, each with what it has not seen yet, until `stopped`."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped
        self._guard = threading.Lock()  # guards the set; nothing blocks under it
        self._listeners: list[Callable[[pb.Event], None]] = []
        self._queues: set[queue.SimpleQueue[pb.Event]] = set()

    def listen(self, listener: Callable[[pb.Event], None]) -> None:
        """Call this with every event, in the thread that it comes from; it must not block."""
        self._listeners.append(listener)

    def tell(self, event: pb.Event) -> None:
        """All who watch now get it."""
        for listener in self._listeners:
            listener(event)
        with self._guard:
            for each in self._queues:
                each.put(event)

    def watch(self, alive: Callable[[], bool]) -> Iterator[pb.Event]:
        """Events from now on, while the watcher is there."""
        events: queue.SimpleQueue[pb.Event] = queue.SimpleQueue()
        with self._guard:
            self._queues.add(events)
        try:
            while alive() and not self._stopped.is_set():
                try:
                    yield events.get(timeout=POLL_S)
                except queue.Empty:
                    continue
        finally:
            with self._guard:
                self._queues.discard(events)
