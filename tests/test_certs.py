"""`transfuse certs`: what is made, what is never touched, and that two ends trust each other by it."""

from __future__ import annotations

import json
import ssl
from pathlib import Path

import pytest

from launch import authority, cli
from weight_update.errors import PlanError


def handshake(server: Path, client: Path, name: str) -> None:
    """Mutual TLS through memory, by Python's own ssl; raises ssl.SSLError where an end refuses the other."""
    contexts = []
    for purpose, folder in ((ssl.Purpose.CLIENT_AUTH, server), (ssl.Purpose.SERVER_AUTH, client)):
        context = ssl.create_default_context(purpose, cafile=str(folder / "ca.pem"))
        context.load_cert_chain(folder / "node.pem", folder / "node.key")
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [contexts[0].wrap_bio(up, down, server_side=True), contexts[1].wrap_bio(down, up, server_hostname=name)]
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    for end in ends:
        assert end.getpeercert()


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_nodes_trust_each_other_by_every_name_they_have(tmp_path: Path) -> None:
    assert authority.create(tmp_path)
    authority.issue(tmp_path, ["gpu1=10.1.2.3,gpu1.local", "trainer"])
    for name in ("gpu1", "10.1.2.3", "gpu1.local", "localhost", "127.0.0.1"):
        handshake(tmp_path / "gpu1", tmp_path / "trainer", name)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(tmp_path / "gpu1", tmp_path / "trainer", "gpu2")


def test_another_authority_is_not_trusted(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        authority.create(tmp_path / name)
        authority.issue(tmp_path / name, ["node"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "ours" / "node", tmp_path / "theirs" / "node", "node")


def test_keys_are_private_and_a_second_time_changes_nothing(tmp_path: Path) -> None:
    authority.create(tmp_path)
    authority.issue(tmp_path, ["a", "b"])
    before = files(tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.key")} == {0o600}
    assert not authority.create(tmp_path)
    authority.issue(tmp_path, ["a", "b"])
    assert files(tmp_path) == before
    authority.issue(tmp_path, ["b"], renew=True)
    assert {name for name, data in files(tmp_path).items() if data != before[name]} == {"b/node.pem", "b/node.key"}
    handshake(tmp_path / "b", tmp_path / "a", "b")


def test_names_are_added_and_what_expired_or_is_another_s_is_replaced(tmp_path: Path) -> None:
    authority.create(tmp_path / "x")
    (first,) = authority.issue(tmp_path / "x", ["a=10.0.0.1"])
    (second,) = authority.issue(tmp_path / "x", ["a=10.0.0.2"])
    assert set(second.names) == {*first.names, "10.0.0.2"}
    (old,) = authority.issue(tmp_path / "x", ["a"], renew=True, days=0)
    assert old.days_left < 0
    (new,) = authority.issue(tmp_path / "x", ["a"])
    assert new.days_left == 364
    authority.create(tmp_path / "y")
    for path in (tmp_path / "x" / "a").iterdir():
        (tmp_path / "y" / "a").mkdir(exist_ok=True)
        (tmp_path / "y" / "a" / path.name).write_bytes(path.read_bytes())
    authority.issue(tmp_path / "y", ["a", "b"])
    handshake(tmp_path / "y" / "a", tmp_path / "y" / "b", "a")


@pytest.mark.parametrize("name", ["../b", "a/b", "", "-a", "a_b", "a b", "a=b/c", ".", "a" * 64])
def test_a_name_that_is_no_host_makes_no_file(tmp_path: Path, name: str) -> None:
    authority.create(tmp_path)
    before = files(tmp_path)
    with pytest.raises(PlanError, match="neither a host name nor an address"):
        authority.issue(tmp_path, ["good", name])
    assert files(tmp_path) == before


@pytest.mark.parametrize("left", ["ca.pem", "ca.key"])
def test_half_an_authority_is_not_made_whole(tmp_path: Path, left: str) -> None:
    authority.create(tmp_path)
    (tmp_path / ({"ca.pem", "ca.key"} - {left}).pop()).unlink()
    before = files(tmp_path)
    with pytest.raises(PlanError, match="put that back"):
        authority.create(tmp_path)
    with pytest.raises(PlanError):
        authority.issue(tmp_path, ["a"])
    assert files(tmp_path) == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(["certs", *args])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    at = str(tmp_path / "tls")
    code, out, _ = run("init", at, "head", "--json")
    assert code == 0 and json.loads(out)["created"] is True
    assert run("init", at, "head")[1].startswith("authority there already")
    assert run("add", at, "gpu1=10.0.0.9")[0] == 0
    rows = {row["node"]: row for row in json.loads(run("show", at, "--json")[1])}
    assert rows.keys() == {"", "head", "gpu1"} and rows["gpu1"]["days_left"] == 364
    assert "10.0.0.9" in run("show", f"{at}/gpu1")[1]
    assert run("show", str(tmp_path / "none"))[0] == 4
