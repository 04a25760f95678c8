"""Ranks of a tiny random Llama for the engine's tests, here and in other processes, and a plain greedy reference."""

from __future__ import annotations

import datetime
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from service.engine import Engine
from service.requests import TokenOut
from service.sampling import Decoder

VOCAB = 97
EOS = 5
PROMPTS = [[1, 2, 3, 4], [7, 8], [9, 10, 11, 12, 13, 14, 15], [96], [20, 21, 22]]
WAIT_S = 30.0  # for what takes milliseconds on an idle machine
START_S = 120.0  # for a process to import what it needs


def tiny(seed: int) -> LlamaForCausalLM:
    """The weights of version `seed`. Large ones, so that the logits of different tokens lie far apart."""
    torch.manual_seed(seed)
    model: LlamaForCausalLM = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.train(False)
    model.requires_grad_(False)
    return model


class Breaking:
    """A model that raises at forward number `at`."""

    def __init__(self, model: LlamaForCausalLM, at: int) -> None:
        self._model, self.config, self._left = model, model.config, at

    def __call__(self, **inputs: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("this forward broke")
        return self._model(**inputs)


class Rank:
    """One rank of a replica: its model and engine, and a refresh that loads the next version's weights."""

    def __init__(
        self,
        rank: int,
        *,
        rendezvous: str,
        world: int,
        sharded: bool = False,
        break_at: dict[int, int] | None = None,
        **options: Any,
    ) -> None:
        torch.set_num_threads(1)
        timeout = datetime.timedelta(seconds=WAIT_S)
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timeout)
        self.model = tiny(1)
        self.refreshes = 0
        if sharded:
            mesh = init_device_mesh("cpu", (world,))
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        model = Breaking(self.model, break_at[rank]) if break_at and rank in break_at else self.model
        group = dist.new_group(backend="gloo", timeout=timeout)
        keepalive = {"keepalive_s": options.pop("keepalive_s")} if "keepalive_s" in options else {}
        decoder = Decoder(model, eos_ids=[EOS], on_refresh=self.refresh, **options)
        self.engine = Engine(decoder, group=group, rank=rank, world=world, version=1, **keepalive)
        self.engine.start()

    def refresh(self) -> None:
        self.refreshes += 1
        if self.refreshes == 3:
            raise RuntimeError("this refresh broke")
        self.model.load_state_dict(tiny(1 + self.refreshes).state_dict())

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A property of the engine, or what its method returns or raises; or `close`."""
        value = getattr(self if name == "close" else self.engine, name)
        return value(*args, **kwargs) if callable(value) else value

    def close(self) -> None:
        self.engine.stop(timeout_s=5.0)
        dist.destroy_process_group()


def serve_rank(pipe: Connection) -> None:
    """Another process: says that it is up, builds a rank when told to, and answers for its engine."""
    rank: Rank | None = None
    pipe.send(None)
    while True:
        name, args, kwargs = pipe.recv()
        try:
            if name == "build":
                rank, answer = Rank(*args, **kwargs), None
            else:
                assert rank is not None
                answer = rank.ask(name, *args, **kwargs)
        except Exception as error:
            answer = error
        pipe.send(answer)


class Peer:
    """A rank in another process, as seen from here."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._pipe, far = context.Pipe()
        self.process = context.Process(target=serve_rank, args=(far,), daemon=True)
        self.process.start()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def begin(self, name: str, *args: Any, **kwargs: Any) -> None:
        self._pipe.send((name, args, kwargs))

    def answer(self) -> Any:
        if not self._pipe.poll(START_S):
            self.kill()  # or its late answer would pass for that to another question
            raise TimeoutError("the other process does not answer")
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.begin(name, *args, **kwargs)
        return self.answer()


def by_sequence(tokens: Iterable[TokenOut]) -> dict[int, list[TokenOut]]:
    sequences = defaultdict(list)
    for token in tokens:
        sequences[token.sequence].append(token)
    return dict(sequences)


def token_ids(tokens: Iterable[TokenOut]) -> list[list[int]]:
    return [[token.token_id for token in sequence] for _, sequence in sorted(by_sequence(tokens).items())]


@functools.cache
def plain_greedy(prompt: tuple[int, ...], num_tokens: int, seed: int = 1) -> list[int]:
    """Reference: one sequence, no KV cache, the whole forward again for every token."""
    model, ids = tiny(seed), list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


class Stuck:
    """A model whose forward never ends while `held`."""

    def __init__(self) -> None:
        self.config, self.held, self.entered = tiny(1).config, threading.Event(), threading.Event()

    def __call__(self, **inputs: Any) -> Any:
        self.entered.set()
        self.held.wait(WAIT_S)
        raise RuntimeError("released")
