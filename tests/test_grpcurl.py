"""The calls of docs/operations/grpcurl.md, by a client that knows nothing but what reflection tells."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.local import LocalService, local_service
from tests.test_cli import byte_tokenizer
from tests.tiny import save, tiny_llama

PAGE = Path(__file__).parents[1] / "docs" / "operations" / "grpcurl.md"
COMMANDS = [shlex.split(line) for line in PAGE.read_text().splitlines() if line.startswith("grpcurl ")]
ADDRESS = "127.0.0.1:7464"  # of the page

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of the reflection client


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    model_dir = save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))
    byte_tokenizer().save(str(model_dir / "tokenizer.json"))
    with local_service(model_dir, tmp_path_factory.mktemp("state")) as running:
        yield running


def run(address: str, command: list[str]) -> list[dict[str, Any]]:
    """What grpcurl would print: every answer as JSON."""
    assert command[:2] == ["grpcurl", "-plaintext"] and ADDRESS in command
    asked = json.loads(command[command.index("-d") + 1]) if "-d" in command else {}
    service, method = command[-1].split("/")
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert service in set(database.get_services())
        pool = DescriptorPool(database)
        found = pool.FindServiceByName(service).FindMethodByName(method)
        request = json_format.ParseDict(asked, GetMessageClass(found.input_type)())
        call = channel.unary_stream(
            f"/{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )
        return [json_format.MessageToDict(each) for each in call(request, timeout=30)]


def test_the_page_has_ten_calls_each_of_another_method() -> None:
    assert len({command[-1] for command in COMMANDS}) == len(COMMANDS) == 10


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1].rpartition(".")[2])
def test_a_call_of_the_page_is_answered(service: LocalService, command: list[str]) -> None:
    answers = run(service.address, command)
    method = command[-1].rpartition("/")[2]
    wanted = {
        "Status": lambda: answers[0]["digest"] == service.shell.index.decision().digest,
        "Check": lambda: answers == [{"status": "SERVING"}],
        "Versions": lambda: [each["version"] for each in answers[0]["versions"]] == ["1"],
        "Describe": lambda: len(answers[0]["manifest"]["tensors"]) == len(service.shell.manifest.tensors),
        "Reread": lambda: answers[-1]["outcome"]["ok"] is True,
        "Drain": lambda: answers == [{"replicas": [0]}],
        "Abort": lambda: answers == [{}],  # false is left out
    }
    assert wanted.get(method, lambda: len(answers) == 1)()


def test_a_rank_s_reflection_knows_control_too(service: LocalService) -> None:
    with pytest.raises(grpc.RpcError, match=r"the coordinator is at|heard from no coordinator"):
        run(service.ranks[0].address, COMMANDS[0])


def test_a_wrong_call_of_the_page_would_be_seen(service: LocalService) -> None:
    wrong = [re.sub("share", "portion", part) for part in next(c for c in COMMANDS if c[-1].endswith("Reread"))]
    with pytest.raises(json_format.ParseError, match="portion"):
        run(service.address, wrong)
