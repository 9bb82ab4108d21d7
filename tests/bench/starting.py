"""What the extension costs before anything is sampled: its import, and reading a generator file."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from maskunet_core.files.checkpoint import load, save
from maskunet_core.models.structure import inspect_model
from tests.bench.clock import seconds
from tests.builders import make_generator, sd15_unet
from trainer.host import PROJECT

_IMPORT = """
import asyncio
from tests.bench.clock import seconds
from tests.host.extension import load_extension
from trainer.host import enter_host
enter_host()
import nodes, comfy.sample, comfy.samplers, comfy_api.latest, folder_paths, latent_preview, server
async def enter():
    extension = await load_extension().comfy_entrypoint()
    await extension.on_load()
    for node in await extension.get_node_list():
        node.GET_SCHEMA()
print("took", seconds(lambda: asyncio.run(enter())))
"""


def _import_seconds(environment: dict[str, str]) -> float:
    """Of the extension and its schemas, in a fresh process that holds the host already, as ComfyUI does."""
    command = [sys.executable, "-c", _IMPORT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT, env=environment)
    return float(done.stdout.split("took")[-1])


def _imports(repetitions: int) -> dict[str, list[float]]:
    """With the bytecode that an earlier start left, and with none of the extension's."""
    with tempfile.TemporaryDirectory() as bytecode:
        keeping = os.environ | {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
        _import_seconds(keeping)
        later = [_import_seconds(keeping) for _ in range(repetitions)]
        for package in ("nodes", "maskunet_core"):
            shutil.rmtree(Path(bytecode) / (PROJECT / package).relative_to(PROJECT.anchor))
        dropping = keeping | {"PYTHONDONTWRITEBYTECODE": "1"}
        first = [_import_seconds(dropping) for _ in range(repetitions)]
    return {"import of the extension": later, "import of the extension, first start": first}


def measure(repetitions: int) -> list[dict[str, Any]]:
    """Medians with their spread, in milliseconds."""
    toy = PROJECT / "maskunet_core" / "toy" / "generators" / "toy_shapes.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "sd15.safetensors"
        structure = inspect_model(sd15_unet(), "decoder attention", "SD 1.5")
        save(large, make_generator(structure), "decoder attention", {})
        found = {
            **_imports(repetitions),
            f"load a generator for the toy model ({_megabytes(toy)})": [
                seconds(lambda: load(toy)) for _ in range(repetitions)
            ],
            f"load a generator for SD 1.5 ({_megabytes(large)})": [
                seconds(lambda: load(large)) for _ in range(repetitions)
            ],
        }
    return [
        {
            "what": what,
            "ms": round(1000 * statistics.median(took), 1),
            "from": round(1000 * min(took), 1),
            "to": round(1000 * max(took), 1),
        }
        for what, took in found.items()
    ]


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"
