"""The loops of `quant.cuda` that find what changed, in Triton; imported only where a CUDA device is used.

A program encodes a tile and notes the words of codes that are not as they lie; notes are counted, and listed in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cuda_loops import _load, _nvfp4, _tile

# Where the changed bytes of a matrix go, as columns: the slots of its first tile's codes and block scales in the order
# of everything that is compared, the numbers of these two parts, and the first byte of each in its tensor.
SLOT, SCALE_SLOT, PART, SCALE_PART, FIRST, SCALE_FIRST = range(6)


@triton.jit
def _changed_bytes(differ):
    """How many bytes of each word are not zero: 0x80 in each of them, by way of its low seven bits."""
    some = ((((differ & 0x7F7F7F7F) + 0x7F7F7F7F) | differ) >> 7) & 0x01010101
    return (some * 0x01010101) >> 24


# What is seldom done, behind a branch of its own thread: a word of codes new and old, its scale new << 8 | old, its
# number, whether its row is there, ROOM, and addresses of nums, notes, news and olds.
NOTE_ASM = tl.constexpr(
    """{
    .reg .pred p; .reg .b32 differ, scale, t, count, slot; .reg .b64 at, to;
    mov.b32 $0, 0;
    xor.b32 differ, $1, $2;
    shr.u32 scale, $3, 8;
    xor.b32 scale, scale, $3;
    and.b32 scale, scale, 255;
    or.b32 t, differ, scale;
    setp.eq.u32 p, t, 0;
    @p bra DONE;
    setp.eq.u32 p, $5, 0;
    @p bra DONE;
    and.b32 t, differ, 0x7F7F7F7F;
    add.u32 t, t, 0x7F7F7F7F;
    or.b32 t, t, differ;
    and.b32 t, t, 0x80808080;
    popc.b32 count, t;
    shl.b32 count, count, 10;
    or.b32 count, count, 1;
    and.b32 t, $4, 1;
    setp.eq.u32 p, t, 0;
    setp.ne.and.u32 p, scale, 0, p;
    @p add.u32 count, count, 0x400000;
    atom.relaxed.gpu.global.add.u32 slot, [$7], count;
    and.b32 slot, slot, 1023;
    setp.ge.u32 p, slot, $6;
    @p bra DONE;
    mul.wide.u32 at, slot, 4;
    shl.b32 t, $4, 22;
    shl.b32 scale, $3, 6;
    or.b32 t, t, scale;
    add.u64 to, $8, at;
    st.global.b32 [to], t;
    add.u64 to, $9, at;
    st.global.b32 [to], $1;
    add.u64 to, $10, at;
    st.global.b32 [to], $2;
    DONE:
    }"""
)


@triton.jit
def diff_nvfp4(sources, tiles, scales, nums, notes, news, olds, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
               ROOM: tl.constexpr, EVEN: tl.constexpr, FIELDS: tl.constexpr):
    """Encode, compare with what lies at WEIGHT and SCALE, and note the words of codes that differ, or whose scale does.

    nums: int32 [programs], zeros before: three counts in one number, words noted in the low 10 bits, changed bytes of
    codes in the next 12, changed scales in the rest; a tile has 512 words. notes, news, olds: int32 [programs, ROOM],
    in no order: number of the word in the tile << 22 | its scale as it should be << 14 | as it is << 6, its codes as
    they should be and as they are. What finds no room is only counted. BK is K.
    """
    tl.static_assert(BN * BK == 4096)
    program = tl.program_id(0)
    source, rows, inside = _tile(sources, tiles, program, BN, FIELDS)
    w = tl.load(source + 1).to(tl.pointer_type(tl.int32))
    s = tl.load(source + 2).to(tl.pointer_type(tl.uint8))
    words, columns = tl.arange(0, BK // 8)[None, :], tl.arange(0, BK // 16)[None, :]
    wide, mask = rows.to(tl.int64)[:, None], inside[:, None]
    v = _load(source, rows, inside, 0, K, BK, EVEN, "")
    w_old = tl.load(w + (wide * (K // 8) + words), mask=mask, other=0)
    s_old = tl.load(s + (wide * (K // 16) + columns), mask=mask, other=0)
    scale = scales + 3 * tl.load(source + 7)
    codes, s8 = _nvfp4(v, tl.load(scale), tl.load(scale + 1), tl.load(scale + 2), BN, BK)
    both = (s8.to(tl.int32) << 8) | s_old.to(tl.int32)
    both = tl.reshape(tl.broadcast_to(both[:, :, None], (BN, BK // 16, 2)), (BN, BK // 8))
    word = tl.arange(0, BN)[:, None] * (K // 8) + words
    there = tl.broadcast_to(inside.to(tl.int32)[:, None], (BN, BK // 8))
    first = program.to(tl.int64) * ROOM
    tl.inline_asm_elementwise(
        NOTE_ASM, "=r,r,r,r,r,r,r,l,l,l,l",
        [codes, w_old, both, word, there, ROOM, (nums + program).to(tl.int64), (notes + first).to(tl.int64),
         (news + first).to(tl.int64), (olds + first).to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )


@triton.jit(do_not_specialize=["programs"])
def count_nvfp4(tiles, places, nums, programs, counts, most, BLOCK: tl.constexpr, ROOM: tl.constexpr, BN: tl.constexpr):
    """What was noted, by slot: counts, int32. most: int32 [1], the largest number of words where some found no room."""
    program = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = program < programs
    num = tl.load(nums + program, mask=there, other=0)
    place = places + tl.load(tiles + 2 * program, mask=there, other=0).to(tl.int64) * 6
    tile = tl.load(tiles + 2 * program + 1, mask=there, other=0) // BN
    tl.store(counts + tl.load(place, mask=there, other=0) + tile, (num >> 10) & 4095, mask=there)
    tl.store(counts + tl.load(place + 1, mask=there, other=0) + tile, num >> 22, mask=there)
    largest = tl.max(num & 1023, axis=0)
    tl.atomic_max(most, largest, mask=largest > ROOM)


@triton.jit(do_not_specialize=["programs"])
def list_nvfp4(tiles, places, before, nums, notes, news, olds, programs, parts, positions, differences,
               TILES: tl.constexpr, ROOM: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    """Changed bytes in the order of their places. before: int64, by slot, how many come before its own."""
    program = tl.program_id(0) * TILES + tl.arange(0, TILES)
    there = program < programs
    slot = tl.arange(0, ROOM)[None, :]
    mask = slot < (tl.load(nums + program, mask=there, other=0) & 1023)[:, None]
    first = program.to(tl.int64)[:, None] * ROOM
    note = tl.sort(tl.load(notes + first + slot, mask=mask, other=0x7FFFFFC0) | slot, dim=1)
    at = first + (note & 63)
    new, old = tl.load(news + at, mask=mask, other=0), tl.load(olds + at, mask=mask, other=0)
    differ = new ^ old
    place = places + tl.load(tiles + 2 * program, mask=there, other=0).to(tl.int64) * 6
    row0 = tl.load(tiles + 2 * program + 1, mask=there, other=0)
    word = note >> 22
    count = _changed_bytes(differ)
    at = tl.load(before + tl.load(place, mask=there, other=0) + row0 // BN, mask=there, other=0)[:, None]
    at += tl.cumsum(count, axis=1) - count
    owner = tl.broadcast_to(tl.load(place + 2, mask=there, other=0).to(tl.int32)[:, None], word.shape)
    position = tl.load(place + 4, mask=there, other=0)[:, None] + row0.to(tl.int64)[:, None] * (K // 2) + word * 4
    for i in tl.static_range(4):
        here = ((differ >> (8 * i)) & 255) != 0
        tl.store(parts + at, owner, mask=here)
        tl.store(positions + at, position + i, mask=here)
        tl.store(differences + at, ((new >> (8 * i)) - (old >> (8 * i))).to(tl.uint8), mask=here)
        at += here.to(tl.int64)
    scale, was = note >> 14, note >> 6
    here = mask & (((scale ^ was) & 255) != 0) & (word % 2 == 0)
    count = here.to(tl.int32)
    at = tl.load(before + tl.load(place + 1, mask=there, other=0) + row0 // BN, mask=there, other=0)[:, None]
    at += tl.cumsum(count, axis=1) - count
    owner = tl.broadcast_to(tl.load(place + 3, mask=there, other=0).to(tl.int32)[:, None], word.shape)
    position = tl.load(place + 5, mask=there, other=0)[:, None] + row0.to(tl.int64)[:, None] * (K // 16) + word // 2
    tl.store(parts + at, owner, mask=here)
    tl.store(positions + at, position, mask=here)
    tl.store(differences + at, (scale - was).to(tl.uint8), mask=here)
