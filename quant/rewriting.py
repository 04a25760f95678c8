"""A checkpoint folder made from others, tensor by tensor: planned from headers alone, then written as a stream.

    source = Shards(directory)
    items = [source.copied(name) for name in source.names()]
    plan = Rewrite(items=tuple(items), ...)     # printable: nothing but headers was read
    plan.write(folder, progress)                # one tensor in memory at a time, however large the files are

Files are as safetensors specifies them: 8 bytes length of the header, little endian; the header, JSON padded with
spaces to a multiple of 8; then the tensors without holes.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint import read_object, tensor_files
from .configs import Quantization, agreed, parse
from .excludes import ConfigError, Dialect, Excludes
from .output import REPORT, ToolError
from .specs import DTYPES, TensorSpec, dtype_name

Progress = Callable[[int, int], None]  # bytes done, bytes in all

CONFIG, NESTED_CONFIG = "config.json", "hf_quant_config.json"
INDEX_SUFFIX = ".safetensors.index.json"
# Weights in whatever form, and what a rewrite makes itself: not copied along.
NOT_COPIED = (".safetensors", INDEX_SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
PLAIN_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One tensor of the output. did: a word of the report (copied, from base, encoded); source: where from."""

    spec: TensorSpec
    file: str
    did: str
    source: str
    read: Callable[[], Tensor]


