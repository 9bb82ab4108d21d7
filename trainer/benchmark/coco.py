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
from maskunet_core.judges.files import CLIP_B16, CLIP_B32, CLIP_L, CLIP_L336, INCEPTION
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
CMMD = "cmmd"
OPTIONAL = (*CLIPS.values(), CLIP_L336)
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
_BATCH = 16


def captions_of(year: int) -> PromptList:
    address = f"http://images.cocodataset.org/annotations/annotations_trainval{year}.zip"
    return PromptList(f"captions_val{year}.json", address, {})


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
    real = read_real(reference_file(suite, CMMD))
    if real is not None and find(CLIP_L336) is not None:
        found.append(CmmdJudge(*loaded(CLIP_L336), real))
    for name, clip in CLIPS.items():
        if find(clip) is not None:
            found.append(ClipScore(name, *loaded(clip)))
    return found


def of_year(year: int, count: int) -> tuple:
    """What `Suite` takes of a year: prompts, judges."""
    return partial(prompts, year, count), partial(judges, f"coco{year}")


class FrechetJudge:
    """Inception's features of each picture. real: those of COCO's own."""

    def __init__(self, name: str, protocol: Protocol, inception: Inception, digest: str, real: Real):
        self.name, self.protocol, self.inception, self.real = name, protocol, inception, real
        self.record = {"inception": digest, "version": 1, "real pictures": real.gaussian.count}

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return {"features": features(self.inception, self.protocol.drawn, pictures)}


class CmmdJudge:
    """CLIP's embedding of each picture. real: those of COCO's own."""

    name = CMMD

    def __init__(self, clip: ClipReward, digest: str, real: Real):
        self.clip, self.real = clip, real
        self.record = {"clip": digest, "version": 1, "real pictures": real.gaussian.count}

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        return {"embedding": embedded(self.clip, pictures, central_square)}


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
    for name, of_pictures in _seen_by():
        path = reference_file(suite, name)
        if path.is_file():
            yield f"{path} is there already"
            continue
        parts = []
        for start in tqdm(range(0, len(files), _BATCH), desc=name, mininterval=1):
            parts.append(of_pictures([Image.open(file).convert("RGB") for file in files[start : start + _BATCH]]))
        write_real(path, Real.of(torch.cat(parts)))
        yield f"wrote {path}: {len(files)} pictures"


def _seen_by() -> Iterator[tuple[str, Callable[[Sequence[Image.Image]], Tensor]]]:
    """What makes features of real pictures, by the name of its reference."""
    inception, _ = loaded(INCEPTION)
    for name, protocol in PROTOCOLS.items():
        yield name, partial(features, inception, protocol.real)
    if find(CLIP_L336) is not None:
        clip, _ = loaded(CLIP_L336)
        yield CMMD, partial(embedded, clip, framed=central_square)
