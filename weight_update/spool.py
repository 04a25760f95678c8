"""A version on its way into the store: rows as they arrive, in a file that goes with its process.

A replica gives its rows away as fast as they can be taken, and may go on to the next version; what is slow, comparing
and writing, is done from here. On the disk of the store, so that no memory is needed for it.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from quant.specs import TensorSpec

from .chunks import Chunk
from .store_files import reporting


class Spool:
    """Tensors one after the other in an unnamed file. The disk is asked for all of it at once."""

    def __init__(self, directory: Path, tensors: Sequence[TensorSpec]) -> None:
        self._tensors = tensors
        self._at = np.concatenate([[0], np.cumsum([spec.num_bytes for spec in tensors], dtype=np.int64)])
        self._what = f"{directory}: no room to take a version of {self._at[-1]} bytes"
        with reporting(self._what):
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by __exit__
            try:
                self._reserve(int(self._at[-1]))
            except OSError:
                self._file.close()
                raise

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def place(self, chunk: Chunk) -> None:
        """Rows by tensor of the manifest; any thread, any order."""
        assert isinstance(chunk.payload, memoryview)  # what is fetched comes in the chunks
        at = 0
        with reporting(self._what):
            for tensor, offset, length in zip(
                chunk.tensor.tolist(), chunk.offset.tolist(), chunk.length.tolist(), strict=True
            ):
                self._write(chunk.payload[at : at + length], int(self._at[tensor]) + offset)
                at += length

    def rows(self, tensor: int) -> Tensor:
        """All rows of one tensor, uint8 [rows, row_bytes], in memory of its own."""
        spec = self._tensors[tensor]
        data = np.empty(spec.num_bytes, np.uint8)
        view, done = data.data, 0
        with reporting(self._what):
            while done < len(view):
                count = os.preadv(self._file.fileno(), [view[done:]], int(self._at[tensor]) + done)
                if not count:
                    raise OSError(errno.EIO, f"{spec.name} ends after {done} bytes")
                done += count
        return torch.from_numpy(data).view(spec.num_rows, spec.row_bytes)

    def _write(self, data: memoryview, at: int) -> None:
        while data:
            count = os.pwrite(self._file.fileno(), data, at)
            data, at = data[count:], at + count

    def _reserve(self, num_bytes: int) -> None:
        if not num_bytes:
            return
        try:
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # of file systems that cannot promise room
                raise