class Shards:
    """The tensors of one folder as they are stored, by file."""

    def __init__(self, directory: Path, paths: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        paths = tensor_files(directory) if paths is None else paths
        self.file_of = {name: Path(path).name for name, path in paths.items()}
        self._open = {Path(path).name: _safe_open(Path(path)) for path in dict.fromkeys(paths.values())}

    @classmethod
    def of_file(cls, path: Path) -> Shards:
        """The tensors of one file alone."""
        return cls(path.parent, dict.fromkeys(_safe_open(path).keys(), str(path)))

    def __contains__(self, name: object) -> bool:
        return name in self.file_of

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.file_of))

    def modules(self) -> tuple[str, ...]:
        """Names of what has a weight."""
        return tuple(name.removesuffix(".weight") for name in self.names() if name.endswith(".weight"))

    def spec(self, name: str) -> TensorSpec:
        piece = self._open[self.file_of[name]].get_slice(name)
        if piece.get_dtype() not in DTYPES:
            raise ToolError(f"{self.directory}: {name} is {piece.get_dtype()}; known: {', '.join(DTYPES)}")
        return TensorSpec(name=name, dtype=piece.get_dtype(), shape=tuple(piece.get_shape()))

    def tensor(self, name: str) -> Tensor:
        return torch.as_tensor(self._open[self.file_of[name]].get_tensor(name))

    def rows(self, name: str, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        """Rows [row_start, row_stop); a 0-d tensor is its own single row."""
        if not self.spec(name).shape:
            return self.tensor(name)
        return torch.as_tensor(self._open[self.file_of[name]].get_slice(name)[row_start:row_stop])

    def metadata(self) -> dict[str, dict[str, str]]:
        """What each file's header says besides its tensors."""
        return {file: dict(opened.metadata() or {}) for file, opened in self._open.items()}

    def copied(self, name: str) -> Item:
        """The item that copies a tensor, bytes unchanged, into the file of the same name."""
        return Item(
            spec=self.spec(name),
            file=self.file_of[name],
            did="copied",
            source=str(self.directory),
            read=lambda: self.tensor(name),
        )

    def standing_in(self, name: str, source: Shards, file: str) -> Item:
        """The item that puts this folder's tensor in the place of `source`'s, into `file`.

        In the dtype that it has there, if that is a plain one, else in BF16: bytes unchanged where that is its own.
        """
        spec = self.spec(name)
        there = source.spec(name).dtype if name in source else ""
        dtype = there if there in PLAIN_DTYPES else "BF16"
        return Item(
            spec=TensorSpec(name=name, dtype=dtype, shape=spec.shape),
            file=file,
            did="from base" if spec.dtype == dtype else f"from base, rounded to {dtype}",
            source=str(self.directory),
            read=lambda: self.tensor(name).to(DTYPES[dtype]),
        )


def _safe_open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ToolError(f"{path}: cannot be read as safetensors: {error}; copy it again") from error


def weights_folder(path: Path, component: str) -> Path:
    """The folder of a model's weights: `path` itself where it has a config.json, else its folder `component`."""
    found = next((each for each in (path, path / component) if (each / CONFIG).is_file()), None)
    if found is None:
        raise ToolError(f"{path}: no {CONFIG} there nor in its folder {component!r}; name the folder of the weights")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What a folder says of its quantization: the flat form in config.json, the nested one in hf_quant_config.json."""

    config: Mapping[str, Any]
    nested: Mapping[str, Any]

    @property
    def flat(self) -> Mapping[str, Any]:
        return self.config.get("quantization_config") or {}

    @property
    def section(self) -> Mapping[str, Any]:
        return self.nested.get("quantization") or {}

    def quantization(self) -> Quantization | None:
        """Both forms as one value, None where there is neither; raises ToolError."""
        dialect: Dialect = "glob_full" if "_class_name" in self.config else "per_part"
        try:
            flat = parse(self.flat, CONFIG, dialect) if self.flat else None
            return agreed(flat, parse(self.nested, NESTED_CONFIG, dialect) if self.nested else None)
        except ConfigError as error:
            raise ToolError(str(error)) from error

    @property
    def ignored(self) -> tuple[str, ...]:
        """Patterns of modules in high precision, of both forms."""
        return tuple(dict.fromkeys([*(self.flat.get("ignore") or ()), *(self.section.get("exclude_modules") or ())]))

    def updated(self, ignored: Iterable[str], **fields: Any) -> dict[str, dict[str, Any]]:
        """File name -> new content: more modules are ignored, other fields are set, in each form that is there."""
        more = [*self.ignored, *sorted(set(ignored) - set(self.ignored))]
        flat = {"quant_method": "modelopt", **self.flat, **fields, "ignore": more}
        files: dict[str, dict[str, Any]] = {CONFIG: {**self.config, "quantization_config": flat}}
        if self.nested:
            section = {**self.section, **fields, "exclude_modules": more}
            files[NESTED_CONFIG] = {**self.nested, "quantization": section}
        return files


def read_declared(directory: Path) -> Declared:
    """The quantization that the folder's JSON files declare."""
    return Declared(config=read_object(directory / CONFIG), nested=read_object(directory / NESTED_CONFIG))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """An output folder, planned.

    dropped: tensor -> why it is not in the output; json_files: content by name; checked: what was verified of the
    source, and how; warnings: more of them may come while it is written, when the numbers are seen.
    """

    items: tuple[Item, ...]
    dropped: Mapping[str, str]
    json_files: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, Mapping[str, str]]
    copies: tuple[Path, ...]
    index: str | None
    warnings: Sequence[str] = ()
    checked: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(item.spec.num_bytes for item in self.items)

    @property
    def files(self) -> dict[str, list[Item]]:
        """The items by file; a file that would be empty is not there."""
        found: dict[str, list[Item]] = {}
        for item in sorted(self.items, key=lambda each: each.file):
            found.setdefault(item.file, []).append(item)
        return found

    def report(self) -> dict[str, Any]:
        """What is done to every tensor, counted by what is done."""
        done: list[dict[str, Any]] = [
            {
                "name": item.spec.name,
                "did": item.did,
                "dtype": item.spec.dtype,
                "shape": list(item.spec.shape),
                "bytes": item.spec.num_bytes,
                "file": item.file,
                "source": item.source,
            }
            for item in self.items
        ]
        gone: list[dict[str, Any]] = [
            {"name": name, "did": "dropped", "why": why} for name, why in self.dropped.items()
        ]
        rows = sorted((*done, *gone), key=lambda row: str(row["name"]))
        return {
            "counts": dict(Counter(str(row["did"]) for row in rows)),
            "quantized_modules": sum(item.spec.name.endswith(".weight_scale") for item in self.items),
            "bytes": self.num_bytes,
            "checked": self.checked,
            "warnings": [*self.warnings],
            "tensors": rows,
        }

    def write(self, folder: Path, progress: Progress) -> None:
        """Write every file into an empty folder."""
        done = 0

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            progress(done, self.num_bytes)

        progress(0, self.num_bytes)
        for name, items in self.files.items():
            write_shard(folder / name, items, self.metadata.get(name, {}), advance)
        if self.index is not None:
            files = {item.spec.name: item.file for item in self.items}
            content = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(files.items()))}
            (folder / self.index).write_text(json.dumps(content, indent=2) + "\n")
        for name, value in self.json_files.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n")
        for path in self.copies:
            shutil.copyfile(path, folder / path.name)


