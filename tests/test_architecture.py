"""What the shape of the code promises: directions, what loads what, and sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import MODULES

ROOT = Path(__file__).parents[1]
FOLDERS = ("launch", "protos", "quant", "service", "sharding", "weight_update")
# Loaded only where numba is installed, and where a CUDA device is used.
ON_DEVICE = {"quant.cuda_loops", "quant.cuda_diff_loops", "quant.activation_loops", "weight_update.cuda_loops"}
COMPILED = {"quant.loops", "weight_update.loops"} | ON_DEVICE
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 50


def written(*folders: str) -> list[Path]:
    """Python files that people wrote."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "_pb2" not in path.name]


def modules(*folders: str) -> list[str]:
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in written(*folders) if path.stem[0] != "_"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)


def import_without(missing: tuple[str, ...], names: list[str]) -> str:
    """Import modules in a fresh process where some packages are not installed; returns what went wrong."""
    code = f"""
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"no module named {{name}}")

sys.meta_path.insert(0, Missing())
for name in {names!r}:
    importlib.import_module(name)
"""
    return run("-W", "ignore", "-c", code).stderr


def test_imports_follow_the_folders() -> None:
    done = run("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_job_needs_neither_ray_nor_numba_nor_transformers() -> None:
    names = [name for name in modules("quant", "sharding", "weight_update") if name not in COMPILED]
    assert import_without(("ray", "numba", "transformers", "triton", "gguf"), names) == ""


def test_everything_but_the_door_needs_no_grpc() -> None:
    """weight_update.client and what it sends through use transport, the one module that speaks gRPC."""
    through_transport = {
        f"weight_update.{name}"
        for name in ("channels", "transport", "stream", "fetch", "client", "attempt", "sending", "door")
    }
    apart = through_transport | ON_DEVICE
    names = [name for name in modules("quant", "sharding", "weight_update") if name not in apart]
    assert import_without(("ray", "grpc"), names) == ""


def test_the_command_starts_without_loading_torch_or_ray() -> None:
    heavy = ("torch", "ray", "grpc", "numpy", "transformers", "matplotlib")
    assert import_without(heavy, ["launch.cli", *(f"launch.{module}" for module in MODULES)]) == ""


def test_every_benchmark_loads() -> None:
    """Nothing else imports them, and no test runs them."""
    assert import_without((), modules("tests/bench")) == ""


@pytest.mark.parametrize("path", written(*FOLDERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert text.isascii(), f"{path}: not ASCII"
    assert len(text.splitlines()) < MAX_FILE_LINES
    long = [f"{name}: {lines} lines" for name, lines in function_lines(text) if lines >= MAX_FUNCTION_LINES]
    assert not long


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_s_init_is_its_docstring(folder: str) -> None:
    body = ast.parse((ROOT / folder / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


def function_lines(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield node.name, node.end_lineno - node.lineno + 1
