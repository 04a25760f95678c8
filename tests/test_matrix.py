"""One cell of tests.bench.matrix, tiny: two trainer ranks to a replica of two, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.matrix import measure, page
from tests.processes import fleet
from tests.tiny import tiny_llama


@pytest.mark.timeout(240)
def test_two_trainer_ranks_send_each_byte_once_to_a_replica_of_two(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    tiny_llama(seed=1).save_pretrained(model_dir)
    with fleet(model_dir, replicas=1, ranks=2) as service:
        row = measure(service, model_dir, 2, 2, 1)
    assert 1.0 <= row.sent_bytes / row.needed_bytes < 1.05  # the wire counts what says of chunks where they go, too
    assert 0 < row.delta_bytes < row.sent_bytes / 2 and 2 <= row.streams <= 4
    assert row.coordinator_cpu_s < row.full_s + row.delta_s
    assert "| 2 | 2 | 1 | 1.0" in page([row])
