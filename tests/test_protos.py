"""The generated code is what protoc makes of the proto now."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos import generate


def test_generated_code_is_current(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    for name in generate.GENERATED:
        committed = (generate.HERE / name).read_bytes()
        assert committed == (tmp_path / "protos" / name).read_bytes(), f"protos/{name} is stale; run 'make protos'"


def test_protoc_errors_are_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="protoc exited with"):
        generate.generate(tmp_path / "missing")
