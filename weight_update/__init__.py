"""The job: new weights into running, quantized, sharded modules, all or nothing and byte for byte.

    errors      every error that a user can meet
    manifest    names, shapes and formats of what a service holds; the check of a push against it
    digest      additive, position-keyed digest of checkpoint-form bytes (loops: its compiled loop)
    chunks      rows on the wire: hand-framed, valid protobuf

the rank side
    receiver    the library: begin, stage, prepare, install, publish, undo, abort
    holdings    what a rank holds, whoever's model it is: storages, and where tensors lie in them
    staging     one buffer a rank, in which chunks arrive in any order
    live        where the rows of every tensor lie in a rank's storages; padding
    inplace     copy_or_rebind_param, the seal, the address audit
    member      one rank's side of the protocol

the trainer side
    client      the library: Pusher
    source      what a trainer rank brings, matched with what the service holds
    adapters    LoRA adapters, merged into what is sent
    sharing     which of the trainer's ranks sends what of it
    routing     the routes of a push, for people
    foresight   what a push is expected to take
    encoder     its rows in checkpoint form, block by block
    forms       the same of a model on a GPU: in one piece of its memory, by tables (filling, gathering: in and out)
    base        what is sent and what is remembered of it (device_base: in a form); retained: plan and tables as well
    door        encoded rows become chunks on the streams of their owners
    ranks       the few collectives that a push needs
    links       the table of transports: which one two processes can use
    stream      chunks on their way to one rank: credits, acknowledgements, connections
    rings       payloads in shared memory (device_rings: in a GPU's)
    transport   the one module that speaks gRPC; loads no torch, so that administrators' commands start at once
    values      manifests, digests and delta plans, to their messages and back

the transaction
    protocol    the coordinator's side, without I/O
    messages    its events and actions
    versions    decisions and the index of versions, durable
    flight      the flight recorder's files; replay: one of them done again
    codes       every error code with cause and cure
"""
