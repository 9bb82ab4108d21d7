"""`make pictures`: every template's thumbnail and the pictures of the help pages, from real runs on the toy model."""

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from trainer.host import PROJECT

from .demo import fetch
from .graph import load_workflow, shows_pictures, template_file, titled, to_prompt
from .server import Server, ServerError

HELP_PICTURES = PROJECT / "nodes" / "web" / "docs" / "pictures"
SIZE = 560
"""Side of a picture: the template browser shows squares."""
LARGEST = 60_000
"""Bytes that a picture may take in the repository."""
_PAPER, _INK, _FAINT = (24, 24, 27), (244, 244, 245), (161, 161, 170)
_GAP, _LINE, _FONT, _READABLE = 10, 34, 26, 18


@dataclass(frozen=True)
class Thumbnail:
    """What a template's picture shows: captions, each with the title of the node whose pictures stand under it.

    runs: the graph that is run, where the template itself needs weights that do not ship; the picture then says so.
    preset, text, seed, batch: where not the graph's own.
    """

    panels: tuple[tuple[str, str], ...]
    runs: str = ""
    preset: str = ""
    text: str = ""
    seed: int = 0
    batch: int = 0


_SEARCH = (("stock sampler", "Save without a search"), ("reward sampler", "Save with a search"))
_BEST = (("six noises, the best framed", "Candidates"),)


def _random(most: int, *shares: int) -> tuple[tuple[str, str], ...]:
    return (
        ("all weights", "Save with all weights"),
        (f"{most} % of the weights", f"Save with {most} %"),
        *((f"{share} %", f"Save with {share} %") for share in shares),
    )


_RANDOM, _RANDOM_ON_A_TRANSFORMER = _random(90, 80, 60), _random(98, 95, 90)
_TRAINING = (
    ("what it learns from", "What it learns from"),
    ("before", "Save before"),
    ("after 80 steps", "Save after"),
)
THUMBNAILS = {
    "generator_off_and_on": Thumbnail((("A without masks, B with a generator's", "What the judge saw"),)),
    "random_masks": Thumbnail(_RANDOM),
    "reward_sampler": Thumbnail(_SEARCH),
    "reward_sampler_and_best_of_n": Thumbnail(
        (("plain", "Save plain"), ("best of 16", "Save best of 16"), ("search", "Save search"))
    ),
    "save_masks": Thumbnail((("found, and saved", "Save with a search"), ("reward while it samples", "Reward curve"))),
    "replay_masks": Thumbnail((("all weights", "Save without masks"), ("masks from a file", "Save with masks"))),
    "with_lora": Thumbnail(
        (
            ("the LoRA learns from", "What it learns from"),
            ("LoRA", "Save with the LoRA"),
            ("LoRA and masks", "Save with LoRA and masks"),
        )
    ),
    "inpainting": Thumbnail(
        (
            ("right part inpainted", "Save without a search"),
            ("right part inpainted, with a search", "Save with a search"),
        )
    ),
    "inspect": Thumbnail(
        (
            ("weights that its masks keep", "Keep ratio"),
            ("one prompt", "Save one prompt"),
            ("another", "Save another prompt"),
        )
    ),
    "attention_guidance": Thumbnail(
        (
            ("plain", "Save plainly"),
            ("attention guidance", "Save with guidance"),
            ("where the model sees the words", "Attention maps"),
        )
    ),
    "check_and_compare": Thumbnail((("the same noises without masks and with", "Save pairs"),)),
    "train_on_my_pictures": Thumbnail(_TRAINING),
    "video": Thumbnail(
        (("frames of a video", "Save frames"), ("with masks found on its first", "Save frames with masks"))
    ),
    "learned_word": Thumbnail(
        (
            ("the word it began with", "Save with the start"),
            ("learned from ten pictures", "Save with the word"),
            ("with masks, at half the price", "Save with masks"),
        )
    ),
    "attention_and_search": Thumbnail((("fast", "Save plainly"), ("fast, guided", "Save with guidance"))),
    "random_masks_on_a_transformer": Thumbnail(_RANDOM_ON_A_TRANSFORMER),
    "sd15_best_of_6": Thumbnail(_BEST, "reward_sampler", "fast", "a black ring and a yellow cross", 1, 1),
    "sd15_reward_sampler": Thumbnail(_SEARCH, "reward_sampler", text="a red circle and a green triangle", seed=2),
    "sd15_random_masks": Thumbnail(_RANDOM, "random_masks", text="a yellow star", seed=1),
    "sd15_train_on_my_pictures": Thumbnail(_TRAINING, "train_on_my_pictures", seed=9),
    "sdxl_best_of_6": Thumbnail(_BEST, "reward_sampler", "fast", "an orange cross right of a blue circle", 3, 1),
    "sdxl_reward_sampler": Thumbnail(_SEARCH, "reward_sampler", text="a green cross left of a red square", seed=5),
    "z_image_best_of_6": Thumbnail(_BEST, "reward_sampler", "fast", "a blue star and a white circle", 4, 1),
    "z_image_random_masks": Thumbnail(
        _RANDOM_ON_A_TRANSFORMER, "random_masks_on_a_transformer", text="an orange cross and a white triangle", seed=1
    ),
    "flux_best_of_6": Thumbnail(_BEST, "reward_sampler", "fast", "a purple triangle and a green ring", 2, 1),
    "sdxl_random_masks": Thumbnail(_RANDOM, "random_masks", text="a small green cross", seed=2),
}
TOY_MODEL = "toy_model"
TOY_PROMPTS = (
    "a red circle",
    "a small orange star",
    "a green star and a black ring",
    "a red star above a blue ring",
)
Panel = tuple[str, list[Image.Image]]


