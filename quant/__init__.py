"""Numbers and where their bytes lie; torch only, imports nothing of ours.

formats     checkpoint tensors of a parameter, encode, decode: the door to the format table
encodings   rows of the format table
specs       what a row is made of: dtypes, tensors, components
numerics_*  the numbers of the rows: float, int, and as compressed-tensors rounds them
dialects    other libraries' names and dtypes for the same bytes
conversions what rounds, or puts a foreign checkpoint in order, before a digest
kernels     CPU kernels behind formats and placements: numba loops where importable, torch twins otherwise
loops       the numba loops
steps       row maps and byte orders, the pieces of a layout
placements  where one tensor lies in one storage; apply and invert any of its rows
derived     rows of the table of derived scalars
backends    rows of the layout table
layouts     what a row means for one module: storages, placements, derived scalars, and which row it gets
whole       all tensors of a module at once, with a tag that says in which order their bytes are
gemms       rows of the table of matrix products that forward calls where the device has them
gemms_fp*   their calls: torch's on FP8, flashinfer's on FP4 (untested); activation_loops: Triton before the first
modules     quantized Linear and experts that compute from kernel-layout bytes
parameters  one weight as a trainer names it
names       trainer names to parameter names
models      quantize a model, and name its parameters, placements and storages
checkpoint  checkpoints on disk, read lazily by rows
"""
