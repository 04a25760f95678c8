"""The diffusion demo's subject: a tiny FLUX.1 transformer paints discs, and learns to paint them red."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import load, save
from torch import Tensor

from protos import transfuse_pb2 as pb
from weight_update.client import Pusher

from .demo import Prepared, Shown, Step, Subject
from .painter import REWARD_MEANS, SIZE, Painter, conditioning, pictures_of, pretrain, reward_of, save_pipeline
from .progress import Bars
from .rpc import denoise

NUM_SAMPLES, NUM_STEPS = 32, 8
NUM_SHOWN, SHOWN_SEED = 16, 7
SEED_STRIDE = 1000  # a step's seeds never meet another step's


class PictureSession:
    """One trainer and the service that it feeds."""

    def __init__(self, address: str, painter: Painter, bars: Bars) -> None:
        self._address = address
        self._painter = painter
        self._bars = bars
        self._pusher = Pusher(address, on_progress=lambda phase, done, total: bars.update("push", done, total))

    def step(self, number: int) -> Step:
        """Sample from the actors, learn, push."""
        start_s = time.perf_counter()
        latents = self._paint(range(SEED_STRIDE * number, SEED_STRIDE * number + NUM_SAMPLES))
        sampled_s = time.perf_counter()
        with self._bars.show("train"):
            learned = self._painter.step(latents)
        with self._bars.show("push"):
            pushed = self._pusher.push({"transformer": self._painter.model})
        return {
            "step": number,
            **asdict(pushed),
            "reward": learned.reward,
            "loss": learned.loss,
            "sample_s": sampled_s - start_s,
            "train_s": learned.seconds,
        }

    def reward(self, seed: int) -> float:
        """Of fresh samples from the current version."""
        return reward_of(self._paint(range(SEED_STRIDE * seed, SEED_STRIDE * seed + NUM_SAMPLES))).mean().item()

    def show(self) -> list[Shown]:
        """What the actors paint from the same noise."""
        pictures = pictures_of(self._paint(range(SHOWN_SEED, SHOWN_SEED + NUM_SHOWN)))
        red, green, blue = pictures.mean((0, 2, 3)).tolist()
        line = f"{NUM_SHOWN} pictures, mean colour: red {red:.2f}, green {green:.2f}, blue {blue:.2f}"
        return [Shown(line=line, html=_sheet(pictures))]

    def _paint(self, seeds: Sequence[int]) -> Tensor:
        """Latents [seeds, TOKENS, CHANNELS], one a seed."""
        words = {name: value for name, value in conditioning(1).items() if not name.endswith("_ids")}
        request = pb.DenoiseRequest(
            seeds=seeds, num_steps=NUM_STEPS, num_frames=1, height=SIZE, width=SIZE, conditioning=save(dict(words))
        )
        painted: dict[int, Tensor] = {}
        with self._bars.show("sample"):
            for done, sample in enumerate(denoise(self._address, request), 1):
                self._bars.update("sample", done, NUM_STEPS * len(seeds))
                if sample.last:
                    painted[sample.sample] = load(sample.latents)["latents"].float()
        return torch.cat([painted[index] for index in range(len(seeds))])


def _sheet(pictures: Tensor) -> str:
    """Pictures [n, 3, SIZE, SIZE] side by side, as an image element."""
    figure = Figure(figsize=(4.0, 2.0), layout="constrained")
    for axes, picture in zip(figure.subplots(NUM_SHOWN // 8, 8).flat, pictures, strict=True):
        axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _prepare(scratch: Path, bars: Bars) -> Prepared:
    painter, model = Painter(), scratch / "pipeline"
    pretrain(painter, lambda done, total: bars.update("teach discs", done, total))
    save_pipeline(painter, model)
    return Prepared(model=str(model), session=lambda address: PictureSession(address, painter, bars))


PICTURES = Subject(
    title="A tiny FLUX.1 transformer",
    reward_means=REWARD_MEANS,
    shown="Pictures",
    note="By the quantized actors, from the same noise.",
    prepare=_prepare,
)
