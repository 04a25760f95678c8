"""Where bytes live, and who sends which to whom; knows no formats.

fsdp    FSDP2 of quantized modules
routes  the rows that a trainer rank holds of a tensor; actor ranks that own the same rows
tiles   what ranks hold of many tensors as a value; who sends what several hold
plan    the routes of a push, from two placements
cost    seconds by phase and resource, and memory, of a plan
"""
