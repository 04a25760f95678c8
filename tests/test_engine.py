"""The generation engine: gloo ranks, one in this process and the others spawned, and a tiny random Llama."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_ranks import (
    EOS,
    PROMPTS,
    VOCAB,
    WAIT_S,
    Peer,
    Rank,
    Stuck,
    by_sequence,
    plain_greedy,
    tiny,
    token_ids,
    wait_until,
)

from service.engine import Engine
from service.requests import TokenOut
from service.sampling import Decoder, pick
from weight_update.errors import MemberError

Build = Callable[..., tuple[Rank, Peer]]


@pytest.fixture(scope="module")
def peers() -> Iterator[list[Peer]]:
    """Two processes for all tests: starting one costs seconds."""
    peers = [Peer(), Peer()]
    for peer in peers:
        peer.answer()
    yield peers
    for peer in peers:
        peer.kill()


@pytest.fixture
def build(peers: list[Peer], tmp_path: Path) -> Iterator[Build]:
    """Builds a replica of serving ranks, rank `here` in this process, with these options of rank and engine."""
    replicas: list[tuple[Rank, list[Peer]]] = []

    def build(*, here: int = 0, world: int = 2, **options: Any) -> tuple[Rank, Peer]:
        options = {"rendezvous": f"file://{tmp_path}/store", "world": world, **options}
        others = [peer for peer in peers if peer.process.is_alive()][: world - 1]
        assert len(others) == world - 1, "an earlier test lost a process"
        for rank, peer in zip((rank for rank in range(world) if rank != here), others, strict=True):
            peer.begin("build", rank, **options)
        try:
            replicas.append((Rank(here, **options), others))
        except BaseException:
            for peer in others:  # theirs will not end either, and its answer would come too late
                peer.kill()
            raise
        for peer in others:
            peer.answer()
        return replicas[-1][0], others[0]

    yield build
    for built, others in replicas:
        alive = [peer for peer in others if peer.process.is_alive()]
        for peer in alive:
            peer.begin("close")
        built.close()
        for peer in alive:
            peer.answer()


def test_a_batch_of_prompts_of_many_lengths_generates_what_a_plain_greedy_loop_does(build: Build) -> None:
    leader, peer = build()
    tokens = list(leader.engine.submit(PROMPTS, 12, temperature=0, ignore_eos=True))
    assert token_ids(tokens) == [plain_greedy(tuple(prompt), 12) for prompt in PROMPTS]
    for sequence in by_sequence(tokens).values():
        assert [token.last for token in sequence] == [False] * 11 + [True]
        assert {token.version for token in sequence} == {1}
        assert [token.kv_versions for token in sequence] == [()] * 11 + [(1,)]
    assert (leader.engine.num_sequences, peer.ask("num_sequences")) == (0, 0)


def test_a_sequence_ends_with_the_end_token_unless_that_is_ignored(build: Build) -> None:
    leader, _ = build()
    free = token_ids(leader.engine.submit(PROMPTS * 6, 40, seed=3, ignore_eos=True))
    assert any(EOS in ids for ids in free)
    tokens = list(leader.engine.submit(PROMPTS * 6, 40, seed=3))
    assert token_ids(tokens) == [ids[: ids.index(EOS) + 1] if EOS in ids else ids for ids in free]
    assert all(sequence[-1].last for sequence in by_sequence(tokens).values())


def test_log_probabilities_are_those_of_a_whole_forward_at_the_requested_temperature(build: Build) -> None:
    leader, _ = build()
    model = tiny(1)
    for temperature in (0.0, 0.7, 1.0):
        tokens = by_sequence(leader.engine.submit(PROMPTS, 8, temperature=temperature, seed=11, ignore_eos=True))
        for index, prompt in enumerate(PROMPTS):
            ids = [token.token_id for token in tokens[index]]
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits / (temperature or 1.0), -1)[range(8), ids]
            torch.testing.assert_close(torch.tensor([token.logprob for token in tokens[index]]), expected)


def test_sampling_repeats_with_its_seed_whatever_runs_beside_it(build: Build) -> None:
    leader, _ = build()

    def run(seed: int) -> list[TokenOut]:
        return sorted(leader.engine.submit(PROMPTS, 16, seed=seed, ignore_eos=True), key=lambda token: token.sequence)

    alone = run(7)
    beside = leader.engine.submit(PROMPTS * 4, 400, seed=1, ignore_eos=True)
    next(beside)
    assert run(7) == alone
    beside.cancel()
    assert token_ids(run(8)) != token_ids(alone)
    repeated = token_ids(leader.engine.submit([PROMPTS[0]] * 4, 16, seed=7, ignore_eos=True))
    assert len({tuple(ids) for ids in repeated}) == 4, "sequences of one request draw independently"


def test_a_pause_stops_both_ranks_after_the_same_step_and_tokens_go_on_with_the_new_version(build: Build) -> None:
    leader, peer = build()
    stream = leader.engine.submit(PROMPTS[:2], 60, temperature=0, ignore_eos=True)
    tokens = [next(stream) for _ in range(6)]
    step = leader.engine.request_pause()
    assert leader.engine.wait_paused(WAIT_S) and peer.ask("wait_paused", WAIT_S)
    assert (leader.engine.step, peer.ask("step")) == (step, step)
    assert (leader.engine.state, peer.ask("state")) == ("paused", "paused")
    time.sleep(0.1)
    assert (leader.engine.step, peer.ask("step")) == (step, step)

    leader.engine.resume(2)
    assert (leader.engine.version, peer.ask("version")) == (2, 2)
    assert leader.engine.wait_resumed(2, WAIT_S) and peer.ask("wait_resumed", 2, WAIT_S)
    assert (leader.engine.state, peer.ask("state")) == ("serving", "serving")
    sequences = by_sequence([*tokens, *stream])

    # Reference: the same model object over the same KV, its weights replaced after `step` forwards.
    new_state = tiny(2).state_dict()
    for index in (0, 1):
        model, ids, cache = tiny(1), list(PROMPTS[index]), None
        inputs = ids
        for forward in range(60):
            if forward == step:
                model.load_state_dict(new_state)
            output = model(input_ids=torch.tensor([inputs]), past_key_values=cache, use_cache=True)
            cache, inputs = output.past_key_values, [int(output.logits[0, -1].argmax())]
            ids += inputs
        assert [token.token_id for token in sequences[index]] == ids[len(PROMPTS[index]) :]
        assert [token.version for token in sequences[index]] == [1] * step + [2] * (60 - step)
        assert sequences[index][-1].kv_versions == (1, 2)
    fresh = list(leader.engine.submit([PROMPTS[3]], 5, temperature=0, ignore_eos=True))
    assert token_ids(fresh) == [plain_greedy(tuple(PROMPTS[3]), 5, seed=2)]
    assert fresh[-1].kv_versions == (2,)


def commit_after_some_tokens(leader: Rank, peer: Peer, prompts: list[list[int]], **options: Any) -> list[TokenOut]:
    """The tokens of a request in whose midst version 2 of the weights came."""
    stream = leader.engine.submit(prompts, 40, ignore_eos=True, **options)
    tokens = [next(stream) for _ in range(3 * len(prompts))]
    leader.engine.request_pause()
    assert leader.engine.wait_paused(WAIT_S) and peer.ask("wait_paused", WAIT_S)
    leader.engine.resume(2)
    return [*tokens, *stream]


def test_recompute_goes_on_as_if_the_new_weights_had_read_everything(build: Build) -> None:
    leader, peer = build(on_commit="recompute")
    sequences = by_sequence(commit_after_some_tokens(leader, peer, PROMPTS, temperature=0))
    for index, prompt in enumerate(PROMPTS):
        tokens = sequences[index]
        old = [token.token_id for token in tokens if token.version == 1]
        assert 0 < len(old) < 40
        assert old == plain_greedy(tuple(prompt), len(old))
        # Reference: no KV at all, the new weights read the prompt and all that the old ones wrote.
        new = plain_greedy((*prompt, *old), 40 - len(old), seed=2)
        assert [token.token_id for token in tokens if token.version == 2] == new
        assert [token.position for token in tokens] == list(range(40))
        assert tokens[-1].kv_versions == (2,)


def test_restart_begins_again_from_the_prompts_with_the_same_seeds(build: Build) -> None:
    leader, peer = build(on_commit="restart")
    sequences = by_sequence(commit_after_some_tokens(leader, peer, PROMPTS, temperature=1.0, seed=9))
    fresh = by_sequence(leader.engine.submit(PROMPTS, 40, temperature=1.0, seed=9, ignore_eos=True))
    for index in range(len(PROMPTS)):
        tokens = sequences[index]
        begin = max(i for i, token in enumerate(tokens) if token.position == 0)
        assert begin > 0 and {token.version for token in tokens[:begin]} == {1}
        assert tokens[begin:] == fresh[index]
        assert tokens[-1].kv_versions == (2,)


def test_a_pause_while_idle_holds_new_requests_until_resume_and_can_be_undone_without_a_refresh(build: Build) -> None:
    leader, peer = build(keepalive_s=0.05)
    assert not leader.engine.wait_paused(0.05)
    leader.engine.request_pause()
    assert leader.engine.request_pause() == 0
    assert leader.engine.wait_paused(WAIT_S) and peer.ask("wait_paused", WAIT_S)
    stream = leader.engine.submit([PROMPTS[0]], 4, temperature=0, ignore_eos=True)
    cpu_s = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - cpu_s < 0.05, "waits without spinning"
    assert (leader.engine.step, leader.engine.num_sequences, leader.engine.state) == (0, 1, "paused")
    assert not peer.ask("wait_resumed", 1, 0.0)
    leader.engine.resume(1, refresh=False)
    assert token_ids(stream) == [plain_greedy(tuple(PROMPTS[0]), 4)]
    assert leader.refreshes == 0


def test_a_resume_that_stays_paused_refreshes_and_serves_nothing(build: Build) -> None:
    leader, peer = build()
    leader.engine.request_pause()
    assert leader.engine.wait_paused(WAIT_S)
    stream = leader.engine.submit([PROMPTS[0]], 4, temperature=0, ignore_eos=True)
    leader.engine.resume(2, stay_paused=True)
    assert leader.engine.wait_resumed(2, WAIT_S) and peer.ask("wait_resumed", 2, WAIT_S)
    assert leader.engine.wait_paused(WAIT_S) and peer.ask("wait_paused", WAIT_S)
    assert (leader.engine.state, leader.engine.version, leader.engine.step) == ("paused", 2, 0)
    leader.engine.resume(2, refresh=False)
    assert token_ids(stream) == [plain_greedy(tuple(PROMPTS[0]), 4, seed=2)]
    assert leader.refreshes == 1


def test_a_model_whose_forward_is_collective_runs_as_often_on_a_rank_without_sequences(build: Build) -> None:
    leader, peer = build(sharded=True, collective_forward=True)
    # 3 sequences in 2 requests: ranks hold 2 and 1 batches, then 1 and 0, then none and a new version.
    streams = [leader.engine.submit([PROMPTS[0]], 4, temperature=0, ignore_eos=True)]
    streams += [leader.engine.submit(PROMPTS[1:3], 9, temperature=0, ignore_eos=True)]
    assert [token_ids(stream) for stream in streams] == [
        [plain_greedy(tuple(PROMPTS[0]), 4)],
        [plain_greedy(tuple(prompt), 9) for prompt in PROMPTS[1:3]],
    ]
    assert (leader.engine.state, peer.ask("state")) == ("serving", "serving")


def test_requests_beyond_the_batch_wait_their_turn(build: Build) -> None:
    leader, _ = build(max_batch=5)
    streams = [leader.engine.submit(PROMPTS, 6, temperature=0, ignore_eos=True) for _ in range(3)]
    assert leader.engine.num_sequences > 5
    for stream in streams:
        assert token_ids(stream) == [plain_greedy(tuple(prompt), 6) for prompt in PROMPTS]


def test_a_cancelled_a_closed_and_an_abandoned_stream_free_their_sequences(build: Build) -> None:
    leader, peer = build(max_tokens=100_000)  # more than can end by itself while we wait
    stream = leader.engine.submit(PROMPTS, 90_000, ignore_eos=True)
    next(stream)
    assert leader.engine.num_sequences == 5
    stream.cancel()
    assert len(list(stream)) < 5 * 90_000
    with leader.engine.submit(PROMPTS, 90_000, ignore_eos=True) as closed:
        next(closed)
    abandoned = leader.engine.submit(PROMPTS, 90_000, ignore_eos=True)
    next(abandoned)
    del abandoned
    gc.collect()
    wait_until(lambda: leader.engine.num_sequences == 0)
    wait_until(lambda: peer.ask("num_sequences") == 0)
    assert token_ids(leader.engine.submit([PROMPTS[0]], 4, temperature=0, ignore_eos=True)) == [
        plain_greedy(tuple(PROMPTS[0]), 4)
    ]


def test_bad_requests_are_refused_with_all_their_problems_and_only_the_leader_takes_any(build: Build) -> None:
    leader, peer = build(max_batch=3, max_tokens=20)
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"prompts": []}, ["no prompts"]),
        ({"prompts": [[1], []]}, ["prompt 1 is empty"]),
        ({"prompts": [[1] * 17]}, ["prompt 0 is too long: 17 tokens, max_new_tokens leaves 16 of 20"]),
        ({"prompts": [[1, 97, -1]]}, ["prompt 0: token ids outside 0..96: [97, -1]"]),
        ({"prompts": [[1]] * 4}, ["expected at most 3, got 4"]),
        ({"prompts": [[1]], "max_new_tokens": 0}, ["max_new_tokens: expected 1 to 19, got 0"]),
        ({"prompts": [[1]], "temperature": -1.0}, ["temperature: expected 0 or"]),
        ({"prompts": [[1]], "temperature": math.nan}, ["temperature: expected 0 or"]),
        ({"prompts": [[], [99]], "temperature": 1e-9}, ["3 problem", "temperature", "prompt 0", "prompt 1"]),
    ]
    for request, texts in cases:
        with pytest.raises(ValueError) as caught:
            leader.engine.submit(**{"max_new_tokens": 4, **request})
        assert all(text in str(caught.value) for text in texts), str(caught.value)
    for name, args in {"submit": ([[1]], 4), "request_pause": (), "resume": (2,)}.items():
        with pytest.raises(ValueError, match="expected rank 0 of the replica, got rank 1"):
            peer.ask(name, *args)
    assert (leader.engine.state, leader.engine.num_sequences) == ("serving", 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_in_a_step_fails_the_replica_and_every_caller_hears_why(build: Build, rank: int) -> None:
    leader, peer = build(break_at={rank: 5})
    streams = [leader.engine.submit(PROMPTS[:2], 40, ignore_eos=True) for _ in range(2)]
    for stream in streams:
        with pytest.raises(MemberError, match=f"rank {rank}: RuntimeError: this forward broke"):
            list(stream)
    reason = f"rank {rank}: RuntimeError: this forward broke"
    wait_until(lambda: peer.ask("state").startswith("failed") and leader.engine.state.startswith("failed"))
    assert reason in leader.engine.state and reason in peer.ask("state")
    for call in (leader.engine.request_pause, leader.engine.wait_paused, lambda: leader.engine.submit([[1]], 4)):
        with pytest.raises(MemberError, match="this forward broke"):
            call()
    with pytest.raises(MemberError, match="this forward broke"):
        peer.ask("wait_paused")


def test_a_refresh_that_fails_surfaces_in_resume(build: Build) -> None:
    leader, _ = build()
    stream = leader.engine.submit(PROMPTS[:1], 400, ignore_eos=True)
    leader.engine.resume(2)
    leader.engine.resume(3)
    with pytest.raises(MemberError, match="rank 0: RuntimeError: this refresh broke; rank 1: RuntimeError"):
        leader.engine.resume(4)
    with pytest.raises(MemberError, match="this refresh broke"):
        list(stream)
    assert leader.engine.version == 3


def test_stop_ends_both_ranks_and_tells_whoever_still_reads(build: Build) -> None:
    leader, peer = build()
    stream = leader.engine.submit(PROMPTS, 400, ignore_eos=True)
    next(stream)
    leader.engine.stop()
    peer.ask("stop")
    assert (leader.engine.state, peer.ask("state")) == ("stopped", "stopped")
    with pytest.raises(MemberError, match="stopped"):
        list(stream)
    with pytest.raises(MemberError, match="stop"):
        leader.engine.submit([[1]], 4)


def test_the_most_likely_token_is_never_missed_and_an_impossible_one_never_drawn() -> None:
    logits = torch.full((64, VOCAB), -math.inf)
    logits[:, [3, 50]] = 0.0
    generators = [torch.Generator().manual_seed(row) for row in range(64)]
    tokens, logprobs = pick(logits, 1.0, generators)
    assert set(tokens.tolist()) == {3, 50}
    torch.testing.assert_close(logprobs, torch.full((64,), -math.log(2.0)))
    with pytest.raises(FloatingPointError, match="not finite"):
        pick(torch.full((1, VOCAB), math.nan), 0.0, generators[:1])


def test_draws_follow_the_distribution_they_are_drawn_from() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125]))
    generators = [torch.Generator().manual_seed(row) for row in range(4096)]
    for temperature, expected in ((1.0, [0.5, 0.25, 0.125, 0.125]), (0.5, [0.7273, 0.1818, 0.0455, 0.0455])):
        tokens, _ = pick(logits.repeat(4096, 1), temperature, generators)
        shares = torch.bincount(tokens, minlength=4) / 4096
        torch.testing.assert_close(shares, torch.tensor(expected), atol=0.03, rtol=0)


def test_stop_returns_even_from_a_forward_that_does_not_and_frees_its_readers() -> None:
    model = Stuck()
    decoder = Decoder(model, eos_ids=[], on_refresh=lambda: None)
    engine = Engine(decoder, group=None, rank=0, world=1, version=1)
    with pytest.raises(MemberError, match="stopped"):
        engine.submit([[1]], 4)
    engine.start()
    stream = engine.submit([[1]], 4)
    assert model.entered.wait(WAIT_S)
    engine.stop(timeout_s=0.1)
    with pytest.raises(MemberError, match=r"engine thread of rank 0 ran on 0\.1 s after stop"):
        list(stream)
    model.held.set()


def test_a_replica_of_one_rank_needs_no_process_group() -> None:
    model = tiny(1)
    decoder = Decoder(model, eos_ids=[], on_refresh=lambda: model.load_state_dict(tiny(2).state_dict()))
    engine = Engine(decoder, group=None, rank=0, world=1, version=1)
    engine.start()
    assert token_ids(engine.submit([PROMPTS[0]], 4, temperature=0)) == [plain_greedy(tuple(PROMPTS[0]), 4)]
    engine.request_pause()
    assert engine.wait_paused(WAIT_S)
    engine.resume(2)
    assert token_ids(engine.submit([PROMPTS[0]], 4, temperature=0)) == [plain_greedy(tuple(PROMPTS[0]), 4, seed=2)]
    engine.stop()
    assert engine.state == "stopped"


def test_a_dead_rank_fails_the_leader_and_the_other_ranks_at_once(build: Build, peers: list[Peer]) -> None:
    leader, survivor = build(world=3)
    stream = leader.engine.submit(PROMPTS[:3], 400, ignore_eos=True)
    next(stream)
    peers[1].kill()
    started_s = time.monotonic()
    with pytest.raises(MemberError, match="rank 2: no longer reached"):
        list(stream)
    wait_until(lambda: survivor.ask("state") == leader.engine.state)
    assert time.monotonic() - started_s < WAIT_S / 2


def test_a_dead_leader_fails_its_followers_at_once(build: Build) -> None:
    follower, leader = build(here=1)
    leader.kill()
    started_s = time.monotonic()
    with pytest.raises(MemberError, match="rank 1, step 0: "):
        follower.engine.wait_paused(WAIT_S)
    assert time.monotonic() - started_s < WAIT_S / 2
