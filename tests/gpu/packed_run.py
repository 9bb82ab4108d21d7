"""Runs `make gpu` from a packed folder, on a machine that needs Python with torch, transformers, safetensors, numpy and
pytest, and no network: `python run.py`. Options are those of `make gpu`; tables come to `output/` beside this file.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
PACKAGES = {
    # wheel's name: module
    "accelerate": "accelerate",
    "comfy_aimdo": "comfy_aimdo",
    "comfy_kitchen": "comfy_kitchen",
    "einops": "einops",
    "pillow": "PIL",
    "psutil": "psutil",
    "torchsde": "torchsde",
    "trampoline": "trampoline",
}
STAND_INS = ("av", "scipy", "torchaudio", "torchvision")


def unpack() -> None:
    """Once; a second call finds everything."""
    finished = WORK / "finished"
    if finished.exists():
        return
    WORK.mkdir(exist_ok=True)
    for archive in HERE.glob("*.tar.xz"):
        with tarfile.open(archive) as source:
            source.extractall(WORK, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    for wheel in (HERE / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as source:
            source.extractall(WORK / "packages" / wheel.name.split("-")[0])
    finished.touch()


def paths() -> list[str]:
    """The project, and what this Python lacks: what it has of its own is taken."""
    found = [WORK / "project"]
    found += [WORK / "packages" / name for name, module in PACKAGES.items() if find_spec(module) is None]
    found += [WORK / "stand_ins" / module for module in STAND_INS if find_spec(module) is None]
    return [str(path) for path in found]


def main() -> int:
    unpack()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths()), "COMFYUI_PATH": str(WORK / "ComfyUI")}
    command = [sys.executable, "-m", "tests.gpu", "--output", str(HERE / "output"), *sys.argv[1:]]
    return subprocess.run(command, cwd=WORK / "project", env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
