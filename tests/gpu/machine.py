"""What the steps run on: `python -m tests.gpu.machine FILE` writes it as JSON."""

import contextlib
import hashlib
import json
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.gpu.rows import replace_text
from trainer.host import PROJECT, find_host

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "comfy-kitchen", "comfy-aimdo", "torchsde")
STANDINS = ("av", "scipy", "PIL", "torchvision", "torchaudio")
"""Packages that a packed folder may bring as a stand-in, which says so of itself."""


def _driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    with contextlib.suppress(OSError):
        found = re.search(r"(\d+\.\d+[.\d]*)", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
        return found[1] if found else "unknown"
    return "unknown"


def _card() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return {
            "device": "cuda",
            "card": properties.name,
            "memory GB": round(properties.total_memory / 2**30, 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "driver": _driver(),
            "built for": built,
        }
    name = "mps" if torch.backends.mps.is_available() else "cpu"
    return {"device": name, "card": f"none ({platform.machine()})", "threads": torch.get_num_threads()}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _kernels(device: str) -> str:
    """The backends of comfy_kitchen that the host may call."""
    sys.path.insert(0, str(find_host()))
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    try:
        import comfy.quant_ops  # noqa: F401 - it switches backends off
        import comfy_kitchen
    except ImportError as error:
        return f"none ({error})"
    backends = comfy_kitchen.list_backends()
    return ", ".join(name for name, state in backends.items() if state["available"] and not state["disabled"])


def _stand_ins() -> str:
    return ", ".join(name for name in STANDINS if (spec := find_spec(name)) and "stand_ins" in str(spec.origin))


def sources() -> str:
    """Digest of the project's Python files: rows of different ones are not comparable."""
    digest = hashlib.sha256()
    for folder in ("maskunet_core", "nodes", "trainer", "tests"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            digest.update(path.relative_to(PROJECT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def facts() -> dict[str, Any]:
    """Plain keys and values."""
    card = _card()
    host = (find_host() / "comfyui_version.py").read_text(encoding="utf-8").split('"')
    told = {**card, "system": platform.platform(), "python": platform.python_version(), **_versions()}
    told |= {"ComfyUI": host[-2], "comfy_kitchen kernels": _kernels(card["device"])}
    return told | {"stand-ins for packages": _stand_ins() or "none", "sources": sources()}


if __name__ == "__main__":
    replace_text(Path(sys.argv[1]), json.dumps(facts()))
