"""What commits overwrote is kept within bounds, and leads back byte for byte."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from tests.rig import LAYOUT_PAIRS, Rig, random_content
from weight_update.errors import VersionError
from weight_update.history import History


def history_of(rig: Rig, **bounds: int) -> History:
    receiver = rig.receivers[0]
    return History(receiver.manifest.tensors, receiver.row_start, receiver.row_stop, **bounds)


def commit(rig: Rig, history: History, tensors: list[int], seed: int) -> list[int]:
    rig.push(tensors, random_content(rig.specs, seed))
    reverse = rig.receivers[0].last_undo()
    assert reverse is not None
    return history.add(reverse)


def test_any_version_that_is_kept_is_restored_byte_for_byte_at_the_same_addresses() -> None:
    rig = Rig(LAYOUT_PAIRS[2])
    history, everything = history_of(rig), list(range(len(rig.specs)))
    held, addresses = {}, rig.addresses()
    for seed, tensors in enumerate((everything, [0, 1], [1, 2, 3], everything), 1):
        commit(rig, history, tensors, seed)
        held[rig.receivers[0].version] = dict(rig.committed)
    first, *_, last = held
    assert history.versions(last) == tuple(sorted(held, reverse=True))[1:]
    patches = history.back(last, first)
    rig.num += 1
    receiver = rig.receivers[0]
    receiver.begin(rig.num, last + 1, last, np.array(everything), blobs=(), patches=patches)
    expected = rig.expected_digests(everything, held[first])
    assert np.array_equal(receiver.prepare(), expected)
    assert np.array_equal(receiver.install(), expected)
    receiver.publish()
    rig.committed = held[first]
    assert rig.wrong() == []
    assert rig.addresses() == addresses


@pytest.mark.parametrize("bounds", [{"keep": 2}, {"keep_bytes": 20_000}], ids=["count", "bytes"])
def test_what_falls_out_is_said_and_is_out_of_reach(bounds: dict[str, int], caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(LAYOUT_PAIRS[0])
    history, versions = history_of(rig, **bounds), []
    with caplog.at_level(logging.INFO, "weight_update.history"):
        dropped = []
        for seed in range(1, 7):
            dropped += commit(rig, history, [1, 2], seed)
            versions.append(rig.receivers[0].version)
    kept = history.versions(versions[-1])
    assert sorted([*dropped, *kept]) == versions[:-1]
    assert dropped and kept
    assert len(kept) <= bounds.get("keep", 9) and history.num_bytes <= bounds.get("keep_bytes", 1 << 30)
    assert [f"version {version} is out of reach" in caplog.text for version in dropped] == [True] * len(dropped)
    with pytest.raises(VersionError, match=f"version {dropped[0]} is not kept on this rank; reachable"):
        history.back(versions[-1], dropped[0])


def test_a_commit_that_overwrote_more_than_a_step_may_hold_is_refused_before_it_is_copied(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig(LAYOUT_PAIRS[0])
    rig.push([1, 2], random_content(rig.specs, 1))
    num_bytes = rig.receivers[0].last_undo_bytes
    assert num_bytes >= sum(rig.specs[i].num_bytes for i in (1, 2))
    assert history_of(rig, step_bytes=num_bytes).takes(num_bytes)
    with caplog.at_level(logging.INFO, "weight_update.history"):
        assert not history_of(rig, step_bytes=num_bytes - 1).takes(num_bytes)
    assert f"{num_bytes} bytes lead back" in caplog.text


def test_what_was_loaded_without_a_number_is_no_version_to_go_back_to() -> None:
    rig = Rig(LAYOUT_PAIRS[0])
    history = history_of(rig)
    commit(rig, history, [0], 1)
    assert history.versions(rig.receivers[0].version) == ()
    assert history.num_bytes == 0
