"""The ranks as the coordinator knows them: where they are, what they hold, what they said last, how it meets them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.channels import PLAINTEXT, Channels
from weight_update.digest import Digests, total, unlike
from weight_update.errors import DigestError, MemberError, VersionError, WeightUpdateError, raise_all
from weight_update.manifest import Manifest
from weight_update.messages import Decision, Donor, MemberId, Send
from weight_update.security import Security
from weight_update.store import StoredVersion
from weight_update.transaction import of_held, replica_sums
from weight_update.transport import call
from weight_update.versions import VersionIndex

from .members import SENDERS, STEP_TIMEOUT_S, Around, MemberSpec

MEET_RETRY_S = 0.5


class Roster:
    """Connections to the ranks, and what is known of each. epoch: of the coordinator."""

    def __init__(self, epoch: int, security: Security = PLAINTEXT) -> None:
        self._epoch = epoch
        self.security = security
        self._channels = Channels(security)
        self._addresses: dict[MemberId, str] = {}
        self._guard = threading.Lock()  # guards what is asked for; nothing blocks under it
        self.coordinator = ""  # host:port of Control, once it listens
        self.states: dict[MemberId, pb.HelloReply] = {}
        self.specs: dict[MemberId, MemberSpec] = {}
        self.asked: set[int] = set()  # replicas that an operator wants and that are not here yet

    def hello(self, address: str, *, brief: bool = False) -> pb.HelloReply | WeightUpdateError:
        """Greet whoever has this address: its manifest and rows, or why there is no answer. brief: ask how it is."""
        stub = self._channels.stub(address, pb_grpc.MemberStub)
        request = pb.HelloRequest() if brief else pb.HelloRequest(epoch=self._epoch, round=self._epoch << 32)
        try:
            reply: pb.HelloReply = call(stub.Hello, request, timeout_s=STEP_TIMEOUT_S, where=address)
        except WeightUpdateError as error:
            return error
        return reply

    def meet(self, addresses: Sequence[str], pool: ThreadPoolExecutor, *, all_of_them: bool) -> list[pb.HelloReply]:
        """Greet every member. A restart goes on with those that answer, once one does."""
        while True:
            found = dict(zip(addresses, pool.map(self.hello, addresses), strict=True))
            replies = {address: each for address, each in found.items() if isinstance(each, pb.HelloReply)}
            failed = [error for error in found.values() if isinstance(error, WeightUpdateError)]
            if failed and all_of_them:
                raise failed[0]
            if replies:
                break
            time.sleep(MEET_RETRY_S)
        specs = [self.learn(address, reply) for address, reply in replies.items()]
        require_one_manifest(specs, [reply.manifest.fingerprint for reply in replies.values()])
        return list(replies.values())

    def learn(self, address: str, reply: pb.HelloReply) -> MemberSpec:
        """What a member said in its first answer holds from now on."""
        spec = MemberSpec.of(address, reply)
        self.specs[spec.id], self.states[spec.id] = spec, reply
        self.asked.discard(spec.id.replica)
        self.connect(spec.id, address)
        return spec

    def connect(self, member: MemberId, address: str) -> None:
        """From now on this member is at this address, whether it answers or not."""
        self._addresses[member] = address

    def ask(self, taken: Iterable[int]) -> int:
        """The number of one more replica, which is to be started."""
        with self._guard:
            number = max({*taken, *self.asked}, default=-1) + 1
            self.asked.add(number)
            return number

    def stub(self, member: MemberId) -> Any:
        """The process that has the member's address now, and none that comes after it."""
        return self._channels.stub(self._addresses[member], pb_grpc.MemberStub)

    def around(self, send: Send) -> Around:
        """What a member is told beside its step."""
        source = send.source
        donors = [
            spec.spec
            for member, spec in self.specs.items()
            if isinstance(source, Donor) and member.replica == source.replica
        ]
        peers = self._peers(send.member) if send.step == "open" else ()
        rows = None if send.tensors is None else self.specs[send.member].rows
        return Around(donors=donors, coordinator=self.coordinator, peers=peers, rows=rows)

    def _peers(self, member: MemberId) -> list[str]:
        """Where the other ranks are that own the same rows."""
        own = self.specs[member]
        return [each.address for each in self.specs.values() if each is not own and each.rows_hash == own.rows_hash]

    def step(self, member: MemberId, step: str, version: int = 0) -> Any:
        """One step beside the protocol, in the caller's thread."""
        send = Send(
            member=member,
            step=step,
            epoch=self._epoch,
            round=self._epoch << 32,
            transaction=0,
            version=version,
            token=self.states[member].token,
        )
        return SENDERS[step](self.stub(member), send, Around()).result

    def close(self) -> None:
        """Close all connections."""
        self._channels.close()


