"""A first quantized checkpoint with real activation scales: nvidia-modelopt calibrates and exports, on CPU or GPU.

    calls = read_calls(Path("inputs.safetensors"), model_dir)        # or prompts, of a causal LM
    model = quantized(load_model(model_dir), "nvfp4", calls, exclude=("*.norm_out.*",), progress=print)
    export(model, model_dir, folder)

Recorded inputs of a diffusers transformer are a safetensors file of tensors "<call>.<argument>", for instance
"0.hidden_states" and "0.timestep": one call of forward each. A causal LM takes prompts, or "input_ids" [n, length].
"""

from __future__ import annotations

import copy
import io
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import read_object
from .excludes import Excludes
from .families import FAMILIES, family_of, is_served
from .output import ToolError, require
from .rewriting import CONFIG, Shards, beside, unmatched

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # calls done, calls in all
Call = Mapping[str, Any]  # arguments of one forward

# Row of FORMATS -> the recipe of modelopt.torch.quantization
RECIPES: Mapping[str, str] = {"nvfp4": "NVFP4_DEFAULT_CFG", "fp8": "FP8_DEFAULT_CFG"}
CLASS_NAME = "_class_name"  # what diffusers writes into a config, and transformers does not
AS_LISTS = ("img_shapes", "txt_seq_lens")  # arguments of Qwen-Image that are lists of numbers, not tensors
INSTALL = "pip install 'transfuse[calibrate,diffusion]'"


# ---------------------------------------------------------------- data


def read_calls(path: Path, model_dir: Path, *, max_calls: int = 512, max_length: int = 2048) -> list[Call]:
    """The calls in a data file: recorded inputs (.safetensors), or a prompt a line (.txt, .jsonl with "text")."""
    if not path.is_file():
        raise ToolError(f"{path}: no such file; expected .safetensors, .txt or .jsonl")
    if path.suffix not in READERS:
        raise ToolError(f"{path}: {path.suffix or 'no suffix'}; expected one of {', '.join(READERS)}")
    return READERS[path.suffix](path, model_dir, max_length)[:max_calls]


