"""Rows of a committed version, taken from the ranks that serve it.

    fetch(ranks_of_one_replica, version, row_start, row_stop, sink)

Each rank streams what it has of the rows through its own door; nothing is gathered. gRPC's flow control holds a rank
back while the sink is slow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from protos import transfuse_pb2 as pb

from .channels import PLAINTEXT
from .chunks import Chunk, check, decode_request
from .errors import MemberError, TransferError
from .security import Security
from .transport import fetch_stream

Rows = npt.NDArray[np.int64]  # one a tensor of the manifest
Sink = Callable[[Chunk], object]


def fetch(
    donors: Sequence[pb.RankSpec],
    version: int,
    row_start: Rows,
    row_stop: Rows,
    sink: Sink,
    security: Security = PLAINTEXT,
) -> None:
    """Rows [row_start[i], row_stop[i]) of every tensor of the manifest from the ranks of one replica.

    sink: takes checked chunks, whose tensors are indices into the manifest, in any order and from several threads.
    VersionError: a rank holds another version, or has just taken one; ask again for the current one. Whatever is
    raised, the sink may have taken some of the rows.
    """
    requests = _shares(donors, version, row_start, row_stop)
    failed = threading.Event()
    with ThreadPoolExecutor(max(1, len(requests)), thread_name_prefix="fetch") as pool:
        for done in [pool.submit(_drain, address, request, sink, failed, security) for address, request in requests]:
            done.result()


def _drain(
    address: str, request: pb.FetchRequest, sink: Sink, failed: threading.Event, security: Security
) -> None:
    try:
        for message in fetch_stream(address, request, security):
            if failed.is_set():
                return
            _take(address, message, sink)
    except BaseException:
        failed.set()
        raise


def _take(address: str, message: bytes, sink: Sink) -> None:
    chunk = decode_request(message)
    if not isinstance(chunk, Chunk):
        raise TransferError(f"{address}: what was fetched holds no rows; install the same release on both ends")
    check(chunk)
    sink(chunk)


def _shares(
    donors: Sequence[pb.RankSpec], version: int, row_start: Rows, row_stop: Rows
) -> list[tuple[str, pb.FetchRequest]]:
    """(address, what it is asked for); no row twice. A rank holds consecutive rows, so what is left is consecutive."""
    requests = []
    num_missing = np.maximum(row_stop - row_start, 0)
    for donor in donors:
        first = np.maximum(row_start, np.array(donor.row_start, np.int64))
        stop = np.maximum(first, np.minimum(row_stop, np.array(donor.row_stop, np.int64)))
        if (stop > first).any():
            request = pb.FetchRequest(version=version, row_start=first.tolist(), row_stop=stop.tolist())
            requests.append((donor.address, request))
        num_missing -= stop - first
    if num_missing.any():
        at = int(np.flatnonzero(num_missing)[0])
        raise MemberError(
            f"version {version}: {abs(int(num_missing[at]))} rows of tensor {at} are held by"
            f" {'no' if num_missing[at] > 0 else 'more than one'} rank of the donor; describe the service again"
        )
    return requests
