"""docs/formats.md, from the tables of formats and layouts. `python -m launch.formats_page` rewrites it."""

from __future__ import annotations

from pathlib import Path

from .tables import formats, layouts, markdown

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
HEAD = """# Formats and layouts

Written by `python -m launch.formats_page`; a test compares. `transfuse formats` prints the tables of the release that
is installed.

A **format** says how numbers are encoded. A **layout** says where the encoded bytes lie for one kernel. The wire, the
version store and every digest know the *checkpoint form* only: a format's tensors, row after row, under the names of
the library whose export they equal. The actor alone knows its *kernel layout*, so one push serves replicas of
different layouts, and a stored version is a checkpoint that other engines load.

## Formats

A weight of shape [N, K] in NVFP4, for instance, is four tensors:

```
weight          U8       [N, K/2]    two E2M1 codes a byte, the first one in the low nibble
weight_scale    F8_E4M3  [N, K/16]   a scale for 16 elements of a row
weight_scale_2  F32      []          a scale for all of them; one for q, k and v together, one for gate and up
input_scale     F32      []          of the activations: from a calibration, never from the weights

element = code * weight_scale * weight_scale_2
```

FP32 and FP16 masters are cast to BF16 first, ties to even, so that the bytes are those of an exported checkpoint.
`elements a scale` is rows x columns. An all-zero block or tensor is encoded as the column `zeros` says; values that
are not finite are refused. Where the last column names a library, tests compare every byte with what that library
wrote (`transfuse conformance tests/golden`).
"""
LAYOUTS = """## Layouts

A layout is a sum: byte (r, c) of a checkpoint tensor lies at `row_offsets[r] + run_offsets[c // run] + c % run` of
its storage, plus padding that stays zero. Shuffles, swizzles, transposes, block-major orders and gated interleaves
are all of that kind ([the picture](concepts.md#layouts-in-place)), and each runs backwards. What rounds is no layout
but a conversion, and done before the digest. Rows are the unit of sharding: 128 of them stay together wherever a
layout moves bytes between them.

Where the hardware has no kernel, forward computes from the same bytes, decoded once a version. `kernels on` is where
the kernel would run; [support.md](support.md) has every pair of format and layout, and
[adding_a_row.md](adding_a_row.md) how to add one.
"""


def page() -> str:
    """The whole page."""
    return f"{HEAD}\n{markdown(formats())}\n\n{LAYOUTS}\n{markdown(layouts())}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
