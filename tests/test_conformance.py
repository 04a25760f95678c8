"""The conformance command: all fixtures accounted for, a changed byte named, other directories read alike."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from launch.conformance import CASES, Report, check
from launch.fixtures import first_difference
from tests import goldens


@pytest.fixture(scope="module")
def report() -> Report:
    return check([goldens.DIRECTORY])


def test_every_shipped_fixture_is_equal_or_accounted_for(report: Report) -> None:
    assert report.differences == []
    assert len(report.fixtures) == 75 == len(goldens.fixtures())
    seen = {each.fixture for each in (*report.outcomes, *report.uncovered)}
    assert seen == set(report.fixtures)
    assert all(each.detail for each in report.uncovered)
    assert not [each for each in report.uncovered if each.detail.startswith("no case")]


def test_no_tensor_is_lost_between_the_lists(report: Report) -> None:
    listed = {(each.fixture, each.tensor) for each in (*report.outcomes, *report.uncovered) if each.tensor}
    outputs = {
        (name, tensor)
        for name, entry in goldens.fixtures().items()
        for tensor in entry["tensors"]
        if not tensor.startswith(("in.", "all_bytes"))
    }
    assert listed == outputs


def test_every_case_reproduces_something(report: Report) -> None:
    reported = {(row["format or layout"], row["oracle"]) for row in report.rows()}
    assert {(case.row, case.oracle) for case in CASES} == reported
    assert all(row["cases"] == row["equal"] > 0 for row in report.rows())


def test_what_stands_apart_is_only_what_cannot_be_equal(report: Report) -> None:
    apart = [each for each in report.outcomes if each.status in ("refused", "special")]
    for each in apart:
        inputs = goldens.load(each.fixture).get("in.weight")
        if each.status == "refused":
            assert inputs is not None and not inputs.isfinite().all()
        elif each.detail.startswith("all zeros"):
            assert inputs is not None and not inputs.any()
        elif each.detail.endswith("is not stored"):
            assert "same_as" not in goldens.fixtures()[each.fixture]["tensors"][each.detail.split()[0]]
        else:
            assert each.row == "whole export"


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def copied(tmp_path: Path, name: str, change: Change) -> Path:
    """One fixture alone in a directory, under another file name, changed."""
    entry = json.loads(json.dumps(goldens.fixtures()[name]))
    tensors = load_file(goldens.DIRECTORY / f"{name}.safetensors")
    change(entry, tensors)
    entry["file"] = "renamed.safetensors"
    for key, tensor in tensors.items():
        entry["tensors"][key]["sha256"] = hashlib.sha256(goldens.bytes_of(tensor).numpy().tobytes()).hexdigest()
    save_file(tensors, tmp_path / entry["file"])
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 1, "fixtures": [entry]}))
    return tmp_path


def run(directory: Path, *options: str) -> int:
    try:
        main(["conformance", str(directory), *options])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_changed_byte_is_named_by_its_coordinates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def flip(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["modelopt.weight"][17, 5] ^= 0x21

    directory = copied(tmp_path, "nvfp4_dense_b96x64", flip)
    assert run(directory, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    (difference,) = [each for each in told["differences"] if each["row"] == "nvfp4"]
    assert not told["ok"] and difference["detail"].startswith("modelopt.weight[17, 5] byte 0: expected 0x")
    assert difference["detail"].endswith("1 of 3072 bytes differ")
    assert run(directory) == 1
    assert "DIFFERS  renamed: nvfp4: modelopt.weight[17, 5]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mxfp8_d33x160", "int_c66x320", "dit_nvfp4_n40k80", "fp8_c200x192"])
def test_names_of_files_mean_nothing(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(copied(tmp_path, name, lambda entry, tensors: None), "--list") == 0
    told = capsys.readouterr().out
    assert told.splitlines()[1].startswith("renamed") and "tensors equal" in told


def test_a_difference_that_is_only_hashed_is_found_too(tmp_path: Path) -> None:
    def other_hash(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        assert "modelopt.dequant_bf16" not in tensors
        entry["tensors"]["modelopt.dequant_bf16"]["sha256"] = "0" * 64

    (difference,) = check([copied(tmp_path, "nvfp4_dense_b96x64", other_hash)]).differences
    assert "modelopt.dequant_bf16: sha256 differs" in difference.detail


def test_shapes_and_dtypes_are_compared_before_bytes(tmp_path: Path) -> None:
    def reshape(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        entry["tensors"]["modelopt.weight"]["shape"] = [64, 48]

    (difference,) = check([copied(tmp_path, "nvfp4_dense_b96x64", reshape)]).differences
    assert difference.detail == "modelopt.weight: got uint8 [96, 32], expected uint8 [64, 48]"


def test_the_sign_of_a_nan_is_no_difference_and_that_of_a_zero_is() -> None:
    codes = torch.tensor([[0x7F, 0x00], [0x01, 0xFF]], dtype=torch.uint8)
    flipped = codes ^ torch.tensor([[0x80, 0], [0, 0x80]], dtype=torch.uint8)
    as_fp8 = (codes.view(torch.float8_e4m3fn), flipped.view(torch.float8_e4m3fn))
    assert first_difference("a", *as_fp8) is None
    negative_zero = flipped ^ torch.tensor([[0, 0x80], [0, 0]], dtype=torch.uint8)
    found = first_difference("a", as_fp8[0], negative_zero.view(torch.float8_e4m3fn))
    assert found == "a[0, 1] byte 0: expected 0x00, got 0x80; 1 of 4 bytes differ"


def test_what_is_no_directory_of_fixtures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 4 and "no manifest.json" in capsys.readouterr().err
    shutil.copy(goldens.DIRECTORY / "manifest.json", tmp_path)
    assert run(tmp_path) == 4 and "not there" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text('{"fixtures": []}')
    assert run(tmp_path) == 4 and "nothing was checked" in capsys.readouterr().err
