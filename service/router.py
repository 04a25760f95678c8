"""Generation on the coordinator: one request is dealt out to the serving replicas, and their answers are merged."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.channels import PLAINTEXT, Channels
from weight_update.errors import MemberError, WeightUpdateError
from weight_update.security import Security
from weight_update.transport import error_of

from .coordinator import CoordinatorShell
from .text import Detokenizer, TextCodec
from .wire import refusing_stream

Share = Callable[[Sequence[int]], Any]  # indices of sequences -> the request for them


class GenerationRouter(pb_grpc.GenerationServicer):
    """Deals the prompts or samples of one request out to the serving replicas and merges what comes back."""

    def __init__(self, shell: CoordinatorShell, codec: TextCodec, security: Security = PLAINTEXT) -> None:
        self._shell = shell
        self._codec = codec
        self._channels = Channels(security)
        self._turn = itertools.count()

    @refusing_stream
    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.Token]:
        prompts = [self._codec.encode(prompt) for prompt in request.prompts]
        texts: list[Detokenizer] = [self._codec.detokenizer() for _ in prompts]

        def share(indices: Sequence[int]) -> pb.GenerateRequest:
            return pb.GenerateRequest(
                prompts=[pb.Prompt(token_ids=prompts[i]) for i in indices],
                max_new_tokens=request.max_new_tokens,
                temperature=request.temperature,
                seed=request.seed + (indices[0] if indices else 0),
                ignore_eos=request.ignore_eos,
            )

        for index, token in self._deal("Generate", len(prompts), share, "sequence", context):
            if token.position == 0:
                texts[index] = self._codec.detokenizer()
            token.text = texts[index].add(token.token_id, last=token.last)
            yield token

    @refusing_stream
    def Denoise(self, request: pb.DenoiseRequest, context: grpc.ServicerContext) -> Iterator[pb.Denoised]:
        def share(indices: Sequence[int]) -> pb.DenoiseRequest:
            part = pb.DenoiseRequest()
            part.CopyFrom(request)
            del part.seeds[:]
            part.seeds.extend(request.seeds[i] for i in indices)
            return part

        for _, step in self._deal("Denoise", len(request.seeds), share, "sample", context):
            yield step

    def _deal(
        self, rpc: str, size: int, share: Share, index_field: str, context: grpc.ServicerContext
    ) -> Iterator[tuple[int, Any]]:
        """(index, answer) of all sequences of a request; index_field: of an answer, counts within a share."""
        leaders = sorted(self._shell.leader_addresses().items())
        if not leaders:
            raise MemberError(f"{rpc}: no replica serves ({self._shell.protocol.fenced}); see 'transfuse status'")
        turn = next(self._turn)
        merged: queue.SimpleQueue[Any] = queue.SimpleQueue()
        calls = []
        for i, (_, address) in enumerate(leaders):
            indices = [index for index in range(size) if (index + turn) % len(leaders) == i]
            if indices or not size:
                calls.append(self._call(rpc, share(indices), indices, index_field, address, merged))
        context.add_callback(lambda: [each.cancel() for each in calls])
        open_calls = len(calls)
        while open_calls:
            item = merged.get()
            if isinstance(item, WeightUpdateError):
                raise item
            if item is None:
                open_calls -= 1
            else:
                yield getattr(item, index_field), item

    def _call(
        self,
        rpc: str,
        request: Any,
        indices: Sequence[int],
        index_field: str,
        address: str,
        merged: queue.SimpleQueue[Any],
    ) -> Any:
        stream = getattr(self._channels.stub(address, pb_grpc.GenerationStub), rpc)(request)

        def read() -> None:
            try:
                for answer in stream:
                    setattr(answer, index_field, indices[getattr(answer, index_field)])
                    merged.put(answer)
                merged.put(None)
            except grpc.RpcError as error:
                merged.put(error_of(error, address))

        threading.Thread(target=read, name=f"{rpc}-{address}", daemon=True).start()
        return stream
