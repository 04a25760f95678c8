"""Engines that already run, as members of a service: vLLM and SGLang, without a patch.

boundary    the step boundary: what the rank server asks of whatever runs a model; Foreign, for engines of others
plan        where checkpoint tensors lie in the parameters of such an engine's model
member      a rank server over both, in the engine's own worker process
vllm        plugin and weight-transfer engine
sglang      custom weight loader

What an engine must offer is weight_update.holdings.Holdings (named storages, the layout of each) and a Boundary (a
place between two steps, a cache to renew). Our own actor offers holdings_of(model) and service.engine.Engine.
"""
