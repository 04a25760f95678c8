"""The job: new weights into running, quantized, sharded modules, all or nothing and byte for byte.

    errors      every error that a user can meet
    manifest    names, shapes and formats of what a service holds; the check of a push against it
    digest      additive, position-keyed digest of checkpoint-form bytes
    chunks      rows on the wire: hand-framed, valid protobuf
    staging     one buffer a rank, in which chunks arrive in any order
    inplace     copy_or_rebind_param, the seal, the address audit
    receiver    the rank side as a library: stage, prepare, install, publish, undo
    protocol    the transaction as state machines without I/O
    versions    decisions and the index of versions, durable
    source      what a trainer brings, matched with what the service holds
    client      the trainer side as a library: Pusher
    transport   the one module that speaks gRPC
"""
