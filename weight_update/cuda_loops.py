"""The loops of `weight_update.cuda`, in Triton; imported only where a CUDA device is used.

All rows of all tensors of a push are one launch for each kind of row (bytes of a row and of a run, width of an item).
A table says what a tensor is, int64 [tensors, FIELDS]; tiles, int32 [tiles, 2], name a tensor and its first row on this
rank. Arithmetic of the digest is on 64-bit words that wrap round; `_shift` brings zeros in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .digest import GOLDEN as _GOLDEN
from .digest import MULTIPLIERS, signed

# Columns of the table. LIVE: address of byte 0 of the whole storage, though this rank may not hold it. ROWS_AT: of the
# int64 offsets of this rank's rows. RUNS_AT: of the int32 offsets of the runs of a row.
LIVE, ROWS_AT, RUNS_AT, RUN_BYTES, ROW_BYTES, ROW0, NUM_ROWS, KEY0, KEY1, SWAP = range(10)
FIELDS = 10

GOLDEN = tl.constexpr(signed(_GOLDEN))
FIRST, SECOND = tl.constexpr(signed(MULTIPLIERS[0])), tl.constexpr(signed(MULTIPLIERS[1]))
LOW, HIGH = tl.constexpr(0x0F0F0F0F0F0F0F0F), tl.constexpr(signed(0xF0F0F0F0F0F0F0F0))


@triton.jit
def _shift(x, bits: tl.constexpr):
    return (x.to(tl.uint64, bitcast=True) >> bits).to(tl.int64, bitcast=True)


@triton.jit
def _mix(x):
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


@triton.jit
def _swapped(x):
    return (_shift(x, 4) & LOW) | ((x << 4) & HIGH)


@triton.jit
def _at(column, runs, RUN: tl.constexpr, ROW: tl.constexpr, mask):
    """Offset of a byte of a row from where the row starts."""
    if RUN == ROW:
        return column
    run = tl.load(runs + column // RUN, mask=mask, other=0)
    if RUN > 1:
        run += column % RUN
    return run


@triton.jit
def copy_rows(table, staged, tiles, ROW: tl.constexpr, RUN: tl.constexpr, ITEM: tl.constexpr, BN: tl.constexpr,
              BW: tl.constexpr, BACK: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr, FIELDS: tl.constexpr):
    """Staged rows to where they lie, or BACK. ITEM: bytes that move at a time, 4 or 1, of which runs are multiples.
    WIDE: rows lie at multiples of 16 bytes."""
    steps: tl.constexpr = (ROW // ITEM + BW - 1) // BW
    tile, step = tl.program_id(0) // steps, tl.program_id(0) % steps
    tensor, first = tl.load(tiles + 2 * tile).to(tl.int64), tl.load(tiles + 2 * tile + 1)
    spec = table + tensor * FIELDS
    kind = tl.int32 if ITEM == 4 else tl.uint8
    rows = first + tl.arange(0, BN)
    inside = rows < tl.load(spec + 6).to(tl.int32)
    items = step * BW + tl.arange(0, BW)
    whole = items < ROW // ITEM
    row_at = tl.load(tl.load(spec + 1).to(tl.pointer_type(tl.int64)) + rows, mask=inside, other=0) // ITEM
    live, src = tl.load(spec).to(tl.pointer_type(kind)), tl.load(staged + tensor).to(tl.pointer_type(kind))
    if ITEM == 4:
        src = tl.multiple_of(src, 16)
    if RUN == ROW:  # one run a row
        if WIDE:
            row_at, live = tl.multiple_of(row_at, 4), tl.multiple_of(live, 16)
        there = live + row_at[:, None] + items[None, :]
    else:
        runs = tl.load(spec + 2).to(tl.pointer_type(tl.int32))
        there = live + row_at[:, None] + (_at(items * ITEM, runs, RUN, ROW, whole) // ITEM)[None, :]
    flat = src + rows.to(tl.int64)[:, None] * (ROW // ITEM) + items[None, :]
    mask = inside[:, None] & whole[None, :]
    value = tl.load(there if BACK else flat, mask=mask, other=0)
    if SWAP:
        low = 0x0F0F0F0F if ITEM == 4 else 0x0F
        value = ((value >> 4) & low) | ((value & low) << 4)
    tl.store(flat if BACK else there, value, mask=mask)


@triton.jit(do_not_specialize=["base"])
def move_pieces(pieces, tiles, base, BLOCK: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr):
    """pieces: int64 [n, 3], source, target from `base` on, and bytes. tiles: int64, a piece << 32 | which BLOCK of it,
    STEP bytes at a time. WIDE: all are multiples of 16."""
    tile = tl.load(tiles + tl.program_id(0))
    piece = pieces + (tile >> 32) * 3
    start = (tile & 0xFFFFFFFF) * BLOCK
    source, target, left = tl.load(piece) + start, tl.load(piece + 1) + base + start, tl.load(piece + 2) - start
    if WIDE:
        there = tl.multiple_of(target.to(tl.pointer_type(tl.int64)), 16)
        here = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
        count = tl.multiple_of(left // 8, 2)
        for i in tl.static_range(BLOCK // STEP):
            at = i * (STEP // 8) + tl.arange(0, STEP // 8)
            tl.store(there + at, tl.load(here + at, mask=at < count), mask=at < count)
    else:
        at = tl.arange(0, BLOCK)
        value = tl.load(source.to(tl.pointer_type(tl.uint8)) + at, mask=at < left)
        tl.store(target.to(tl.pointer_type(tl.uint8)) + at, value, mask=at < left)


@triton.jit
def _beside(pieces, tiles, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """A BLOCK of a piece: its row of the table, its number in the piece, which bytes, as they are and as they were."""
    tile = tl.load(tiles + tl.program_id(0))
    piece, block = pieces + (tile >> 32) * 6, tile & 0xFFFFFFFF
    at, left = tl.arange(0, BLOCK), tl.load(piece + 2) - block * BLOCK
    here, there = tl.load(piece) + block * BLOCK, tl.load(piece + 1) + block * BLOCK
    news, olds = here.to(tl.pointer_type(tl.uint8)), there.to(tl.pointer_type(tl.uint8))
    if WIDE:
        news, olds, left = tl.multiple_of(news, 16), tl.multiple_of(olds, 16), tl.multiple_of(left, 16)
    new, old = tl.load(news + at, mask=at < left, other=0), tl.load(olds + at, mask=at < left, other=0)
    return piece, block, at, new, old


@triton.jit
def count_changed(pieces, tiles, counts, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Bytes that differ, of each BLOCK, by slot. pieces: int64 [n, 6]: address of what is and of what was, bytes, slot
    of the first BLOCK, number of the part, its first byte in its tensor. tiles and WIDE as of `move_pieces`."""
    piece, block, _, new, old = _beside(pieces, tiles, BLOCK, WIDE)
    tl.store(counts + tl.load(piece + 3) + block, tl.sum((new != old).to(tl.int32), axis=0))


