"""`python -m tests.parity.judges`: the second half of `make parity`.

Inception's features, Frechet distances, KID, resized pictures, Mask2Former and DINOv2 by the original packages, or by
transformers where these are in none, and by ours, on fresh random weights, pictures and features. Writes
output/parity/judges.md and judges.json; ends with an error where anything differs by more than 1e-5, relative to the
largest number of the original. CLIP's towers are in the first half. GenEval's rules and T2I-CompBench's BLIP are in no
package: golden values hold these.
"""

import json
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskunet_core.judges.files import DETECTOR_STAND_IN, DINOV2, INCEPTION
from maskunet_core.judges.frechet import Gaussian, frechet_distance
from maskunet_core.judges.inception import PROTOCOLS
from maskunet_core.judges.kernel import kid
from maskunet_core.judges.pictures import levels
from tests.judge_weights import blobs, edges, features, inception_weights, noise
from tests.parity.environment import run_original
from tests.parity.told import TOLERANCE, end_with, tell
from trainer.host import PROJECT, enter_host

SEED = 20250504
_GOLDEN = PROJECT / "tests" / "core" / "judges" / "inception.json"


def write_inputs(folder: Path) -> dict[str, Tensor]:
    """What judges_original.py reads."""
    convolutions = json.loads(_GOLDEN.read_text(encoding="utf-8"))["convolutions"]
    torch.save(inception_weights(convolutions, seed=SEED), folder / "inception.pth")
    drawn = {"blobs": blobs(512, 512, SEED), "noise": noise(200, 301, SEED), "edges": edges(427, 640, SEED)}
    inputs = {name: levels(picture).contiguous() for name, picture in drawn.items()}
    inputs["first"] = features(500, 64, SEED, mean=0.4)
    inputs["second"] = features(500, 64, SEED + 1, mean=0.5, scale=1.1)
    stream = torch.Generator().manual_seed(SEED)
    inputs["to mask2former"] = torch.randn(1, 3, 288, 320, generator=stream)
    inputs["to dinov2"] = torch.randn(2, 3, 42, 42, generator=stream)
    save_file(inputs, folder / "inputs.safetensors")
    return inputs


def ours(folder: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of judges_original.py, from the same files."""
    first, second, inception = inputs["first"], inputs["second"], INCEPTION.load(folder / "inception.pth")
    classes, masks = DETECTOR_STAND_IN.load(folder / "mask2former" / "model.safetensors")(inputs["to mask2former"])
    found = {
        "pytorch-fid/Frechet distance": torch.tensor([frechet_distance(first, Gaussian.of(second))]),
        "torch-fidelity/KID": torch.tensor([kid(first, second)[0]]),
        "transformers/Mask2Former classes": classes,
        "transformers/Mask2Former masks": masks,
        "transformers/DINOv2": DINOV2.load(folder / "dinov2" / "model.safetensors")(inputs["to dinov2"])[:, 0],
    }
    for name in [name for name, value in inputs.items() if value.dtype == torch.uint8]:
        picture = Image.fromarray(inputs[name].movedim(0, -1).numpy())
        found[f"clean-fid/resized {name}"] = PROTOCOLS["clean"].drawn(picture)
        for package in ("pytorch-fid", "torch-fidelity"):
            found[f"{package}/features of {name}"] = inception(PROTOCOLS[package].drawn(picture)[None])[0]
    return found


@torch.no_grad()
def main() -> int:
    enter_host()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = write_inputs(folder)
        run_original("judges_original.py", folder)
        original, found = load_file(folder / "original.safetensors"), ours(folder, inputs)
    rows = []
    for name, expected in sorted(original.items()):
        relative = float((found[name] - expected).abs().max() / expected.abs().max())
        package, what = name.split("/")
        difference = {"largest relative difference": f"{relative:.1e}", "equal": relative <= TOLERANCE}
        rows.append({"original": package, "of": what} | difference)
    return tell(rows, SEED, "judges")


if __name__ == "__main__":
    end_with(main)
