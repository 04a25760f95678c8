"""Deltas on a receiver: hot = cold after any sequence of pushes, nothing half done, damage refused, a way back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.deltas import blobs_for, changed, chunks_of, send_delta
from tests.plans import PLANS
from tests.rig import LAYOUT_PAIRS, NUM_TENSORS, Rig, chunk_of, random_content, shard_of
from tests.test_rows_hot import PAIRS, cold
from tests.test_rows_hot import random_content as numbers
from weight_update.chain import compose
from weight_update.delta import BlobSize, Patch, pack
from weight_update.digest import Digests
from weight_update.errors import DigestError, PlanError, TransferError, VersionError
from weight_update.receiver import Receiver, Reverse

ALL = list(range(NUM_TENSORS))


def names_of(rig: Rig, tensors: list[int]) -> list[str]:
    return [rig.specs[i].name for i in tensors]


def begin_delta(rig: Rig, tensors: list[int], seed: int) -> dict[str, np.ndarray]:
    """A delta staged on every rank; what the tensors are to become."""
    new = changed(rig.committed, names_of(rig, tensors), seed)
    rig.num += 1
    for receiver in rig.receivers:
        send_delta(receiver, rig.num, receiver.version + rig.num, tensors, rig.committed, new, seed)
    return new


def commit_full(rig: Rig, tensors: list[int], seed: int) -> None:
    rig.push(tensors, random_content(rig.specs, seed), seed)


def commit_delta(rig: Rig, tensors: list[int], seed: int) -> None:
    new = begin_delta(rig, tensors, seed)
    expected = rig.expected_digests(tensors, new)
    assert np.array_equal(rig.prepare(), expected)
    assert np.array_equal(rig.install(), expected)
    rig.publish(tensors, new)


def abort_delta(rig: Rig, tensors: list[int], seed: int) -> None:
    begin_delta(rig, tensors, seed)
    steps: list[Callable[[], object]] = [rig.prepare, rig.install]
    for step in steps[: seed % 3]:
        step()
    rig.abort()


def undo_and_install_again(rig: Rig, tensors: list[int], seed: int) -> None:
    new = begin_delta(rig, tensors, seed)
    rig.prepare()
    first = rig.install()
    for receiver in rig.receivers:
        receiver.undo()
    assert rig.wrong() == []
    assert np.array_equal(rig.install(), first)
    rig.publish(tensors, new)


def go_back(rig: Rig, tensors: list[int], seed: int) -> None:
    """A commit, then its reverse delta as the next commit."""
    before = dict(rig.committed)
    (commit_full if seed % 2 else commit_delta)(rig, tensors, seed)
    rig.num += 1
    for receiver in rig.receivers:
        reverse = receiver.last_undo()
        assert reverse is not None and reverse.version == receiver.version
        version = receiver.version + rig.num
        receiver.begin(rig.num, version, receiver.version, ALL, blobs=(), patches=reverse.patches)
    expected = rig.expected_digests(ALL, before)
    assert np.array_equal(rig.prepare(), expected)
    assert np.array_equal(rig.install(), expected)
    rig.publish(ALL, before)


def go_back_over_several(rig: Rig, tensors: list[int], seed: int) -> None:
    """Three commits, and one that takes all of them back."""
    before = dict(rig.committed)
    reverses: list[list[Reverse]] = [[] for _ in rig.receivers]
    for i, step in enumerate((commit_delta, commit_full if seed % 3 == 0 else commit_delta, commit_delta)):
        step(rig, tensors, seed + i)
        for receiver, found in zip(rig.receivers, reverses, strict=True):
            reverse = receiver.last_undo()
            assert reverse is not None
            found.insert(0, reverse)
    rig.num += 1
    for receiver, found in zip(rig.receivers, reverses, strict=True):
        patches = compose([reverse.patches for reverse in found])
        receiver.begin(rig.num, receiver.version + rig.num, receiver.version, ALL, blobs=(), patches=patches)
    rig.prepare()
    assert np.array_equal(rig.install(), rig.expected_digests(ALL, before))
    rig.publish(ALL, before)


STEPS = (commit_full, commit_delta, commit_delta, abort_delta, undo_and_install_again, go_back, go_back_over_several)
subsets = st.one_of(st.just(ALL), st.lists(st.sampled_from(ALL), min_size=1, max_size=12, unique=True))


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(LAYOUT_PAIRS),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(STEPS), subsets, st.integers(1, 999)), max_size=6),
)
def test_any_sequence_of_full_and_delta_pushes_leaves_the_bytes_of_a_cold_load_at_the_same_addresses(
    layouts: tuple[str, str], world: int, steps: list[tuple[Callable[[Rig, list[int], int], None], list[int], int]]
) -> None:
    rig = Rig(layouts, world)
    addresses = rig.addresses()
    commit_full(rig, ALL, 0)
    for step, tensors, seed in steps:
        step(rig, tensors, seed)
        assert rig.wrong() == [] and rig.addresses() == addresses
    assert np.array_equal(live_digests(rig), rig.expected_digests(ALL, rig.committed))


def live_digests(rig: Rig) -> Digests:
    """Read anew, every byte."""
    return np.sum([receiver.digests() for receiver in rig.receivers], axis=0, dtype=np.uint64)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("case", PAIRS)
def test_deltas_leave_what_a_cold_load_would_in_every_format_and_layout(case: str, world: int) -> None:
    plan = PLANS[case]()
    shapes = {spec.name: (spec.shape, spec.dtype) for spec in plan.storages}
    shapes |= {each.name: (each.shape, torch.float32) for each in plan.derived}
    receivers, storages = [], []
    for rank in range(world):
        shards = {name: shard_of(shape[0], rank, world) for name, (shape, _) in shapes.items()}
        held = {
            name: torch.zeros((shards[name][1] - shards[name][0], *shape[1:]), dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }
        storages.append(held)
        receivers.append(Receiver(held, plan.placements, plan.derived, shards=shards))
    specs = receivers[0].manifest.tensors
    everything = list(range(len(specs)))
    content = {spec.name: np.zeros((spec.num_rows, spec.row_bytes), np.uint8) for spec in specs}
    for push, seed in enumerate((1, 2, 3), start=1):
        new = numbers(specs, seed)
        if push > 1:  # numbers where scalars are derived from them, few changes elsewhere
            few = changed(content, [spec.name for spec in specs if spec.dtype != "F32"], seed)
            new = {spec.name: (new if spec.dtype == "F32" else few)[spec.name] for spec in specs}
        for receiver in receivers:
            send_delta(receiver, push, push, everything, content, new, seed)
            receiver.prepare()
            receiver.install()
            receiver.publish()
        content = new
    expected = cold(plan, content)
    for name in shapes:
        got = torch.cat([held[name].reshape(-1).view(torch.uint8) for held in storages])
        assert torch.equal(got, expected[name]), name


def test_without_numba_the_bytes_and_digests_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quant.kernels.numba_loops", lambda: None)
    monkeypatch.setattr("weight_update.digest._loops", lambda: None)
    for layouts in LAYOUT_PAIRS:
        rig = Rig(layouts, 2)
        commit_full(rig, ALL, 0)
        for seed in (1, 2, 3):
            commit_delta(rig, ALL, seed)
            assert rig.wrong() == []


# ---------------------------------------------------------------- what must not happen


def installed_rig() -> tuple[Rig, Receiver]:
    rig = Rig(("trtllm_linear", "trtllm_moe"))
    rig.push_all(1)
    return rig, rig.receivers[0]


def test_a_rank_whose_bytes_are_not_the_base_says_so_before_anything_is_written() -> None:
    rig, receiver = installed_rig()
    with pytest.raises(VersionError, match="this rank holds 1"):
        receiver.begin(7, 9, 5, ALL, blobs=())
    at = rig.specs.index(next(spec for spec in rig.specs if spec.name == "d.weight"))
    old = rig.committed["d.weight"]
    patch = Patch(tensor=0, first=0, stop=old.size, positions=np.array([123]), values=np.array([1], np.uint8))
    blob, size = pack([patch])
    new = {**rig.committed, "d.weight": old.copy()}
    new["d.weight"].reshape(-1)[123] += 1
    rig.storages[0]["d.weight"].view(-1)[:] ^= 1  # rot, in the very word too
    receiver.begin(2, 3, 1, [at], blobs=[size])
    receiver.stage(chunk_of([(0, 0, blob)]))
    staged = receiver.prepare()
    assert not np.array_equal(staged, rig.expected_digests([at], new))  # the coordinator compares, and aborts
    receiver.abort()


def test_a_word_that_is_not_read_back_as_written_is_caught_and_undone() -> None:
    rig, receiver = installed_rig()
    new = changed(rig.committed, ["d.weight"], 3)
    new["d.weight"] = rig.committed["d.weight"].copy()
    new["d.weight"][5, 7] ^= 0x11
    at = [i for i, spec in enumerate(rig.specs) if spec.name == "d.weight"]
    rig.num += 1
    send_delta(receiver, rig.num, 9, at, rig.committed, new, 3)
    receiver.prepare()
    planned = receiver._install._planned  # type: ignore[union-attr]
    part = planned.parts[0]
    damaged = part.__class__.apply

    def apply(self: object) -> tuple[int, int]:
        lanes: tuple[int, int] = damaged(self)  # type: ignore[arg-type]
        return lanes[0] ^ 1, lanes[1]

    part.apply = apply.__get__(part)
    with pytest.raises(DigestError, match=r"1 problem\n  - d\.weight: installed"):
        receiver.install()
    assert rig.wrong() == []
    receiver.abort()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 255))
def test_a_corrupted_blob_is_refused_or_harmless(seed: int, at: int, flip: int) -> None:
    """The checksum of its chunk passes: whoever made the chunk made the damage. Either the delta is refused, or what
    it would lead to is seen in the digests; never is a byte outside the rank's rows touched, nor memory taken that was
    not announced."""
    rig, receiver = installed_rig()
    new = changed(rig.committed, names_of(rig, ALL), seed)
    blobs = blobs_for(receiver, ALL, rig.committed, new, seed)
    trainer = seed % 2
    data = bytearray(blobs[trainer][0])
    data[at % len(data)] ^= flip
    blobs[trainer] = (bytes(data), blobs[trainer][1])
    receiver.begin(5, 9, 1, ALL, blobs=[size for _, size in blobs])
    for chunk in chunks_of(blobs, seed):
        receiver.stage(chunk)
    try:
        staged = receiver.prepare()
    except TransferError:
        receiver.abort()
    else:
        harmless = np.array_equal(staged, rig.expected_digests(ALL, new))
        receiver.abort()
        assert harmless or not np.array_equal(staged, rig.expected_digests(ALL, new))
    assert rig.wrong() == []


def test_hostile_patches_are_refused_with_nothing_written() -> None:
    rig, receiver = installed_rig()
    at = [i for i, spec in enumerate(rig.specs) if spec.name == "d.weight"]
    size = rig.committed["d.weight"].size
    row_bytes = rig.committed["d.weight"].shape[1]

    def sparse(positions: list[int], first: int = 0, stop: int = size, tensor: int = 0) -> list[Patch]:
        values = np.ones(len(positions), np.uint8)
        return [Patch(tensor=tensor, first=first, stop=stop, positions=np.array(positions), values=values)]

    for patches, message in (
        (sparse([5, 5]), "changed bytes leave"),
        (sparse([9, 5]), "changed bytes leave"),
        (sparse([size]), "changed bytes leave"),
        (sparse([-1]), "changed bytes leave"),
        (sparse([1], tensor=1), "names tensor 1, the push has 1"),
        (sparse([1], first=1), r"1 changes in bytes \[1, "),
        (sparse([1], stop=size + row_bytes), "this rank holds"),
        ([*sparse([1]), *sparse([2])], "come twice"),
        ([Patch(tensor=0, first=0, stop=size, positions=None, values=np.zeros(3, np.uint8))], "3 changes in bytes"),
    ):
        blob, announced = pack(patches)
        receiver.begin(5, 9, 1, at, blobs=[announced])
        receiver.stage(chunk_of([(0, 0, blob)]))
        with pytest.raises(TransferError, match=message):
            receiver.prepare()
        receiver.abort()
    assert rig.wrong() == []


def test_a_blob_that_is_more_than_was_announced_is_refused_before_it_is_unpacked() -> None:
    rig, receiver = installed_rig()
    at = [i for i, spec in enumerate(rig.specs) if spec.name == "d.weight"]
    size = rig.committed["d.weight"].size
    blob, real = pack([Patch(tensor=0, first=0, stop=size, positions=None, values=np.zeros(size, np.uint8))])
    for field in ("num_segments", "num_changes", "dense_bytes"):
        fields = {name: getattr(real, name) for name in BlobSize.__dataclass_fields__}
        announced = BlobSize(**(fields | {field: fields[field] + 1}))
        receiver.begin(5, 9, 1, at, blobs=[announced])
        receiver.stage(chunk_of([(0, 0, blob)]))
        with pytest.raises(TransferError, match="announced were"):
            receiver.prepare()
        receiver.abort()
    receiver.begin(5, 9, 1, at, blobs=[BlobSize(num_bytes=9, num_segments=0, num_changes=0, dense_bytes=0)])
    with pytest.raises(TransferError, match=r"this rank takes bytes \[0, 9\)"):
        receiver.stage(chunk_of([(0, 0, blob)]))
    with pytest.raises(TransferError, match=r"delta of trainer rank 0: bytes \[0, 9\)"):
        receiver.prepare()
    receiver.abort()
    assert rig.wrong() == []


def test_a_delta_that_needs_more_than_the_budget_is_refused_at_its_begin() -> None:
    rig = Rig(LAYOUT_PAIRS[0], budget=64 << 20)
    rig.push_all(1)
    size = BlobSize(num_bytes=100, num_segments=1, num_changes=10**9, dense_bytes=0)
    with pytest.raises(PlanError, match="the budget is"):
        rig.receivers[0].begin(5, 9, 1, ALL, blobs=[size])


def test_the_undo_of_the_last_commit_is_there_until_the_next_begins() -> None:
    rig, receiver = installed_rig()
    reverse = receiver.last_undo()
    assert reverse is not None and (reverse.version, reverse.base_version) == (1, 0)
    commit_delta(rig, ALL, 5)
    reverse = receiver.last_undo()
    assert reverse is not None and reverse.num_bytes > 0
    begin_delta(rig, ALL, 6)
    assert receiver.last_undo() is None
    rig.abort()
