"""What holds a video together on the toy model, by the reader that nothing was optimised for.

Videos of the same prompts and noises, with and without cross-frame attention, with a generator's masks for each frame
or for all, at the published levels of noise and at levels that suit the toy.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskunet_core.toy.captions import Caption
from maskunet_core.toy.judge import read
from maskunet_core.toy.model import load_reader
from maskunet_core.toy.readers import Reading
from trainer.evaluate import mean_and_error
from trainer.toy.held_out import TABLE, held_out_prompts

FRAMES, STEPS, MOTION = 4, 10, 24.0
PUBLISHED, OF_THE_TOY = (0.058, 0.118), (0.45, 0.55)
ROWS = {
    "frames apart": {"cross_frame": False},
    "cross-frame attention": {},
    "frames apart, published levels": {"cross_frame": False, "levels": PUBLISHED},
    "cross-frame attention, published levels": {"levels": PUBLISHED},
    "generator, masks per frame": {"masked": True, "share_masks": False},
    "generator, masks shared": {"masked": True},
}
DIFFERENCES = (
    ("cross-frame attention", "frames apart"),
    ("cross-frame attention, published levels", "frames apart, published levels"),
    ("generator, masks shared", "generator, masks per frame"),
)
_INSIDE = 0.1
"""Of the picture's width at each side, where things may have left it: their places are not compared."""


@dataclass
class Held:
    """`[videos]` each. right: share of later frames with just the things that the prompt names. same: with just those
    of the first frame. drift: how far a thing is from its place in the first frame, moved; step: mean difference of
    neighbouring frames' pixels. Both in percent: of the picture's width, of the pixels' range.
    """

    right: Tensor
    same: Tensor
    drift: Tensor
    step: Tensor


def held(videos: list[Tensor], readings: list[Reading], captions: list[Caption]) -> Held:
    """videos: pictures `[FRAMES, 3, H, W]` of each, and what the reader saw in them."""
    right, same, drift, step = [], [], [], []
    for pictures, reading, caption in zip(videos, readings, captions):
        present = reading.presence > 0
        named = torch.zeros_like(present[0])
        named[[phrase.pair for phrase in caption.phrases]] = True
        right.append((present[1:] == named).all(1).float().mean())
        same.append((present[1:] == present[0]).all(1).float().mean())
        places = reading.position.clone()
        places[..., 0] += torch.arange(len(places))[:, None] * MOTION / 512
        inside = (reading.position[0] - (len(places) - 1) * torch.tensor([MOTION / 512, 0.0]) > _INSIDE).all(1)
        both = present[1:] & present[0] & inside
        away = (places[1:] - places[0]).norm(dim=-1)[both]
        drift.append(100 * away.mean() if both.any() else torch.tensor(torch.nan))
        step.append(100 * (pictures[1:] - pictures[:-1]).abs().mean())
    return Held(*(torch.stack(values) for values in (right, same, drift, step)))


class _Stage:
    def __init__(self) -> None:
        from tests.host.extension import NAME, load_extension

        load_extension()
        nodes = {
            name: importlib.import_module(f"{NAME}.nodes.{name}") for name in ("toy", "video", "generator", "folders")
        }
        nodes["folders"].register()
        self._sampler = nodes["video"].MaskUNetVideoSampler
        self.model, self.clip, self.vae = nodes["toy"].MaskUNetToyModel.execute().result
        generator = nodes["generator"].MaskUNetLoader.execute("toy_shapes.safetensors").result[0]
        self.masked = nodes["generator"].MaskUNetApply.execute(self.model, generator, 1.0, 0.0, 1.0, False, 0).result[0]

    def _text(self, text: str) -> Any:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def video(self, caption: Caption, seed: int, masked: bool = False, levels=OF_THE_TOY, **more: Any) -> Tensor:
        """Pictures `[FRAMES, 3, H, W]` in [0, 1]."""
        sampling = (seed, STEPS, 5.0, "ddim", "ddim_uniform", self._text(str(caption)), self._text(""))
        latent = {"samples": torch.zeros(1, 4, 8, 8)}
        options = {"t1_percent": levels[0], "t0_percent": levels[1], "chunk": FRAMES} | more
        model = self.masked if masked else self.model
        found = self._sampler.execute(model, *sampling, latent, FRAMES, MOTION, 0.0, **options).result[0]
        return self.vae.decode(found["samples"]).movedim(-1, 1).clamp(0, 1)


def measure(videos: int) -> list[dict[str, Any]]:
    """A row for each of ROWS; the seed of a video is its number."""
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    captions, judge, rows = held_out_prompts(videos, TABLE), load_reader("reader_b"), []
    with torch.inference_mode():
        stage = _Stage()
        results: dict[str, Held] = {}
        for name, settings in ROWS.items():
            drawn = [stage.video(caption, seed, **settings) for seed, caption in enumerate(captions)]
            results[name] = held(drawn, [read(judge, pictures) for pictures in drawn], captions)
            rows.append({"video": name} | {key: _told(values) for key, values in vars(results[name]).items()})
            print(rows[-1], flush=True)
    for one, other in DIFFERENCES:
        first, second = vars(results[one]), vars(results[other])
        differences = {key: _told(first[key] - second[key]) for key in first}
        rows.append({"video": f"{one} - {other}"} | differences)
    return rows


def _told(values: Tensor) -> str:
    mean, error = mean_and_error(values[values.isfinite()])
    return f"{mean:.3f} ± {error:.3f}"
