"""The examples of docs/examples run as people run them, against a service of tiny actors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local import LocalService, local_service
from tests.test_cli import byte_tokenizer
from tests.tiny import save, tiny_llama

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TOKENIZER = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!", "pad_token": "\\"", "bos_token": "#"}'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(TOKENIZER)
    return folder


@pytest.fixture
def service(place: Path, tmp_path: Path) -> Iterator[LocalService]:
    with local_service(place, tmp_path) as running:
        yield running


@pytest.mark.parametrize(
    ("name", "launcher"),
    [("fsdp2_policy_gradient.py", TORCHRUN), ("ray_trainer.py", ()), ("trl_grpo.py", ())],
)
def test_an_example_learns_and_pushes_twice(
    name: str, launcher: tuple[str, ...], place: Path, service: LocalService
) -> None:
    before = service.bytes()
    options = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name), str(place), service.address],
        env={**os.environ, **options, **offline},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(steps) == 2 and "full" in steps[0] and "delta" in steps[1], done.stdout
    assert service.shell.index.last_version() == 3
    assert service.bytes() != before


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_page(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 100
