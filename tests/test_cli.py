"""The command line: help, exit codes, JSON, against a real service on loopback."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from launch import cli, exits
from tests.local import LocalService, local_service
from tests.tiny import save, tiny_llama
from weight_update.errors import ERRORS
from weight_update.transport import ControlClient
from weight_update.values import from_manifest_proto

COMMANDS = sorted(name for name, (_, attribute) in cli.COMMANDS.items() if attribute != "app")


class Shell:
    """Runs one command as the console script does: exit code, stdout, stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str], address: str) -> None:
        self._capsys = capsys
        self.address = address

    def __call__(self, *args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(args)
        captured = self._capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    def json(self, *args: str) -> Any:
        """What a command of the running service prints with --json; it must succeed."""
        code, out, err = self(*args, "--to", self.address, "--json")
        assert code == 0, err
        return json.loads(out)

    def failing(self, *args: str) -> tuple[int, str]:
        """Exit code and error of a command of the running service that prints nothing on stdout."""
        code, out, err = self(*args, "--to", self.address)
        assert out == ""
        return code, err


def eventually(shell: Shell, name: str, wanted: Any, within_s: float = 5.0) -> list[Any]:
    """A field of every replica's status, once all have the wanted value: ranks are asked every second."""
    stop_s = time.monotonic() + within_s
    while True:
        found = [replica[name] for replica in shell.json("status")["replicas"]]
        if set(found) == {wanted} or time.monotonic() > stop_s:
            return found
        time.sleep(0.1)


def byte_tokenizer() -> Tokenizer:
    """One token a byte: the vocabulary of 256 that the tiny models have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    model_dir = save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))
    byte_tokenizer().save(str(model_dir / "tokenizer.json"))
    with local_service(model_dir, tmp_path_factory.mktemp("state"), layouts=("trtllm", "cutlass")) as running:
        yield running


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys, "127.0.0.1:1")


@pytest.fixture
def live(capsys: pytest.CaptureFixture[str], service: LocalService) -> Shell:
    return Shell(capsys, service.address)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Other weights of the same model."""
    return str(save(tiny_llama(seed=1), tmp_path_factory.mktemp("trained")))


# ---------------------------------------------------------------- without a service


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_speaks_json(shell: Shell, command: str) -> None:
    code, out, _ = shell(command, "--help")
    assert code == 0
    assert "--json" in out
    assert len(out.split("Options:")[0].splitlines()) > 2


def test_help_lists_commands_and_exit_codes(shell: Shell) -> None:
    code, out, _ = shell("--help")
    assert code == 0
    assert all(f"\n  {command} " in out for command in COMMANDS)
    assert all(f"{row.code}  {row.means}" in out for row in exits.EXITS)


def test_every_error_has_one_exit_code() -> None:
    assert sorted(exits.EXIT_OF) == sorted(ERRORS)
    assert len({row.code for row in exits.EXITS}) == len(exits.EXITS)


@pytest.mark.parametrize("args", [("nonsense",), ("status", "--nonsense"), ("status", "--to", "nohost"), ("push",)])
def test_wrong_usage_exits_with_2(shell: Shell, args: tuple[str, ...]) -> None:
    code, out, err = shell(*args)
    assert (code, out) == (2, "")
    assert "Error:" in err


@pytest.mark.parametrize("command", ["status", "versions", "verify", "pause", "resume", "describe", "probe"])
def test_no_service_exits_with_3_and_says_what_to_do(shell: Shell, command: str) -> None:
    code, err = shell.failing(*([command, "hello"] if command == "probe" else [command]))
    assert code == 3
    assert "127.0.0.1:1: no answer" in err and "transfuse serve --listen 127.0.0.1:1" in err


def test_an_error_is_json_too_when_asked_for(shell: Shell) -> None:
    code, err = shell.failing("status", "--json")
    told = json.loads(err)
    assert (code, told["error"], told["exit_code"]) == (3, "transfer", 3)


def test_serve_refuses_names_that_it_does_not_know_at_once(shell: Shell) -> None:
    code, out, err = shell("serve", "--model", "smollm2", "--format", "fp3", "--layout", "trtllm,nonsense")
    assert (code, out) == (4, "")
    assert "format 'fp3'" in err and "layout 'nonsense'" in err and "nvfp4" in err and "cutlass_moe" in err


# ---------------------------------------------------------------- with a service


def test_push_makes_the_next_version_on_all_replicas(live: Shell, service: LocalService, trained: str) -> None:
    before = live.json("status")
    report = live.json("push", trained)
    after = live.json("status")
    assert report["version"] == after["version"] == before["version"] + 1
    assert report["digest_verified"] is True
    assert report["digest"] == after["digest"] != before["digest"]
    assert eventually(live, "version", report["version"]) == [report["version"]] * 2
    assert live.json("versions")[-1]["digest"] == report["digest"]


def test_a_plan_says_what_the_push_then_sends(live: Shell, trained: str, tmp_path: Path) -> None:
    before = live.json("status")
    plan = live.json("plan", trained, "--picture", str(tmp_path / "who.png"))
    assert live.json("status")["version"] == before["version"]
    report = live.json("push", trained)
    (predicted,) = plan["predictions"]
    assert predicted["wire_bytes"] == sum(map(sum, plan["links"]))
    assert 1.0 <= report["wire_bytes"] / predicted["wire_bytes"] < 1.005  # the wire counts frames, too
    assert len(plan["links"]) == 1 and len(plan["links"][0]) == 2
    assert predicted["phases"].keys() == report["predicted"].keys() < report["phases"].keys()
    assert (tmp_path / "who.png").stat().st_size > 10_000
    code, text, _ = live("plan", trained, "--full", "--to", live.address)
    assert code == 0 and "model.layers.1.mlp.down_proj.weight_scale_2" in text and "bottleneck" in text


def test_a_plan_refuses_what_a_push_would(live: Shell, tmp_path: Path) -> None:
    other = save(tiny_llama(seed=2, num_layers=1), tmp_path / "other")
    code, err = live.failing("plan", str(other))
    assert code == 4 and "model.layers.1.mlp.down_proj.weight: missing" in err
    code, err = live.failing("plan", str(tmp_path / "nowhere"))
    assert code == 4 and str(tmp_path / "nowhere") in err
    code, err = live.failing("plan")
    assert code == 4 and "name a checkpoint" in err


def test_a_scope_carries_the_rest_over(live: Shell, trained: str) -> None:
    report = live.json("push", trained, "--scope", "*layers.0.mlp.down_proj*")
    parameters = live.json("describe")["manifest"]["parameters"]
    assert report["carried_over"] == len(parameters) - 1


def test_the_same_push_id_is_one_version(live: Shell, trained: str) -> None:
    first = live.json("push", trained, "--push-id", "nightly")
    again = live.json("push", trained, "--push-id", "nightly")
    assert again["version"] == first["version"] == live.json("status")["version"]


def test_a_checkpoint_that_does_not_fit_is_refused_with_4(live: Shell, service: LocalService, tmp_path: Path) -> None:
    other = save(tiny_llama(seed=2, num_layers=1), tmp_path / "other")
    before = service.bytes()
    code, err = live.failing("push", str(other))
    assert code == 4
    assert "model.layers.1.mlp.down_proj.weight" in err
    assert service.bytes() == before


def test_a_checkpoint_that_is_not_there_is_refused_with_4(live: Shell, tmp_path: Path) -> None:
    code, err = live.failing("push", str(tmp_path / "nowhere"))
    assert code == 4
    assert str(tmp_path / "nowhere") in err


def test_a_base_version_that_is_not_current_exits_with_6(live: Shell, trained: str) -> None:
    code, _ = live.failing("push", trained, "--base-version", "999")
    assert code == 6


def test_a_push_while_another_is_open_exits_with_5(live: Shell, service: LocalService, trained: str) -> None:
    control = ControlClient(service.address)
    manifest = from_manifest_proto(control.describe().manifest)
    begun = control.begin(
        push_id="other",
        base_version=0,
        fingerprint=manifest.fingerprint,
        tensors=manifest.tensors,
        pushed_by="another trainer",
        logical_bytes=0,
        lease_s=60.0,
    )
    code, err = live.failing("push", trained)
    assert code == 5
    assert "another trainer" in err
    assert "another trainer" in live("status", "--to", service.address)[1]
    control.abort(begun.transaction, "the test is over")
    control.close()


def test_pause_and_resume_show_in_status(live: Shell) -> None:
    for command, state in (("pause", "paused"), ("resume", "serving")):
        live.json(command)
        assert eventually(live, "state", state) == [state] * 2


def test_probe_gives_the_version_of_every_token(live: Shell, service: LocalService) -> None:
    code, out, err = live("probe", "hello", "--max-new-tokens", "8", "--to", service.address, "--json")
    assert code == 0, err
    tokens = [json.loads(line) for line in out.splitlines()]
    version = live.json("status")["version"]
    assert 0 < len(tokens) <= 8
    assert {token["version"] for token in tokens} == {version}
    assert all(token["logprob"] <= 0.0 for token in tokens)
    _, text, _ = live("probe", "hello", "--max-new-tokens", "8", "--to", service.address)
    assert text.startswith(f"[v{version}]")
    assert text.endswith(f" tokens of version {version}\n")


def test_verify_exits_with_1_and_names_what_is_wrong(live: Shell, service: LocalService) -> None:
    assert live.json("verify")["ok"] is True
    name = "model.layers.1.self_attn.o_proj.weight"
    storage = dict(service.models[1].named_parameters())[name]
    storage.view(-1)[5] ^= 1
    code, out, _ = live("verify", "--to", service.address)
    storage.view(-1)[5] ^= 1
    assert code == 1
    assert name in out and "MISMATCH" in out
    assert live.json("verify")["ok"] is True


def test_people_get_tables(live: Shell, service: LocalService) -> None:
    for command in ("status", "versions", "describe"):
        code, out, _ = live(command, "--to", service.address)
        assert code == 0
        assert len(out.splitlines()) > 1
