"""docs/support.md, from the tables of formats, layouts and families. `python -m launch.support_page` rewrites it."""

from __future__ import annotations

from pathlib import Path

from quant.families import FAMILIES
from quant.formats import FORMATS
from quant.layouts import LAYOUTS

from .tables import Row, device_name, markdown

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
# What models are made of, and which kinds of layout that takes.
MODELS = (
    {"model": "transformers, dense decoders", "modules": "linear", "tested with": "SmolLM2-135M, a tiny Llama"},
    {"model": "transformers, Qwen3-MoE", "modules": "linear, experts", "tested with": "a tiny one of 4 experts"},
    *(
        {
            "model": f"diffusers, {row.class_name} ({', '.join(row.components)})",
            "modules": "linear",
            "tested with": "a tiny one of the real class",
        }
        for row in FAMILIES.values()
    ),
)


def pairs() -> list[Row]:
    """Every format of every layout: where its bytes and its kernel run."""
    return [
        {
            "modules": layout.kind,
            "format": name,
            "layout": layout.name,
            "CPU: bytes in place, forward decodes": "run",
            "hardware of its kernel": ", ".join(map(device_name, sorted(layout.archs, key=str))) or "none needed",
            "its kernel": layout.kernel,
        }
        for layout in LAYOUTS.values()
        for name in (FORMATS if layout.kind == "any" else sorted(layout.formats))
    ]


def page() -> str:
    """The whole page."""
    return (
        "# What is supported, and what of it was run\n\nWritten by `python -m launch.support_page` from the tables of"
        " formats, layouts and families.\nA model takes every format and layout of the kinds of modules that it is made"
        " of. `run`: the tests do it, on a CPU.\nA kernel that is `not run` gets bytes that equal those of the library"
        " named in formats.md; nobody here has started it.\n`UNTESTED`: forward calls it where the device has it, with"
        " arguments that are tested; the call was never made.\n\n"
        f"{markdown(MODELS)}\n\n{markdown(pairs())}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