@dataclass(frozen=True)
class Layout:
    """Places (left, top, width, height) of the panels' captions and pictures, and the height of it all."""

    captions: list[tuple[int, int, int]]
    pictures: list[list[tuple[int, int, int, int]]]
    height: int

    @property
    def area(self) -> int:
        return sum(width * height for places in self.pictures for _, _, width, height in places)


def _layout(panels: list[Panel], panel_columns: int, picture_columns: int, margin: int) -> Layout:
    """Rows of panels, each with rows of pictures as large as the width allows; a last row fills the width, too."""
    captions, places, top = [], [], _GAP
    for start in range(0, len(panels), panel_columns):
        row = panels[start : start + panel_columns]
        width, bottom = (SIZE - 2 * margin - _GAP) // len(row) - _GAP, top
        for number, (_, pictures) in enumerate(row):
            left = margin + _GAP + number * (width + _GAP)
            captions.append((left, top, width))
            columns = min(picture_columns, len(pictures))
            wide = (width - (columns - 1) * _GAP // 2) // columns
            high = round(wide * pictures[0].height / pictures[0].width)
            steps = wide + _GAP // 2, high + _GAP // 2
            corners = [
                (left + n % columns * steps[0], top + _LINE + n // columns * steps[1]) for n in range(len(pictures))
            ]
            places.append([(x, y, wide, high) for x, y in corners])
            bottom = max(bottom, corners[-1][1] + high)
        top = bottom + _GAP
    return Layout(captions, places, top)


def compose(panels: list[Panel], remark: str = "") -> Image.Image:
    """One picture, SIZE wide and high: captions over their pictures, these as large as possible."""
    foot, most = _LINE if remark else 0, max(len(pictures) for _, pictures in panels)
    choices = itertools.product(range(1, len(panels) + 1), range(1, most + 1), range(0, SIZE // 3, _GAP))
    layouts = [layout for choice in choices if (layout := _layout(panels, *choice)).height + foot <= SIZE]
    best = max(
        layouts, key=lambda layout: (_fair(panels, layout), _font(panels, layout).size >= _READABLE, layout.area)
    )
    sheet, down = Image.new("RGB", (SIZE, SIZE), _PAPER), (SIZE - best.height - foot) // 2
    draw, font = ImageDraw.Draw(sheet), _font(panels, best)
    for (caption, pictures), (left, top, _), places in zip(panels, best.captions, best.pictures):
        draw.text((left, top + down), caption, _INK, font)
        for picture, (x, y, *size) in zip(pictures, places):
            sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x, y + down))
    if remark:
        draw.text((_GAP, best.height + down), remark, _FAINT, ImageFont.load_default(_FONT))
    return sheet


def _fair(panels: list[Panel], layout: Layout) -> bool:
    """Pictures that can be compared, because they are of one size, are shown in one size."""
    pairs = {(pictures[0].size, places[0][2:]) for (_, pictures), places in zip(panels, layout.pictures)}
    return len(pairs) == len({size for size, _ in pairs})


def _font(panels: list[Panel], layout: Layout) -> ImageFont.FreeTypeFont:
    """As large as all captions allow."""
    room = [(caption, width) for (caption, _), (_, _, width) in zip(panels, layout.captions)]
    fonts = (ImageFont.load_default(size) for size in range(_FONT, 0, -1))
    return next(font for font in fonts if all(font.getlength(caption) <= width for caption, width in room))


def save(picture: Image.Image, path: Path) -> None:
    """As good as fits into LARGEST."""
    for quality in range(90, 30, -5):
        picture.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= LARGEST:
            break
    print(f"  {path.relative_to(PROJECT)}  {path.stat().st_size / 1000:.0f} kB", flush=True)


def drawn(server: Server, name: str) -> dict[str, list[Image.Image]]:
    """Runs a template's graph: pictures by the title of the node that shows or saves them."""
    thumbnail = THUMBNAILS[name]
    prompt = to_prompt(load_workflow(thumbnail.runs or name), server.object_info())
    changes = {"preset": thumbnail.preset, "text": thumbnail.text, "prompt": thumbnail.text, "seed": thumbnail.seed}
    changes["batch_size"] = thumbnail.batch
    for node in prompt.values():
        # An empty prompt, and a seed of 0, which masks have, stay as they are.
        own = {key for key, value in node["inputs"].items() if value and not isinstance(value, list)}
        node["inputs"] |= {key: value for key, value in changes.items() if value and key in own}
    outputs = server.run(prompt)
    return {
        prompt[node]["_meta"]["title"]: fetch(server, found) for node, found in outputs.items() if shows_pictures(found)
    }


def toy_panels(server: Server) -> list[Panel]:
    """What the toy model draws of TOY_PROMPTS, without masks, guided."""
    prompt, panels = to_prompt(load_workflow("generator_off_and_on"), server.object_info()), []
    titled(prompt, "Sample without masks")["cfg"] = 5.0
    for text in TOY_PROMPTS:
        titled(prompt, "Prompt")["text"] = text
        node = next(key for key, value in prompt.items() if value["_meta"]["title"] == "Save without masks")
        panels.append((text, fetch(server, server.run(prompt)[node])[:3]))
    return panels


def draw(names: list[str]) -> None:
    """Thumbnails of the templates by name, and the same for the help pages that show them; TOY_MODEL for its own."""
    HELP_PICTURES.mkdir(parents=True, exist_ok=True)
    pages = "".join(path.read_text(encoding="utf-8") for path in HELP_PICTURES.parent.glob("*.md"))
    with Server() as server:
        for name in (name for name in names if name in THUMBNAILS):
            thumbnail = THUMBNAILS[name]
            shown = drawn(server, name)
            remark = "drawn by the toy model" if thumbnail.runs else ""
            picture = compose([(caption, shown[title]) for caption, title in thumbnail.panels], remark)
            save(picture, template_file(name, ".jpg"))
            if f"pictures/{name}.jpg" in pages:
                save(picture, HELP_PICTURES / f"{name}.jpg")
        if TOY_MODEL in names:
            save(compose(toy_panels(server)), HELP_PICTURES / f"{TOY_MODEL}.jpg")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help="of templates, or toy_model; all unless told")
    arguments = parser.parse_args()
    every = [*THUMBNAILS, TOY_MODEL]
    unknown = set(arguments.names) - set(every)
    if unknown:
        parser.error(f"there is no picture {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    try:
        draw(arguments.names or every)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
