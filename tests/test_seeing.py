"""What a service shows of itself: metrics, dashboard and alerts over them, logs, the status page."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from protos import transfuse_pb2 as pb
from service.logs import FIELDS, JsonLines
from service.metrics import METRICS
from service.status_page import render
from tests.local import LocalService, local_service
from tests.test_cli import byte_tokenizer
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.errors import ManifestError

OPERATIONS = Path(__file__).parents[1] / "docs" / "operations"
RUNBOOK = (OPERATIONS.parent / "operations.md").read_text()
EXPOSED = {
    name
    for row in METRICS
    for name in ([row.name] if row.kind != "histogram" else [f"{row.name}_{end}" for end in ("bucket", "sum", "count")])
}


@pytest.fixture(scope="module")
def logged() -> Iterator[io.StringIO]:
    """All that the processes of this module log, as JSON lines."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, logged: io.StringIO) -> Iterator[LocalService]:
    model_dir = save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))
    byte_tokenizer().save(str(model_dir / "tokenizer.json"))
    state_dir = tmp_path_factory.mktemp("state")
    with local_service(model_dir, state_dir, layouts=("trtllm", "cutlass"), pages=True) as running:
        scrape(running.ranks[0].pages.address)  # scales are compared from one scrape to the next
        pusher = Pusher(running.address, pushed_by="a <trainer> & co")
        for seed in (1, 2):
            pusher.push(tiny_llama(seed=seed), step=seed)
        with pytest.raises(ManifestError):
            pusher.push(tiny_llama(seed=3, num_layers=1))
        pusher.close()
        yield running


def read(address: str, path: str) -> tuple[str, str]:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def scrape(address: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name -> label values -> value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(read(address, "/metrics")[1]):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


# ---------------------------------------------------------------- metrics


def test_the_coordinator_counts_what_it_committed(service: LocalService) -> None:
    found = scrape(service.pages)
    decisions = service.shell.index.decisions()
    assert found["transfuse_version"][()] == 3
    assert found["transfuse_digests_total"][("verified",)] == 2
    assert found["transfuse_wire_bytes_total"][()] == sum(each.wire_bytes for each in decisions)
    assert found["transfuse_logical_bytes_total"][()] == sum(each.logical_bytes for each in decisions[1:])
    assert found["transfuse_commit_s_count"][()] == 2
    deadline_s = time.monotonic() + 5  # states are up to a second old
    while (found := scrape(service.pages))["transfuse_replica_state"][("1", "serving")] != 1:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert sum(value for (replica, _), value in found["transfuse_replica_state"].items() if replica == "1") == 1


def test_a_rank_counts_phases_bytes_and_pauses(service: LocalService) -> None:
    (rank, _) = service.ranks
    assert rank.pages is not None
    found = scrape(rank.pages.address)
    counts = {labels[0]: value for labels, value in found["transfuse_phase_s_count"].items()}
    assert counts["stage"] == counts["prepare"] == counts["install"] == counts["publish"] == 2
    assert found["transfuse_pause_s_count"][()] == 2 and found["transfuse_pause_s_sum"][()] > 0
    pushed = [spec for spec in rank.receiver.manifest.tensors if not spec.name.endswith(".input_scale")]  # carried over
    assert found["transfuse_received_bytes_total"][()] == 2 * sum(spec.num_bytes for spec in pushed)
    assert found["transfuse_streams"][()] == found["transfuse_staged_bytes"][()] == 0
    assert found["transfuse_scale_drift"][()] > 0  # other weights have other scales


def test_every_metric_of_the_table_is_exposed_and_no_other(service: LocalService) -> None:
    rank = service.ranks[0]
    assert rank.pages is not None
    with urllib.request.urlopen(f"http://{rank.pages.address}/metrics", timeout=10) as answer:
        text = answer.read().decode() + read(service.pages, "/metrics")[1]
    named = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)) - set(re.findall(r"\S+_created", text))
    assert named == {row.name for row in METRICS}


def test_targets_are_what_service_discovery_wants(service: LocalService) -> None:
    deadline_s = time.monotonic() + 5  # ranks are asked every second
    while len(found := json.loads(read(service.pages, "/targets")[1])) < 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    assert found[1]["labels"] == {"replica": "1", "rank": "0"}
    assert scrape(found[1]["targets"][0])


def expressions(value: Any) -> Iterator[str]:
    """Every "expr" in a tree."""
    if isinstance(value, dict):
        yield from (each for key, each in value.items() if key == "expr")
        yield from (found for each in value.values() for found in expressions(each))
    if isinstance(value, list):
        yield from (found for each in value for found in expressions(each))


def test_prometheus_is_told_of_paths_that_exist_and_shows_a_token_at_each(service: LocalService) -> None:
    found = yaml.safe_load((OPERATIONS / "prometheus.yaml").read_text())
    assert all((OPERATIONS / name).is_file() for name in found["rule_files"])
    (job,) = found["scrape_configs"]
    (ranks,) = job["http_sd_configs"]
    assert job["scheme"] == "https" and ranks["url"].startswith("https://")
    assert job["authorization"] == ranks["authorization"] and job["tls_config"] == ranks["tls_config"]
    read(service.pages, ranks["url"].partition(job["static_configs"][0]["targets"][0])[2])