def plan_rewrite(
    source: Shards,
    items: Iterable[Item],
    dropped: Mapping[str, str],
    json_files: Mapping[str, Mapping[str, Any]],
    warnings: Sequence[str] = (),
    checked: str = "",
) -> Rewrite:
    """A rewrite of `source`: its files by name, with the new quantization in their headers, and what lies beside."""
    made = tuple(sorted(items, key=lambda item: item.spec.name))
    quantization = json_files[CONFIG]["quantization_config"]
    stated = {"quantization_config": json.dumps(quantization), "_quantization_metadata": _layers(made, quantization)}
    indexes = [path.name for path in source.directory.glob(f"*{INDEX_SUFFIX}")]
    return Rewrite(
        items=made,
        dropped=dropped,
        json_files=json_files,
        metadata={file: {"format": "pt", **old, **stated} for file, old in source.metadata().items()},
        copies=tuple(beside(source.directory, json_files)),
        index=indexes[0] if indexes else None,
        warnings=warnings,
        checked=checked,
    )


def _layers(items: Sequence[Item], quantization: Mapping[str, Any]) -> str:
    """Format by quantized layer, as ComfyUI and nvidia-modelopt write it into headers."""
    algorithm = str(quantization["quant_algo"]).lower()
    scaled = [item.spec.name.removesuffix(".weight_scale") for item in items if item.spec.name.endswith("weight_scale")]
    return json.dumps({"format_version": "1.0", "layers": {layer: {"format": algorithm} for layer in scaled}})


def beside(directory: Path, made: Iterable[str]) -> Iterable[Path]:
    """Files next to the weights, such as a tokenizer, but for those whose names are in `made`."""
    return (
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.endswith(NOT_COPIED) and path.name not in (REPORT, *made)
    )


def write_shard(path: Path, items: Sequence[Item], metadata: Mapping[str, str], advance: Callable[[int], None]) -> None:
    """Write one safetensors file, a tensor at a time; `advance` is told the bytes of each."""
    # Wide dtypes first, as safetensors itself has it: every tensor is then aligned to its dtype.
    ordered = sorted(items, key=lambda item: (-DTYPES[item.spec.dtype].itemsize, item.spec.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    stop = 0
    for item in ordered:
        start, stop = stop, stop + item.spec.num_bytes
        entry = {"dtype": item.spec.dtype, "shape": list(item.spec.shape), "data_offsets": [start, stop]}
        header[item.spec.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for item in ordered:
            tensor = item.read()
            got = (dtype_name(tensor.dtype), tuple(tensor.shape))
            assert got == (item.spec.dtype, item.spec.shape), f"{item.spec}: made {got}"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            advance(item.spec.num_bytes)


def check_bf16_source(base: Shards, name: str, shape: tuple[int, ...]) -> list[str]:
    """What keeps a tensor of `base` from standing in, in BF16, for one of this shape."""
    if name not in base:
        return [f"{name}: not in {base.directory}"]
    spec = base.spec(name)
    problems = []
    if spec.dtype not in PLAIN_DTYPES:
        problems.append(f"{name}: {spec.dtype} in {base.directory}; expected one of {', '.join(PLAIN_DTYPES)}")
    if spec.shape != shape:
        problems.append(f"{name}: {list(spec.shape)} in {base.directory}; expected {list(shape)}")
    return problems


def unmatched(modules: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """What is wrong with globs that match no module: a typo would quantize what must not be."""
    return [
        f"pattern {pattern!r}: matches none of {len(modules)} modules, such as {min(modules, default='none')!r}"
        for pattern in patterns
        if not any(map(Excludes(patterns=(pattern,)).matches, modules))
    ]
