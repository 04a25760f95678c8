from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ParameterSpec(_message.Message):
    __slots__ = ("name", "shape", "format", "group", "tensors", "aliases")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    format: str
    group: str
    tensors: _containers.RepeatedScalarFieldContainer[int]
    aliases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., format: _Optional[str] = ..., group: _Optional[str] = ..., tensors: _Optional[_Iterable[int]] = ..., aliases: _Optional[_Iterable[str]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("tensors", "parameters", "fingerprint")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    parameters: _containers.RepeatedCompositeFieldContainer[ParameterSpec]
    fingerprint: int
    def __init__(self, tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., parameters: _Optional[_Iterable[_Union[ParameterSpec, _Mapping]]] = ..., fingerprint: _Optional[int] = ...) -> None: ...

class RankSpec(_message.Message):
    __slots__ = ("replica", "rank", "address", "row_start", "row_stop", "place")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ROW_START_FIELD_NUMBER: _ClassVar[int]
    ROW_STOP_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    replica: int
    rank: int
    address: str
    row_start: _containers.RepeatedScalarFieldContainer[int]
    row_stop: _containers.RepeatedScalarFieldContainer[int]
    place: Place
    def __init__(self, replica: _Optional[int] = ..., rank: _Optional[int] = ..., address: _Optional[str] = ..., row_start: _Optional[_Iterable[int]] = ..., row_stop: _Optional[_Iterable[int]] = ..., place: _Optional[_Union[Place, _Mapping]] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("host", "processes", "user", "gpu", "nccl")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    USER_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    NCCL_FIELD_NUMBER: _ClassVar[int]
    host: str
    processes: str
    user: int
    gpu: str
    nccl: str
    def __init__(self, host: _Optional[str] = ..., processes: _Optional[str] = ..., user: _Optional[int] = ..., gpu: _Optional[str] = ..., nccl: _Optional[str] = ...) -> None: ...

class ExpertMap(_message.Message):
    __slots__ = ("module", "physical_to_logical")
    MODULE_FIELD_NUMBER: _ClassVar[int]
    PHYSICAL_TO_LOGICAL_FIELD_NUMBER: _ClassVar[int]
    module: str
    physical_to_logical: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, module: _Optional[str] = ..., physical_to_logical: _Optional[_Iterable[int]] = ...) -> None: ...

class Digests(_message.Message):
    __slots__ = ("lane0", "lane1")
    LANE0_FIELD_NUMBER: _ClassVar[int]
    LANE1_FIELD_NUMBER: _ClassVar[int]
    lane0: bytes
    lane1: bytes
    def __init__(self, lane0: _Optional[bytes] = ..., lane1: _Optional[bytes] = ...) -> None: ...

class VersionInfo(_message.Message):
    __slots__ = ("version", "base_version", "push_id", "digest", "created_s", "wire_bytes", "logical_bytes", "num_tensors", "pushed_by", "state", "seconds", "pause_s", "step", "reachable", "durable", "restores")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_TENSORS_FIELD_NUMBER: _ClassVar[int]
    PUSHED_BY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REACHABLE_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FIELD_NUMBER: _ClassVar[int]
    version: int
    base_version: int
    push_id: str
    digest: str
    created_s: float
    wire_bytes: int
    logical_bytes: int
    num_tensors: int
    pushed_by: str
    state: str
    seconds: float
    pause_s: float
    step: int
    reachable: bool
    durable: bool
    restores: int
    def __init__(self, version: _Optional[int] = ..., base_version: _Optional[int] = ..., push_id: _Optional[str] = ..., digest: _Optional[str] = ..., created_s: _Optional[float] = ..., wire_bytes: _Optional[int] = ..., logical_bytes: _Optional[int] = ..., num_tensors: _Optional[int] = ..., pushed_by: _Optional[str] = ..., state: _Optional[str] = ..., seconds: _Optional[float] = ..., pause_s: _Optional[float] = ..., step: _Optional[int] = ..., reachable: _Optional[bool] = ..., durable: _Optional[bool] = ..., restores: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("fingerprint",)
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    fingerprint: int
    def __init__(self, fingerprint: _Optional[int] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("manifest", "ranks", "version", "digest", "epoch", "max_message_bytes", "fingerprint", "stores", "expert_maps")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    STORES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_MAPS_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    ranks: _containers.RepeatedCompositeFieldContainer[RankSpec]
    version: int
    digest: str
    epoch: int
    max_message_bytes: int
    fingerprint: int
    stores: bool
    expert_maps: _containers.RepeatedCompositeFieldContainer[ExpertMap]
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ..., ranks: _Optional[_Iterable[_Union[RankSpec, _Mapping]]] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., epoch: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., fingerprint: _Optional[int] = ..., stores: _Optional[bool] = ..., expert_maps: _Optional[_Iterable[_Union[ExpertMap, _Mapping]]] = ...) -> None: ...

class BeginRequest(_message.Message):
    __slots__ = ("push_id", "base_version", "fingerprint", "tensors", "pushed_by", "logical_bytes", "lease_s", "num_streams", "delta", "step", "keys", "tensors_hash")
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PUSHED_BY_FIELD_NUMBER: _ClassVar[int]
    LOGICAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_HASH_FIELD_NUMBER: _ClassVar[int]
    push_id: str
    base_version: int
    fingerprint: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    pushed_by: str
    logical_bytes: int
    lease_s: float
    num_streams: int
    delta: Delta
    step: int
    keys: _containers.RepeatedScalarFieldContainer[str]
    tensors_hash: int
    def __init__(self, push_id: _Optional[str] = ..., base_version: _Optional[int] = ..., fingerprint: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., pushed_by: _Optional[str] = ..., logical_bytes: _Optional[int] = ..., lease_s: _Optional[float] = ..., num_streams: _Optional[int] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., step: _Optional[int] = ..., keys: _Optional[_Iterable[str]] = ..., tensors_hash: _Optional[int] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("base_version", "base_digest", "ranks")
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    base_version: int
    base_digest: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankDelta]
    def __init__(self, base_version: _Optional[int] = ..., base_digest: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankDelta, _Mapping]]] = ...) -> None: ...