@pytest.mark.parametrize("name", ["dashboard.json", "alerts.yaml"])
def test_dashboard_and_alerts_name_metrics_that_exist(name: str) -> None:
    found = list(expressions(yaml.safe_load((OPERATIONS / name).read_text())))
    used = {metric for each in found for metric in re.findall(r"transfuse_\w+", each)}
    assert len(found) >= 8 and used <= EXPOSED, sorted(used - EXPOSED)
    labels = {label for row in METRICS for label in row.labels} | {"le", "instance", "job", "rank", "replica"}
    assert {each for text in found for each in re.findall(r"[{,]\s*(\w+)\s*=", text)} <= labels


def test_the_dashboard_imports_cleanly() -> None:
    """What Grafana asks of a file: a title and uid, panels that do not overlap, a data source that is chosen."""
    board = json.loads((OPERATIONS / "dashboard.json").read_text())
    assert board["title"] and board["uid"] and board["id"] is None and board["schemaVersion"] >= 36
    assert board["templating"]["list"][0]["type"] == "datasource"
    panels, taken = board["panels"], set()
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["datasource"]["uid"] == "${source}" and panel["targets"]


def test_every_alert_has_a_line_of_the_runbook() -> None:
    (group,) = yaml.safe_load((OPERATIONS / "alerts.yaml").read_text())["groups"]
    for rule in (rules := group["rules"]):
        name, notes = rule["alert"], rule["annotations"]
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert notes["summary"] and notes["runbook"] == f"docs/operations.md, {name}"
        assert f"\n### {name}\n" in RUNBOOK
    assert len(rules) >= 8


# ---------------------------------------------------------------- logs


def test_a_phase_is_one_line_with_version_rank_bytes_and_seconds(service: LocalService, logged: io.StringIO) -> None:
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    phases = [line for line in lines if line.get("event") == "install"]
    assert [(each["version"], each["rank"]) for each in phases if each["rank"] == "0.0"] == [(2, "0.0"), (3, "0.0")]
    assert all(each["bytes"] > 0 and each["seconds"] > 0 for each in phases)
    assert {"open", "stage", "prepare", "install", "publish"} <= {line["event"] for line in lines if "event" in line}


def test_no_line_holds_weights_or_tokens(service: LocalService, logged: io.StringIO) -> None:
    """Not even at the lowest level: weights would be bytes or long rows of numbers."""
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    assert len(lines) > 10
    for line in lines:
        assert set(line) <= {"time", "level", "logger", "message", "error", *FIELDS}
        assert not re.search(r"tensor\(|b'|\\x[0-9a-f]{2}|(?:-?\d+\.\d+[,\s]+){4}", line["message"]), line
        assert not re.search(r"(?i)bearer|authorization|token[ =:]+\S{16}", line["message"]), line


def test_fields_that_nobody_named_are_not_written() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "said %s", ("this",), None)
    record.secret, record.version = "hidden", 7
    assert json.loads(JsonLines().format(record)) == {
        "time": record.created, "level": "INFO", "logger": "x", "message": "said this", "version": 7,
    }  # fmt: skip


# ---------------------------------------------------------------- pages


def test_the_page_shows_replicas_pushes_and_versions_and_loads_nothing(service: LocalService) -> None:
    kind, text = read(service.pages, "/")
    assert kind.startswith("text/html")
    assert "version 3" in text and service.shell.index.decision().digest in text
    assert text.count("<figure>") == 2 and 'class="pause"' in text
    assert "a &lt;trainer&gt; &amp; co" in text and "<trainer>" not in text
    assert not re.search(r"<script|<link|src=|@import|url\(|https?://", text)


def test_pages_take_no_other_path_and_no_other_method(service: LocalService) -> None:
    for path, method, code in (("/etc/passwd", "GET", 404), ("/", "POST", 501), ("/", "DELETE", 501)):
        request = urllib.request.Request(f"http://{service.pages}{path}", method=method)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code == code
        refused.value.close()


def many() -> str:
    """The page of a service that has much to show: 64 ranks, long names, trouble."""
    versions = [
        pb.VersionInfo(version=i, step=i, state="durable", created_s=1.7e9 + i, wire_bytes=i * 10**7, pause_s=0.01 * i,
                       digest="0123456789abcdef" * 2, pushed_by="a trainer with a rather long name")
        for i in range(1, 61)
    ]  # fmt: skip
    timings = [
        pb.RankTiming(replica=i // 8, rank=i % 8, stage_start_s=10, stage_stop_s=12 + i / 40, pause_start_s=14,
                      install_stop_s=14.3, pause_stop_s=14.4)
        for i in range(64)
    ]  # fmt: skip
    replicas = [
        pb.ReplicaStatus(replica=i, state=("serving", "fenced", "paused", "joining")[i % 4], version=60, format="nvfp4",
                         layout="trtllm_linear, trtllm_moe", reason="rank 3: no connection" if i % 4 == 1 else "")
        for i in range(8)
    ]  # fmt: skip
    status = pb.StatusReply(version=60, digest="0123456789abcdef" * 2, model="/models/" + "long" * 40, uptime_s=4000,
                            replicas=replicas, lost="version 60 is held by no replica")  # fmt: skip
    return render(status, versions, [pb.DecideReply(version=versions[-1], timings=timings)])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_lays_the_page_out_without_overflow(tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(
        many().replace('http-equiv="refresh"', "")
        + "<script>document.title = document.documentElement.scrollWidth + ' ' + innerWidth</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=1000", f"file://{tmp_path}/page.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert found is not None, done.stderr
    assert int(found[1]) <= int(found[2])
    assert done.stdout.count('class="stage"') >= 16 and "48 more ranks" in done.stdout