def prompt_calls(prompts: Sequence[str], model_dir: Path, max_length: int = 2048) -> list[Call]:
    """A call a prompt, by the tokenizer in the model's folder."""
    if _is_diffusers(model_dir):
        raise ToolError(f"{model_dir}: a diffusion transformer takes no prompts; record its inputs into .safetensors")
    try:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    except (ImportError, OSError, ValueError) as error:
        raise ToolError(f"{model_dir}: its tokenizer cannot be loaded: {error}") from error
    rows = [tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"] for prompt in prompts]
    return [{"input_ids": torch.tensor([row])} for row in rows if row]


def _recorded(path: Path, model_dir: Path, max_length: int) -> list[Call]:
    tensors = Shards.of_file(path)
    if "input_ids" in tensors:
        return [{"input_ids": row[None, :max_length]} for row in tensors.tensor("input_ids")]
    calls: dict[str, dict[str, Any]] = {}
    for name in tensors.names():
        call, _, argument = name.partition(".")
        if not argument:
            raise ToolError(f"{path}: tensor {name!r}; expected '<call>.<argument>', or 'input_ids' alone")
        value = tensors.tensor(name)
        calls.setdefault(call, {})[argument] = value.tolist() if argument in AS_LISTS else value
    return [calls[call] for call in sorted(calls, key=lambda each: (len(each), each))]


def _lines(path: Path, model_dir: Path, max_length: int) -> list[Call]:
    return prompt_calls([line for line in path.read_text().splitlines() if line.strip()], model_dir, max_length)


def _json_lines(path: Path, model_dir: Path, max_length: int) -> list[Call]:
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    try:
        return prompt_calls([json.loads(line)["text"] for line in lines], model_dir, max_length)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ToolError(f"{path}: expected a JSON object with 'text' in each line: {error!r}") from error


READERS: Mapping[str, Callable[[Path, Path, int], list[Call]]] = {
    ".safetensors": _recorded,
    ".txt": _lines,
    ".jsonl": _json_lines,
}


# ---------------------------------------------------------------- model


def load_model(model_dir: Path, device: str = "cpu") -> nn.Module:
    """The causal LM or diffusers transformer of a folder, in BF16. With "meta" it has no weights."""
    make = _diffusers_model if _is_diffusers(model_dir) else _causal_lm
    try:
        return make(model_dir, device).eval()
    except ImportError as error:
        raise ToolError(f"{model_dir}: loading it needs more packages: {error}; {INSTALL}") from error
    except (OSError, ValueError) as error:
        raise ToolError(f"{model_dir}: cannot be loaded: {error}") from error


def _is_diffusers(model_dir: Path) -> bool:
    return CLASS_NAME in read_object(model_dir / CONFIG)


def _diffusers_model(model_dir: Path, device: str) -> nn.Module:
    import diffusers

    name = read_object(model_dir / CONFIG)[CLASS_NAME]
    if not is_served(name):
        raise ToolError(f"{model_dir}: {name}; known: {', '.join(row.class_name for row in FAMILIES.values())}")
    kind: Any = getattr(diffusers, name)
    if device != "meta":
        loaded: nn.Module = kind.from_pretrained(model_dir, torch_dtype=torch.bfloat16)
        return loaded.to(device)
    with torch.device("meta"):
        empty: nn.Module = kind.from_config(kind.load_config(model_dir))
    return empty


def _causal_lm(model_dir: Path, device: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind: Any = AutoModelForCausalLM
    if device != "meta":
        model: Any = kind.from_pretrained(model_dir, dtype=torch.bfloat16).to(device)
        # Its export fails without: "'NoneType' object is not iterable".
        model.config.architectures = model.config.architectures or [type(model).__name__]
        loaded: nn.Module = model
        return loaded
    with torch.device("meta"):
        empty: nn.Module = kind.from_config(AutoConfig.from_pretrained(model_dir), dtype=torch.bfloat16)
    return empty


def kept_modules(model: nn.Module, exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """Modules that stay in high precision: by `exclude` (globs on full names), and by the family's own filter.

    Raises ToolError that lists the globs of `exclude` that match none.
    """
    patterns = [*exclude]
    if is_served(type(model).__name__):
        family = family_of(type(model).__name__)
        patterns += family.kept(len(model.get_submodule(family.blocks)))  # type: ignore[arg-type]  # a ModuleList
    matrices = [name for name, module in model.named_modules() if _has_matrix(module)]
    require(type(model).__name__, unmatched(matrices, exclude))
    excludes = Excludes(patterns=tuple(patterns))
    return tuple(filter(excludes.matches, matrices))


def linears(model: nn.Module) -> tuple[str, ...]:
    """The modules that a recipe would quantize, before its own filter."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim > 1


# ---------------------------------------------------------------- calibration


def require_recipe(format_name: str, calls: Sequence[Call]) -> None:
    """Refuse what no calibration can start with."""
    if format_name not in RECIPES:
        raise ToolError(f"format {format_name!r}: no recipe; known: {', '.join(RECIPES)}")
    if not calls:
        raise ToolError("no calls to calibrate with; give data or prompts")


def require_device(device: str) -> None:
    """Refuse a device that torch cannot compute on here."""
    try:
        torch.zeros(1, device=device).add_(1)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).strip().partition("\n")[0]
        raise ToolError(f"device {device!r}: {reason}; expected cpu, or cuda:N where torch sees a GPU") from error


def quantized(
    model: nn.Module, format_name: str, calls: Sequence[Call], exclude: Sequence[str], progress: Progress
) -> nn.Module:
    """Calibrate by running every call, and return the model with its quantizers; raises ToolError."""
    require_recipe(format_name, calls)
    try:
        with redirect_stdout(io.StringIO()):
            mtq = import_module("modelopt.torch.quantization")
    except ImportError as error:
        raise ToolError(f"calibration needs nvidia-modelopt: {error}; {INSTALL}") from error
    recipe = copy.deepcopy(getattr(mtq, RECIPES[format_name]))
    kept = kept_modules(model, exclude)
    recipe["quant_cfg"] += [{"quantizer_name": f"{name}.*quantizer", "enable": False} for name in kept]
    with redirect_stdout(io.StringIO()) as said:
        result: nn.Module = mtq.quantize(model, recipe, lambda each: _run(each, calls, progress))
    log.debug("%s", said.getvalue())
    return result


def _run(model: nn.Module, calls: Sequence[Call], progress: Progress) -> None:
    device = next(model.parameters()).device
    progress(0, len(calls))
    for done, call in enumerate(calls, 1):
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}
        try:
            with torch.no_grad():
                model(**moved)
        except (TypeError, ValueError, RuntimeError) as error:
            shapes = {name: list(value.shape) for name, value in call.items() if isinstance(value, Tensor)}
            raise ToolError(f"call {done} of {len(calls)}: {type(model).__name__} refuses {shapes}: {error}") from error
        progress(done, len(calls))


def export(model: nn.Module, model_dir: Path, folder: Path) -> None:
    """Write the checkpoint by modelopt's own export, and what else lies beside the model's weights, as a tokenizer."""
    with redirect_stdout(io.StringIO()) as said:
        import_module("modelopt.torch.export").export_hf_checkpoint(model, export_dir=folder)
    log.debug("%s", said.getvalue())
    for path in beside(model_dir, [each.name for each in folder.iterdir()]):
        shutil.copyfile(path, folder / path.name)


def exported(folder: Path) -> dict[str, Any]:
    """The report of an export: every tensor, every activation scale, and the modules that never saw an input."""
    shards = Shards(folder)
    scaled = {name for name in shards.modules() if f"{name}.weight_scale" in shards}
    inputs = {name: f"{name}.input_scale" for name in sorted(scaled)}
    values = {module: shards.tensor(name).item() for module, name in inputs.items() if name in shards}
    specs = [shards.spec(name) for name in shards.names()]
    tensors = [
        {
            "name": spec.name,
            "did": _did(spec.name, scaled),
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "bytes": spec.num_bytes,
            "file": shards.file_of[spec.name],
        }
        for spec in specs
    ]
    missing = sorted(scaled - values.keys())
    return {
        "quantized_modules": len(scaled),
        "bytes": sum(spec.num_bytes for spec in specs),
        "warnings": [f"{name}: no call reached it: it has no input_scale" for name in missing],
        "input_scales": values,
        "tensors": tensors,
    }


def _did(name: str, scaled: set[str]) -> str:
    module, _, leaf = name.rpartition(".")
    if module not in scaled or leaf == "bias":
        return "kept"
    return "encoded" if leaf == "weight" else "scale"
