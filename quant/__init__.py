"""Numbers and where their bytes lie; torch only, imports nothing of ours.

formats   rows of the format table: checkpoint tensors of a parameter, encode, decode
kernels   CPU loops behind formats and layouts: numba where importable, a torch twin otherwise
steps     row maps and byte orders, the pieces of a layout
layouts   rows of the layout table: storages, placements and derived scalars of a module; apply and invert
modules   quantized Linear and experts that compute from kernel-layout bytes
models    quantize a model, and name its parameters, placements and storages
checkpoint  checkpoints on disk, read lazily by rows
"""
