"""What tokens, metrics, logs and TLS cost a push: CPU seconds of trainer and ranks, paired, with an A/A control.

    python -m tests.bench.overhead [--rounds N] [--json]

Services in one process take the same full pushes in turns: two without anything (their ratio is the noise of this
measurement), one with tokens, metrics and JSON logs, one with TLS besides. A round pushes to each of them there and
back (A B C D D C B A), so that a drift of the machine cancels out; a ratio is of a round's two pushes over the plain
service's two. Told are the median over the rounds and within what it lies in 95 of 100 redraws of the rounds. Garbage
is collected between the pushes, not within.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch import authority
from service.logs import JsonLines
from tests.bench.seeing import quiet
from tests.local import LocalService, local_service
from weight_update.client import Pusher
from weight_update.security import Security, token_line

CASES = ("nothing", "nothing again", "tokens, metrics, logs", "the same and TLS")
PLAIN = CASES[:2]
REDRAWS = 2000


def model() -> torch.nn.Module:
    """12 million weights: 24 MB of BF16."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def securities(folder: Path) -> list[Security]:
    """One a case; service and trainer share the token file, as on one machine."""
    authority.create(folder)
    authority.issue(folder, ["node"])
    tokens = folder / "tokens"
    tokens.touch(0o600)
    tokens.write_text(token_line("push", "trainer") + token_line("service", "fleet"))
    return [Security(), Security(), Security(token_file=tokens), Security(token_file=tokens, tls_dir=folder / "node")]


def pushed(pusher: Pusher, service: LocalService, case: str, weights: torch.nn.Module) -> float:
    """CPU seconds of one push."""
    gc.collect()
    gc.disable()
    try:
        with quiet(service) if case in PLAIN else nullcontext():
            start_s = time.process_time()
            pusher.push(weights)
            return time.process_time() - start_s
    finally:
        gc.enable()


def measure(rounds: int, log: Path) -> dict[str, list[float]]:
    """CPU seconds of the two pushes of each round, by case; the first rounds, which touch fresh pages, are left out."""
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    weights = model()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        handler = logging.StreamHandler(stack.enter_context(log.open("w")))
        handler.setFormatter(JsonLines())
        logging.getLogger().addHandler(handler)
        stack.callback(logging.getLogger().removeHandler, handler)
        logging.getLogger().setLevel(logging.INFO)
        scratch = Path(directory)
        weights.save_pretrained(scratch / "model")  # type: ignore[operator]
        ends: dict[str, tuple[Pusher, LocalService]] = {}
        for case, security in zip(CASES, securities(scratch), strict=True):
            state = scratch / "state" / case
            state.mkdir(parents=True)
            with_pages = case not in PLAIN
            service = stack.enter_context(
                local_service(scratch / "model", state, security=security, pages=with_pages)
            )
            ends[case] = Pusher(service.address, mode="full", security=security), service
            stack.callback(ends[case][0].close)
        for number in range(-2, rounds):
            with torch.no_grad():
                next(iter(weights.parameters())).view(-1)[:8].add_(1)
            order = random.Random(number).sample(CASES, len(CASES))
            took = dict.fromkeys(CASES, 0.0)
            for case in (*order, *reversed(order)):
                took[case] += pushed(*ends[case], case, weights)
            if number >= 0:
                for case in CASES:
                    seconds[case].append(took[case])
    return seconds


def interval(ratios: Sequence[float]) -> list[float]:
    """Within what the median of such rounds lies, in 95 of 100 redraws."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(REDRAWS))
    return [medians[int(share * (REDRAWS - 1))] for share in (0.025, 0.975)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(options.rounds, Path(folder) / "log.json")
    rows = []
    for case in CASES:
        ratios = [each / base for each, base in zip(seconds[case], seconds[CASES[0]], strict=True)]
        rows.append({"case": case, "cpu_s": statistics.median(seconds[case]) / 2, "ratio": statistics.median(ratios)})
        rows[-1]["within"] = interval(ratios)
    if options.json:
        print(json.dumps({"rows": rows, "rounds": options.rounds}))
        return
    for row in rows:
        low, high = row["within"]
        print(f"{row['case']:22s} {row['cpu_s']:.3f} CPU s a push, {row['ratio']:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