def require_one_manifest(members: Sequence[MemberSpec], fingerprints: Sequence[int]) -> None:
    """All ranks hold the same manifest, or MemberError names those that do not."""
    first = fingerprints[0]
    problems = [
        f"{member.id} holds another manifest than {members[0].id}"
        for member, fingerprint in zip(members, fingerprints, strict=True)
        if fingerprint != first
    ]
    raise_all(MemberError, "the ranks do not serve one model", problems)


def differing(
    found: Mapping[MemberId, Digests], committed: Digests, manifest: Manifest, held: Callable[[int], np.ndarray]
) -> list[str]:
    """Tensors, by replica, whose digests are not the committed ones. held: which tensors a replica holds."""
    return [
        f"replica {replica}: {manifest.tensors[i].name}"
        for replica, each in replica_sums(found).items()
        for i in np.flatnonzero(unlike(each, of_held(committed, held(replica))))
    ]


def first_version(
    digests: Mapping[MemberId, Digests],
    specs: Mapping[MemberId, MemberSpec],
    manifest: Manifest,
    source: str,
    index: VersionIndex,
) -> Decision:
    """Number what the members loaded, if all replicas agree on its digests, as far as they hold the same."""
    formats = {member.replica: spec.format for member, spec in specs.items()}
    agreed, known, problems = np.zeros((len(manifest.tensors), 2), np.uint64), np.zeros(len(manifest.tensors), bool), []
    for replica, each in replica_sums(digests).items():
        held = manifest.held_by(formats[replica])
        agreed[held & ~known] = each[held & ~known]
        known |= held
        differs = np.flatnonzero(unlike(each, of_held(agreed, held)))
        problems += [f"{manifest.tensors[i].name}: replica {replica} differs from those before it" for i in differs]
    raise_all(DigestError, f"the replicas loaded different bytes of {source}", problems)
    return Decision(
        version=index.last_version() + 1,
        base_version=0,
        transaction=0,
        push_id=f"load-{index.epoch}",
        pushed_by=f"loaded from {source}",
        created_s=time.time(),
        digest=total(agreed),
        digests=agreed,
        num_tensors=len(manifest.tensors),
        wire_bytes=0,
        logical_bytes=sum(2 * math.prod(row.shape) for row in manifest.parameters),
        seconds=0.0,
    )


def stored_version(stored: StoredVersion, manifest: Manifest) -> Decision:
    """The decision of a version that only its store remembers."""
    if stored.fingerprint != f"{manifest.fingerprint:016x}":
        raise VersionError(
            f"version {stored.version} of the store is of another model, format or tensor list; name another --store"
        )
    lanes = [[int(digest[:16], 16), int(digest[16:], 16)] for digest in stored.digests]
    digests = np.array(lanes, np.uint64).reshape(-1, 2)
    return Decision(
        version=stored.version,
        base_version=0,
        transaction=0,
        push_id=f"store-{stored.version}",
        pushed_by=stored.pushed_by,
        created_s=stored.created_s,
        digest=stored.digest,
        digests=digests,
        num_tensors=len(manifest.tensors),
        wire_bytes=0,
        logical_bytes=sum(2 * math.prod(row.shape) for row in manifest.parameters),
        seconds=0.0,
        step=stored.step,
    )
