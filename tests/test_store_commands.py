"""Commands around the version store, against a real service on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.local import LocalService, cold, local_service, wait_for
from tests.test_cli import Shell, byte_tokenizer
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def service(place: Path) -> Iterator[LocalService]:
    model_dir = save(tiny_llama(seed=0), place / "model")
    byte_tokenizer().save(str(model_dir / "tokenizer.json"))
    with local_service(model_dir, place / "state", store_dir=place / "store") as running:
        pusher = Pusher(running.address, pushed_by="a test")
        model = tiny_llama(seed=1)
        pusher.push(model, durable=True, step=4)
        with torch.no_grad():
            model.get_parameter("model.norm.weight")[3] += 1
        pusher.push(model, durable=True, step=5)
        pusher.close()
        yield running


@pytest.fixture
def shell(service: LocalService, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys, service.address)


def test_versions_shows_what_is_durable_and_what_can_be_reached(shell: Shell) -> None:
    wait_for(lambda: [row["reachable"] for row in shell.json("versions")] == [True, True, False])
    rows = shell.json("versions")
    assert [(row["version"], row["step"], row["durable"], row["state"]) for row in rows] == [
        (1, 0, True, "durable"),
        (2, 4, True, "durable"),
        (3, 5, True, "durable"),
    ]
    code, out, _ = shell("versions", "--to", shell.address)
    assert code == 0
    head, *lines = [line.split() for line in out.splitlines()]
    assert {"version", "step", "state", "rollback", "digest", "by"} <= set(head)
    assert [line[:5] for line in lines] == [
        ["1", "0", "0", "durable", "yes"],
        ["2", "1", "4", "durable", "yes"],
        ["3", "2", "5", "durable", "no"],
    ]


def test_an_exported_version_is_loaded_as_a_checkpoint_bit_for_bit(
    shell: Shell, service: LocalService, place: Path, tmp_path: Path
) -> None:
    told = shell.json("export", "3", str(tmp_path / "three"))
    assert told["digest"] == shell.json("status")["digest"]
    assert cold(tmp_path / "three", "trtllm")[1].storage_bytes() == service.bytes()[0]
    code, out, _ = shell("export", "3", str(tmp_path / "again"), "--store", str(place / "store"))
    assert code == 0 and "digests as committed" in out
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("three", "again")]
    assert files[0] == files[1] and "tokenizer.json" in files[0]


def test_what_is_not_there_cannot_be_exported(shell: Shell, place: Path, tmp_path: Path) -> None:
    code, err = shell.failing("export", "9", str(tmp_path / "out"))
    assert code == 6 and "holds 1, 2, 3" in err
    (tmp_path / "taken").mkdir()
    code, err = shell.failing("export", "3", str(tmp_path / "taken"))
    assert code == 1 and "name a new folder" in err
    assert shell("export", "3", str(tmp_path / "out"), "--store", str(tmp_path / "nowhere"))[0] == 6
    assert not (tmp_path / "out").exists()


def test_rollback_brings_a_version_back_and_reset_is_for_lost_ones_only(
    shell: Shell, service: LocalService, tmp_path: Path
) -> None:
    told = shell.json("rollback", "2", "--yes")
    assert (told["version"], told["restores"]) == (4, 2)
    save(tiny_llama(seed=1), tmp_path)
    assert service.bytes()[0] == cold(tmp_path, "trtllm")[1].storage_bytes()
    code, out, err = shell("reset", "--to", "durable", "--service", shell.address, "--yes")
    assert (code, out) == (6, "") and "nothing is lost" in err
    assert shell("reset", "--to", "yesterday", "--service", shell.address)[0] == 2


def test_status_names_the_store_and_push_can_wait_for_it(shell: Shell, place: Path, tmp_path: Path) -> None:
    version = shell.json("push", str(save(tiny_llama(seed=2), tmp_path)), "--durable")["version"]
    code, out, _ = shell("status", "--to", shell.address)
    assert code == 0 and f"store {place / 'store'}: version {version} is durable" in out
    assert json.loads((place / "store" / f"v{version:08d}" / "transfuse.json").read_text())["version"] == version
