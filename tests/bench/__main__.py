"""`make bench`: what masks cost in sampling and in training, on published models' shapes with random weights."""

import argparse

import torch

from trainer.host import PROJECT, enter_host
from trainer.tables import write_table

# The host has a package `tests` of its own, so ours comes first.
import tests.bench.models  # noqa: F401  isort: skip


def _starting(quick: bool):
    from tests.bench import starting

    return starting.measure(1 if quick else 3), {}


def _sampling(quick: bool):
    from tests.bench import sampling

    return sampling.measure(sampling.QUICK if quick else sampling.SIZES), {"seed": 0}


def _training(quick: bool):
    from tests.bench import training

    rows = [] if quick else training.measure("SD 1.5", 256, {1: 3, 4: 1})
    return rows + training.measure("toy", 64, {32: 3 if quick else 10}), {"seed": 0, "precision": "fp32"}


def _search(quick: bool):
    from tests.bench import search

    rows = search.measure(256, 1) if quick else search.measure(512, 3)
    write_table(PROJECT / "output" / "bench" / "search_images", search.measure_images(512), {"seed": 0})
    return rows, {"seed": 0, "precision": "fp32", "batch": "1 with CFG"}


def _video(quick: bool):
    from tests.bench import video

    rows = video.measure(4 if quick else 40)
    return rows, {"frames": video.FRAMES, "steps": video.STEPS, "motion": video.MOTION, "cfg": 5.0}


def _judges(quick: bool):
    from tests.bench import judges

    return judges.measure(1 if quick else 3), {"seed": 0, "precision": "fp32"}


def _transformers(quick: bool):
    from tests.bench import transformers

    return transformers.measure(quick), {"seed": 0, "precision": "fp32", "guidance": "none"}


def _data(quick: bool):
    from tests.bench import data

    sizes = data.SIZES[:2] if quick else data.SIZES
    return data.measure(sizes), {"batch": data.BATCH, "simulated step": f"{data.STEP} s"}


def _rewards(quick: bool):
    from tests.bench import rewarded

    rows = rewarded.measure("SD 1.5", 256 if quick else 512)
    return rows if quick else rows + rewarded.measure("SDXL", 1024), {
        "seed": 0,
        "precision": "fp32",
        "samples": 1,
        "unit": "plain forwards",
    }


TABLES = {
    "starting": _starting,
    "sampling": _sampling,
    "training": _training,
    "search": _search,
    "video": _video,
    "judges": _judges,
    "transformers": _transformers,
    "data": _data,
    "rewards": _rewards,
}
ALONE = ("training", "search", "video", "judges", "transformers", "data", "rewards")
"""Measured where they are asked for: at full size they take minutes to hours."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: 3 minutes")
    parser.add_argument("--only", choices=TABLES, help=f"one table alone; {', '.join(ALONE)} are not among the others")
    arguments = parser.parse_args()
    enter_host()
    # Seconds of the processor are those of work, and a process that has used several threads cannot be forked.
    torch.set_num_threads(1)
    for table, measure in TABLES.items():
        if arguments.only == table or (arguments.only is None and table not in ALONE):
            rows, settings = measure(arguments.quick)
            print(f"\n{table}\n\n{write_table(PROJECT / 'output' / 'bench' / table, rows, settings)}", flush=True)


if __name__ == "__main__":
    main()
