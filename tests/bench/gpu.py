"""Everything here that needs a GPU, measured as ratios within one run and printed as one Markdown table.

    python -m tests.bench.gpu [--only qwen3] [--write] [--json FILE]

--only: sections whose names begin so. --write: put the figures into docs/performance_gpu.json and its tables into
docs/performance.md. Sections: the CUDA kernels over a device copy of the same bytes (this file), linears and denoise
steps in FP8 over BF16 (`dit`), and, where there are two GPUs, what the links carry (`links`).

Kernels: layers of Qwen3-30B-A3B (four in a call, 128 experts, 2048/768) and one share of 32 experts of DeepSeek-V3
(7168/2048), NVFP4 in the trtllm_moe layout. Medians by events. Beside them the call sequence of today's engines,
written here in torch: quantize each expert, gather its rows, swizzle its scales, stack, copy. Says so and exits where
there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quant import cuda
from quant.formats import FORMATS
from quant.layouts import LAYOUTS, plan_experts
from tests.bench.gpu_table import HEAD, Measured, Section, line, milliseconds, row_of, write
from weight_update import cuda as rows_of
from weight_update.live import plan_live

LAYERS = {"qwen3-30b-a3b, 4 layers": (4, 128, 2048, 768), "deepseek-v3, 32 experts": (1, 32, 7168, 2048)}
SHARE = 1000  # one byte of codes in this many differs in the diff


def copy_ms(num_bytes: float) -> float:
    """A copy that reads and writes this many bytes together."""
    source = torch.empty(int(num_bytes / 2), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source))


class Layer:
    """Weights of a layer's experts, their checkpoint form, and live storages."""

    def __init__(self, layers: int, experts: int, hidden: int, inter: int) -> None:
        self.sizes = (layers * experts, hidden, inter)
        num = layers * experts
        self.w13 = (torch.randn(num, 2 * inter, hidden, device="cuda") * 0.02).bfloat16()
        self.w2 = (torch.randn(num, hidden, inter, device="cuda") * 0.02).bfloat16()
        plan = plan_experts(LAYOUTS["trtllm_moe"], FORMATS["nvfp4"], "m", num, hidden, inter)
        self.live = {s.name: torch.zeros(s.shape, dtype=s.dtype, device="cuda") for s in plan.storages}
        self.live |= {each.name: torch.zeros(each.shape, device="cuda") for each in plan.derived}
        planned = plan_live(self.live, plan.placements, plan.derived, {}, self.live)
        self.writes = planned.writes
        self.form = {
            name: torch.zeros(num, rows, columns // width, dtype=torch.uint8, device="cuda")
            for matrix, rows, columns in (("w13", 2 * inter, hidden), ("w2", hidden, inter))
            for name, width in ((f"{matrix}.weight", 2), (f"{matrix}.weight_scale", 16))
        }

    def part(self, name: str) -> Tensor:
        """Checkpoint form of a tensor of the manifest."""
        _, expert, half, suffix = name.split(".")
        inter = self.sizes[2]
        whole = self.form[f"{'w2' if half == 'down_proj' else 'w13'}.{suffix}"][int(expert)]
        return {"gate_proj": whole[:inter], "up_proj": whole[inter:], "down_proj": whole}[half]

    def matrices(self, matrix: str, live: bool) -> list[cuda.Matrix]:
        halves = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}[matrix]
        place = {write.placement.tensor.name: write.placement for write in self.writes}
        found = []
        for expert in range(self.sizes[0]):
            parts = getattr(self, matrix)[expert].chunk(len(halves))
            for half, rows in zip(halves, parts, strict=True):
                names = [f"m.{expert}.{half}.{suffix}" for suffix in ("weight", "weight_scale")]
                at = [place[name] for name in names]
                memory = [self.live[each.storage] for each in at] if live else [self.part(name) for name in names]
                where = [cuda.At(located=each.located, row0=0, shift=each.origin) if live else None for each in at]
                found.append(
                    cuda.Matrix(
                        rows=rows,
                        weight=memory[0],
                        block_scale=memory[1],
                        group=expert,
                        weight_at=where[0],
                        scale_at=where[1],
                    )
                )
        return found


