"""Views: a checkpoint whose files name, pack or order things otherwise, read as canonical checkpoint form.

    view = CheckpointView(checkpoint, prefix="transformer", name_map=NAME_MAPS["bfl_flux2"],
                          swap_nibbles=True, scale_layout="swizzled")
    view.names(), view.spec(name), view.rows(name, 0, 128)

Nothing is converted ahead: rows are read when asked for, of swizzled scales the tiles of 128 rows that hold them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .checkpoint import Checkpoint, CheckpointError
from .configs import Quantization, ScaleLayout
from .excludes import ConfigError, in_list
from .names import IDENTITY, Link, NameMap, NameMapError, raise_all
from .placements import Placement, invert_rows, swapped
from .specs import TensorSpec
from .steps import Swizzle128x4, locate, round_up

TILE_ROWS = 128  # of swizzled scales
PAD = 16  # ModelOpt's ComfyUI export pads rows, bytes of codes and columns of scales to multiples of this
GROUP = 16  # NVFP4 codes that share a scale
ROWS_OF_SCALES = (1, 128)  # rows of a weight that share a row of its scales: channels and NVFP4, FP8 blocks

# ComfyUI's note on how a module is quantized, JSON in a tensor: no weight.
MARKER = ".comfy_quant"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor of a file in checkpoint form: without padding, and its rows [first, last) in their proper order."""

    spec: TensorSpec
    read: Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Rows [start, stop) of a stored tensor that follow each other in a tensor of the view.

    is_shared: the tensor has one value, which all parts of a packed weight have in common.
    """

    stored: _Stored
    start: int
    stop: int
    is_shared: bool


class CheckpointView(Checkpoint):
    """A checkpoint under the model's names and in checkpoint form; it has the reading API of Checkpoint.

    checkpoint: what is stored; closing the view closes it. prefix: component that the tensors belong to, "" for none.
    swap_nibbles: the first code of a byte lies in the high nibble. scale_layout: "swizzled" where block scales lie in
    tiles of 128 rows x 4 columns. Both are by default what checkpoint.quantization says.
    shapes: of the model's weights by name, [rows, elements]: what ComfyUI's padding adds to them is cut. A weight
    without a shape is cut to the rows of its bias where it has one, else left as it is.

    `quantization` is that of the checkpoint, in the view's names and order. Raises CheckpointError that lists every
    tensor that is filled twice or in part, or is not stored as it should be.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        prefix: str = "",
        name_map: NameMap = IDENTITY,
        swap_nibbles: bool | None = None,
        scale_layout: ScaleLayout | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        stated = checkpoint.quantization or Quantization(format="bf16")
        self.config_dir = checkpoint.config_dir
        self._checkpoint = checkpoint
        self._names = name_map.into(prefix) if prefix else name_map
        self._swap_nibbles = stated.swap_nibbles if swap_nibbles is None else swap_nibbles
        self._is_swizzled = (scale_layout or stated.scale_layout) == "swizzled"
        self._shapes = shapes or {}
        self._stored: dict[str, _Stored] = {}
        try:
            links = self._names.links(name for name in checkpoint.names() if not name.endswith(MARKER))
            self._runs = self._all_runs(links)
            self.quantization = self._quantization(checkpoint.quantization)
        except (NameMapError, ConfigError) as error:
            raise CheckpointError(f"{self.config_dir}: {error}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._runs

    def close(self) -> None:
        """Unmap the files."""
        self._checkpoint.close()

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._runs))

    def sources(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a tensor is made of."""
        return tuple(dict.fromkeys(run.stored.spec.name for run in self._runs_of(name)))

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape, without reading the tensor."""
        runs = self._runs_of(name)
        spec = runs[0].stored.spec
        num_rows = sum(run.stop - run.start for run in runs)
        return replace(spec, name=name, shape=spec.shape if runs[0].is_shared else (num_rows, *spec.shape[1:]))

    def rows(self, name: str, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        """Rows [row_start, row_stop) in the stored dtype; a 0-d tensor is its own single row."""
        runs = self._runs_of(name)
        if runs[0].is_shared:
            return self._shared(name, runs)
        pieces: list[Tensor] = []
        for run, at in zip(runs, accumulate((run.stop - run.start for run in runs), initial=0), strict=False):
            first = max(row_start - at, 0) + run.start
            last = run.stop if row_stop is None else min(row_stop - at + run.start, run.stop)
            pieces += [run.stored.read(first, last)] if first < last else []
        if not pieces:
            return runs[0].stored.read(runs[0].start, runs[0].start)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def metadata(self) -> Sequence[Mapping[str, str]]:
        """That of the stored files."""
        return self._checkpoint.metadata()

    # -- names

    def _runs_of(self, name: str) -> list[_Run]:
        if name not in self._runs:
            raise CheckpointError(f"{self.config_dir}: no tensor {name!r} among {len(self._runs)}")
        return self._runs[name]

    def _all_runs(self, links: Mapping[str, Sequence[Link]]) -> dict[str, list[_Run]]:
        runs: dict[str, list[_Run]] = {}
        problems: list[str] = []
        for name, its_links in links.items():
            try:
                runs[name] = [self._run(link) for link in its_links]
            except (NameMapError, CheckpointError) as error:
                problems.append(f"{name}: {error}")
                continue
            specs = [run.stored.spec for run in runs[name]]
            if len({(spec.dtype, spec.shape[1:]) for spec in specs}) > 1:
                found = "; ".join(f"{spec.name} {list(spec.shape)} of {spec.dtype}" for spec in specs)
                problems.append(f"{name}: what it is made of does not fit together: {found}")
        raise_all(problems, "stored otherwise than expected")
        return runs

    def _run(self, link: Link) -> _Run:
        stored = self._stored_of(link.source.name)
        spec, is_part = stored.spec, not (link.source.is_whole and link.target.is_whole)
        if not spec.shape or (is_part and math.prod(spec.shape) == 1):
            return _Run(stored=stored, start=0, stop=1, is_shared=True)
        start, stop = 0, spec.num_rows
        if not link.source.is_whole:
            start, stop = self._one_each(link, spec) or self._by_rows(link, spec)
        return _Run(stored=stored, start=start, stop=stop, is_shared=False)

    def _one_each(self, link: Link, spec: TensorSpec) -> tuple[int, int] | None:
        """Which value is this part's, where a packed weight has one value a part (a scale each for q, k and v)."""
        parts = self._names.forward(link.source.name)
        module, _, leaf = link.source.name.rpartition(".")
        if spec.shape != (len(parts),) or leaf in ("weight", "bias") or self._rows_of(module) == len(parts):
            return None
        index = parts.index(link)
        return index, index + 1

    def _by_rows(self, link: Link, spec: TensorSpec) -> tuple[int, int]:
        """The rows of a part, where the tensor goes along with the rows of its weight."""
        rows = self._rows_of(spec.name.rpartition(".")[0]) or spec.num_rows
        if rows % spec.num_rows or rows // spec.num_rows not in ROWS_OF_SCALES:
            raise CheckpointError(
                f"{spec.name} has {spec.num_rows} rows beside a packed weight of {rows}; "
                f"expected {rows}, or one value, or one a part"
            )
        return link.source.rows(spec.num_rows)

    def _rows_of(self, module: str) -> int | None:
        """The rows of a module's weight, without padding."""
        name = f"{module}.weight"
        return self._stored_of(name).spec.num_rows if name in self._checkpoint else None

    def _shared(self, name: str, runs: list[_Run]) -> Tensor:
        """The value that all parts have."""
        values = [run.stored.read(0, 1) for run in runs]
        if any(not torch.equal(value, values[0]) for value in values):
            found = ", ".join(f"{run.stored.spec.name} {value.item()}" for run, value in zip(runs, values, strict=True))
            raise CheckpointError(
                f"{self.config_dir}: {name}: its parts have different values: {found}; bring them onto one first"
            )
        return values[0]

    def _quantization(self, stated: Quantization | None) -> Quantization | None:
        """What the checkpoint says, of the names and the order that the view has: whole module names are excluded."""
        if stated is None:
            return None
        modules = {
            name.removesuffix(".weight"): [source.rpartition(".")[0] for source in self.sources(name)]
            for name in self._runs
            if name.endswith(".weight")
        }
        excluded = stated.excludes.packed(modules)
        return replace(
            stated,
            exclude=tuple(sorted(excluded)),
            dialect="glob_full",
            others=self._others(stated, {name: parts for name, parts in modules.items() if name not in excluded}),
            swap_nibbles=False,
            packed_qkv=False,
            scale_layout="linear",
        )

    def _others(self, stated: Quantization, modules: Mapping[str, Sequence[str]]) -> tuple[tuple[str, str], ...]:
        """The modules in another row than most, and which one."""
        row_of = dict(stated.others)
        rows = {name: {row_of.get(part, stated.format) for part in parts} for name, parts in modules.items()}
        split = [
            f"{name}: its parts are in {' and '.join(sorted(each))}" for name, each in rows.items() if len(each) > 1
        ]
        if split:
            raise ConfigError(in_list("packed projections whose parts disagree; quantize them alike", split))
        found = {name: min(each) for name, each in rows.items()}
        return tuple(sorted((name, row) for name, row in found.items() if row != stated.format))

    # -- bytes

    def _stored_of(self, name: str) -> _Stored:
        if name not in self._stored:
            module, _, leaf = name.rpartition(".")
            convert = {"weight": self._codes, "weight_scale": self._scales}.get(leaf)
            made = convert(module) if convert and self._has_packed_codes(module) else None
            self._stored[name] = made or self._as_it_is(name)
        return self._stored[name]

    def _as_it_is(self, name: str) -> _Stored:
        return _Stored(spec=self._checkpoint.spec(name), read=lambda a, b: self._checkpoint.rows(name, a, b))

    def _has_packed_codes(self, module: str) -> bool:
        """Two codes a byte, and E4M3 scales of blocks of them."""
        weight, scale = f"{module}.weight", f"{module}.weight_scale"
        if weight not in self._checkpoint or scale not in self._checkpoint:
            return False
        codes, scales = self._checkpoint.spec(weight), self._checkpoint.spec(scale)
        return codes.dtype == "U8" and len(codes.shape) == 2 and scales.dtype == "F8_E4M3" and scales.num_bytes > 1

    def _shape_of(self, module: str) -> tuple[int, int]:
        """Rows and bytes of a module's codes without the padding of ComfyUI."""
        rows, row_bytes = self._checkpoint.spec(f"{module}.weight").shape
        bias = f"{module}.bias"
        wanted = (self._checkpoint.spec(bias).num_rows if bias in self._checkpoint else rows, row_bytes)
        links = self._names.forward(f"{module}.weight")
        if all(link.target.name in self._shapes for link in links):
            shapes = [self._shapes[link.target.name] for link in links]
            parts = [link.target.rows(shape[0]) for link, shape in zip(links, shapes, strict=True)]
            wanted = (sum(stop - start for start, stop in parts), shapes[0][1] // 2)
        # Anything else is no padding: it stays, and the shapes are compared where they are needed.
        pairs = zip(wanted, (rows, row_bytes), strict=True)
        cut = [size if round_up(size, PAD) == held else held for size, held in pairs]
        return cut[0], cut[1]

    def _codes(self, module: str) -> _Stored:
        name, shape = f"{module}.weight", self._shape_of(module)

        def read(first: int, last: int) -> Tensor:
            codes = self._checkpoint.rows(name, first, last)[:, : shape[1]]
            return swapped(codes) if self._swap_nibbles else codes

        return _Stored(spec=replace(self._checkpoint.spec(name), shape=shape), read=read)

    def _scales(self, module: str) -> _Stored:
        name, (num_rows, row_bytes) = f"{module}.weight_scale", self._shape_of(module)
        spec = self._checkpoint.spec(name)
        shape = (num_rows, 2 * row_bytes // self._group())
        read = self._swizzled(spec, module) if self._is_swizzled else self._as_it_is(name).read
        return _Stored(spec=replace(spec, shape=shape), read=lambda a, b: read(a, b)[:, : shape[1]])

    def _group(self) -> int:
        stated = self._checkpoint.quantization
        return GROUP if stated is None or stated.group_size is None else stated.group_size

    def _swizzled(self, spec: TensorSpec, module: str) -> Callable[[int, int], Tensor]:
        """Rows of scales that lie in tiles: [row tiles, column tiles, 32, 4, 4] bytes, whatever shape is noted."""
        num_rows, row_bytes = self._checkpoint.spec(f"{module}.weight").shape
        tall, wide = round_up(num_rows, TILE_ROWS), spec.num_bytes // round_up(num_rows, TILE_ROWS)
        if spec.num_bytes != tall * wide or wide % 4 or 2 * row_bytes > wide * self._group():
            raise CheckpointError(
                f"{spec.name} {list(spec.shape)} is no swizzled scale of [{num_rows}, {row_bytes}] "
                f"packed codes; expected {tall} rows and columns in multiples of 4; is its layout linear?"
            )

        def read(first: int, last: int) -> Tensor:
            tile0, tile1 = first // TILE_ROWS, -(-last // TILE_ROWS)
            step = TILE_ROWS * (1 if len(spec.shape) > 1 else wide)  # noted as a matrix, or flat
            tiles = self._checkpoint.rows(spec.name, tile0 * step, tile1 * step)
            rows = (tile1 - tile0) * TILE_ROWS
            placement = Placement(
                tensor=TensorSpec(name=spec.name, dtype="U8", shape=(rows, wide)),
                storage=str(self.config_dir),
                origin=0,
                located=locate((), Swizzle128x4(), rows, wide),
                unit_bytes=TILE_ROWS * wide,
            )
            local = tiles.contiguous().view(torch.uint8).view(-1)
            return invert_rows(placement, first - tile0 * TILE_ROWS, last - first, local, 0).view(tiles.dtype)

        return read
