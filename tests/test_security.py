"""Who may do what on a service with certificates and tokens, over real TLS on loopback."""

from __future__ import annotations

import base64
import json
import logging
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from launch import access, authority, cli
from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service import guard
from service import pages as pages_module
from service.fleet import Fleet, FleetConfig
from service.guard import Limits
from service.pages import Pages
from service.wire import bind, make_server
from tests.local import LocalService, local_service
from tests.tiny import save, tiny_llama
from weight_update.channels import Channels, connect, server_credentials
from weight_update.client import Pusher
from weight_update.errors import DeniedError, PlanError
from weight_update.security import ANYBODY, ROLES, Security, Tokens, is_loopback, token_line
from weight_update.store import Store
from weight_update.transport import STAGE, ControlClient, error_of, fetch_stream
from weight_update.values import from_manifest_proto

LIMITS = Limits(idle_s=2.0, calls=16, reading_calls=24, slow_s=0.03, slowed=2)
WITHOUT = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List", "/grpc.health.v1.Health/Watch"})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, two nodes, a service's token file and everybody's own."""
    folder = tmp_path_factory.mktemp("security")
    authority.create(folder)
    authority.issue(folder, ["service", "trainer"])
    names = (("read", "eve"), ("push", "ppo"), ("push", "rival"), ("admin", "oncall"), ("service", "fleet"))
    lines = {name: token_line(role, name) for role, name in names}
    for name, text in {"all": "".join(lines.values()), **lines, "stranger": token_line("admin", "stranger")}.items():
        path = folder / f"{name}.token"
        path.touch(0o600)
        path.write_text(text)
    return folder


def of(files: Path, name: str, node: str = "trainer") -> Security:
    return Security(tls_dir=files / node, token_file=files / f"{name}.token")


