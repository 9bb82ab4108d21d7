"""What a data set of many pictures costs: to encode, to begin from, and step by step; latents and texts are tiny."""

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from maskunet_core.training.ahead import ReadAhead
from maskunet_core.training.batches import Batches
from trainer.config_file import parse_config
from trainer.data.cache import Cache, Encoders, prepare
from trainer.data.decoding import Record
from trainer.host import PROJECT

SIZES = (1_000, 10_000, 100_000, 1_000_000)
BATCH, STEPS = 32, 300
STEP = 0.02
"""Seconds of a simulated step, in which a card would be at work."""


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "BMP")
    return buffer.getvalue()


class ManyRecords(Sequence):
    """Pictures that differ in a few bytes, each with a caption of its own."""

    def __init__(self, count: int):
        self._count, self._picture = count, _picture()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(self._count))]
        caption = f"a photo of a thing on a table, number {place} of many"
        return Record(f"{place // 1000:05}.tar/{place:08}.bmp", caption, lambda: self._picture + str(place).encode())


def _text(caption: str) -> dict[str, torch.Tensor]:
    return {"cross_attn": torch.full((4, 8), len(caption) / 100)}


def _data(folder: Path, count: int) -> Any:
    encoders = Encoders([(8, 8)], lambda pixels: pixels[:1, :4, :4].expand(4, 4, 4), "vae", _text, "clip", False)
    inputs = ManyRecords(count), encoders, Cache(folder)
    return prepare(*inputs, fingerprint=f"{count}", broken_limit=0.0, progress=False)


def _of_process(folder: Path, count: int) -> dict[str, Any]:
    """In a process of its own, which begins from what is encoded."""
    memory = psutil.Process().memory_info
    before, began = memory().rss, time.monotonic()
    data = _data(folder, count)
    training, _ = data.split(64, 0)
    torch.as_tensor(data.digests)
    config = parse_config({"data": {"flip": False}, "loop": {"batch": BATCH}})
    batches = Batches(training, config, 1000)
    batches.draw(0)
    start = time.monotonic() - began
    plain = ReadAhead(batches.draw, STEPS, threaded=False)
    began = time.monotonic()
    for step in range(STEPS):
        plain.take(step)
    alone = time.monotonic() - began
    ahead = ReadAhead(batches.draw, STEPS, threaded=True)
    began = time.monotonic()
    for step in range(STEPS):
        ahead.take(step)
        time.sleep(STEP)
    whole = time.monotonic() - began
    ahead.close()
    return {
        "pictures": count,
        "start s": round(start, 1),
        "memory MB": round(memory().rss / 2**20),
        "of which libraries MB": round(before / 2**20),
        "batches a second": round(STEPS / alone),
        "steps a second": round(STEPS / whole, 1),
        "waits for data": f"{ahead.waited / whole:.1%}",
    }


def measure(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of pictures."""
    rows = []
    for count in sizes:
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            _data(Path(folder), count)
            encoding = time.monotonic() - began
            command = [sys.executable, "-m", "tests.bench.data", folder, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))
        told = json.loads(done.stdout.splitlines()[-1])
        rows.append(told | {"on disk MB": round(size / 2**20, 1), "encoded a second": round(count / encoding)})
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_of_process(Path(sys.argv[1]), int(sys.argv[2]))))