def measured(layer: Layer) -> Iterator[Measured]:
    """(what, milliseconds, over what, milliseconds of that)."""
    plain, direct, tables, amaxes = [], [], [], []
    for matrix in ("w13", "w2"):
        batch = cuda.plan_batch(layer.matrices(matrix, live=False))
        plain.append(batch)
        direct.append(cuda.plan_batch(layer.matrices(matrix, live=True)))
        amaxes.append(cuda.amax(batch))
        tables.append(cuda.scale_table(cuda.scales_of(amaxes[-1])))
    read = 2.0 * (layer.w13.numel() + layer.w2.numel())
    form = float(sum(each.numel() for each in layer.form.values()))
    copy = copy_ms(read + form)
    pairs = list(zip(plain, tables, strict=True))
    yield "encode", milliseconds(lambda: [cuda.encode_nvfp4(*pair) for pair in pairs]), "copy", copy
    lay = [*zip(direct, tables, strict=True)]
    both = milliseconds(lambda: [cuda.encode_nvfp4(*pair) for pair in lay])
    yield "encode and lay out", both, "copy", copy
    direct_bytes = {name: each.clone() for name, each in layer.live.items()}

    def with_amax() -> None:
        for batch, bits in zip(plain, amaxes, strict=True):
            cuda.encode_nvfp4(batch, cuda.scale_table(cuda.scales_of(cuda.amax(batch, bits))))

    yield "encode, amax not given", milliseconds(with_amax), "copy", copy
    names = [write.placement.tensor.name for write in layer.writes]
    indices = [i for i, name in enumerate(names) if name.endswith((".weight", ".weight_scale"))]
    chosen = rows_of.Table(layer.writes).select(indices)
    staged = torch.tensor([layer.part(names[i]).data_ptr() for i in indices], device="cuda")
    for each in layer.live.values():
        each.zero_()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    chosen.scatter(staged)
    torch.cuda.synchronize()
    scratch = torch.cuda.max_memory_allocated() - base
    assert all(torch.equal(each, direct_bytes[name]) for name, each in layer.live.items()), "layout differs"
    whole = copy_ms(2 * form)
    install = milliseconds(lambda: chosen.scatter(staged))
    yield "install, full", install, "copy", whole
    assert torch.equal(chosen.digest(staged), chosen.digest()), "digest differs"
    words = torch.empty(int(form) // 8, dtype=torch.int64, device="cuda").random_()
    reading = milliseconds(words.sum)
    yield "digest of what arrived", milliseconds(lambda: chosen.digest(staged)), "read", reading
    yield "digest through the layout", milliseconds(chosen.digest), "read", reading
    yield "scratch of the install, MiB", scratch / 2**20, "", 1.0
    random = torch.Generator(device="cuda").manual_seed(0)
    for name in ("w13.weight", "w2.weight"):
        flat = layer.form[name].view(-1)
        at = torch.randint(0, flat.numel(), (flat.numel() // SHARE,), device="cuda", generator=random)
        flat[at] ^= 1
    noted = [(batch, table, cuda.Notes(batch.programs, table.device)) for batch, table in pairs]

    def note() -> None:
        for each in noted:
            cuda.note_nvfp4(*each)

    yield "diff, 0.1 % of the codes: compare and note", milliseconds(note), "copy", copy
    made = [(batch, table, (cuda.places_of(batch), notes)) for batch, table, notes in noted]
    diff = milliseconds(lambda: [cuda.diff_nvfp4(*each) for each in made])
    yield "diff, sorted into positions and values", diff, "copy", copy
    yield from sequence(layer, install, both)


def sequence(layer: Layer, install: float, direct: float) -> Iterator[Measured]:
    """Today's calls an expert: for the layout alone, and with quantizing."""
    num, hidden, inter = layer.sizes
    out = {name: torch.empty_like(each) for name, each in layer.form.items()}
    order = {"w13": source_rows(2 * inter, gated=True), "w2": source_rows(hidden, gated=False)}

    def lay_out() -> None:
        for matrix in ("w13", "w2"):
            weights, scales = [], []
            for e in range(num):
                weights.append(layer.form[f"{matrix}.weight"][e][order[matrix]].contiguous())
                scale = layer.form[f"{matrix}.weight_scale"][e][order[matrix]]
                rows, columns = scale.shape
                swizzled = scale.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4).contiguous()
                scales.append(swizzled.view(rows, columns))
            out[f"{matrix}.weight"].copy_(torch.stack(weights))
            out[f"{matrix}.weight_scale"].copy_(torch.stack(scales))

    def quantize() -> None:
        for matrix in ("w13", "w2"):
            for e in range(num):
                eager(getattr(layer, matrix)[e])

    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    alone = milliseconds(lay_out, 3)
    peak = (torch.cuda.max_memory_allocated() - base) / sum(each.numel() for each in out.values())
    yield "the sequence of calls, layout alone", alone, "our install", install
    yield "its scratch over the destination", peak, "", 1.0
    both = alone + milliseconds(quantize, 1)
    yield "the sequence of calls, quantizing first", both, "our encode and lay out", direct


def eager(rows: Tensor) -> tuple[Tensor, Tensor]:
    """One expert, an operator at a time."""
    scale = rows.abs().amax().float() / 2688
    blocks = rows.float().unflatten(1, (-1, 16))
    block = (blocks.abs().amax(2) / (6 * scale)).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    quotient = blocks / (block.float() * scale).unsqueeze(2)
    magnitude, code = quotient.abs(), (quotient < 0).to(torch.uint8) << 3
    for edge in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        code += magnitude > edge
    code = code.flatten(1)
    return code[:, 0::2] | (code[:, 1::2] << 4), block


def source_rows(num_rows: int, *, gated: bool) -> Tensor:
    row = torch.arange(num_rows)
    row = 32 * (row // 32) + 4 * (row % 8) + row % 32 // 8
    if gated:  # up first: [gate; up] in the checkpoint
        row = torch.where(row % 2 == 0, num_rows // 2 + row // 2, row // 2)
    return row.cuda()


def kernels(*sizes: int) -> Iterator[Measured]:
    yield from measured(Layer(*sizes))
    torch.cuda.empty_cache()


def links() -> Iterator[Measured]:
    """From one GPU to another, in two processes; `python -m tests.bench.links` says more."""
    command = [sys.executable, "-m", "tests.bench.links", "--from", "cuda:0", "--to", "cuda:1", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    for row in json.loads(done.stdout):
        copied = 1e3 * row["gb"] / row["copy_gb_s"]
        yield f"{row['tensors']} tensors over {row['transport']}", 1e3 * row["send_s"], "a plain copy", copied


def sections() -> dict[str, Callable[[], Iterator[Measured]]]:
    found = {name: partial(kernels, *sizes) for name, sizes in LAYERS.items()}
    try:
        from tests.bench import dit
    except ModuleNotFoundError as error:  # whoever takes the layers alone may lack it
        print(f"linears and transformers left out: {error}", file=sys.stderr)
        return {**found, "links, one layer of qwen3-30b-a3b": links}
    return {**found, **dit.SECTIONS, "links, one layer of qwen3-30b-a3b": links}


GPUS_OF = {"links, one layer of qwen3-30b-a3b": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="how the names of sections begin, repeatable")
    parser.add_argument("--write", action="store_true", help="renew docs/performance_gpu.json and docs/performance.md")
    parser.add_argument("--json", type=Path, help="where to write the figures besides")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return
    count = torch.cuda.device_count()
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    found: dict[str, Section] = {}
    print(f"{device}\n\n{HEAD}")
    for name, measure in sections().items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        if count < GPUS_OF.get(name, 1):
            print(f"{name}: skipped, needs {GPUS_OF[name]} GPUs, found {count}", file=sys.stderr)
            continue
        print(f"measuring {name} ...", file=sys.stderr)
        found[name] = {"device": device, "rows": []}
        for each in measure():
            found[name]["rows"].append(row_of(each))
            print(line(name, found[name]["rows"][-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.write:
        write(found)


if __name__ == "__main__":
    main()
