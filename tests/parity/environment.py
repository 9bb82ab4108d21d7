"""The environment of the original packages, `.parity`: pinned, and without what their models do not need."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from trainer.host import PROJECT

FOLDER = PROJECT / ".parity"
PACKAGES = (
    "image-reward==1.5",
    "hpsv2==1.2.0",
    "transformers==4.46.0",
    "tokenizers==0.20.3",
    "huggingface_hub==0.36.0",
    "timm==0.6.13",
    "ftfy==6.3.1",
    "wcwidth==0.2.13",
    "pytorch-fid==0.3.0",
    "clean-fid==0.1.35",
    "torch-fidelity==0.4.0",
)


class ParityError(Exception):
    """The comparison could not be made; the message is one sentence for the person at the screen."""


def interpreter() -> Path:
    """Python of the environment, which is made on the first call.

    torch and what else is not pinned come from the environment that runs this: both sides compute on one torch.
    """
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = FOLDER / "installed.txt"
    if done.is_file() and done.read_text() == "\n".join(PACKAGES):
        return python
    print(f"[parity] installing {', '.join(PACKAGES)} in {FOLDER.name}", flush=True)
    _run(sys.executable, "-m", "venv", "--clear", str(FOLDER), what="Making a virtual environment")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    _run(*pip, *PACKAGES, what="Installing the original packages")
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    # A path file adds to the end of the search path: what is pinned here stays in front.
    shared = Path(own.stdout.strip()) / "shared.pth"
    shared.write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}) + "\n")
    done.write_text("\n".join(PACKAGES))
    return python


def run_original(script: str, *arguments: Path) -> None:
    """Run a file of this folder in the environment. Raises ParityError."""
    command = [interpreter(), Path(__file__).with_name(script), *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        raise ParityError("The original packages failed; what they said is above.")


def _run(*command: str, what: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        print("\n".join(lines[-8:]), file=sys.stderr)
        raise ParityError(f"{what} failed (the last lines are above). Check the network connection and try again.")
