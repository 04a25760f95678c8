"""The administrators' commands: against any node, with a record of who asked, asking before they take away."""

from __future__ import annotations

import io
import itertools
import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import grpc
import pytest

from launch import errors_page, formats_page, settings, support_page
from launch.top import bars, rates, replica_digest
from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service import scrubbing
from tests.bench import gpu_table
from tests.local import LocalService, local_service
from tests.test_cli import Shell, byte_tokenizer, eventually
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.codes import CODES
from weight_update.errors import PlanError
from weight_update.messages import Notify
from weight_update.transport import ControlClient
from weight_update.values import from_manifest_proto
from weight_update.versions import VersionIndex

ADMIN = ("status", "versions", "verify", "rollback", "pause", "resume", "drain", "abort", "watch", "top", "events")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    model_dir = save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))
    byte_tokenizer().save(str(model_dir / "tokenizer.json"))
    with local_service(model_dir, tmp_path_factory.mktemp("state"), layouts=("trtllm", "cutlass")) as running:
        pusher = Pusher(running.address, pushed_by="a trainer")
        pusher.push(tiny_llama(seed=1), step=4)
        pusher.close()
        deadline_s = time.monotonic() + 10
        while not all(rank.coordinator for rank in running.ranks):  # they are greeted every second
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        yield running


@pytest.fixture
def live(capsys: pytest.CaptureFixture[str], service: LocalService) -> Shell:
    return Shell(capsys, service.address)


@pytest.fixture
def alone(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys, "127.0.0.1:1")


def begin(service: LocalService, push_id: str) -> int:
    """A push that another trainer leaves open."""
    control = ControlClient(service.address)
    manifest = from_manifest_proto(control.describe().manifest)
    begun = control.begin(
        push_id=push_id,
        base_version=0,
        fingerprint=manifest.fingerprint,
        tensors=manifest.tensors,
        pushed_by="another trainer",
        logical_bytes=0,
        lease_s=60.0,
    )
    control.close()
    return begun.transaction


# ---------------------------------------------------------------- how they start


