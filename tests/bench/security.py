"""What tokens and TLS cost a push: CPU seconds of trainer and ranks together, paired, with an A/A control in one run.

    python -m tests.bench.security [--rounds N] [--json]

Four services in one process take the same pushes in turns: two without anything (their ratio is the noise of this
measurement), one with tokens, one with tokens and TLS. Each ratio is the median over the rounds of one service's CPU
seconds over the first one's in the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch import authority
from tests.local import local_service
from weight_update.client import Pusher
from weight_update.security import Security, token_line

CASES = ("nothing", "nothing again", "tokens", "tokens and TLS")


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
    plain, with_tokens = Security(), Security(token_file=tokens)
    return [plain, plain, with_tokens, Security(token_file=tokens, tls_dir=folder / "node")]


def measure(rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each round, by case; the first round, which touches fresh pages, is left out."""
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    pushed = model()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        scratch = Path(directory)
        pushed.save_pretrained(scratch / "model")  # type: ignore[operator]
        pushers = []
        for case, security in zip(CASES, securities(scratch), strict=True):
            state = scratch / "state" / case
            state.mkdir(parents=True)
            service = stack.enter_context(local_service(scratch / "model", state, security=security))
            pushers.append(Pusher(service.address, mode="full", security=security))
        for number in range(rounds + 1):
            with torch.no_grad():
                next(iter(pushed.parameters())).view(-1)[:8].add_(1)
            order = [(i + number) % len(CASES) for i in range(len(CASES))]
            for i in order:
                start_s = time.process_time()
                pushers[i].push(pushed)
                if number:
                    seconds[CASES[i]].append(time.process_time() - start_s)
        for pusher in pushers:
            pusher.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measure(options.rounds)
    first = seconds[CASES[0]]
    rows = []
    for case in CASES:
        ratios = sorted(each / base for each, base in zip(seconds[case], first, strict=True))
        low, high = (ratios[int(share * (len(ratios) - 1))] for share in (0.25, 0.75))
        rows.append({"case": case, "cpu_s": statistics.median(seconds[case]), "ratio": statistics.median(ratios)})
        rows[-1] |= {"quartiles": [low, high]}
    if options.json:
        print(json.dumps({"rows": rows, "rounds": options.rounds}))
        return
    for row in rows:
        low, high = row["quartiles"]
        print(f"{row['case']:15s} {row['cpu_s']:.3f} CPU s a push, {row['ratio']:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
