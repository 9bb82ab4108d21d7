"""What a data set of many encoded pictures costs, to begin from and step by step; latents and texts are tiny."""

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
from safetensors.torch import save

from maskunet_core.training.ahead import ReadAhead
from maskunet_core.training.batches import Batches
from maskunet_core.training.data import content_of
from trainer.config_file import parse_config
from trainer.data.cache import Cache, Encoders, Preparation
from trainer.data.encoded import Rows
from trainer.data.store import key_of
from trainer.host import PROJECT

SIZES = (1_000, 10_000, 100_000, 1_000_000)
BATCH, STEPS = 32, 300
STEP = 0.02
"""Seconds of a simulated step, in which a card would be at work."""


class ManyRecords(Sequence):
    """Pictures that nobody reads, each with a caption of its own."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        raise AssertionError("A picture is read that is encoded already.")


def _encoders() -> Encoders:
    def text(caption: str) -> dict[str, torch.Tensor]:
        return {"cross_attn": torch.zeros(4, 8)}

    return Encoders([(32, 32)], lambda pixels: pixels, "vae", text, "clip", False)


def _preparation(folder: Path, count: int) -> Preparation:
    return Preparation(ManyRecords(count), _encoders(), Cache(folder), f"{count} pictures", 0.0, False)


def _write(folder: Path, count: int) -> None:
    """What encoding leaves: latents [4, 4, 4] and texts [4, 8] in fp16, each text another."""
    preparation = _preparation(folder, count)
    latents, texts = preparation.cache.latents, preparation.cache.texts
    texts.add(preparation.encoders.empty, preparation.encoders.text(""))
    latent, text = save({"latent": torch.randn(4, 4, 4).half()}), save({"cross_attn": torch.randn(4, 8).half()})
    for number, part in enumerate(preparation.parts):
        rows = Rows()
        for place in range(number * preparation.size, min((number + 1) * preparation.size, count)):
            content = content_of(f"picture {place}".encode())
            keys = key_of("latent", place), key_of("text", place)
            caption = f"a photo of a thing on a table, number {place} of many"
            rows.add(f"{place // 1000:05}.tar/{place:08}.jpg", caption, content, (4, 4, 4), keys[:1], keys[1])
            latents.add_saved(keys[0], latent)
            texts.add_saved(keys[1], text)
        for store in (latents, texts):
            if store.due:
                store.flush()
        rows.write(part)
    latents.flush()
    texts.flush()


def _of_process(folder: Path, count: int) -> dict[str, Any]:
    """In a process of its own, which begins from what is encoded."""
    memory = psutil.Process().memory_info
    before, began, worked = memory().rss, time.monotonic(), time.process_time()
    data = _preparation(folder, count).run()
    training, _ = data.split(64, 0)
    torch.as_tensor(data.digests)
    config = parse_config({"data": {"flip": False}, "loop": {"batch": BATCH}})
    batches = Batches(training, config, 1000)
    batches.draw(0)
    start, working = time.monotonic() - began, time.process_time() - worked
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
        "of which computing s": round(working, 1),
        "memory MB": round(memory().rss / 2**20),
        "of which not of files MB": round((memory().rss - memory().shared) / 2**20),
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
            _write(Path(folder), count)
            command = [sys.executable, "-m", "tests.bench.data", folder, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT)
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))
        told = json.loads(done.stdout.splitlines()[-1])
        rows.append(told | {"on disk MB": round(size / 2**20)})
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(_of_process(Path(sys.argv[1]), int(sys.argv[2]))))
