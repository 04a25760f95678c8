"""Trainer names to checkpoint names, by tables: wrapper prefixes stripped, stacked experts taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

# Modules that wrap others leave their attribute in the name, anywhere in it:
# torch.compile, FSDP1, activation checkpointing, DDP.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")

# Transformers keeps experts stacked; checkpoints name them one by one. Stacked gate_up_proj is [E, 2I, H], gate first.
STACKED: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"^(?P<prefix>.*\.experts)\.gate_up_proj$"), ("gate_proj", "up_proj")),
    (re.compile(r"^(?P<prefix>.*\.experts)\.down_proj$"), ("down_proj",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows [row0, row1) of expert `expert` of a stacked parameter, under their checkpoint name."""

    name: str
    expert: int
    row0: int
    row1: int


@lru_cache(maxsize=1 << 16)
def canonical_name(name: str) -> str:
    """A parameter's name without the prefixes of wrapper modules."""
    return WRAPPERS.sub("", name)


def expert_parts(name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The checkpoint parameters in a stacked experts parameter [E, rows, columns]; none when it is not one."""
    for pattern, projections in STACKED:
        match = pattern.match(name)
        if match and len(shape) == 3:
            rows = shape[1] // len(projections)
            return tuple(
                Part(
                    name=f"{match['prefix']}.{expert}.{projection}.weight",
                    expert=expert,
                    row0=i * rows,
                    row1=(i + 1) * rows,
                )
                for expert in range(shape[0])
                for i, projection in enumerate(projections)
            )
    return ()
