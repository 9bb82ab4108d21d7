"""The suites `coco2014` and `coco2017`: captions of COCO's pictures, and the Frechet distance to these."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from maskunet_core.judges.clip import embedded
from maskunet_core.judges.dinov2 import Dinov2
from maskunet_core.judges.files import (
    CLIP_B16,
    CLIP_B32,
    CLIP_L,
    CLIP_L336,
    DINOV2,
    INCEPTION,
    told_digest,
)
from maskunet_core.judges.inception import PROTOCOLS, Inception, Prepare, Protocol
from maskunet_core.judges.pictures import central_square
from maskunet_core.rewards.clip import ClipReward

from .clip_score import ClipScore
from .files import BadSuite, PromptList, find, loaded
from .real import Real, read_real, write_real
from .suites import PictureJudge, Prompt

REFERENCES = Path("output/benchmark/reference")
CLIPS = {"clip-b32": CLIP_B32, "clip-b16": CLIP_B16, "clip-l14": CLIP_L}
"""Nobody says by which of them the paper scored."""
OPTIONAL = (*CLIPS.values(), CLIP_L336, DINOV2)
KEPT = 200
"""Pictures of each method; of the others features are enough."""
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
_BATCH = 16


def captions_of(year: int) -> PromptList:
    address = f"http://images.cocodataset.org/annotations/annotations_trainval{year}.zip"
    return PromptList(f"captions_val{year}.json", address, {}, "0.24 GB")


def missing_references(year: int) -> list[str]:
    """A line where no statistics of the real pictures have been made."""
    if any(reference_file(f"coco{year}", name).is_file() for name in PROTOCOLS):
        return []
    address, size = f"http://images.cocodataset.org/zips/val{year}.zip", {2014: "6.2 GB", 2017: "0.8 GB"}[year]
    return [
        f"val{year}, COCO's pictures ({size}, {address}; {told_digest('')}), to any folder: then once "
        f"`python -m trainer benchmark reference coco{year} FOLDER`"
    ]


def prompts(year: int, count: int, data: Path | None) -> list[Prompt]:
    """The first caption of each picture, in the order of COCO's file, `count` of them. Raises BadSuite."""
    chosen = captions_of(year)
    try:
        captions: dict[int, str] = {}
        for one in json.loads(chosen.read(data))["annotations"]:
            captions.setdefault(one["image_id"], " ".join(one["caption"].split()))
    except (KeyError, TypeError, json.JSONDecodeError):
        raise BadSuite(f"'{chosen.name}' holds no captions of COCO: take it from {chosen.address}.") from None
    return [Prompt(text, "captions", {"image_id": image}) for image, text in list(captions.items())[:count]]


def judges(suite: str, data: Path | None) -> list[PictureJudge]:
    """Distances by every protocol that has a reference, and scores of each CLIP that is there."""
    inception, digest = loaded(INCEPTION)
    found: list[PictureJudge] = []
    for name, protocol in PROTOCOLS.items():
        real = read_real(reference_file(suite, name))
        if real is not None:
            found.append(FrechetJudge(f"fid-{name}", protocol, inception, digest, real))
    if not found:
        raise BadSuite(f"There are no statistics of the real pictures: make them once by `reference {suite} FOLDER`.")
    for judge, weights in ((CmmdJudge, CLIP_L336), (Dinov2Judge, DINOV2)):
        real = read_real(reference_file(suite, judge.name))
        if real is not None and find(weights) is not None:
            found.append(judge(*loaded(weights), real))
    for name, clip in CLIPS.items():
        if find(clip) is not None:
            found.append(ClipScore(name, *loaded(clip)))
    return found


def of_year(year: int, count: int) -> tuple:
    """What `Suite` takes of a year: prompts, judges, and what is missing besides files."""
    return partial(prompts, year, count), partial(judges, f"coco{year}"), partial(missing_references, year)


class FrechetJudge:
    """Inception's features of each picture. real: those of COCO's own."""

    def __init__(self, name: str, protocol: Protocol, inception: Inception, digest: str, real: Real):
        self.name, self.protocol, self.inception, self.real = name, protocol, inception, real
        self.record = {"inception": digest, "version": 1, "real pictures": real.gaussian.count}

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return {"features": features(self.inception, self.protocol.drawn, pictures)}


class CmmdJudge:
    """CLIP's embedding of each picture. real: those of COCO's own."""

    name = "cmmd"

    def __init__(self, clip: ClipReward, digest: str, real: Real):
        self.clip, self.real = clip, real
        self.record = {"clip": digest, "version": 1, "real pictures": real.gaussian.count}

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return {"embedding": embedded(self.clip, pictures, central_square)}


class Dinov2Judge:
    """DINOv2's features of each picture. real: those of COCO's own."""

    name = "fd-dinov2"

    def __init__(self, dinov2: Dinov2, digest: str, real: Real):
        self.dinov2, self.real = dinov2, real
        self.record = {"dinov2": digest, "version": 1, "real pictures": real.gaussian.count}

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return {"class token": self.dinov2.features(pictures)}


@torch.no_grad()
def features(inception: Inception, prepare: Prepare, pictures: Sequence[Image.Image]) -> Tensor:
    """`[N, 2048]`, on the CPU."""
    device = next(inception.parameters()).device
    return inception(torch.stack([prepare(picture) for picture in pictures]).to(device)).cpu()


def reference_file(suite: str, protocol: str) -> Path:
    return REFERENCES / suite / f"{protocol}.safetensors"


def make_references(suite: str, folder: Path) -> Iterator[str]:
    """Statistics of the real pictures in a folder, by every protocol that lacks them; a line for each.

    Raises BadSuite.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS)
    if len(files) < 2:
        raise BadSuite(f"'{folder}' holds no pictures: name the folder of COCO's own, such as val2017.")
    every = _seen_by()
    made = {name: seen for name, seen in every.items() if not reference_file(suite, name).is_file()}
    found: dict[str, list[Tensor]] = {name: [] for name in made}
    # A picture is read once for all protocols.
    for start in tqdm(range(0, len(files), _BATCH), desc=suite, mininterval=1, disable=not made):
        pictures = [Image.open(file).convert("RGB") for file in files[start : start + _BATCH]]
        for name, features_of in made.items():
            found[name].append(features_of(pictures))
    for name in every:
        path = reference_file(suite, name)
        if name in made:
            write_real(path, Real.of(torch.cat(found.pop(name))))
        yield f"wrote {path}: {len(files)} pictures" if name in made else f"{path} is there already"


def _seen_by() -> dict[str, Callable[[Sequence[Image.Image]], Tensor]]:
    """What makes features of real pictures, by the name of its reference."""
    inception, _ = loaded(INCEPTION)
    found = {name: partial(features, inception, protocol.real) for name, protocol in PROTOCOLS.items()}
    if find(CLIP_L336) is not None:
        found[CmmdJudge.name] = partial(embedded, loaded(CLIP_L336)[0], framed=central_square)
    if find(DINOV2) is not None:
        found[Dinov2Judge.name] = loaded(DINOV2)[0].features
    return found
