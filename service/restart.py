"""What a replica loads where no other can fill it: the newest version of the store, or else the model's own weights."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from weight_update.errors import DigestError, StoreError
from weight_update.store import Store, StoredVersion, stored_versions

log = logging.getLogger(__name__)

WHOLE = ".whole-"  # a version that is stored as changes, written out in full to be loaded


class Weights:
    """model: folder or file of the weights that were there before any push."""

    def __init__(self, model: str, store_dir: Path | None) -> None:
        self._model, self._directory = model, store_dir
        self.loaded: StoredVersion | None = None  # what `source` named last

    def source(self) -> str:
        """A checkpoint to load. What is stored is read and compared before; a damaged version is passed over, and said
        so: the coordinator then knows that what it committed is not there."""
        self.loaded = None
        for record in reversed(stored_versions(self._directory) if self._directory is not None else []):
            try:
                folder = self._folder(record)
            except (DigestError, StoreError) as error:
                log.error("version %d of the store is passed over: %s", record.version, error)
                continue
            self.loaded = record
            return str(folder)
        return self._model

    def _folder(self, record: StoredVersion) -> Path:
        assert self._directory is not None
        store = Store.existing(self._directory, record.version)
        if not record.base:
            store.check(record.version)
            return store.path(record.version)
        whole = self._directory / f"{WHOLE}v{record.version:08d}"
        for old in self._directory.glob(f"{WHOLE}*"):
            if old != whole:
                shutil.rmtree(old, ignore_errors=True)
        if not whole.exists():
            store.export(record.version, whole)
        return whole