@pytest.fixture(scope="module")
def service(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    scratch = tmp_path_factory.mktemp("service")
    model_dir = save(tiny_llama(seed=0), scratch / "model")
    security = of(files, "all", "service")
    with local_service(model_dir, scratch, security=security, limits=LIMITS, pages=True) as running:
        yield running


def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    error: Any = raised.value
    return error.code(), error.details()


# ---------------------------------------------------------------- what is asked for where


def all_methods() -> set[str]:
    """Of every service of ours, as the proto declares them."""
    services = pb.DESCRIPTOR.services_by_name.values()
    return {f"/{service.full_name}/{method.name}" for service in services for method in service.methods}


def test_every_method_has_a_role() -> None:
    assert all_methods() == {method for method in guard.ROLE_OF if method.startswith("/transfuse.")}
    assert set(guard.ROLE_OF.values()) <= {guard.OPEN, *ROLES}
    assert {method for method, role in guard.ROLE_OF.items() if role == guard.OPEN} == WITHOUT
    assert all_methods() >= guard.LARGE


@pytest.mark.parametrize("door", ["coordinator", "rank"])
@pytest.mark.parametrize("who", ["nobody", "stranger", "eve", "ppo", "oncall"])
def test_every_method_of_both_doors_refuses_whoever_lacks_its_role(
    service: LocalService, files: Path, door: str, who: str
) -> None:
    address = service.address if door == "coordinator" else service.ranks[0].address
    security = Security(tls_dir=files / "trainer") if who == "nobody" else of(files, who)
    role = {"eve": "read", "ppo": "push", "oncall": "admin"}.get(who)
    offered = {"coordinator": ("Control", "Generation"), "rank": ("Data", "Member", "Generation")}[door]
    with connect(address, security) as channel:
        for method in sorted(all_methods()):
            if method.split("/")[1].rpartition(".")[2] not in offered:
                continue
            if role is not None and ROLES.index(role) >= ROLES.index(guard.ROLE_OF[method]):
                continue
            call = channel.unary_unary(method)
            assert status_of(lambda call=call: call(b"", timeout=10))[0] is grpc.StatusCode.PERMISSION_DENIED, method


def test_a_method_without_a_row_is_refused(service: LocalService, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dict(guard.ROLE_OF)
    del rows["/transfuse.v1.Control/Status"]
    monkeypatch.setattr(guard, "ROLE_OF", rows)
    with connect(service.address, of(files, "oncall")) as channel:
        code, told = status_of(lambda: pb_grpc.ControlStub(channel).Status(pb.StatusRequest(), timeout=10))
    assert code is grpc.StatusCode.PERMISSION_DENIED and "no role may call" in told


def test_without_our_certificate_nobody_gets_in(service: LocalService, files: Path, tmp_path: Path) -> None:
    authority.create(tmp_path)
    authority.issue(tmp_path, ["trainer"])
    insecure = Security(token_file=files / "oncall.token")
    foreign = Security(tls_dir=tmp_path / "trainer", token_file=files / "oncall.token")
    for address in (service.address, service.ranks[0].address):
        for security in (insecure, foreign):
            with connect(address, security) as channel:
                call = channel.unary_unary("/transfuse.v1.Control/Status")
                assert status_of(lambda call=call: call(b"", timeout=10))[0] is grpc.StatusCode.UNAVAILABLE
    ca = (files / "ca.pem").read_bytes()
    with grpc.secure_channel(service.address, grpc.ssl_channel_credentials(ca)) as channel:  # none of its own
        call = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert status_of(lambda: call(b"", timeout=10))[0] is grpc.StatusCode.UNAVAILABLE


def test_a_push_over_tls_with_a_token(service: LocalService, files: Path) -> None:
    pusher = Pusher(service.address, security=of(files, "ppo"))
    before = service.bytes()
    assert pusher.push(tiny_llama(seed=3)).digest_verified
    assert service.bytes() != before
    pusher.close()


def test_a_rank_gives_rows_to_the_fleet(service: LocalService, files: Path) -> None:
    rank = service.ranks[0]
    tensors = rank.receiver.manifest.tensors
    first, stop = [0] * len(tensors), [spec.num_rows for spec in tensors]
    request = pb.FetchRequest(version=rank.member.version, row_start=first, row_stop=stop)
    fleet = of(files, "all", "service").as_service()
    assert sum(map(len, fetch_stream(rank.address, request, fleet))) > sum(spec.num_bytes for spec in tensors)
    with pytest.raises(DeniedError, match="this takes service"):
        list(fetch_stream(rank.address, request, of(files, "ppo")))


def test_versions_are_stored_over_connections_with_certificates(files: Path, tmp_path: Path) -> None:
    """The keeper takes rows from the ranks' doors as the fleet, and reads back what it wrote."""
    model_dir = save(tiny_llama(seed=0), tmp_path / "model")
    security = of(files, "all", "service")
    with local_service(model_dir, tmp_path, store_dir=tmp_path / "store", security=security) as service:
        pusher = Pusher(service.address, security=of(files, "ppo"))
        report = pusher.push(tiny_llama(seed=4), durable=True)
        pusher.close()
        store = Store(tmp_path / "store", config_dir=model_dir, manifest=service.shell.manifest, read_only=True)
        assert [each.version for each in store.versions()] == [1, report.version]


@pytest.mark.slow
def test_a_fleet_of_processes_pushes_and_fills_a_replica_with_certificates_and_tokens(
    files: Path, tmp_path: Path
) -> None:
    model = save(tiny_llama(seed=0), tmp_path / "model")
    config = FleetConfig(model=str(model), ranks=2, min_replicas=1, security=of(files, "all", "service"))
    with Fleet(config) as fleet:
        pusher = Pusher(fleet.address, security=of(files, "ppo"))
        assert pusher.push(tiny_llama(seed=1)).digest_verified
        pusher.close()
        with connect(fleet.address, of(files, "oncall")) as channel:
            control = pb_grpc.ControlStub(channel)
            control.ReplicaAdd(pb.ReplicaAddRequest(), timeout=30)  # a live donor fills it, rank to rank
            deadline_s = time.monotonic() + 200
            while [each.state for each in control.Status(pb.StatusRequest(), timeout=30).replicas] != ["serving"] * 2:
                assert time.monotonic() < deadline_s
                time.sleep(0.5)
            assert control.Verify(pb.VerifyRequest(), timeout=60).ok
            request = pb.GenerateRequest(prompts=[pb.Prompt(token_ids=[3, 4])], max_new_tokens=2, ignore_eos=True)
            assert len(list(pb_grpc.GenerationStub(channel).Generate(request, timeout=60))) == 2


# ---------------------------------------------------------------- one transaction and another


def begun(client: ControlClient, push_id: str) -> tuple[pb.DescribeReply, pb.BeginReply]:
    described = client.describe()
    reply = client.begin(
        push_id=push_id,
        tensors=from_manifest_proto(described.manifest).tensors,
        fingerprint=described.fingerprint,
        lease_s=30.0,
        pushed_by="anybody",
    )
    return described, reply


def test_one_token_cannot_join_write_or_commit_the_push_of_another(service: LocalService, files: Path) -> None:
    ours, theirs = (ControlClient(service.address, of(files, name)) for name in ("ppo", "rival"))
    before = service.bytes()
    described, reply = begun(ours, "of ppo")
    try:
        for call in (
            lambda: theirs.begin(push_id="of ppo", tensors=[], pushed_by="ppo"),
            lambda: theirs.install(reply.transaction),
            lambda: theirs.decide(reply.transaction),
        ):
            with pytest.raises(DeniedError, match="begun by 'ppo'"):
                call()
        stolen = {"ours": reply.ticket, "none": b"", "forged": bytes(32)}
        for name, ticket in stolen.items():
            with pytest.raises(DeniedError, match="no ticket of 'rival'"):
                stage(described.ranks[0].address, of(files, "rival"), reply, ticket)
            if name != "ours":
                with pytest.raises(DeniedError, match="no ticket of 'ppo'"):
                    stage(described.ranks[0].address, of(files, "ppo"), reply, ticket)
        assert stage(described.ranks[0].address, of(files, "ppo"), reply, reply.ticket).credit_bytes > 0
    finally:
        ours.abort(reply.transaction, "over")
    _, later = begun(ours, "of ppo, again")
    ours.abort(later.transaction, "over")
    assert later.ticket != reply.ticket
    assert service.bytes() == before
    for client in (ours, theirs):
        client.close()


def stage(address: str, security: Security, reply: pb.BeginReply, ticket: bytes) -> pb.StageReply:
    opening = pb.StageOpen(transaction=reply.transaction, epoch=reply.epoch, ticket=ticket)
    with connect(address, security) as channel:
        call = channel.stream_stream(STAGE, response_deserializer=pb.StageReply.FromString)
        try:
            first: pb.StageReply = next(call(iter([pb.StageRequest(open=opening).SerializeToString()]), timeout=10))
        except grpc.RpcError as error:
            raise error_of(error) from None
        return first


def test_a_begin_that_announces_too_much_opens_nothing(service: LocalService, files: Path) -> None:
    client = ControlClient(service.address, of(files, "ppo"))
    for too_much in ({"num_streams": (1 << 32) - 1}, {"push_id": "x" * 2000}, {"pushed_by": "x" * 2000}):
        with pytest.raises(PlanError, match="begin: at most"):
            client.begin(tensors=[], **{"push_id": "many", **too_much})
    client.close()


# ---------------------------------------------------------------- failed attempts


def test_failed_attempts_are_counted_slowed_and_logged_without_the_token(
    service: LocalService, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counted = service.server.guard.num_failed
    service.server.guard._failed.clear()  # or whether this attempt is told of depends on those before
    token = Tokens(files / "stranger.token").own()
    with caplog.at_level(logging.DEBUG), connect(service.address, of(files, "stranger")) as channel:
        for _ in range(4):
            start_s = time.monotonic()
            status_of(lambda: pb_grpc.ControlStub(channel).Status(pb.StatusRequest(), timeout=10))
            assert time.monotonic() - start_s >= LIMITS.slow_s
    assert service.server.guard.num_failed == counted + 4
    assert "this token is not known" in caplog.text and "Control/Status" in caplog.text
    for name in ("stranger", "all"):
        for line in (files / f"{name}.token").read_text().split():
            assert not line.startswith("tf_") or line not in caplog.text
    assert token not in caplog.text


def test_a_token_that_is_taken_back_or_added_counts_at_once(service: LocalService, files: Path) -> None:
    path = files / "all.token"
    text = path.read_text()
    line = token_line("read", "late")
    (files / "late.token").touch(0o600)
    (files / "late.token").write_text(line)
    try:
        with connect(service.address, of(files, "late")) as channel:
            control = pb_grpc.ControlStub(channel)
            assert status_of(lambda: control.Status(pb.StatusRequest(), timeout=10))[0].name == "PERMISSION_DENIED"
            path.write_text(text + line)
            assert control.Status(pb.StatusRequest(), timeout=10).version
            path.write_text(text)
            assert status_of(lambda: control.Status(pb.StatusRequest(), timeout=10))[0].name == "PERMISSION_DENIED"
            path.chmod(0o644)  # others could read it: nobody is let in
            assert status_of(lambda: control.Status(pb.StatusRequest(), timeout=10))[0].name == "PERMISSION_DENIED"
    finally:
        path.chmod(0o600)
        path.write_text(text)


# ---------------------------------------------------------------- token files


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("read a\n", "entry 1 is no"),
        ("root a tf_" + "x" * 43 + "\n", "entry 1 is no"),
        ("read a short\n", "entry 1 is no"),
        ("read a/b tf_" + "x" * 43 + "\n", "entry 1 is no"),
        (f"read a tf_{'x' * 43}\npush a tf_{'y' * 43}\n", "entry 2.*twice|entry 1.*twice"),
        ("#" * ((1 << 20) + 1), "more than"),
    ],
)
def test_a_token_file_that_is_none_is_refused_without_a_word_of_it(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "t"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(PlanError, match=told) as raised:
        Tokens(path)
    assert "xxxx" not in str(raised.value)


def test_a_client_s_file_shows_its_highest_role_never_the_fleet_s(files: Path) -> None:
    tokens = Tokens(files / "all.token")
    assert tokens.find(tokens.own()) and tokens.find(tokens.own()).role == "admin"  # type: ignore[union-attr]
    assert tokens.find(tokens.own("service")).name == "fleet"  # type: ignore[union-attr]
    assert tokens.find("") is None and tokens.find(tokens.own() + "x") is None and tokens.find("\udcff") is None
    with pytest.raises(PlanError, match="no token of role"):
        Tokens(files / "fleet.token").own()


# ---------------------------------------------------------------- beyond loopback


def test_what_counts_as_loopback() -> None:
    inside = ("127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "unix:/tmp/x")
    outside = ("0.0.0.0:1", "10.0.0.1:1", "[::]:1", "host:1", "localhost.evil:1", "127.0.0.1.evil:1", ":1")
    assert all(map(is_loopback, inside)) and not any(map(is_loopback, outside))


def test_no_public_address_without_certificates_and_tokens(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = of(files, "all", "service")
    for lacking in (Security(), replace(full, tls_dir=None), replace(full, token_file=None)):
        with pytest.raises(PlanError, match="not loopback, needs"):
            FleetConfig(model="x", listen="0.0.0.0:0", security=lacking)
        with pytest.raises(PlanError, match="not loopback, needs"):
            connect("192.0.2.1:1", lacking)
        watched = guard.Guard()
        server, _ = make_server([], max_message_bytes=1 << 20, guard=watched)
        try:
            with pytest.raises(PlanError, match="--insecure-plaintext"):
                bind(server, "0.0.0.0:0", lacking)
            caplog.clear()
            bind(server, "0.0.0.0:0", replace(lacking, insecure_plaintext=True))
            assert "--insecure-plaintext" in caplog.text
            for listen in ("0.0.0.0:0", "[::]:0", "example.org:0"):
                with guarding(lacking) as watching, pytest.raises(PlanError, match=r"pages on .* not loopback, needs"):
                    Pages(listen, {}, watching)
        finally:
            server.stop(None).wait()
            watched.stop()
    FleetConfig(model="x", listen="0.0.0.0:0", security=full)


def test_a_renewed_certificate_is_taken_up_without_a_restart(files: Path, tmp_path: Path) -> None:
    for name in ("ca.pem", "ca.key"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    authority.issue(tmp_path, ["node"])
    security = Security(tls_dir=tmp_path / "node")
    watched = guard.Guard(security)
    server, _ = make_server([], max_message_bytes=1 << 20, guard=watched)
    pages = Pages("127.0.0.1:0", {}, watched)
    doors = (bind(server, "127.0.0.1:0", security), pages.address)
    try:
        old = {shown_by(address, files / "trainer") for address in doors}
        key = (tmp_path / "node" / "node.key").read_bytes()
        authority.issue(tmp_path, ["node"], renew=True)
        new = {shown_by(address, files / "trainer") for address in doors}
        assert len(old) == len(new) == 1 and new != old
        (tmp_path / "node" / "node.key").write_bytes(key)  # half of a pair: the last whole one stays
        assert {shown_by(address, files / "trainer") for address in doors} == new
    finally:
        pages.stop()
        server.stop(None).wait()
        watched.stop()
    with pytest.raises(PlanError, match="must be the key"):
        server_credentials(security)


def shown_by(address: str, folder: Path) -> bytes:
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "node.pem", folder / "node.key")
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as raw, context.wrap_socket(raw, server_hostname=host) as end:
        found = end.getpeercert(binary_form=True)
        assert found
        return found


def test_a_client_connects_anew_with_new_files_and_only_then(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.touch(0o600)
    path.write_text(token_line("read", "a"))
    channels = Channels(Security(token_file=path))
    first = channels("127.0.0.1:1")
    assert channels("127.0.0.1:1") is first and channels("127.0.0.1:2") is not first
    path.write_text(token_line("read", "longer"))
    assert channels("127.0.0.1:1") is not first
    channels.close()


# ---------------------------------------------------------------- pages


@contextmanager
def guarding(security: Security) -> Iterator[guard.Guard]:
    watched = guard.Guard(security, LIMITS)
    try:
        yield watched
    finally:
        watched.stop()


def page(address: str, files: Path, authorization: str = "", path: str = "/metrics") -> tuple[int, str]:
    """Status and body over HTTPS, as a browser without a certificate of its own reads it."""
    headers = {"Authorization": authorization} if authorization else {}
    request = urllib.request.Request(f"https://{address}{path}", headers=headers)
    context = ssl.create_default_context(cafile=str(files / "ca.pem"))
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            assert refused.headers["WWW-Authenticate"].startswith("Basic ")
            return refused.code, refused.read().decode()


def test_pages_are_https_and_for_whoever_may_read(
    service: LocalService, files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token = {name: (files / f"{name}.token").read_text().split()[2] for name in ("eve", "stranger")}
    browser = {name: f"Basic {base64.b64encode(f'me:{token[name]}'.encode()).decode()}" for name in token}
    rank = service.ranks[0].pages
    assert rank is not None
    for address, served in ((service.pages, service.server.guard), (rank.address, service.ranks[0].guard)):
        counted = served.num_failed
        assert page(address, files)[0] == 401  # how a browser asks first: no attempt
        assert served.num_failed == counted
        for wrong in (f"Bearer {token['stranger']}", browser["stranger"], "Basic !", "Bearer ", f"{browser['eve']}x"):
            assert page(address, files, wrong)[0] == 401
        assert served.num_failed >= counted + 3
        for right in (f"Bearer {token['eve']}", browser["eve"]):
            status, text = page(address, files, right)
            assert status == 200 and "transfuse_" in text
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read()
    assert "Transfuse, version" in page(service.pages, files, browser["eve"], "/")[1]
    assert not any(each in caplog.text for each in token.values())


def test_a_page_is_not_kept_from_others_by_clients_that_dawdle(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setattr(pages_module, "REQUEST_S", 0.5)
    monkeypatch.setattr(pages_module, "MAX_REQUESTS", 3)
    with guarding(Security(tls_dir=files / "service")) as watched, ExitStack() as stack:
        shown = Pages("127.0.0.1:0", {"/metrics": lambda: ("text/plain", b"x")}, watched)
        stack.callback(shown.stop)
        host, _, port = shown.address.rpartition(":")
        slow = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(3)]
        slow[0].sendall(b"\x16")  # the first byte of a handshake
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            page(shown.address, files)
        for each in slow:
            each.settimeout(5)
            assert each.recv(100) == b""
        assert page(shown.address, files) == (200, "x")


# ---------------------------------------------------------------- the command


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main(args)
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return run


Shell = Callable[..., tuple[int, str, str]]


def test_the_command_shows_its_token_and_says_what_it_may_not(
    service: LocalService, files: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ("--tls-dir", str(files / "trainer"), "--token-file", str(files / "eve.token"))
    assert shell(*first, "status", "--to", service.address, "--json")[0] == 0
    code, out, err = shell(*first, "pause", "--to", service.address)
    assert (code, out) == (7, "") and "eve has role read; this takes admin" in err
    assert shell("--tls-dir", str(files / "trainer"), "status", "--to", service.address)[0] == 7
    monkeypatch.setenv("TRANSFUSE_TLS_DIR", str(files / "trainer"))
    monkeypatch.setenv("TRANSFUSE_TOKEN_FILE", str(files / "eve.token"))
    assert shell("versions", "--to", service.address)[0] == 0
    assert access.from_environment() == of(files, "eve")
    code, _, err = shell("status", "--to", "192.0.2.1:1")
    assert code == 3  # it may connect there; nobody answers
    monkeypatch.delenv("TRANSFUSE_TLS_DIR")
    code, _, err = shell("status", "--to", "192.0.2.1:1")
    assert code == 4 and "--tls-dir" in err and "--insecure-plaintext" in err


def test_the_command_makes_token_files(tmp_path: Path, shell: Shell) -> None:
    path = tmp_path / "deep" / "tokens"
    assert shell("tokens", "init", str(path))[0] == 0
    made = path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    assert shell("tokens", "init", str(path))[0] == 4 and path.read_bytes() == made
    code, out, _ = shell("tokens", "add", str(path), "push", "ppo")
    assert code == 0 and "tf_" not in out and path.read_bytes().startswith(made)
    assert path.stat().st_mode & 0o777 == 0o600
    for role, name in (("push", "ppo"), ("root", "x"), ("read", "a b")):
        assert shell("tokens", "add", str(path), role, name)[0] == 4
    rows = json.loads(shell("tokens", "list", str(path), "--json")[1])
    assert [row["role"] for row in rows] == [*ROLES, "push"]
    code, line, _ = shell("tokens", "show", str(path), "ppo")
    found = Tokens(path).find(line.split()[2])
    assert code == 0 and found is not None and (found.name, found.role) == ("ppo", "push")


# ---------------------------------------------------------------- limits


def test_a_silent_client_loses_its_slot_and_a_large_small_request_is_not_parsed(
    service: LocalService, files: Path
) -> None:
    watched = service.ranks[0].guard
    dropped = watched.num_dropped
    silent = threading.Event()

    def nothing() -> Iterator[bytes]:
        silent.wait(30)
        yield from ()

    with connect(service.ranks[0].address, of(files, "ppo")) as channel:
        call = channel.stream_stream(STAGE)(nothing(), timeout=25)
        assert status_of(lambda: next(call))[0] is grpc.StatusCode.CANCELLED
        silent.set()
    assert watched.num_dropped == dropped + 1
    with connect(service.address, of(files, "oncall")) as channel:
        pause = channel.unary_unary("/transfuse.v1.Control/Pause")
        request = pb.PauseRequest(reason="x" * guard.SMALL_BYTES).SerializeToString()
        assert status_of(lambda: pause(request, timeout=10))[0] is grpc.StatusCode.INTERNAL
        assert pb_grpc.ControlStub(channel).Status(pb.StatusRequest(), timeout=10).replicas[0].state == "serving"


def test_one_peer_has_so_many_calls_and_another_is_still_served(service: LocalService, files: Path) -> None:
    with connect(service.address, of(files, "eve")) as channel, connect(service.address, of(files, "ppo")) as other:
        watch = pb_grpc.ControlStub(channel).Watch
        calls = [watch(pb.WatchRequest()) for _ in range(LIMITS.calls)]
        deadline_s = time.monotonic() + 10
        while len(service.server.guard._calls) < LIMITS.calls and time.monotonic() < deadline_s:
            time.sleep(0.02)
        code, told = status_of(lambda: next(watch(pb.WatchRequest(), timeout=10)))
        assert code is grpc.StatusCode.ABORTED and "run already" in told
        assert pb_grpc.ControlStub(other).Status(pb.StatusRequest(), timeout=10).version
        for call in calls:
            call.cancel()


def test_a_bucket_holds_back_what_comes_too_fast() -> None:
    bucket = guard.Bucket(1000.0)
    early = [bucket.take() for _ in range(1500)]
    assert early[0] == 0 and early[900] == 0 and early[-1] > 0


# ---------------------------------------------------------------- of a trial on loopback


def test_a_trial_on_loopback_needs_nothing() -> None:
    assert Security().require("127.0.0.1:1", "listening on") == []
    assert Security().bearer() == "" and Security().identity() is None
    assert ANYBODY.may("service")
