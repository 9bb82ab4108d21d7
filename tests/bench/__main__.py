"""`make bench`: what a masked step costs over an unmasked one, on SD 1.5's shapes with random weights."""

import argparse
import statistics
import time

import torch

from tests.builders import make_generator, sd15_unet
from trainer.host import PROJECT, enter_host
from trainer.tables import write_table


def random_unet() -> torch.nn.Module:
    """SD 1.5's U-Net in memory, fp32 on the CPU, with small random weights."""
    unet = sd15_unet().to_empty(device="cpu").requires_grad_(False).eval()
    torch.manual_seed(0)
    for parameter in unet.parameters():
        parameter.normal_(std=0.02)
    return unet


def measure(sizes: list[int], repetitions: int) -> list[dict]:
    """A row per size: seconds of unmasked and masked calls in turn, and the ratio pair by pair."""
    from maskunet_core.families import inspect_model
    from maskunet_core.patch import installed
    from maskunet_core.sources import GeneratorMasks

    unet = random_unet()
    structure = inspect_model(unet, "decoder attention", "SD 1.5")
    # A generator whose bits differ between the samples: what all samples share would be cheaper.
    source = GeneratorMasks(make_generator(structure, lively=True))
    rows = []
    for size in sizes:
        x, text = torch.randn(2, 4, size // 8, size // 8), torch.randn(2, 77, 768)
        timesteps = torch.tensor([500.0, 500.0])

        def call(*sources, x=x, timesteps=timesteps, text=text) -> float:
            began = time.perf_counter()
            with torch.inference_mode(), installed(unet, sources):
                unet(x, timesteps, context=text, transformer_options={})
            return time.perf_counter() - began

        call((source, 1.0))
        pairs = [(call(), call((source, 1.0))) for _ in range(repetitions)]
        ratios = [masked / plain for plain, masked in pairs]
        rows.append(
            {
                "pixels": f"{size}x{size}",
                "samples": 2,
                "unmasked s": round(statistics.median(plain for plain, _ in pairs), 2),
                "masked s": round(statistics.median(masked for _, masked in pairs), 2),
                "ratio": round(statistics.median(ratios), 3),
                "ratio min": round(min(ratios), 3),
                "ratio max": round(max(ratios), 3),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="256x256 alone, two repetitions")
    arguments = parser.parse_args()
    enter_host()
    rows = measure([256], 2) if arguments.quick else measure([256, 512], 5)
    print(write_table(PROJECT / "output" / "bench", rows, {"seed": 0, "batch": "1 with CFG"}))


if __name__ == "__main__":
    main()
