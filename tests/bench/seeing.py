"""`python -m tests.bench.seeing`: what metrics, logs and the flight recorder cost a push, in CPU-seconds.

One process holds trainer, coordinator and a rank. Pushes are measured in blocks in random order: `off` twice, which is
the A/A control, and `on`: phases and bytes counted, JSON logs written to a file. `scraped` adds a scrape of the rank's
metrics after every push, `record` the flight recorder. Ratios are medians over blocks of CPU-seconds of this process;
the control says what noise alone makes of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.logs import JsonLines
from tests.local import LocalService, local_service
from tests.test_cli import byte_tokenizer
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.flight import Recorder

BLOCKS = 40


@contextmanager
def quiet(service: LocalService) -> Iterator[None]:
    """Nothing is counted and nothing is logged."""
    metrics = [rank.metrics for rank in service.ranks]
    listeners, service.shell._watchers._listeners = service.shell._watchers._listeners, []
    for each in metrics:
        each.add = each.observe = lambda *args: None  # type: ignore[method-assign]
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        service.shell._watchers._listeners = listeners
        for each in metrics:
            del each.add, each.observe


def pushed(pusher: Pusher, model: nn.Module, service: LocalService, how: str, records: Path) -> float:
    """CPU-seconds of one full push."""
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    (rank,) = service.ranks
    rank.recorder = Recorder(records, "0.0") if how == "record" else None
    start_s = time.process_time()
    if how in ("off", "control"):
        with quiet(service):
            pusher.push(model)
    else:
        pusher.push(model)
        if how == "scraped":
            rank.metrics.text()
    return time.process_time() - start_s


def measure(service: LocalService, model: nn.Module, blocks: int, records: Path) -> dict[str, Any]:
    """Median ratios over `off`, and their quartiles."""
    names = ["off", "control", "on", "scraped", "record"]
    took: dict[str, list[float]] = {name: [] for name in names}
    pusher = Pusher(service.address, mode="full")
    for block in range(blocks + 3):
        for how in random.Random(block).sample(names, len(names)):
            seconds = pushed(pusher, model, service, how, records)
            if block >= 3:  # the first ones warm up
                took[how].append(seconds)
    pusher.close()
    found: dict[str, Any] = {"cpu_s_off": statistics.median(took["off"])}
    for name in names[1:]:
        ratios = [each / off for each, off in zip(took[name], took["off"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        found[name] = {"median": round(quartiles[1], 4), "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)]}
    return found


def main() -> None:
    """One JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--layers", type=int, default=2)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log.json", "w") as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JsonLines())
        logging.getLogger().addHandler(handler)
        logging.getLogger().setLevel(logging.INFO)
        model = tiny_llama(seed=0, num_layers=asked.layers)
        model_dir = save(model, Path(folder) / "model")
        byte_tokenizer().save(str(model_dir / "tokenizer.json"))
        with local_service(model_dir, Path(folder) / "state", pages=True) as service:
            num_bytes = sum(spec.num_bytes for spec in service.shell.manifest.tensors)
            found = measure(service, model, asked.blocks, Path(folder) / "records")
    sys.stdout.write(json.dumps({"blocks": asked.blocks, "bytes": num_bytes} | found) + "\n")


if __name__ == "__main__":
    main()