class RankDelta(_message.Message):
    __slots__ = ("replica", "rank", "blobs")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    replica: int
    rank: int
    blobs: _containers.RepeatedCompositeFieldContainer[BlobSize]
    def __init__(self, replica: _Optional[int] = ..., rank: _Optional[int] = ..., blobs: _Optional[_Iterable[_Union[BlobSize, _Mapping]]] = ...) -> None: ...

class BlobSize(_message.Message):
    __slots__ = ("num_bytes", "num_segments", "num_changes", "dense_bytes")
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHANGES_FIELD_NUMBER: _ClassVar[int]
    DENSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    num_segments: int
    num_changes: int
    dense_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ..., num_segments: _Optional[int] = ..., num_changes: _Optional[int] = ..., dense_bytes: _Optional[int] = ...) -> None: ...

class BeginReply(_message.Message):
    __slots__ = ("transaction", "version", "epoch", "planned_bytes", "already_committed", "ticket", "tensors_asked")
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLANNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALREADY_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TENSORS_ASKED_FIELD_NUMBER: _ClassVar[int]
    transaction: int
    version: int
    epoch: int
    planned_bytes: int
    already_committed: bool
    ticket: bytes
    tensors_asked: bool
    def __init__(self, transaction: _Optional[int] = ..., version: _Optional[int] = ..., epoch: _Optional[int] = ..., planned_bytes: _Optional[int] = ..., already_committed: _Optional[bool] = ..., ticket: _Optional[bytes] = ..., tensors_asked: _Optional[bool] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("transaction", "digests", "wire_bytes")
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    transaction: int
    digests: Digests
    wire_bytes: int
    def __init__(self, transaction: _Optional[int] = ..., digests: _Optional[_Union[Digests, _Mapping]] = ..., wire_bytes: _Optional[int] = ...) -> None: ...

class PrepareReply(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class InstallRequest(_message.Message):
    __slots__ = ("transaction",)
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    transaction: int
    def __init__(self, transaction: _Optional[int] = ...) -> None: ...

class InstallReply(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class DecideRequest(_message.Message):
    __slots__ = ("transaction", "durable")
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    transaction: int
    durable: bool
    def __init__(self, transaction: _Optional[int] = ..., durable: _Optional[bool] = ...) -> None: ...

class RankTiming(_message.Message):
    __slots__ = ("replica", "rank", "stage_start_s", "stage_stop_s", "pause_start_s", "install_stop_s", "pause_stop_s", "planned_bytes", "staged_bytes", "passed_bytes")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STAGE_START_S_FIELD_NUMBER: _ClassVar[int]
    STAGE_STOP_S_FIELD_NUMBER: _ClassVar[int]
    PAUSE_START_S_FIELD_NUMBER: _ClassVar[int]
    INSTALL_STOP_S_FIELD_NUMBER: _ClassVar[int]
    PAUSE_STOP_S_FIELD_NUMBER: _ClassVar[int]
    PLANNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PASSED_BYTES_FIELD_NUMBER: _ClassVar[int]
    replica: int
    rank: int
    stage_start_s: float
    stage_stop_s: float
    pause_start_s: float
    install_stop_s: float
    pause_stop_s: float
    planned_bytes: int
    staged_bytes: int
    passed_bytes: int
    def __init__(self, replica: _Optional[int] = ..., rank: _Optional[int] = ..., stage_start_s: _Optional[float] = ..., stage_stop_s: _Optional[float] = ..., pause_start_s: _Optional[float] = ..., install_stop_s: _Optional[float] = ..., pause_stop_s: _Optional[float] = ..., planned_bytes: _Optional[int] = ..., staged_bytes: _Optional[int] = ..., passed_bytes: _Optional[int] = ...) -> None: ...

class DecideReply(_message.Message):
    __slots__ = ("version", "timings", "digest_verified", "replicas")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_VERIFIED_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    version: VersionInfo
    timings: _containers.RepeatedCompositeFieldContainer[RankTiming]
    digest_verified: bool
    replicas: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[_Union[VersionInfo, _Mapping]] = ..., timings: _Optional[_Iterable[_Union[RankTiming, _Mapping]]] = ..., digest_verified: _Optional[bool] = ..., replicas: _Optional[_Iterable[str]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("transaction", "reason")
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    transaction: int
    reason: str
    def __init__(self, transaction: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: bool
    def __init__(self, aborted: _Optional[bool] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("replica", "state", "version", "layout", "format", "num_sequences", "reason", "pids", "digest", "checkpoint")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    replica: int
    state: str
    version: int
    layout: str
    format: str
    num_sequences: int
    reason: str
    pids: _containers.RepeatedScalarFieldContainer[int]
    digest: str
    checkpoint: str
    def __init__(self, replica: _Optional[int] = ..., state: _Optional[str] = ..., version: _Optional[int] = ..., layout: _Optional[str] = ..., format: _Optional[str] = ..., num_sequences: _Optional[int] = ..., reason: _Optional[str] = ..., pids: _Optional[_Iterable[int]] = ..., digest: _Optional[str] = ..., checkpoint: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("version", "digest", "epoch", "replicas", "transaction_state", "transaction_by", "transaction_since_s", "transaction", "uptime_s", "model", "lost", "durable_version", "min_replicas", "store", "store_dir", "expert_map_digest", "ranks")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_STATE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_BY_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_SINCE_S_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    DURABLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MIN_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    STORE_DIR_FIELD_NUMBER: _ClassVar[int]
    EXPERT_MAP_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    version: int
    digest: str
    epoch: int
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaStatus]
    transaction_state: str
    transaction_by: str
    transaction_since_s: float
    transaction: int
    uptime_s: float
    model: str
    lost: str
    durable_version: int
    min_replicas: int
    store: str
    store_dir: str
    expert_map_digest: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    def __init__(self, version: _Optional[int] = ..., digest: _Optional[str] = ..., epoch: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[ReplicaStatus, _Mapping]]] = ..., transaction_state: _Optional[str] = ..., transaction_by: _Optional[str] = ..., transaction_since_s: _Optional[float] = ..., transaction: _Optional[int] = ..., uptime_s: _Optional[float] = ..., model: _Optional[str] = ..., lost: _Optional[str] = ..., durable_version: _Optional[int] = ..., min_replicas: _Optional[int] = ..., store: _Optional[str] = ..., store_dir: _Optional[str] = ..., expert_map_digest: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("replica", "rank", "address", "version", "state", "pid", "gauges")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    GAUGES_FIELD_NUMBER: _ClassVar[int]
    replica: int
    rank: int
    address: str
    version: int
    state: str
    pid: int
    gauges: RankGauges
    def __init__(self, replica: _Optional[int] = ..., rank: _Optional[int] = ..., address: _Optional[str] = ..., version: _Optional[int] = ..., state: _Optional[str] = ..., pid: _Optional[int] = ..., gauges: _Optional[_Union[RankGauges, _Mapping]] = ...) -> None: ...

class RankGauges(_message.Message):
    __slots__ = ("planned_bytes", "staged_bytes", "reserved_bytes", "streams", "draining", "digest", "metrics")
    PLANNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    planned_bytes: int
    staged_bytes: int
    reserved_bytes: int
    streams: _containers.RepeatedCompositeFieldContainer[StreamStatus]
    draining: bool
    digest: str
    metrics: str
    def __init__(self, planned_bytes: _Optional[int] = ..., staged_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., streams: _Optional[_Iterable[_Union[StreamStatus, _Mapping]]] = ..., draining: _Optional[bool] = ..., digest: _Optional[str] = ..., metrics: _Optional[str] = ...) -> None: ...

class StreamStatus(_message.Message):
    __slots__ = ("trainer_rank", "received_bytes", "credit_bytes", "seconds", "peer")
    TRAINER_RANK_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    trainer_rank: int
    received_bytes: int
    credit_bytes: int
    seconds: float
    peer: str
    def __init__(self, trainer_rank: _Optional[int] = ..., received_bytes: _Optional[int] = ..., credit_bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., peer: _Optional[str] = ...) -> None: ...

class WaitDurableRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class WaitDurableReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VersionsRequest(_message.Message):
    __slots__ = ("last",)
    LAST_FIELD_NUMBER: _ClassVar[int]
    last: int
    def __init__(self, last: _Optional[int] = ...) -> None: ...

class VersionsReply(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[VersionInfo]
    def __init__(self, versions: _Optional[_Iterable[_Union[VersionInfo, _Mapping]]] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("ok", "version", "bytes", "seconds", "mismatches")
    OK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    version: int
    bytes: int
    seconds: float
    mismatches: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ok: _Optional[bool] = ..., version: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., mismatches: _Optional[_Iterable[str]] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("version", "push_id", "pushed_by")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    PUSHED_BY_FIELD_NUMBER: _ClassVar[int]
    version: int
    push_id: str
    pushed_by: str
    def __init__(self, version: _Optional[int] = ..., push_id: _Optional[str] = ..., pushed_by: _Optional[str] = ...) -> None: ...

class ResetRequest(_message.Message):
    __slots__ = ("version", "push_id", "pushed_by")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    PUSHED_BY_FIELD_NUMBER: _ClassVar[int]
    version: int
    push_id: str
    pushed_by: str
    def __init__(self, version: _Optional[int] = ..., push_id: _Optional[str] = ..., pushed_by: _Optional[str] = ...) -> None: ...

class ReplicaAddRequest(_message.Message):
    __slots__ = ("addresses", "dead")
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    DEAD_FIELD_NUMBER: _ClassVar[int]
    addresses: _containers.RepeatedScalarFieldContainer[str]
    dead: bool
    def __init__(self, addresses: _Optional[_Iterable[str]] = ..., dead: _Optional[bool] = ...) -> None: ...

class ReplicaAddReply(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: int
    def __init__(self, replica: _Optional[int] = ...) -> None: ...

class ReplicaRemoveRequest(_message.Message):
    __slots__ = ("replica",)
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    replica: int
    def __init__(self, replica: _Optional[int] = ...) -> None: ...

class ReplicaRemoveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RollbackReply(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: VersionInfo
    def __init__(self, version: _Optional[_Union[VersionInfo, _Mapping]] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class PauseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("replicas", "timeout_s")
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedScalarFieldContainer[int]
    timeout_s: float
    def __init__(self, replicas: _Optional[_Iterable[int]] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("num_sequences", "replicas")
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    num_sequences: int
    replicas: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_sequences: _Optional[int] = ..., replicas: _Optional[_Iterable[int]] = ...) -> None: ...

class RereadRequest(_message.Message):
    __slots__ = ("share",)
    SHARE_FIELD_NUMBER: _ClassVar[int]
    share: float
    def __init__(self, share: _Optional[float] = ...) -> None: ...

class RereadProgress(_message.Message):
    __slots__ = ("done_bytes", "total_bytes", "outcome")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    outcome: VerifyReply
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., outcome: _Optional[_Union[VerifyReply, _Mapping]] = ...) -> None: ...

class EventsRequest(_message.Message):
    __slots__ = ("after", "limit", "kinds")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    KINDS_FIELD_NUMBER: _ClassVar[int]
    after: int
    limit: int
    kinds: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, after: _Optional[int] = ..., limit: _Optional[int] = ..., kinds: _Optional[_Iterable[str]] = ...) -> None: ...

class EventsReply(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Event(_message.Message):
    __slots__ = ("time_s", "kind", "version", "transaction", "text", "who", "peer", "number")
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WHO_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    kind: str
    version: int
    transaction: int
    text: str
    who: str
    peer: str
    number: int
    def __init__(self, time_s: _Optional[float] = ..., kind: _Optional[str] = ..., version: _Optional[int] = ..., transaction: _Optional[int] = ..., text: _Optional[str] = ..., who: _Optional[str] = ..., peer: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class StageOpen(_message.Message):
    __slots__ = ("transaction", "epoch", "trainer_rank", "ticket", "ring_bytes", "on_device", "group", "onward")
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRAINER_RANK_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    RING_BYTES_FIELD_NUMBER: _ClassVar[int]
    ON_DEVICE_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ONWARD_FIELD_NUMBER: _ClassVar[int]
    transaction: int
    epoch: int
    trainer_rank: int
    ticket: bytes
    ring_bytes: int
    on_device: bool
    group: bytes
    onward: _containers.RepeatedCompositeFieldContainer[RankSpec]
    def __init__(self, transaction: _Optional[int] = ..., epoch: _Optional[int] = ..., trainer_rank: _Optional[int] = ..., ticket: _Optional[bytes] = ..., ring_bytes: _Optional[int] = ..., on_device: _Optional[bool] = ..., group: _Optional[bytes] = ..., onward: _Optional[_Iterable[_Union[RankSpec, _Mapping]]] = ...) -> None: ...

class Ring(_message.Message):
    __slots__ = ("pid", "fd", "num_bytes", "token", "device", "in_group", "group")
    PID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    IN_GROUP_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    pid: int
    fd: int
    num_bytes: int
    token: bytes
    device: DeviceMemory
    in_group: bool
    group: str
    def __init__(self, pid: _Optional[int] = ..., fd: _Optional[int] = ..., num_bytes: _Optional[int] = ..., token: _Optional[bytes] = ..., device: _Optional[_Union[DeviceMemory, _Mapping]] = ..., in_group: _Optional[bool] = ..., group: _Optional[str] = ...) -> None: ...

class DeviceMemory(_message.Message):
    __slots__ = ("gpu", "handle", "storage_bytes", "storage_at", "counter", "counter_at", "event", "waits_for_event", "at")
    GPU_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORAGE_AT_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    COUNTER_AT_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_EVENT_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    gpu: str
    handle: bytes
    storage_bytes: int
    storage_at: int
    counter: bytes
    counter_at: int
    event: bytes
    waits_for_event: bool
    at: int
    def __init__(self, gpu: _Optional[str] = ..., handle: _Optional[bytes] = ..., storage_bytes: _Optional[int] = ..., storage_at: _Optional[int] = ..., counter: _Optional[bytes] = ..., counter_at: _Optional[int] = ..., event: _Optional[bytes] = ..., waits_for_event: _Optional[bool] = ..., at: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("sequence", "tensor", "offset", "length", "checksum", "payload", "ring_at", "ring_bytes")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    RING_AT_FIELD_NUMBER: _ClassVar[int]
    RING_BYTES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    tensor: _containers.RepeatedScalarFieldContainer[int]
    offset: _containers.RepeatedScalarFieldContainer[int]
    length: _containers.RepeatedScalarFieldContainer[int]
    checksum: int
    payload: bytes
    ring_at: int
    ring_bytes: int
    def __init__(self, sequence: _Optional[int] = ..., tensor: _Optional[_Iterable[int]] = ..., offset: _Optional[_Iterable[int]] = ..., length: _Optional[_Iterable[int]] = ..., checksum: _Optional[int] = ..., payload: _Optional[bytes] = ..., ring_at: _Optional[int] = ..., ring_bytes: _Optional[int] = ...) -> None: ...

class StageRequest(_message.Message):
    __slots__ = ("open", "chunk")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    open: StageOpen
    chunk: Chunk
    def __init__(self, open: _Optional[_Union[StageOpen, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class StageReply(_message.Message):
    __slots__ = ("sequence", "credit_bytes", "staged_bytes", "ring")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STAGED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RING_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    credit_bytes: int
    staged_bytes: int
    ring: Ring
    def __init__(self, sequence: _Optional[int] = ..., credit_bytes: _Optional[int] = ..., staged_bytes: _Optional[int] = ..., ring: _Optional[_Union[Ring, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("version", "row_start", "row_stop")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROW_START_FIELD_NUMBER: _ClassVar[int]
    ROW_STOP_FIELD_NUMBER: _ClassVar[int]
    version: int
    row_start: _containers.RepeatedScalarFieldContainer[int]
    row_stop: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, version: _Optional[int] = ..., row_start: _Optional[_Iterable[int]] = ..., row_stop: _Optional[_Iterable[int]] = ...) -> None: ...

class HelloRequest(_message.Message):
    __slots__ = ("epoch", "round", "version", "token", "brief", "coordinator")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    BRIEF_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    round: int
    version: int
    token: float
    brief: bool
    coordinator: str
    def __init__(self, epoch: _Optional[int] = ..., round: _Optional[int] = ..., version: _Optional[int] = ..., token: _Optional[float] = ..., brief: _Optional[bool] = ..., coordinator: _Optional[str] = ...) -> None: ...

class HelloReply(_message.Message):
    __slots__ = ("manifest", "spec", "version", "state", "transaction", "layout", "format", "pid", "num_sequences", "paused", "serves", "token", "kept", "damage", "checkpoint", "gauges")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NUM_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    SERVES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    GAUGES_FIELD_NUMBER: _ClassVar[int]
    manifest: Manifest
    spec: RankSpec
    version: int
    state: str
    transaction: int
    layout: str
    format: str
    pid: int
    num_sequences: int
    paused: bool
    serves: bool
    token: float
    kept: _containers.RepeatedScalarFieldContainer[int]
    damage: str
    checkpoint: str
    gauges: RankGauges
    def __init__(self, manifest: _Optional[_Union[Manifest, _Mapping]] = ..., spec: _Optional[_Union[RankSpec, _Mapping]] = ..., version: _Optional[int] = ..., state: _Optional[str] = ..., transaction: _Optional[int] = ..., layout: _Optional[str] = ..., format: _Optional[str] = ..., pid: _Optional[int] = ..., num_sequences: _Optional[int] = ..., paused: _Optional[bool] = ..., serves: _Optional[bool] = ..., token: _Optional[float] = ..., kept: _Optional[_Iterable[int]] = ..., damage: _Optional[str] = ..., checkpoint: _Optional[str] = ..., gauges: _Optional[_Union[RankGauges, _Mapping]] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("epoch", "transaction", "version", "base_version", "tensors", "num_streams", "delta", "restores", "donors", "peers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FIELD_NUMBER: _ClassVar[int]
    DONORS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    transaction: int
    version: int
    base_version: int
    tensors: _containers.RepeatedScalarFieldContainer[int]
    num_streams: int
    delta: Delta
    restores: int
    donors: _containers.RepeatedCompositeFieldContainer[RankSpec]
    peers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, epoch: _Optional[int] = ..., transaction: _Optional[int] = ..., version: _Optional[int] = ..., base_version: _Optional[int] = ..., tensors: _Optional[_Iterable[int]] = ..., num_streams: _Optional[int] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., restores: _Optional[int] = ..., donors: _Optional[_Iterable[_Union[RankSpec, _Mapping]]] = ..., peers: _Optional[_Iterable[str]] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("planned_bytes", "token")
    PLANNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    planned_bytes: int
    token: float
    def __init__(self, planned_bytes: _Optional[int] = ..., token: _Optional[float] = ...) -> None: ...

class MemberRequest(_message.Message):
    __slots__ = ("epoch", "transaction", "version", "round", "token")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TRANSACTION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    transaction: int
    version: int
    round: int
    token: float
    def __init__(self, epoch: _Optional[int] = ..., transaction: _Optional[int] = ..., version: _Optional[int] = ..., round: _Optional[int] = ..., token: _Optional[float] = ...) -> None: ...

class MemberReply(_message.Message):
    __slots__ = ("timing", "version", "token")
    TIMING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    timing: RankTiming
    version: int
    token: float
    def __init__(self, timing: _Optional[_Union[RankTiming, _Mapping]] = ..., version: _Optional[int] = ..., token: _Optional[float] = ...) -> None: ...

class MemberDigests(_message.Message):
    __slots__ = ("digests", "timing", "token")
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    digests: Digests
    timing: RankTiming
    token: float
    def __init__(self, digests: _Optional[_Union[Digests, _Mapping]] = ..., timing: _Optional[_Union[RankTiming, _Mapping]] = ..., token: _Optional[float] = ...) -> None: ...

class MemberRereadRequest(_message.Message):
    __slots__ = ("epoch", "version", "share")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    version: int
    share: float
    def __init__(self, epoch: _Optional[int] = ..., version: _Optional[int] = ..., share: _Optional[float] = ...) -> None: ...

class MemberRereadReply(_message.Message):
    __slots__ = ("done_bytes", "total_bytes", "digests")
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    done_bytes: int
    total_bytes: int
    digests: Digests
    def __init__(self, done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., digests: _Optional[_Union[Digests, _Mapping]] = ...) -> None: ...

class ReachReply(_message.Message):
    __slots__ = ("versions", "token")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[int]
    token: float
    def __init__(self, versions: _Optional[_Iterable[int]] = ..., token: _Optional[float] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("prompts", "max_new_tokens", "temperature", "seed", "ignore_eos")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    max_new_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    def __init__(self, prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., ignore_eos: _Optional[bool] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("token_ids", "text")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("sequence", "token_id", "logprob", "version", "text", "last", "kv_versions", "replica", "position")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    KV_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    token_id: int
    logprob: float
    version: int
    text: str
    last: bool
    kv_versions: _containers.RepeatedScalarFieldContainer[int]
    replica: int
    position: int
    def __init__(self, sequence: _Optional[int] = ..., token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., version: _Optional[int] = ..., text: _Optional[str] = ..., last: _Optional[bool] = ..., kv_versions: _Optional[_Iterable[int]] = ..., replica: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class DenoiseRequest(_message.Message):
    __slots__ = ("seeds", "num_steps", "num_frames", "height", "width", "guidance", "cfg_scale", "cfg_scale_2", "conditioning", "trajectory")
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_FIELD_NUMBER: _ClassVar[int]
    CFG_SCALE_FIELD_NUMBER: _ClassVar[int]
    CFG_SCALE_2_FIELD_NUMBER: _ClassVar[int]
    CONDITIONING_FIELD_NUMBER: _ClassVar[int]
    TRAJECTORY_FIELD_NUMBER: _ClassVar[int]
    seeds: _containers.RepeatedScalarFieldContainer[int]
    num_steps: int
    num_frames: int
    height: int
    width: int
    guidance: float
    cfg_scale: float
    cfg_scale_2: float
    conditioning: bytes
    trajectory: bool
    def __init__(self, seeds: _Optional[_Iterable[int]] = ..., num_steps: _Optional[int] = ..., num_frames: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., guidance: _Optional[float] = ..., cfg_scale: _Optional[float] = ..., cfg_scale_2: _Optional[float] = ..., conditioning: _Optional[bytes] = ..., trajectory: _Optional[bool] = ...) -> None: ...

class Denoised(_message.Message):
    __slots__ = ("sample", "step", "version", "last", "latents", "versions", "replica")
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    sample: int
    step: int
    version: int
    last: bool
    latents: bytes
    versions: _containers.RepeatedScalarFieldContainer[int]
    replica: int
    def __init__(self, sample: _Optional[int] = ..., step: _Optional[int] = ..., version: _Optional[int] = ..., last: _Optional[bool] = ..., latents: _Optional[bytes] = ..., versions: _Optional[_Iterable[int]] = ..., replica: _Optional[int] = ...) -> None: ...
