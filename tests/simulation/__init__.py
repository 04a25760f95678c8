"""The protocol under deterministic simulation: the state machines that run in production over a simulated network,
clock and disk.

    ranks      one rank of one replica: `weight_update.member` over real bytes
    clients    trainers and operators, who push, ask again, roll back, and give up
    world      the network, the clock, the coordinator's disk, and the order of events
    faults     what goes wrong, drawn from a seed
    checks     what must hold after every event
    __main__   many schedules, and what they covered
"""
