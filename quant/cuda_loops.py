"""The loops of `quant.cuda`, in Triton; imported only where a CUDA device is used.

Bytes are those of torch's true division and of ties to even. Per block of weights one correctly rounded reciprocal
r = 1/s is taken, and per weight q = a*r; y = fma(fma(-q, s, a), r, q), which is the correctly rounded a/s (Markstein
1990). E2M1 rounding is the least of four lines of the grid, each a single fused multiply-add that leaves the code in
the low mantissa bits of 1.5 * 2^23 + code. What is said in PTX is what Triton's own operators would spread over the
half-rate integer pipe; two BF16 weights are one little-endian 32-bit word throughout.

A batch is a table of sources, int64 [sources, FIELDS], and a list of tiles, int32 [tiles, 2]: a source and its first
row. Sources may be separate tensors: their memory is named by address.
"""

from __future__ import annotations



import triton
import triton.language as tl

MAGIC = 0x4B400000  # the bits of 1.5 * 2^23

# What a source is, as columns of the table.
ROWS, WEIGHT, SCALE, NUM_ROWS, WEIGHT_AT, SCALE_AT, SCALE_COLUMNS, GROUP = range(8)
FIELDS = 8


def _e2m1_asm() -> str:
    """PTX: four words of two BF16 weights each, 1/s and s -> eight codes in one word, the first in the low nibble."""
    lines = [
        ".reg .b32 a, o, n0, n1, n2, n3, x, y, c; .reg .f32 v, q, e, u, l0, l1, l2, z<8>; .reg .b32 k<8>;",
        "mov.b32 o, 0x3f803f80;",
        "mov.b32 c, 0;",
    ]
    for word in range(4):
        source = f"${word + 1}"
        # A negative zero has no sign: times one, plus zero.
        lines.append(f"fma.rn.bf16x2 n{word}, {source}, o, c;")
        for half in range(2):
            i = 2 * word + half
            if half == 0:
                lines += [f"and.b32 a, {source}, 0x7fff;", "shl.b32 a, a, 16;"]
            else:
                lines.append(f"and.b32 a, {source}, 0x7fff0000;")
            lines += [
                "mov.b32 v, a;",
                "mul.rn.f32 q, v, $5;",
                "neg.f32 e, q;",
                "fma.rn.f32 e, e, $6, v;",
                "fma.rn.f32 u, e, $5, q;",
                "fma.rn.f32 l0, u, 0f40000000, 0f4B400000;",  # 2 u + M
                "add.rn.f32 l1, u, 0f4B400002;",  # u + (M + 2)
                "fma.rn.f32 l2, u, 0f3F000000, 0f4B400004;",  # u / 2 + (M + 4)
                "min.f32 l0, l0, l1;",
                "min.f32 l2, l2, 0f4B400007;",  # M + 7
                f"min.f32 z{i}, l0, l2;",
                f"mov.b32 k{i}, z{i};",
            ]
    # The constants of all eight add up, so that nothing needs a mask.
    total = sum(MAGIC * 16**i for i in range(8)) % 2**32
    lines.append("mov.b32 a, k7;")
    lines += [f"mad.lo.u32 a, a, 16, k{i};" for i in range(6, -1, -1)]
    lines += [
        f"sub.u32 a, a, 0x{total:x};",
        "prmt.b32 x, n0, n1, 0x7531;",  # the bytes with the signs of weights 0..3
        "prmt.b32 y, n2, n3, 0x7531;",
        "prmt.b32 c, x, y, 0x6420;",
        "prmt.b32 o, x, y, 0x7531;",
        "shr.u32 c, c, 4;",
        "and.b32 c, c, 0x08080808;",
        "and.b32 o, o, 0x80808080;",
        "or.b32 c, c, o;",
        "or.b32 $0, a, c;",
    ]
    return "{ " + " ".join(lines) + " }"