@triton.jit
def list_changed(pieces, tiles, before, parts, positions, differences, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Which they are. before: int64, by slot, how many come before each BLOCK."""
    piece, block, at, new, old = _beside(pieces, tiles, BLOCK, WIDE)
    differ = new != old
    place = tl.load(before + tl.load(piece + 3) + block) + tl.cumsum(differ.to(tl.int32), axis=0) - 1
    tl.store(parts + place, tl.load(piece + 4).to(tl.int32) + tl.zeros_like(at), mask=differ)
    tl.store(positions + place, tl.load(piece + 5) + block * BLOCK + at, mask=differ)
    tl.store(differences + place, new - old, mask=differ)


@triton.jit
def _word(base, row_at, word, runs, mask, ROW: tl.constexpr, RUN: tl.constexpr, ITEM: tl.constexpr):
    """Words of 8 bytes of rows that start at byte row_at; the last one of a row is filled up with zeros."""
    if ITEM == 16:  # one run a row, at multiples of 16
        words = tl.multiple_of(base.to(tl.pointer_type(tl.int64)), 16)
        value = tl.load(words + tl.multiple_of(row_at // 8, 2)[:, None] + word[None, :], mask=mask, other=0)
    elif ITEM == 8:
        at = _at(word * 8, runs, RUN, ROW, word * 8 < ROW) // 8
        value = tl.load(base.to(tl.pointer_type(tl.int64)) + (row_at // 8)[:, None] + at[None, :], mask=mask, other=0)
    elif ITEM == 4:
        lower = _at(word * 8, runs, RUN, ROW, word * 8 < ROW)
        upper = _at(word * 8 + 4, runs, RUN, ROW, word * 8 < ROW)
        words = base.to(tl.pointer_type(tl.uint32))
        value = tl.load(words + (row_at // 4)[:, None] + (lower // 4)[None, :], mask=mask, other=0).to(tl.int64)
        high = tl.load(words + (row_at // 4)[:, None] + (upper // 4)[None, :], mask=mask, other=0).to(tl.int64)
        value = value | (high << 32)
    else:
        value = tl.zeros_like(row_at[:, None] + word[None, :])
        for i in tl.static_range(8):
            here = word * 8 + i < ROW
            at = _at(word * 8 + i, runs, RUN, ROW, here)
            bytes_ = base.to(tl.pointer_type(tl.uint8)) + row_at[:, None] + at[None, :]
            value |= tl.load(bytes_, mask=mask & here[None, :], other=0).to(tl.int64) << (8 * i)
    return value


@triton.jit
def digest_rows(table, staged, tiles, out, ROW: tl.constexpr, RUN: tl.constexpr, ITEM: tl.constexpr, BN: tl.constexpr,
                BW: tl.constexpr, SPAN: tl.constexpr, UNROLL: tl.constexpr, SWAP: tl.constexpr, STAGED: tl.constexpr,
                FIELDS: tl.constexpr):
    """Digests of rows, added to int64 [tensors, 2]; STAGED: as they arrived, one after the other, or as they lie.

    A program takes SPAN words of BN rows, BW at a time, so that a row's keys are made once for all of them.
    """
    spans: tl.constexpr = ((ROW + 7) // 8 + SPAN - 1) // SPAN
    tile, span = tl.program_id(0) // spans, tl.program_id(0) % spans
    tensor, first = tl.load(tiles + 2 * tile).to(tl.int64), tl.load(tiles + 2 * tile + 1)
    spec = table + tensor * FIELDS
    rows = first + tl.arange(0, BN)
    inside = rows < tl.load(spec + 6).to(tl.int32)
    runs = tl.load(spec + 2).to(tl.pointer_type(tl.int32))
    if STAGED:
        base, row_at = tl.load(staged + tensor), rows.to(tl.int64) * ROW
    else:
        base = tl.load(spec)
        row_at = tl.load(tl.load(spec + 1).to(tl.pointer_type(tl.int64)) + rows, mask=inside, other=0)
    number = (tl.load(spec + 5) + rows + 1) * GOLDEN
    step = ((span * SPAN + tl.arange(0, BW)).to(tl.int64) * GOLDEN)[None, :]
    key0, key1 = _mix(tl.load(spec + 7) + number)[:, None] + step, _mix(tl.load(spec + 8) + number)[:, None] + step
    ahead = tl.full((1, 1), BW, tl.int64) * GOLDEN
    sum0, sum1 = tl.zeros((BN, BW), tl.int64), tl.zeros((BN, BW), tl.int64)
    for i in tl.range(0, SPAN // BW, loop_unroll_factor=UNROLL):
        word = span * SPAN + i * BW + tl.arange(0, BW)
        mask = inside[:, None]
        if ROW % (8 * SPAN):
            mask = mask & (word * 8 < ROW)[None, :]
        value = _word(base, row_at, word, runs, mask, ROW, ROW if STAGED else RUN, ITEM)
        if SWAP and not STAGED:
            value = _swapped(value)
        mixed0, mixed1 = _mix(value ^ key0), _mix(value ^ key1)
        if ROW % (8 * SPAN):
            mixed0, mixed1 = tl.where(mask, mixed0, 0), tl.where(mask, mixed1, 0)
        sum0 += mixed0
        sum1 += mixed1
        key0 += ahead
        key1 += ahead
    sum0, sum1 = tl.where(inside[:, None], sum0, 0), tl.where(inside[:, None], sum1, 0)
    tl.atomic_add(out + 2 * tensor, tl.sum(tl.reshape(sum0, (BN * BW,)), axis=0))
    tl.atomic_add(out + 2 * tensor + 1, tl.sum(tl.reshape(sum1, (BN * BW,)), axis=0))


# ---------------------------------------------------------------- single bytes


@triton.jit
def _byte_at(spec, position, mask):
    """Addresses of bytes by their positions in their tensors; spec: what each tensor is."""
    row_bytes = tl.load(spec + 4, mask=mask, other=1)
    run_bytes = tl.load(spec + 3, mask=mask, other=1)
    row, column = position // row_bytes, position % row_bytes
    rows = tl.load(spec + 1, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    runs = tl.load(spec + 2, mask=mask, other=0).to(tl.pointer_type(tl.int32))
    row_at = tl.load(rows + (row - tl.load(spec + 5, mask=mask, other=0)), mask=mask, other=0)
    run_at = tl.load(runs + column // run_bytes, mask=mask, other=0)
    return tl.load(spec, mask=mask, other=0) + row_at + run_at + column % run_bytes


@triton.jit
def _live_word(spec, position, swap, mask):
    """The word of 8 bytes that holds the byte at `position`, as it lies now; which byte of it that is."""
    row_bytes = tl.load(spec + 4, mask=mask, other=1)
    within = position % row_bytes % 8
    start = position - within
    left = row_bytes - start % row_bytes
    value = tl.zeros_like(position)
    for i in tl.static_range(8):
        here = mask & (i < left)
        at = _byte_at(spec, start + i, here).to(tl.pointer_type(tl.uint8))
        value |= tl.load(at, mask=here, other=0).to(tl.int64) << (8 * i)
    return tl.where(swap, _swapped(value), value), within


@triton.jit
def _lanes(spec, position, value, mask):
    """What words add to the two lanes of their tensors' digests."""
    row_bytes = tl.load(spec + 4, mask=mask, other=1)
    number = (position // row_bytes + 1) * GOLDEN
    step = (position % row_bytes // 8) * GOLDEN
    key0 = _mix(tl.load(spec + 7, mask=mask, other=0) + number) + step
    key1 = _mix(tl.load(spec + 8, mask=mask, other=0) + number) + step
    return _mix(value ^ key0), _mix(value ^ key1)


# Triton compiles anew for numbers that 16 divides: a count of changes is now one, now the other, and that takes 2 s.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["tensors", "positions", "differences"])
def plan_bytes(table, tensors, positions, differences, count, at, old, new, taken, given, BLOCK: tl.constexpr,
               FIELDS: tl.constexpr):
    """Where changed bytes lie, what is there and what will be; what their words add to the digests before and after,
    int64 [tensors, 2].

    Bytes of one word follow each other: the first one answers for the word.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    tensor = tl.load(tensors + i, mask=mask, other=0).to(tl.int64)
    position = tl.load(positions + i, mask=mask, other=0)
    spec = table + tensor * FIELDS
    swap = tl.load(spec + 9, mask=mask, other=0) != 0
    before, within = _live_word(spec, position, swap, mask)
    after = before
    word = position - within
    for j in tl.static_range(8):
        here = mask & (i + j < count)
        there = tl.load(positions + i + j, mask=here, other=0)
        here = here & (tl.load(tensors + i + j, mask=here, other=0).to(tl.int64) == tensor)
        here = here & (there >= word) & (there < word + 8 - 0)
        here = here & (there // tl.load(spec + 4, mask=mask, other=1) == word // tl.load(spec + 4, mask=mask, other=1))
        shift = tl.where(here, there - word, 0) * 8
        byte = _shift_by(before, shift) & 255
        changed = (byte + tl.load(differences + i + j, mask=here, other=0).to(tl.int64)) & 255
        after = tl.where(here, after ^ ((byte ^ changed) << shift), after)
        if j == 0:
            flip = ((changed >> 4) & 15) | ((changed << 4) & 240)
            back = ((byte >> 4) & 15) | ((byte << 4) & 240)
            tl.store(at + i, _byte_at(spec, position, mask), mask=mask)
            tl.store(old + i, tl.where(swap, back, byte).to(tl.uint8), mask=mask)
            tl.store(new + i, tl.where(swap, flip, changed).to(tl.uint8), mask=mask)
    begins = mask & _begins(positions, tensors, i, tensor, word, position, mask, tl.load(spec + 4, mask=mask, other=1))
    out0, out1 = _lanes(spec, word, before, begins)
    into0, into1 = _lanes(spec, word, after, begins)
    tl.atomic_add(taken + 2 * tensor, out0, mask=begins)
    tl.atomic_add(taken + 2 * tensor + 1, out1, mask=begins)
    tl.atomic_add(given + 2 * tensor, into0, mask=begins)
    tl.atomic_add(given + 2 * tensor + 1, into1, mask=begins)


@triton.jit
def _shift_by(x, bits):
    return (x.to(tl.uint64, bitcast=True) >> bits.to(tl.uint64)).to(tl.int64, bitcast=True)


@triton.jit
def _begins(positions, tensors, i, tensor, word, position, mask, row_bytes):
    """Whether the change before lies in another word."""
    some = mask & (i > 0)
    before = tl.load(positions + i - 1, mask=some, other=-1)
    other = tl.load(tensors + i - 1, mask=some, other=-1).to(tl.int64)
    return (i == 0) | (other != tensor) | (before < word)


@triton.jit(do_not_specialize=["count"])
def put_bytes(at, values, count, BLOCK: tl.constexpr):
    """Each byte to its address."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    there = tl.load(at + i, mask=mask, other=0).to(tl.pointer_type(tl.uint8))
    tl.store(there, tl.load(values + i, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["tensors", "positions"])
def digest_bytes(table, tensors, positions, count, out, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """Lanes of the words that hold these bytes, read back as they lie: added to int64 [tensors, 2]."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    tensor = tl.load(tensors + i, mask=mask, other=0).to(tl.int64)
    position = tl.load(positions + i, mask=mask, other=0)
    spec = table + tensor * FIELDS
    row_bytes = tl.load(spec + 4, mask=mask, other=1)
    word = position - position % row_bytes % 8
    begins = mask & _begins(positions, tensors, i, tensor, word, position, mask, row_bytes)
    value, _ = _live_word(spec, position, tl.load(spec + 9, mask=mask, other=0) != 0, begins)
    lane0, lane1 = _lanes(spec, word, value, begins)
    tl.atomic_add(out + 2 * tensor, lane0, mask=begins)
    tl.atomic_add(out + 2 * tensor + 1, lane1, mask=begins)
