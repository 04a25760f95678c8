"""The two sides of a comparison, and what both are asked: values only, so that the command starts fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# English prose of our own, with the digits, names and punctuation that tokenizers treat apart.
SAMPLE = """The ferry left the harbour at 6:40, ten minutes late, and nobody on deck seemed to mind. Anna had counted
the passengers twice: 31 adults, four children and a dog called Biscuit, who belonged to no one in particular. "Will
we be in time for the market?" asked the baker, holding a tray of warm rolls under a cloth. She looked at the sky,
which was turning from grey to a thin, watery blue, and said that they would. Beyond the breakwater the waves grew
longer. A sailor tied down the last of the crates, checked each knot, and went below to write the day's first entry in
the log: wind south-west, 12 knots; sea moderate; engine steady at 900 revolutions. By noon they would see the island,
with its white lighthouse, its two hills and the long row of houses behind the quay. Until then there was coffee,
there was bread, and there was nothing whatever to do but watch the water and wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two. All but source is of a checkpoint only.

    format: "" for what it says of itself. first: what its storages hold before. components: of a pipeline, NAME=PATH,
    where the weights of a component are instead.
    """

    source: str
    format: str = ""
    layout: str = "auto"
    first: str = ""
    components: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """ "saved", "service" or "checkpoint". What lies on disk comes first: a folder may be called as a host is."""
        path = Path(self.source)
        if path.is_file() and path.suffix == ".safetensors":
            return "saved"
        host, _, port = self.source.rpartition(":")
        return "service" if not path.exists() and host and port.isdigit() else "checkpoint"

    @property
    def overrides(self) -> dict[str, str]:
        """Component -> where its weights are instead."""
        return dict(part.split("=", 1) for part in self.components)

    @property
    def label(self) -> str:
        parts = (self.source, *self.components, self.format, self.layout if self.layout != "auto" else "")
        return " ".join(part for part in parts if part) + (f" over {self.first}" if self.first else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What both sides are asked. text, max_tokens: of language models; the rest of diffusion models.

    max_tokens bounds the tokens of a checkpoint and the probes of a service. seed: of the first sample, the next have
    the next. Sizes are those of the VAE's latents: pixels / 8 for most. conditioning: a safetensors file of what a
    pipeline's text encoders give, as for the Denoise call; "" for random numbers.
    """

    text: str = SAMPLE
    max_tokens: int = 256
    seed: int = 0
    num_samples: int = 1
    num_steps: int = 8
    num_frames: int = 1
    height: int = 64
    width: int = 64
    guidance: float = 0.0
    cfg_scale: float = 0.0
    cfg_scale_2: float = 0.0
    conditioning: str = ""


# What records of a kind depend on: fields of Asked.
ASKED: dict[str, tuple[str, ...]] = {
    "text": ("text", "max_tokens"),
    "latents": (
        "seed",
        "num_samples",
        "num_steps",
        "num_frames",
        "height",
        "width",
        "guidance",
        "cfg_scale",
        "cfg_scale_2",
    ),
}
