"""A replica's generation door: only its leader (rank 0) answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.chunks import MAX_MESSAGE_BYTES
from weight_update.errors import BusyError, ManifestError

from .hosts.boundary import Boundary
from .samples import MAX_CONDITIONING_BYTES
from .wire import refusing_stream
from .work import Stream

# Largest message that a rank takes: a chunk of a push, or a request with its conditioning.
MESSAGE_BYTES = {"Generate": MAX_MESSAGE_BYTES, "Denoise": MAX_MESSAGE_BYTES + MAX_CONDITIONING_BYTES}
RIGHT_WAIT_S, RIGHT_POLL_S = 5.0, 0.05  # a replica that came in serves from the coordinator's next greeting on
SERVED = {"Generate": "a language model", "Denoise": "a diffusion pipeline"}


class GenerationServicer(pb_grpc.GenerationServicer):
    """Tokens or latents of this replica. version, may_serve: of the rank, as they are now. refused: what an operator
    did that lets no request in, "" for nothing."""

    def __init__(
        self,
        engine: Boundary,
        *,
        replica: int,
        version: Callable[[], int],
        may_serve: Callable[[], bool],
        refused: Callable[[], str],
    ) -> None:
        self._engine = engine
        self._replica = replica
        self._version = version
        self._may_serve = may_serve
        self._refused = refused

    def _submit(self, rpc: str, context: grpc.ServicerContext, *args: Any, **kwargs: Any) -> Stream[Any]:
        served = self._engine.rpc
        if served != rpc:
            raise ManifestError(f"{rpc}: this service holds {SERVED[served]}, not {SERVED[rpc]}; call {served}")
        if self._version() == 0:
            raise BusyError(f"{rpc}: no version is published on this replica yet; wait for health SERVING")
        if not self._has_right():
            raise BusyError(f"{rpc}: this replica has no right to serve now; see 'transfuse status'")
        if why := self._refused():
            raise BusyError(f"{rpc}: serving is {why} by an operator; 'transfuse resume' ends it")
        stream = self._engine.submit(*args, **kwargs)
        context.add_callback(stream.cancel)
        return stream

    def _has_right(self) -> bool:
        deadline_s = time.monotonic() + RIGHT_WAIT_S
        while not (has := self._may_serve()) and time.monotonic() < deadline_s:
            time.sleep(RIGHT_POLL_S)
        return has

    @refusing_stream
    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.Token]:
        tokens = self._submit(
            "Generate",
            context,
            [list(prompt.token_ids) for prompt in request.prompts],
            max_new_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            ignore_eos=request.ignore_eos,
        )
        for token in tokens:
            yield pb.Token(
                sequence=token.sequence,
                token_id=token.token_id,
                logprob=token.logprob,
                version=token.version,
                last=token.last,
                position=token.position,
                kv_versions=token.kv_versions,
                replica=self._replica,
            )

    @refusing_stream
    def Denoise(self, request: pb.DenoiseRequest, context: grpc.ServicerContext) -> Iterator[pb.Denoised]:
        steps = self._submit(
            "Denoise",
            context,
            list(request.seeds),
            request.num_steps,
            request.conditioning,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            guidance=request.guidance,
            cfg_scale=request.cfg_scale,
            cfg_scale_2=request.cfg_scale_2,
            trajectory=request.trajectory,
        )
        for step in steps:
            yield pb.Denoised(
                sample=step.sample,
                step=step.step,
                version=step.version,
                last=step.last,
                latents=step.latents,
                versions=step.versions,
                replica=self._replica,
            )
