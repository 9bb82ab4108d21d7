"""Pictures of a class that the frozen base draws itself, for prior preservation (DreamBooth, arXiv 2208.12242)."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from maskunet_core.replacing import replacing
from maskunet_core.training.base import BaseModel
from maskunet_core.training.buckets import Size
from maskunet_core.training.data import EncodedPictures, sha256
from maskunet_core.training.drawn import drawn

from .config import Config
from .data.decoding import Record
from .pictures import base_digest, encoded, sizes_in_use
from .sheets import to_image


@dataclass(frozen=True)
class ClassPictures:
    """Those of one size: `00000.png` and so on. folder: named by all that they depend on, so that none is ever stale;
    size: (width, height); origin: what the folder's name stands for, which lies in it as JSON."""

    folder: Path
    size: Size
    count: int
    origin: bytes

    @property
    def paths(self) -> list[Path]:
        return [self.folder / f"{number:05d}.png" for number in range(self.count)]

    @property
    def missing(self) -> list[int]:
        """Numbers of those to be made, each the seed of its picture."""
        return [number for number, path in enumerate(self.paths) if not path.exists()]


def class_pictures(config: Config) -> list[ClassPictures]:
    """About `prior.pictures` in all, in the sizes of the pictures trained on, each in its share. Raises BadData."""
    prior = config.prior
    used = sizes_in_use(config) if config.data.path else Counter({(64, 64): 1})
    origin = {"prompt": prior.prompt, "steps": prior.steps, "cfg": prior.cfg, "base": base_digest(config.base)}
    found = []
    for size, pictures in sorted(used.items()):
        content = json.dumps(origin | {"size": size}, indent=2).encode()
        count = max(1, round(prior.pictures * pictures / used.total()))
        found.append(ClassPictures(Path(prior.folder) / sha256(content)[:16], size, count, content))
    return found


def plan(config: Config) -> str:
    """How many class pictures a run needs and would draw first, in a sentence. Raises BadData."""
    found = class_pictures(config)
    needed, missing = sum(of_size.count for of_size in found), sum(len(of_size.missing) for of_size in found)
    return (
        f"Prior: {needed:,} pictures of '{config.prior.prompt}', of which {missing:,} are yet to be drawn, "
        f"in {config.prior.folder}."
    )


def prior_data(config: Config, base: BaseModel) -> EncodedPictures:
    """The class pictures as data to train on; those that are missing are drawn first. Raises BadData."""
    found = class_pictures(config)
    _draw(found, config, base)
    paths = [path for of_size in found for path in of_size.paths]
    records = [Record(str(path), config.prior.prompt, path.read_bytes) for path in paths]
    return encoded(records, [of_size.size for of_size in found], config, base)


def _draw(pictures: list[ClassPictures], config: Config, base: BaseModel) -> None:
    """Draws what is missing. Each picture is written in one go, so that an interrupted drawing goes on."""
    prior, total = config.prior, sum(len(of_size.missing) for of_size in pictures)
    with tqdm(total=total, desc="class pictures", disable=not total) as bar:
        for of_size in pictures:
            missing = of_size.missing
            if missing:
                with replacing(of_size.folder / "origin.json") as temporary:
                    temporary.write_bytes(of_size.origin)
            wanted = [(prior.prompt, number) for number in missing]
            drawings = drawn(base, base.patcher, wanted, size=of_size.size, steps=prior.steps, cfg=prior.cfg)
            for number, drawing in zip(missing, drawings):
                with replacing(of_size.paths[number]) as temporary:
                    to_image(drawing).save(temporary, format="PNG")
                bar.update()
