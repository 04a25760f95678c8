"""The receiver: hot = cold, addresses never move, nothing half done, memory as planned, damage caught."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant.formats import TensorSpec
from quant.layouts import Derived, place_row_major
from tests.rig import LAYOUT_PAIRS, NUM_TENSORS, Rig, chunk_of, chunks_for, random_content
from weight_update.errors import (
    BusyError,
    DigestError,
    LayoutError,
    ManifestError,
    PlanError,
    TransferError,
    VersionError,
)
from weight_update.receiver import Receiver, State

ALL = range(NUM_TENSORS)
LAST = NUM_TENSORS - 1

# ---------------------------------------------------------------- hot = cold, in place, all or nothing


def commit(rig: Rig, tensors: list[int], seed: int) -> None:
    content = random_content(rig.specs, seed)
    rig.begin(tensors)
    rig.stage(tensors, content, seed)
    expected = rig.expected_digests(tensors, content)
    assert np.array_equal(rig.prepare(), expected)
    assert np.array_equal(rig.install(), expected)
    rig.publish(tensors, content)


def abort_open(rig: Rig, tensors: list[int], seed: int) -> None:
    rig.begin(tensors)
    rig.stage(tensors[: seed % (len(tensors) + 1)], random_content(rig.specs, seed), seed)
    rig.abort()


def abort_prepared(rig: Rig, tensors: list[int], seed: int) -> None:
    rig.begin(tensors)
    rig.stage(tensors, random_content(rig.specs, seed), seed)
    rig.prepare()
    rig.abort()


def abort_installed(rig: Rig, tensors: list[int], seed: int) -> None:
    content = random_content(rig.specs, seed)
    rig.begin(tensors)
    rig.stage(tensors, content, seed)
    rig.prepare()
    assert np.array_equal(rig.install(), rig.expected_digests(tensors, content))
    rig.abort()
    rig.abort()


def undo_and_publish(rig: Rig, tensors: list[int], seed: int) -> None:
    content = random_content(rig.specs, seed)
    rig.begin(tensors)
    rig.stage(tensors, content, seed)
    rig.prepare()
    first = rig.install()
    for receiver in rig.receivers:
        receiver.undo()
    assert rig.wrong() == []
    assert np.array_equal(rig.install(), first)
    rig.publish(tensors, content)


def some_ranks_fail(rig: Rig, tensors: list[int], seed: int) -> None:
    """The last rank never installs: the others go back."""
    rig.begin(tensors)
    rig.stage(tensors, random_content(rig.specs, seed), seed)
    rig.prepare()
    for receiver in rig.receivers[:-1]:
        receiver.install()
    rig.abort()


STEPS = (commit, commit, abort_open, abort_prepared, abort_installed, undo_and_publish, some_ranks_fail)
subsets = st.one_of(st.just(list(ALL)), st.lists(st.sampled_from(ALL), min_size=1, max_size=12, unique=True))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(LAYOUT_PAIRS),
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from(STEPS), subsets, st.integers(1, 999)), max_size=6),
)
def test_any_sequence_of_pushes_leaves_the_bytes_of_a_cold_load_at_the_same_addresses(
    layouts: tuple[str, str], world: int, steps: list[tuple[Callable[[Rig, list[int], int], None], list[int], int]]
) -> None:
    rig = Rig(layouts, world)
    assert len(rig.specs) == len(ALL)
    addresses = rig.addresses()
    commit(rig, list(ALL), 0)
    assert rig.wrong() == []
    for step, tensors, seed in steps:
        step(rig, tensors, seed)
        assert rig.wrong() == [] and rig.addresses() == addresses
    live = np.sum([receiver.digests() for receiver in rig.receivers], axis=0, dtype=np.uint64)
    assert np.array_equal(live, rig.expected_digests(ALL, rig.committed))


def test_ranks_own_every_row_once() -> None:
    for world in (1, 2, 3, 5):
        rig = Rig(("trtllm_linear", "trtllm_moe"), world)
        for i, spec in enumerate(rig.specs):
            rows = [row for r in rig.receivers for row in range(int(r.row_start[i]), int(r.row_stop[i]))]
            assert rows == list(range(spec.num_rows))


def test_versions_follow_the_publishes() -> None:
    rig = Rig(LAYOUT_PAIRS[0])
    receiver = rig.receivers[0]
    rig.push_all(1)
    assert receiver.version == 1
    with pytest.raises(VersionError, match="version 3 on base 0: this rank holds 1"):
        receiver.begin(9, 3, 0, [0])
    with pytest.raises(VersionError, match="version 1 on base 1"):
        receiver.begin(9, 1, 1, [0])
    receiver.begin(9, 5, 1, [0])
    receiver.abort()
    assert receiver.version == 1 and receiver.state is State.IDLE


# ---------------------------------------------------------------- refusals


def test_a_step_out_of_turn_is_refused_with_the_state() -> None:
    rig = Rig(LAYOUT_PAIRS[0])
    receiver, content = rig.receivers[0], random_content(rig.specs, 1)
    chunk = chunks_for(receiver, [0], content, 0)[0]

    def refused(*steps: str) -> None:
        for step in steps:
            with pytest.raises(BusyError, match=f"{step}: this rank is {receiver.state.value}"):
                getattr(receiver, step)(*((9, 9, receiver.version, [0]) if step == "begin" else ()))

    refused("prepare", "install", "undo", "publish")
    with pytest.raises(BusyError, match="the open one is none"):
        receiver.stage(chunk)
    rig.begin([0])
    refused("begin", "install", "undo", "publish")
    with pytest.raises(BusyError, match="of transaction 7: the open one is 1"):
        receiver.stage(chunk, transaction=7)
    rig.stage([0], content)
    rig.prepare()
    refused("begin", "prepare", "undo", "publish")
    with pytest.raises(BusyError, match="staging is over"):
        receiver.stage(chunk)
    rig.install()
    refused("begin", "prepare", "install")
    rig.publish([0], content)
    refused("prepare", "install", "undo", "publish")
    receiver.abort()


def test_prepare_names_what_is_missing_and_the_rest_can_still_come() -> None:
    rig = Rig(LAYOUT_PAIRS[2])
    receiver, content = rig.receivers[0], random_content(rig.specs, 1)
    names = [spec.name for spec in rig.specs]
    tensors = [names.index("norm.weight"), names.index("d.weight"), names.index("d.weight_scale_2")]
    rig.begin(tensors)
    receiver.stage(chunk_of([(0, 0, content["norm.weight"].tobytes()), (1, 40, bytes(60))]))
    with pytest.raises(TransferError) as caught:
        receiver.prepare()
    text = str(caught.value)
    assert "d.weight: bytes [0, 40)" in text and "d.weight: bytes [100, 8000)" in text
    assert "3 problems" in text and "d.weight_scale_2: bytes [0, 4)" in text
    rig.stage(tensors, content)
    assert np.array_equal(rig.prepare(), rig.expected_digests(tensors, content))


def test_a_corrupted_chunk_and_one_for_other_rows_are_refused() -> None:
    rig = Rig(LAYOUT_PAIRS[2], world=2)
    content = random_content(rig.specs, 1)
    i = [spec.name for spec in rig.specs].index("d.weight")
    rig.begin([i])
    mine, other = rig.receivers
    chunk = chunks_for(other, [i], content, 0)[0]
    with pytest.raises(TransferError, match=r"d\.weight: \d+ bytes at offset \d+, this rank takes bytes \[0, 5120\)"):
        mine.stage(chunk)
    damaged = chunks_for(mine, [i], content, 0)[0]
    object.__setattr__(damaged, "checksum", damaged.checksum ^ 1)
    with pytest.raises(TransferError, match="checksum"):
        mine.stage(damaged)
    assert mine.staged_bytes == 0


@pytest.mark.parametrize(
    ("tensors", "message"),
    [([], "no tensor"), ([0, 0], "named twice"), ([42], "tensor 42: the manifest has 42"), ([-1], "tensor -1")],
)
def test_begin_refuses_tensors_that_are_none(tensors: list[int], message: str) -> None:
    receiver = Rig(LAYOUT_PAIRS[0]).receivers[0]
    with pytest.raises(ManifestError, match=message):
        receiver.begin(1, 1, 0, tensors)
    assert receiver.state is State.IDLE


def test_storages_and_placements_that_do_not_fit_are_all_named() -> None:
    spec = TensorSpec(name="a.weight", dtype="BF16", shape=(8, 4))
    placed = [place_row_major(spec, "a.weight")]
    good = torch.zeros(8, 4, dtype=torch.bfloat16)
    two = TensorSpec(name="b.weight", dtype="BF16", shape=(8, 4))
    doubled = Derived(name="c", inputs=("d",), function=lambda d: 2 * d, shape=(1,))
    for storages, placements, derived, message in (
        ({}, placed, (), "a.weight: storage a.weight is not among the 0 given"),
        ({"a.weight": good[:6]}, placed, (), "which hold 6 of 8 rows"),
        ({"a.weight": good, "z": good}, placed, (), "z: nothing fills it"),
        ({"a.weight": good.t().contiguous().t()}, placed, (), "expected contiguous memory"),
        ({"a.weight": torch.zeros(9, dtype=torch.uint8)}, placed, (), r"has 9 bytes on this rank, units \[0, 1\) of 8"),
        ({"a.weight": good}, [*placed, place_row_major(two, "a.weight")], (), "they overlap"),
        ({"a.weight": good, "c": torch.zeros(1)}, placed, [doubled], "c: d is not among the storages"),
    ):
        with pytest.raises(PlanError, match=message):
            Receiver(storages, placements, derived)
    d = place_row_major(TensorSpec(name="d", dtype="F32", shape=(1,)), "d")
    with pytest.raises(PlanError, match="its input d is on another rank"):
        Receiver(
            {"a.weight": good, "c": torch.zeros(1), "d": torch.zeros(0)}, [*placed, d], [doubled], shards={"d": (1, 1)}
        )


def test_threads_may_stage_while_another_aborts() -> None:
    rig = Rig(LAYOUT_PAIRS[2])
    receiver = rig.receivers[0]
    rig.push_all(1)
    chunks = chunks_for(receiver, ALL, random_content(rig.specs, 2), 0)
    refused = []

    def stream() -> None:
        for chunk in chunks * 20:
            try:
                receiver.stage(chunk, transaction=rig.num)
            except BusyError as error:
                refused.append(error)
                return

    rig.begin(ALL)
    threads = [threading.Thread(target=stream) for _ in range(3)]
    for thread in threads:
        thread.start()
    rig.abort()
    for thread in threads:
        thread.join()
    assert len(refused) == 3 and rig.wrong() == []
    commit(rig, list(ALL), 3)
    assert rig.wrong() == []


# ---------------------------------------------------------------- damage is caught and undone


Damage = Callable[[Mapping[str, Tensor]], None]


def arming(damage: Damage, armed: list[bool]) -> Callable[[Mapping[str, Tensor]], Derived]:
    """A derived value whose computation does damage: it runs between the writes and the read-back."""

    def make(storages: Mapping[str, Tensor]) -> Derived:
        def function(scale: Tensor) -> Tensor:
            if armed:
                damage(storages)
            return scale + 1

        return Derived(name="extra", inputs=("d.weight_scale_2",), function=function, shape=(1,))

    return make


def flip_weight(storages: Mapping[str, Tensor]) -> None:
    storages["x.w13_weight"].view(-1)[1234] ^= 1


def flip_scale(storages: Mapping[str, Tensor]) -> None:
    storages["d.weight_scale"].view(-1)[0] ^= 0x80


def nudge_norm(storages: Mapping[str, Tensor]) -> None:
    storages["norm.weight"][49] += 1


def swap_experts(storages: Mapping[str, Tensor]) -> None:
    storages["x.w2_weight"][[0, 1]] = storages["x.w2_weight"][[1, 0]]


def write_padding_row(storages: Mapping[str, Tensor]) -> None:
    storages["d.weight"][1, 127, 3] = 9  # row 255 of 200; the shuffle leaves it in its block of 32


def write_padding_column(storages: Mapping[str, Tensor]) -> None:
    storages["d.weight"][0, 5, 63] = 9  # byte 63 of 40


def write_expert_padding(storages: Mapping[str, Tensor]) -> None:
    storages["x.w2_weight"][2, 255, 0] = 1  # row 255 of 192


def write_scale_padding(storages: Mapping[str, Tensor]) -> None:
    storages["d.weight_scale"][0].view(-1)[3 * 128 * 2 + 512 - 768 + 1] = 1  # column 5 of 5: the second atom's byte 1


def move(storages: Mapping[str, Tensor]) -> None:
    storages["d.weight"].data = storages["d.weight"].clone()


def explode(storages: Mapping[str, Tensor]) -> None:
    raise ZeroDivisionError("in the middle of an install")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (flip_weight, DigestError, r"(?s)1 problem\n  - x\.\d\.(up|gate)_proj\.weight: installed [0-9a-f]{32}, staged"),
        (flip_scale, DigestError, r"(?s)1 problem\n  - d\.weight_scale: installed"),
        (nudge_norm, DigestError, r"(?s)1 problem\n  - norm\.weight: installed"),
        (swap_experts, DigestError, r"(?s)2 problems\n  - x\.0\.down_proj\.weight: .*x\.1\.down_proj\.weight: "),
        (write_padding_row, LayoutError, r"d\.weight: padding byte \d+ of unit 1 of this rank is 9, expected 0"),
        (write_padding_column, LayoutError, r"d\.weight: padding byte 383 of unit 0 of this rank is 9, expected 0"),
        (write_expert_padding, LayoutError, r"x\.w2_weight: padding byte \d+ of unit 2 of this rank is 1"),
        (write_scale_padding, LayoutError, r"d\.weight_scale: padding byte 513 of unit 0 of this rank is 1"),
        (move, LayoutError, r"d\.weight: data_ptr was \d+, is \d+"),
        (explode, ZeroDivisionError, "in the middle of an install"),
    ],
)
def test_damage_in_an_install_is_caught_and_the_old_bytes_are_put_back(
    damage: Damage, error: type[Exception], message: str
) -> None:
    armed: list[bool] = []
    rig = Rig(("trtllm_linear", "trtllm_moe"), extra=[arming(damage, armed)])
    receiver = rig.receivers[0]
    rig.push_all(1)
    live = rig.storages[0]["d.weight"].data
    rig.begin(ALL)
    rig.stage(ALL, random_content(rig.specs, 2))
    rig.prepare()
    armed.append(True)
    with pytest.raises(error, match=message):
        rig.install()
    assert receiver.state is State.PREPARED
    rig.storages[0]["d.weight"].data = live  # where the address audit's case moved it from
    assert rig.wrong() == []
    assert torch.equal(rig.storages[0]["extra"], rig.storages[0]["d.weight_scale_2"] + 1)
    rig.abort()
    armed.clear()
    commit(rig, list(ALL), 3)
    assert rig.wrong() == []


def test_staged_bytes_that_change_after_prepare_are_caught() -> None:
    rig = Rig(("trtllm_linear", "trtllm_moe"))
    rig.push_all(1)
    for tensor in (0, 5, LAST):
        rig.begin(ALL)
        rig.stage(ALL, random_content(rig.specs, 2))
        rig.prepare()
        push = rig.receivers[0]._install
        assert push is not None
        push.staging.rows(tensor)[0, 0] ^= 4
        with pytest.raises(DigestError, match=rf"(?s)1 problem\n  - {rig.specs[tensor].name}: "):
            rig.install()
        assert rig.wrong() == []
        rig.abort()


def test_live_bytes_that_rot_change_the_re_read_digest() -> None:
    rig = Rig(("trtllm_linear", "trtllm_moe"))
    rig.push_all(1)
    receiver, before = rig.receivers[0], rig.receivers[0].digests()
    flip_weight(rig.storages[0])
    (changed,) = np.flatnonzero((receiver.digests() != before).any(axis=1)).tolist()
    assert "_proj.weight" in rig.specs[changed].name
    assert np.array_equal(receiver.digests([0, changed])[0], before[0])
