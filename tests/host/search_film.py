"""`make film`: a search at work as a GIF, every picture and number of a real run of the toy model.

The candidates as they are judged, the best of them, each update of its masks, and the end beside what the stock sampler
draws with the seed that one would have begun with.
"""

import importlib
import sys
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskunet_core.search.settings import PRESETS, SearchSettings
from trainer.host import PROJECT, enter_host

from .demo import RIGHT, WRONG, judge
from .extension import NAME, load_extension

FILM = PROJECT / "workflows" / "search_at_work.gif"
PROMPT, SEED, PRESET = "a black ring left of an orange cross", 0, "quality"
SAMPLING = {"seed": SEED, "steps": 15, "cfg": 5.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
SIZE, MARGIN, CELL, PICTURE, GRAPH_TOP = (640, 360), 12, 64, 208, 262
COLUMNS = 5
_PAPER, _INK, _FAINT, _LINE, _SLOT = (24, 24, 27), (244, 244, 245), (161, 161, 170), (96, 165, 250), (39, 39, 42)
COLOURS = 48
CANDIDATE, UPDATE, CHOSEN, END = 180, 60, 700, 1800
"""Milliseconds for which a frame is shown."""


@dataclass(frozen=True)
class Moment:
    """What a search had found at a moment, and for how long it is shown.

    candidates: (picture, reward) of those judged so far; chosen: the best one's number, once it is known. picture:
    what was looked at last; right: of the finished picture, by a reader that the search never asks. updates: rewards.
    """

    text: str
    milliseconds: int
    picture: Image.Image
    candidates: tuple[tuple[Image.Image, float], ...]
    chosen: int | None = None
    updates: tuple[float, ...] = ()
    right: bool | None = None


def as_image(pictures: Tensor) -> Image.Image:
    """The first of pictures `[N, 3, H, W]`, in [0, 1] or as bytes."""
    first = pictures[0] if pictures.dtype == torch.uint8 else (pictures[0].clamp(0, 1) * 255).round().byte()
    return Image.fromarray(first.movedim(0, -1).cpu().numpy())


def node(name: str) -> ModuleType:
    """A module of the nodes' room."""
    return importlib.import_module(f"{NAME}.nodes.{name}")


class Filmed:
    """A run of the reward sampler, and what it looks like."""

    def __init__(self, settings: SearchSettings):
        self.settings = settings
        self.model, clip, self.vae = node("toy").MaskUNetToyModel.execute().result
        rewards = node("rewards")
        self.texts = {
            name: clip.encode_from_tokens_scheduled(clip.tokenize(text))
            for name, text in (("positive", PROMPT), ("negative", ""))
        }
        self.empty = torch.zeros(1, 4, 8, 8)
        self.run = node("reward_run").RewardRun(
            sampling=node("host_sampling").KSampling(
                self.model, self.texts["positive"], self.texts["negative"], dict(SAMPLING)
            ),
            vae=self.vae,
            gradient_vae=None,
            reward=rewards.MaskUNetRewardLoader.execute(rewards.TOY_REWARD, "auto", False).result[0],
            watch=None,
            prompt=PROMPT,
            latent={"samples": self.empty},
            settings=self.settings,
            targets="decoder attention",
            stop_by_watch=False,
            node_id=None,
        )

    def plain(self) -> Image.Image:
        import comfy.sample

        options = dict(SAMPLING)
        settings = [options.pop(name) for name in ("steps", "cfg", "sampler_name", "scheduler")]
        noise = comfy.sample.prepare_noise(self.empty, SEED)
        latents = comfy.sample.sample(
            self.model, noise, *settings, self.texts["positive"], self.texts["negative"], self.empty, **options
        )
        return self._decoded(latents)

    def _decoded(self, latents: Tensor) -> Image.Image:
        return as_image(self.vae.decode(latents).movedim(-1, 1))

    def film(self) -> list[Moment]:
        """Its moments, from the first candidate on."""
        run, plain, moments = self.run, self.plain(), []

        def candidate(number: int, scores: Tensor) -> None:
            picture = as_image(run.judge.last_pictures)
            judged = (*(moments[-1].candidates if moments else ()), (picture, float(scores[0])))
            text = f"starting noise {number + 1} of {self.settings.candidates}"
            moments.append(Moment(text, CANDIDATE, picture, judged))

        def look(seen, estimate: Tensor) -> None:
            last = moments[-1]
            if last.chosen is None:
                best = max(range(len(last.candidates)), key=lambda n: last.candidates[n][1])
                picture = last.candidates[best][0]
                last = replace(last, text="the best of them", milliseconds=CHOSEN, chosen=best, picture=picture)
                moments.append(last)
            text = f"step {seen.step + 1} of {run.steps}, update {seen.iteration} of masks"
            updates = (*last.updates, float(seen.scores[0]))
            picture = as_image(run.judge.last_pictures)
            moments.append(replace(last, text=text, milliseconds=UPDATE, picture=picture, updates=updates))

        run.progress.candidate, run.progress.look = candidate, look
        found = run.run()
        final, last = self._decoded(found.latents), moments[-1]
        right = judge([plain, final], PROMPT)
        ends = [(f"the stock sampler with seed {SEED}", plain, right[0]), ("the search", final, right[1])]
        moments += [replace(last, text=text, milliseconds=END, picture=p, right=r) for text, p, r in ends]
        return moments


class Screen:
    """Draws moments, all on one scale."""

    def __init__(self, moments: list[Moment]):
        scores = [score for _, score in moments[-1].candidates] + list(moments[-1].updates)
        self.looks = len(scores)
        self.lowest, self.highest = min(scores), max(scores)
        self.large, self.small = ImageFont.load_default(17), ImageFont.load_default(13)

    def frame(self, moment: Moment) -> Image.Image:
        screen = Image.new("RGB", SIZE, _PAPER)
        draw = ImageDraw.Draw(screen)
        draw.text((MARGIN, 8), f'"{PROMPT}"', _INK, self.large)
        self._candidates(screen, draw, moment)
        left, top = SIZE[0] - MARGIN - PICTURE, 34
        frame = _SLOT if moment.right is None else RIGHT if moment.right else WRONG
        draw.rectangle((left - 4, top - 4, left + PICTURE + 3, top + PICTURE + 3), fill=frame)
        screen.paste(moment.picture.resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (left, top))
        draw.text((left - 4, top + PICTURE + 8), moment.text, _INK, self.small)
        self._curve(draw, moment)
        return screen

    def _candidates(self, screen: Image.Image, draw: ImageDraw.ImageDraw, moment: Moment) -> None:
        for n, (picture, _) in enumerate(moment.candidates):
            left, top = MARGIN + n % COLUMNS * (CELL + 8), 34 + n // COLUMNS * (CELL + 8)
            if n == moment.chosen:
                draw.rectangle((left - 4, top - 4, left + CELL + 3, top + CELL + 3), fill=RIGHT)
            screen.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))

    def _curve(self, draw: ImageDraw.ImageDraw, moment: Moment) -> None:
        """Rewards: of the candidates as dots, of the updates as a line."""
        left, right, bottom = MARGIN, SIZE[0] - MARGIN, SIZE[1] - MARGIN
        draw.rectangle((left, GRAPH_TOP + 18, right, bottom), fill=_SLOT)
        draw.text(
            (left, GRAPH_TOP), "reward: of each starting noise, then after each update of the masks", _FAINT, self.small
        )
        scores = [score for _, score in moment.candidates] + list(moment.updates)
        apart = (right - left - 16) / (self.looks - 1)
        points = [(left + 8 + n * apart, self._height(score)) for n, score in enumerate(scores)]
        seen = len(moment.candidates)
        for n, (x, y) in enumerate(points[:seen]):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=RIGHT if n == moment.chosen else _FAINT)
        if len(points) > seen + 1:
            draw.line(points[seen:], fill=_LINE, width=2)

    def _height(self, score: float) -> float:
        top, bottom = GRAPH_TOP + 26, SIZE[1] - MARGIN - 8
        return bottom - (score - self.lowest) / max(self.highest - self.lowest, 1e-9) * (bottom - top)


def one_palette(frames: list[Image.Image]) -> list[Image.Image]:
    """Of all frames one: what does not move then costs nothing."""
    few = [
        frame.resize((SIZE[0] // 2, SIZE[1] // 2), Image.Resampling.NEAREST) for frame in frames[:: len(frames) // 8]
    ]
    together = Image.new("RGB", (few[0].width, few[0].height * len(few)))
    for n, frame in enumerate(few):
        together.paste(frame, (0, n * frame.height))
    palette = together.quantize(COLOURS, dither=Image.Dither.NONE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def main() -> int:
    enter_host(cpu=True)
    load_extension()
    node("folders").register()
    with torch.no_grad():
        moments = Filmed(PRESETS[PRESET]).film()
    screen = Screen(moments)
    frames = one_palette([screen.frame(moment) for moment in moments])
    frames[0].save(
        FILM, save_all=True, append_images=frames[1:], duration=[m.milliseconds for m in moments], loop=0, optimize=True
    )
    for moment in moments[-2:]:
        print(moment.text, "right" if moment.right else "wrong")
    seconds = sum(m.milliseconds for m in moments) / 1000
    print(f"{FILM.relative_to(PROJECT)}: {len(frames)} frames, {seconds:.1f} s, {FILM.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
