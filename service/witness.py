"""The first push as a witness: was the NVFP4 checkpoint that this rank serves read as it was written?

    witness = Witness(receiver, checkpoint)         # when the rank is built
    witness.hear()                                  # at every prepare; says once what is wrong
    witness.status                                  # "verified", "unverified (why)", "misread (errors)", "" for others

Where no BF16 base lies beside a checkpoint, nothing but metadata says in which order its nibbles and scales are. What a
trainer pushes was encoded from BF16, a few steps of training away: its rows decode to a base. The live rows, put back
into the order that the file had, are compared with it as quant.probe compares a file with a base.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.configs import NVFP4_ROWS
from quant.conversions import swap_nibbles, swizzled_scales
from quant.formats import FORMATS, decode
from quant.names import canonical_name
from quant.parameters import ParameterRow
from quant.probe import (
    FIELDS,
    NUM_MODULES,
    NUM_ROWS,
    TILE_ROWS,
    Hypothesis,
    ProbeError,
    Reading,
    Sample,
    Verdict,
    check,
)

if TYPE_CHECKING:  # who only asks of_replica loads no receiver
    from weight_update.receiver import Receiver

log = logging.getLogger(__name__)

TILE_COLUMNS = 4  # of swizzled scales
MAGNITUDES = 0x77  # of both codes of a byte, without their signs


class Witness:
    """What is known of how a checkpoint was read, before and after the first push.

    Holds the parameters that no push has brought since the checkpoint was loaded, where that was unverified.
    """

    def __init__(self, receiver: Receiver, checkpoint: Checkpoint | None) -> None:
        readings = () if checkpoint is None else checkpoint.readings
        packed = {canonical_name(name) for name in _packed(checkpoint)} if checkpoint and readings else set()
        rows = [row for row in receiver.manifest.parameters if row.format in NVFP4_ROWS and row.name in packed]
        self._receiver = receiver
        self._readings = {each.component: each for each in readings}
        self._said = {name: _text(each.verdict) for name, each in self._readings.items()}
        self._open = {
            name: [row for row in rows if not name or row.name.startswith(f"{name}.")]
            for name, each in self._readings.items()
            if each.verdict.status != "verified"
        }

    @property
    def status(self) -> str:
        """One text for all components; "" where nothing was loaded in NVFP4."""
        if set(self._said.values()) == {"verified"}:
            return "verified"
        return "; ".join(f"{name}: {text}" if name else text for name, text in self._said.items())

    def forget(self) -> None:
        """Nothing is left of what was loaded: another replica's rows, or stored ones, replace all of it."""
        self._said, self._open = {}, {}

    def hear(self) -> None:
        """Compare what a prepared push brings with what it is about to replace. Reads a few rows; refuses nothing."""
        if not self._open:
            return
        staged = self._receiver.arrived()
        for component, rows in list(self._open.items()):
            reading = self._readings[component]
            brought = [row for row in rows if all(name in staged for name in _compared(row))]
            samples = self._samples(reading.declared, brought, staged)
            # What a push has brought is no longer what was loaded, and so is compared once.
            self._open[component] = [row for row in rows if row.name not in staged]
            if samples:
                self._said[component] = self._judged(reading, samples)
                del self._open[component]

    def _judged(self, reading: Reading, samples: Sequence[Sample]) -> str:
        where, version = reading.component or "the checkpoint", self._receiver.version
        try:
            verdict = check(reading.declared, samples)
        except ProbeError as error:
            log.warning(
                "%s was misread when it was loaded. Versions up to %d were served from misread weights. This push is "
                "right and goes on; what it does not bring stays misread, so push all parameters once. %s",
                where, version, error,
            )  # fmt: skip
            return f"misread ({error})"
        verdict = replace(verdict, verified=verdict.verified | reading.verdict.verified)
        level = logging.INFO if verdict.status == "verified" else logging.WARNING
        log.log(level, "%s against the first push, %s: %s", where, reading.declared, verdict)
        return _text(verdict)

    def _samples(
        self, declared: Hypothesis, brought: Sequence[ParameterRow], staged: Mapping[str, Tensor]
    ) -> list[Sample]:
        """Of parameters all over the model; of those with a whole tile of scales where there are any, as only these
        tell layouts apart."""
        step = max(1, len(brought) // NUM_MODULES)
        spread = [_Rows.of(self._receiver, row) for offset in range(step) for row in brought[offset::step]]
        tiled = [each for each in spread if each.is_tiled]
        made = (each.sample(self._receiver, declared, staged) for each in tiled or spread)
        return list(islice((each for each in made if each is not None), NUM_MODULES))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The first rows [start, start + num_rows) of a parameter on this rank; from a tile of scales where it has one."""

    row: ParameterRow
    start: int
    num_rows: int
    is_tiled: bool

    @classmethod
    def of(cls, receiver: Receiver, row: ParameterRow) -> _Rows:
        # Codes and scales lie in storages of their own, which may be sharded at different rows.
        at = [receiver.manifest.index[name] for name in (row.name, f"{row.name}_scale")]
        first, stop = int(receiver.row_start[at].max()), int(receiver.row_stop[at].min())
        tile = -(-first // TILE_ROWS) * TILE_ROWS
        columns = row.shape[-1] // FORMATS[row.format].encode_block[1]
        is_whole = tile < stop and tile + TILE_ROWS <= int(receiver.row_stop[at[1]])
        is_tiled = is_whole and columns % TILE_COLUMNS == 0
        start = tile if is_tiled else first
        return cls(row=row, start=start, num_rows=min(NUM_ROWS, stop - start), is_tiled=is_tiled)

    def sample(self, receiver: Receiver, declared: Hypothesis, staged: Mapping[str, Tensor]) -> Sample | None:
        """As the file has it, beside the push; None where this rank lacks rows or the scale, or nothing can be told."""
        if self.num_rows <= 0 or (declared.scale_layout == "swizzled" and not self.is_tiled):
            return None
        codes, scales, whole = _compared(self.row)
        if not len(staged[whole]):  # on another rank
            return None
        new_scale, old_scale = _value(staged[whole]), _value(_live(receiver, whole, 0, 1))
        if not (0 < new_scale < math.inf and 0 < old_scale < math.inf):
            return None
        parts = {
            "weight": self._new(receiver, staged, codes),
            "weight_scale": self._new(receiver, staged, scales).view(torch.float8_e4m3fn),
            "weight_scale_2": new_scale,
        }
        live_codes = self._live(receiver, codes, self.num_rows)
        base = decode(FORMATS[self.row.format], parts)
        if not base.any() or not (live_codes & MAGNITUDES).any():  # zeros read alike in any order
            return None
        live_scales = self._live(receiver, scales, TILE_ROWS if self.is_tiled else self.num_rows)
        return Sample(
            name=codes,
            codes=swap_nibbles(live_codes) if declared.swap_nibbles else live_codes,
            scales=swizzled_scales(live_scales) if declared.scale_layout == "swizzled" else live_scales,
            global_scale=old_scale,
            base=base,
            format=self.row.format,
        )

    def _live(self, receiver: Receiver, name: str, num_rows: int) -> Tensor:
        return _live(receiver, name, self.start, self.start + num_rows)

    def _new(self, receiver: Receiver, staged: Mapping[str, Tensor], name: str) -> Tensor:
        first = self.start - int(receiver.row_start[receiver.manifest.index[name]])
        return staged[name][first : first + self.num_rows]


def _compared(row: ParameterRow) -> tuple[str, str, str]:
    """Codes, block scales, global scale."""
    return row.name, f"{row.name}_scale", f"{row.name}_scale_2"


def _live(receiver: Receiver, name: str, start: int, stop: int) -> Tensor:
    """Rows [start, stop) as they are served."""
    return receiver.rows(receiver.version, receiver.manifest.index[name], start, stop)


def _value(rows: Tensor) -> Tensor:
    """The F32 that these bytes are."""
    return rows.reshape(-1).view(torch.float32).reshape(())


def _packed(checkpoint: Checkpoint) -> Iterator[str]:
    weights = (name for name in checkpoint.names() if name.endswith(".weight"))
    return (name for name in weights if checkpoint.spec(name).dtype == "U8")


def _text(verdict: Verdict) -> str:
    if verdict.status == "verified":
        return "verified"
    known = ", ".join(name for name in FIELDS if name in verdict.verified)
    return f"unverified ({verdict.reason}{f'; verified is {known}' if known else ''})"


def of_replica(statuses: Sequence[str]) -> str:
    """What the ranks of a replica know together: each compares only the rows that it holds, of one checkpoint."""
    said = [text for text in statuses if text]
    ranked = sorted(said, key=lambda text: ("misread" not in text, text != "verified"))
    return ranked[0] if ranked else ""