E2M1_ASM = tl.constexpr(_e2m1_asm())
# The larger magnitudes of eight BF16 weights, two by two.
AMAX_ASM = tl.constexpr(
    "{ .reg .b32 a, b; max.u16x2 a, $1, $2; max.u16x2 b, $3, $4; max.u16x2 $0, a, b; }"
)
RCP_ASM = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")


@triton.jit
def _words(v, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK / 2] words as four [BN, BK / 8]: the words of eight weights."""
    even, odd = tl.split(tl.reshape(v, (BN, BK // 8, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def _magnitudes(v0, v1, v2, v3):
    """BF16 bits of the largest of eight magnitudes."""
    a, b, c, d = v0 & 0x7FFF7FFF, v1 & 0x7FFF7FFF, v2 & 0x7FFF7FFF, v3 & 0x7FFF7FFF
    both = tl.inline_asm_elementwise(AMAX_ASM, "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)
    return tl.maximum(both & 0xFFFF, both >> 16)


@triton.jit
def _reciprocal(s):
    """1/s, correctly rounded, of a normal number whose reciprocal is one: one Newton step from the approximation."""
    r = tl.inline_asm_elementwise(RCP_ASM, "=r,r", [s], dtype=tl.float32, is_pure=True, pack=1)
    return tl.math.fma(tl.math.fma(-s, r, 1.0), r, r)


@triton.jit
def _nvfp4(v, gs, six, inverse, BN: tl.constexpr, BK: tl.constexpr):
    """Codes [BN, BK / 8] in words and E4M3 block scales [BN, BK / 16]. six = 6 gs, inverse = 1 / six, rounded once."""
    v0, v1, v2, v3 = _words(v, BN, BK)
    eight = _magnitudes(v0, v1, v2, v3)
    bits = tl.max(tl.reshape(eight, (BN, BK // 16, 2)), axis=2)
    a = (bits << 16).to(tl.float32, bitcast=True)
    q = a * inverse
    block = tl.math.fma(tl.math.fma(-q, tl.broadcast_to(six, q.shape), a), tl.broadcast_to(inverse, q.shape), q)
    block = tl.where(block == 0, 1.0, tl.maximum(block, 0.001953125))
    s8 = tl.minimum(block, 448.0).to(tl.float8e4nv)
    s = s8.to(tl.float32) * gs
    r = _reciprocal(s)
    s2 = tl.reshape(tl.broadcast_to(s[:, :, None], (BN, BK // 16, 2)), (BN, BK // 8))
    r2 = tl.reshape(tl.broadcast_to(r[:, :, None], (BN, BK // 16, 2)), (BN, BK // 8))
    codes = tl.inline_asm_elementwise(
        E2M1_ASM, "=r,r,r,r,r,r,r", [v0, v1, v2, v3, r2, s2], dtype=tl.int32, is_pure=True, pack=1
    )
    return codes, s8.to(tl.uint8, bitcast=True)


@triton.jit
def _load(sources, tiles, tile, kb, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
          EVEN: tl.constexpr, FIELDS: tl.constexpr):
    """A tile of a source: its row of the table, which rows these are, which are there, and the words."""
    source = sources + tl.load(tiles + 2 * tile).to(tl.int64) * FIELDS
    row0 = tl.load(tiles + 2 * tile + 1)
    num_rows = tl.load(source + 3).to(tl.int32)
    rows = row0 + tl.arange(0, BN)
    x = tl.load(source).to(tl.pointer_type(tl.int32)) + row0.to(tl.int64) * (K // 2)
    words = kb * (BK // 2) + tl.arange(0, BK // 2)
    at = tl.arange(0, BN)[:, None] * (K // 2) + words[None, :]
    at = tl.max_contiguous(tl.multiple_of(at, (1, 4)), (1, 4))
    x = tl.multiple_of(x, 16)
    if EVEN:
        v = tl.load(x + at, mask=(rows < num_rows)[:, None], other=0)
    else:
        v = tl.load(x + at, mask=(rows < num_rows)[:, None] & (words < K // 2)[None, :], other=0)
    return source, rows, rows < num_rows, v


@triton.jit
def _swapped(codes):
    return ((codes >> 4) & 0x0F0F0F0F) | ((codes & 0x0F0F0F0F) << 4)


@triton.jit
def _store(codes, s8, source, rows, inside, kb, K: tl.constexpr, BK: tl.constexpr,
           PLAIN: tl.constexpr, SWAP: tl.constexpr):
    """Where the layout wants them. PLAIN: rows one after the other, as a checkpoint has them."""
    w = tl.load(source + 1).to(tl.pointer_type(tl.int32))
    s = tl.load(source + 2).to(tl.pointer_type(tl.uint8))
    words, columns = kb * (BK // 8) + tl.arange(0, BK // 8), kb * (BK // 16) + tl.arange(0, BK // 16)
    if SWAP:
        codes = _swapped(codes)
    if PLAIN:
        w_rows, s_rows = rows.to(tl.int64) * (K // 8), rows.to(tl.int64) * (K // 16)
        s_columns = columns
    else:
        w_at = tl.load(source + 4).to(tl.pointer_type(tl.int64))
        s_at = tl.load(source + 5).to(tl.pointer_type(tl.int64))
        s_columns = tl.load(source + 6).to(tl.pointer_type(tl.int32)) + columns
        s_columns = tl.load(s_columns, mask=columns < K // 16, other=0)
        w_rows, s_rows = tl.load(w_at + rows, mask=inside, other=0) >> 2, tl.load(s_at + rows, mask=inside, other=0)
    tl.store(w + (w_rows[:, None] + words[None, :]), codes, mask=inside[:, None] & (words < K // 8)[None, :])
    tl.store(s + (s_rows[:, None] + s_columns[None, :]), s8, mask=inside[:, None] & (columns < K // 16)[None, :])


@triton.jit
def encode_nvfp4(sources, tiles, scales, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                 EVEN: tl.constexpr, PLAIN: tl.constexpr, SWAP: tl.constexpr, FIELDS: tl.constexpr):
    """scales: FP32 [groups, 3] of gs, 6 gs, 1 / (6 gs)."""
    steps: tl.constexpr = (K + BK - 1) // BK
    tile, kb = tl.program_id(0) // steps, tl.program_id(0) % steps
    source, rows, inside, v = _load(sources, tiles, tile, kb, K, BN, BK, EVEN, FIELDS)
    scale = scales + 3 * tl.load(source + 7)
    codes, s8 = _nvfp4(v, tl.load(scale), tl.load(scale + 1), tl.load(scale + 2), BN, BK)
    _store(codes, s8, source, rows, inside, kb, K, BK, PLAIN, SWAP)


@triton.jit
def amax(sources, tiles, out, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
         FIELDS: tl.constexpr):
    """BF16 bits of the largest magnitude of every group: int32 [groups], zeros before."""
    steps: tl.constexpr = (K + BK - 1) // BK
    tile, kb = tl.program_id(0) // steps, tl.program_id(0) % steps
    source, rows, inside, v = _load(sources, tiles, tile, kb, K, BN, BK, EVEN, FIELDS)
    v0, v1, v2, v3 = _words(v, BN, BK)
    tl.atomic_max(out + tl.load(source + 7), tl.max(tl.max(_magnitudes(v0, v1, v2, v3), axis=1), axis=0))


@triton.jit
def encode_nvfp4_fused(sources, items, state, largest, expected, K: tl.constexpr,
                       BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PLAIN: tl.constexpr,
                       SWAP: tl.constexpr, FIELDS: tl.constexpr):
    """amax and encode in one launch: a group's weights are read for its amax and, while they are in the L2, again.

    items: int32 [n, 4] of kind (0 amax, 1 encode), source, first row, column step; all amax items of a group come
    before its encode items. state: int32 [1 + groups], zeros: tickets drawn, amax items done. Work is drawn by ticket,
    so that whoever waits waits for programs that run already and never wait themselves.
    """
    item = items + 4 * tl.atomic_add(state, 1)
    kind, tile, kb = tl.load(item), item + 1, tl.load(item + 3)
    source, rows, inside, v = _load(sources, tile, 0, kb, K, BN, BK, EVEN, FIELDS)
    group = tl.load(source + 7)
    if kind == 0:
        v0, v1, v2, v3 = _words(v, BN, BK)
        tl.atomic_max(largest + group, tl.max(tl.max(_magnitudes(v0, v1, v2, v3), axis=1), axis=0))
        tl.atomic_add(state + 1 + group, 1, sem="release")
    else:
        wanted = tl.load(expected + group)
        while tl.atomic_add(state + 1 + group, 0, sem="acquire") < wanted:
            pass
        bits = tl.atomic_max(largest + group, 0)
        a = (bits << 16).to(tl.float32, bitcast=True)
        gs = tl.where(bits == 0, 1.0, tl.math.div_rn(a, 2688.0))
        six = 6.0 * gs
        codes, s8 = _nvfp4(v, gs, six, tl.math.div_rn(1.0, six), BN, BK)
        _store(codes, s8, source, rows, inside, kb, K, BK, PLAIN, SWAP)


@triton.jit
def diff_nvfp4(sources, tiles, scales, counts, found, new, K: tl.constexpr,
               BN: tl.constexpr, BK: tl.constexpr, ROOM: tl.constexpr, EVEN: tl.constexpr,
               FIELDS: tl.constexpr):
    """Encode, compare with what lies at WEIGHT and SCALE (row-major), and note what differs.

    counts: int32 [2, programs], zeros: words of codes and bytes of scales that differ. found, new: int32 [2, programs,
    ROOM], the place in the source (word, byte) and what it should be; in no order, what finds no room is only counted.
    """
    steps: tl.constexpr = (K + BK - 1) // BK
    program, programs = tl.program_id(0), tl.num_programs(0)
    tile, kb = program // steps, program % steps
    source, rows, inside, v = _load(sources, tiles, tile, kb, K, BN, BK, EVEN, FIELDS)
    w = tl.load(source + 1).to(tl.pointer_type(tl.int32))
    s = tl.load(source + 2).to(tl.pointer_type(tl.uint8))
    words, columns = kb * (BK // 8) + tl.arange(0, BK // 8), kb * (BK // 16) + tl.arange(0, BK // 16)
    w_mask = inside[:, None] & (words < K // 8)[None, :]
    s_mask = inside[:, None] & (columns < K // 16)[None, :]
    w_at = rows[:, None] * (K // 8) + words[None, :]
    s_at = rows[:, None] * (K // 16) + columns[None, :]
    w_old, s_old = tl.load(w + w_at, mask=w_mask, other=0), tl.load(s + s_at, mask=s_mask, other=0)
    scale = scales + 3 * tl.load(source + 7)
    codes, s8 = _nvfp4(v, tl.load(scale), tl.load(scale + 1), tl.load(scale + 2), BN, BK)
    _note(codes, w_old, w_at, w_mask, counts + program, found + program * ROOM, new + program * ROOM, ROOM)
    program += programs
    _note(s8, s_old, s_at, s_mask, counts + program, found + program * ROOM, new + program * ROOM, ROOM)


@triton.jit
def _note(now, old, at, mask, count, found, new, ROOM: tl.constexpr):
    changed = (now != old) & mask
    if tl.max(tl.max(changed.to(tl.int32), axis=1), axis=0) > 0:
        slot = tl.atomic_add(count + tl.zeros_like(at), 1, mask=changed)
        keep = changed & (slot < ROOM)
        tl.store(found + slot, at, mask=keep)
        tl.store(new + slot, now.to(tl.int32), mask=keep)


@triton.jit
def fetch_words(addresses, out, count, BLOCK: tl.constexpr):
    """out[i] = the 4 bytes at addresses[i]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(addresses + i, mask=i < count, other=0).to(tl.pointer_type(tl.int32))
    tl.store(out + i, tl.load(at, mask=i < count, other=0), mask=i < count)
