"""`make bench`: what masks cost in sampling, in training and in a search, on SD 1.5's shapes with random weights."""

import argparse
import statistics
import time

import torch

from tests.bench.models import random_unet
from tests.builders import make_generator
from trainer.host import PROJECT, enter_host
from trainer.tables import write_table


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
    parser.add_argument("--quick", action="store_true", help="256x256 alone, few repetitions")
    parser.add_argument("--only", choices=("sampling", "training", "search"), help="one table alone")
    arguments = parser.parse_args()
    enter_host()
    from tests.bench import search, training

    folder = PROJECT / "output" / "bench"
    if arguments.only in (None, "sampling"):
        rows = measure([256], 2) if arguments.quick else measure([256, 512], 5)
        print(write_table(folder / "sampling", rows, {"seed": 0, "batch": "1 with CFG"}))
    if arguments.only in (None, "training"):
        repetitions = 1 if arguments.quick else 3
        rows = training.measure("SD 1.5", 256, [1, 4], repetitions) + training.measure("toy", 64, [32], 5 * repetitions)
        print(write_table(folder / "training", rows, {"seed": 0, "precision": "fp32"}))
    if arguments.only in (None, "search"):
        rows = search.measure(256, 1) if arguments.quick else search.measure(512, 3)
        print(write_table(folder / "search", rows, {"seed": 0, "precision": "fp32", "batch": "1 with CFG"}))
        print(write_table(folder / "search_images", search.measure_images(512), {"seed": 0}))


if __name__ == "__main__":
    main()