def test_no_admin_command_loads_torch() -> None:
    """Each is called against nobody in one process; what it needs is loaded by then."""
    more = {"rollback": ["1", "--yes"], "drain": ["--yes"]}
    calls = [[name, *more.get(name, []), "--to", "127.0.0.1:1"] for name in ADMIN]
    code = f"""
import sys
from launch import cli
for args in {[*calls, ["replica", "remove", "1", "--yes"], ["explain", "busy"]]!r}:
    try:
        cli.main(args)
    except SystemExit as left:
        print("ended", args[0], left.code)
print(sorted({{"torch", "ray", "numpy", "transformers", "numba", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    *lines, heavy = done.stdout.splitlines()
    ended = [line.split()[1:] for line in lines if line.startswith("ended ")]
    assert ended == [*([name, "3"] for name in (*ADMIN, "replica")), ["explain", "0"]], done.stderr
    assert heavy == "[]", done.stderr


def test_the_address_comes_from_a_flag_the_environment_or_the_file(
    alone: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[client]\nservice = "127.0.0.1:3"\n')
    monkeypatch.setenv(settings.ENV, str(file))
    assert "127.0.0.1:3: no answer" in alone("status")[2]
    assert "127.0.0.1:3: no answer" in alone("replica", "add")[2]
    assert "127.0.0.1:3: no answer" in alone("reset", "--to", "1", "--yes")[2]
    monkeypatch.setenv("TRANSFUSE_SERVICE", "127.0.0.1:2")
    assert "127.0.0.1:2: no answer" in alone("status")[2]
    assert "127.0.0.1:1: no answer" in alone("status", "--to", "127.0.0.1:1")[2]


@pytest.mark.parametrize(
    "text, told",
    [
        ("[client", "mend it"),
        ("[client]\nnonsense = 1", "nonsense"),
        ("[server]", "[server]"),
        ("client = 1", "no table"),
    ],
)
def test_a_config_file_that_cannot_be_meant_is_refused(
    alone: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str
) -> None:
    (tmp_path / "config.toml").write_text(text)
    monkeypatch.setenv(settings.ENV, str(tmp_path / "config.toml"))
    code, out, err = alone("status")
    assert (code, out) == (4, "")
    assert told in err and str(tmp_path) in err


def test_an_error_names_its_code_and_explain_knows_it(alone: Shell) -> None:
    assert "[transfer]" in alone("status", "--to", "127.0.0.1:1")[2]
    for code, row in CODES.items():
        status, out, _ = alone("explain", code)
        assert status == 0 and row.cause in out and row.cure in out
    status, _, err = alone("explain", "nonsense")
    assert status == 4 and "busy" in err


# ---------------------------------------------------------------- against any node


def test_any_rank_leads_to_the_coordinator(live: Shell, service: LocalService) -> None:
    for rank in service.ranks:
        code, out, err = live("status", "--json", "--to", rank.address)
        assert code == 0, err
        assert json.loads(out)["digest"] == live.json("status")["digest"]
        code, out, _ = live("verify", "--share", "1", "--json", "--to", rank.address)
        assert code == 0 and json.loads(out)["ok"] is True


def test_a_rank_that_knows_no_coordinator_says_so(live: Shell, service: LocalService) -> None:
    rank, roster = service.ranks[0], service.shell.roster
    known, roster.coordinator = roster.coordinator, ""  # greetings do not say it either
    rank.coordinator = ""
    code, _, err = live("status", "--to", rank.address)
    rank.coordinator = roster.coordinator = known
    assert code == 3 and "rank 0.0" in err


# ---------------------------------------------------------------- what takes away asks


@pytest.mark.parametrize(
    "args, told",
    [
        (("rollback", "1"), "the bytes of version 1"),
        (("drain",), "no new request"),
        (("replica", "remove", "1"), "remove replica 1"),
        (("reset", "--to", "durable"), "given up as lost"),
    ],
)
def test_without_a_terminal_and_without_yes_nothing_is_done(
    live: Shell, service: LocalService, args: tuple[str, ...], told: str
) -> None:
    before = live.json("status")["version"], len(live.json("events"))
    option = "--service" if args[0] == "reset" else "--to"
    code, out, err = live(*args, option, service.address)
    assert (code, out) == (8, "")
    assert told in err and "--yes" in err and "[unconfirmed]" in err
    assert (live.json("status")["version"], len(live.json("events"))) == before


@pytest.mark.parametrize("answer, code", [("y\n", 0), ("n\n", 8)])
def test_at_a_terminal_the_answer_counts(
    live: Shell, service: LocalService, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    transaction = begin(service, f"asked-{code}")
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    found, _, err = live("abort", "--to", service.address)
    assert found == code, err
    assert "another trainer" in err
    assert live.json("status")["transaction"] == (0 if code == 0 else transaction)
    if code:
        assert live.json("abort", "--yes") == {"aborted": True, "transaction": transaction}
    assert live.json("abort")["aborted"] is False


def test_a_drained_replica_takes_no_request_and_the_other_does(live: Shell, service: LocalService) -> None:
    assert live.json("drain", "--replica", "1", "--yes") == {"num_sequences": 0, "replicas": [1]}
    deadline_s = time.monotonic() + 5
    while [each["state"] for each in live.json("status")["replicas"]] != ["serving", "draining"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    code, _, err = live("probe", "hello", "--max-new-tokens", "2", "--to", service.address)
    assert code == 0, err
    code, _, err = live("probe", "hello", "--to", service.ranks[1].address)
    assert code == 5 and "drained by an operator" in err
    live.json("resume")
    assert eventually(live, "state", "serving") == ["serving"] * 2
    code, _, err = live("drain", "--replica", "7", "--yes", "--to", service.address)
    assert code == 1 and "7" in err


# ---------------------------------------------------------------- the record


def test_events_say_who_asked_for_what_from_where(live: Shell, service: LocalService) -> None:
    live.json("pause", "--reason", "a look\x1b[31m at it")
    live.json("resume")
    live("rollback", "999", "--yes", "--to", service.address)
    found = live.json("events")
    assert [each["number"] for each in found] == sorted(each["number"] for each in found)
    asked = {each["kind"]: each for each in found if each["who"]}
    assert {"push", "pause", "resume", "rollback"} <= asked.keys()
    assert asked["pause"]["text"] == "a look [31m at it"
    assert "@" in asked["pause"]["who"] and asked["pause"]["peer"].startswith("ipv4:127.0.0.1:")
    assert "a trainer" in next(each for each in found if each["kind"] == "push")["text"]
    refused = [each for each in found if each["kind"] == "rollback"]
    assert refused[0]["text"] == "to version 999" and "refused [version]" in refused[1]["text"]
    assert {"begin", "prepare", "decide"} <= {each["kind"] for each in found if not each["who"]}
    newest = found[-1]["number"]
    assert live.json("events", "--after", str(newest)) == []
    assert [each["kind"] for each in live.json("events", "--kind", "pause", "--last", "1")] == ["pause"]
    code, out, _ = live("events", "--to", service.address)
    assert code == 0 and "a look" in out


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM events",
        "UPDATE events SET who = 'nobody'",
        "INSERT OR REPLACE INTO events (rowid, time_s, kind, version, txn, text) VALUES (1, 0, 'x', 0, 0, '')",
    ],
)
def test_nothing_changes_a_record(tmp_path: Path, statement: str) -> None:
    index = VersionIndex(tmp_path / "state.sqlite")
    index.record(Notify(kind="pause", version=1, transaction=0, text="first"), who="me", peer="here")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        index._db.execute(statement)
    again = index.record(Notify(kind="resume", version=1, transaction=0, text=""))
    assert [(each.number, each.who, each.event.text) for each in index.events()] == [(1, "me", "first"), (2, "", "")]
    assert again.number == 2
    index.close()


def test_a_file_of_an_earlier_release_gets_the_columns_and_keeps_its_events(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    old = sqlite3.connect(path)
    old.execute(
        "CREATE TABLE events (time_s REAL NOT NULL, kind TEXT NOT NULL, version INTEGER NOT NULL, txn INTEGER NOT NULL,"
        " text TEXT NOT NULL)"
    )
    old.execute("INSERT INTO events VALUES (1.5, 'decide', 3, 7, 'abc')")
    old.commit()
    old.close()
    index = VersionIndex(path)
    (found,) = index.events()
    assert (found.time_s, found.event.kind, found.event.version, found.who) == (1.5, "decide", 3, "")
    index.close()


def test_a_pause_that_an_earlier_release_wrote_is_read(tmp_path: Path) -> None:
    index = VersionIndex(tmp_path / "state.sqlite")
    for version in (1, 2):
        columns = "version, base_version, txn, push_id, pushed_by, created_s, digest, digests, fingerprint, num_tensors"
        row = (version, 0, version, f"push {version}", "", 0.0, "", b"", "", 0, 0, 0, 0.0, 0.25)
        places = ",".join("?" * len(row))
        index._db.execute(
            f"INSERT INTO versions ({columns}, wire_bytes, logical_bytes, seconds, pause_s) VALUES ({places})", row
        )
    index.set_pause(2, 0.5)
    assert index.pauses() == {1: 0.25, 2: 0.5}
    index.close()


def test_watch_streams_what_happens(live: Shell, service: LocalService) -> None:
    told: list[tuple[int, str, str]] = []
    watching = threading.Thread(
        target=lambda: told.append(live("watch", "--count", "2", "--json", "--to", service.address)), daemon=True
    )
    watching.start()
    deadline_s = time.monotonic() + 5
    while not service.shell._watchers._queues:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    with grpc.insecure_channel(service.address) as channel:
        stub = pb_grpc.ControlStub(channel)
        stub.Pause(pb.PauseRequest(reason="a look"))
        stub.Resume(pb.ResumeRequest())
    watching.join(timeout=10)
    code, out, _ = told[0]
    assert code == 0
    assert [json.loads(line)["kind"] for line in out.splitlines()] == ["pause", "resume"]


# ---------------------------------------------------------------- verify and top


def test_a_reread_rests_for_what_its_share_leaves(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rests = itertools.count(), []
    ticking = SimpleNamespace(perf_counter=lambda: next(clock), monotonic=lambda: 0.0, sleep=rests.append)
    monkeypatch.setattr(scrubbing, "time", ticking)
    receiver = service.ranks[0].receiver
    *_, last = scrubbing.reread(receiver, receiver.version, 0.2)
    assert last.done_bytes == last.total_bytes == sum(spec.num_bytes for spec in receiver.manifest.tensors)
    assert rests == pytest.approx([4.0] * scrubbing.Scrub(receiver).num_slices)  # one second's work, four of rest
    with pytest.raises(PlanError, match="share"):
        next(scrubbing.reread(receiver, receiver.version, 2.0))


def test_verify_names_what_differs(live: Shell, service: LocalService) -> None:
    assert live.json("verify")["ok"] is True
    name = "model.layers.1.self_attn.o_proj.weight"
    storage = dict(service.models[1].named_parameters())[name]
    storage.view(-1)[5] ^= 1
    code, out, _ = live("verify", "--to", service.address)
    storage.view(-1)[5] ^= 1
    assert code == 1 and f"replica 1: {name}" in out
    assert live("verify", "--share", "0", "--to", service.address)[0] == 2


def test_top_into_a_pipe_shows_it_once(live: Shell, service: LocalService) -> None:
    transaction = begin(service, "while it is watched")
    code, out, err = live("top", "--to", service.address)
    assert code == 0, err
    status = live.json("status")
    assert out.count(f"{status['digest']} as committed") == 2
    assert f"push {transaction} open, by another trainer" in out
    assert all(f"{rank}.0" in out for rank in range(2))
    found = live.json("top")
    assert found["status"]["version"] == found["versions"][-1]["version"]
    live.json("abort", "--yes")


def test_top_in_a_terminal_goes_on_until_it_is_interrupted(service: LocalService) -> None:
    # Whoever runs the tests may have had interrupts ignored, which a process inherits.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        " from launch.cli import main; main()"
    )
    main, worker = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code, "top", "--interval", "0.2", "--to", service.address],
        cwd=ROOT, stdin=worker, stdout=worker, stderr=worker, env=os.environ | {"TERM": "xterm", "COLUMNS": "160"},
    ) as process:  # fmt: skip
        os.close(worker)
        seen, deadline_s = b"", time.monotonic() + 20
        while seen.count(b"replicas") < 3:  # drawn three times
            assert time.monotonic() < deadline_s, seen
            seen += os.read(main, 65536)
        process.send_signal(signal.SIGINT)
        with suppress(OSError):  # the terminal's other end is closed with the process
            while part := os.read(main, 65536):
                seen += part
        assert process.wait(timeout=10) == 0
    assert b"\x1b[?25h" in seen  # the cursor is back
    os.close(main)


def test_top_adds_digests_and_takes_rates_between_two_looks() -> None:
    ranks = [{"gauges": {"digest": digest}} for digest in ("f" * 32, f"{1:016x}{2:016x}")]
    assert replica_digest(ranks) == f"{0:016x}{1:016x}"
    assert replica_digest([*ranks, {"gauges": {"digest": ""}}]) == ""

    def seen(at_s: float, received: int) -> dict[str, object]:
        stream = {"trainer_rank": 0, "received_bytes": received}
        return {"at_s": at_s, "ranks": [{"replica": 1, "rank": 0, "gauges": {"streams": [stream]}}]}

    assert rates(seen(1.0, 100), seen(3.0, 500)) == {(1, 0, 0): 200.0}
    assert rates(None, seen(3.0, 500)) == {}
    assert [ord(each) - 0x2580 for each in bars([1.0, 8.0, 4.0])] == [1, 8, 4] and bars([0.0]) == " "


@pytest.mark.parametrize("module", [errors_page, formats_page, support_page])
def test_generated_pages_are_current(module: ModuleType) -> None:
    assert module.PAGE.read_text() == module.page(), f"run 'python -m {module.__name__}'"


def test_the_tables_of_what_a_gpu_measured_are_those_of_the_figures() -> None:
    text = gpu_table.PAGE.read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert text == gpu_table.page(text, gpu_table.read()), "run 'python -m tests.bench.gpu_table'"


def test_the_runbook_has_a_section_for_each_error_code() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert all(f"\n### {code}\n" in text for code in CODES)
