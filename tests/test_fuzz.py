"""Broken input is refused by name: nothing crashes, nothing large is allocated, no served byte changes."""

from __future__ import annotations

import ast
import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import Target, mutated, targets
from tests.rig import LAYOUT_PAIRS, Rig
from tests.test_architecture import FOLDERS, written

NAMES = ("chunks", "manifests", "deltas", "configs", "headers")
FEW, MANY, MANY_S = 150, 10_000, 90.0


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """Ranks that hold a version and have a push open; at the end they must hold it still."""
    found = Rig(LAYOUT_PAIRS[2])
    found.push_all(seed=1)
    addresses = found.addresses()
    found.begin(range(len(found.specs)))
    yield found
    assert found.wrong() == []
    found.abort()
    assert found.wrong() == [] and found.addresses() == addresses


@pytest.fixture(scope="module")
def by_name(rig: Rig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return {target.name: target for target in targets(tmp_path_factory.mktemp("fuzz"), rig)}


@pytest.mark.parametrize("name", NAMES)
def test_valid_input_is_taken(by_name: dict[str, Target], name: str) -> None:
    for seed in by_name[name].seeds:
        by_name[name].feed(seed)


@pytest.mark.parametrize("name", NAMES)
def test_broken_input_is_refused_by_name(by_name: dict[str, Target], name: str) -> None:
    taken = by_name[name].run(range(FEW))
    assert 0 < taken < FEW  # some broken inputs are still valid, and some are not


def test_a_crash_and_an_allocation_are_found(by_name: dict[str, Target]) -> None:
    crash = replace(by_name["chunks"], feed=lambda data: data[1000])
    with pytest.raises(AssertionError, match=r"input 0 of chunks.*IndexError"):
        crash.run(range(3))
    greedy = replace(by_name["chunks"], feed=lambda data: bytes(64 << 20))
    with pytest.raises(AssertionError, match="input 0 of chunks: 67"):
        greedy.run(range(3))


@pytest.mark.parametrize("name", NAMES)
def test_what_hypothesis_finds_is_refused_by_name(by_name: dict[str, Target], name: str) -> None:
    target = by_name[name]

    @settings(max_examples=40, deadline=None, database=None)
    @given(st.randoms(use_true_random=False), st.binary(max_size=64))
    def feed(rng: random.Random, tail: bytes) -> None:
        with contextlib.suppress(*target.declared):
            target.feed(mutated(rng, target.seeds) + tail)

    feed()


@pytest.mark.slow
def test_fifty_thousand_broken_inputs(by_name: dict[str, Target]) -> None:
    start_s = time.monotonic()
    for name in NAMES:
        by_name[name].run(range(FEW, FEW + MANY))
    assert time.monotonic() - start_s < 4 * MANY_S  # about 90 s on quiet cores


# ---------------------------------------------------------------- no pickle


def test_nothing_of_ours_pickles() -> None:
    """torch.load with weights only, no numpy.load, no module that runs what it reads. Ray and torch.distributed pickle
    between processes of their own: see docs/security.md."""
    problems = []
    for path in written(*FOLDERS):
        for node in ast.walk(ast.parse(path.read_text())):
            problems += [f"{path.name}:{node.lineno} {each}" for each in _dangers(node, path)]  # type: ignore[attr-defined]
    assert problems == []


def _dangers(node: ast.AST, path: Path) -> Iterator[str]:
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    if isinstance(node, ast.Import):
        # quant.scales catches what torch's own safe loader raises.
        allowed = {"pickle"} if path.name == "scales.py" else set()
        yield from (each.name for each in node.names if each.name.split(".")[0] in banned - allowed)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in banned:
        yield str(node.module)
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
        told = ("weights_only", "allow_pickle")
        keywords = {each.arg: ast.unparse(each.value) for each in node.keywords if each.arg in told}
        if called == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if called in ("np.load", "numpy.load", "pickle.load", "pickle.loads", "eval", "exec", "yaml.load"):
            yield called
        if keywords.get("allow_pickle", "False") != "False":
            yield "allow_pickle"


@pytest.mark.parametrize(
    "code", ["import pickle", "from dill import x", "torch.load(p)", "np.load(p)", "f(allow_pickle=True)", "eval(x)"]
)
def test_a_pickle_would_be_found(code: str) -> None:
    found = [each for node in ast.walk(ast.parse(code)) for each in _dangers(node, Path("x.py"))]
    assert found
