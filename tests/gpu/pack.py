"""`make gpu-pack`: what `make gpu` needs on a machine without network, in the folder `output/gpu-pack`.

For Linux on x86-64 with Python 3.12. `python run.py` in the folder runs it.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tests.gpu.packed_run import STAND_INS
from trainer.host import PROJECT, find_host

LIMIT = 64 * 1000**2
"""Bytes of everything."""
PYTHON = "3.12"
WHEELS = (
    "accelerate",
    "comfy-aimdo",
    "comfy-kitchen",
    "einops",
    "pillow",
    "psutil",
    "torchsde",
    "trampoline",
)
KERNELS = ("/backends/hip/_C.", "/backends/cuda/_C.")
"""Libraries of comfy_kitchen: 170 MB of kernels for quantised models, which no step runs. The slower ones come."""
FOLDERS = ("maskunet_core", "nodes", "trainer", "tests")
FILES = ("__init__.py", "pyproject.toml")
SUFFIXES = (".py", ".toml", ".json", ".txt", ".safetensors", ".pt", ".pth")
LEFT_OUT = ("tests/browser", "tests/core/authors", "tests/parity")
"""Folders of the project that no step reads."""
HOST_FOLDERS = ("comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "app", "utils", "middleware")
LARGEST_DATA = 100_000
"""Bytes of a host's file that is no Python: larger ones are tokenisers of other models than CLIP's."""


def project_files() -> Iterator[Path]:
    yield from (PROJECT / name for name in FILES)
    for folder in FOLDERS:
        for path in sorted((PROJECT / folder).rglob("*")):
            name = path.relative_to(PROJECT).as_posix()
            if path.is_file() and path.suffix in SUFFIXES and not name.startswith(LEFT_OUT):
                yield path


def host_files(host: Path) -> Iterator[Path]:
    yield from sorted(host.glob("*.py"))
    for folder in HOST_FOLDERS:
        for path in sorted((host / folder).rglob("*")):
            small = path.is_file() and (path.suffix == ".py" or path.stat().st_size <= LARGEST_DATA)
            if small or (path.is_file() and "sd1_tokenizer" in path.parts):
                yield path


def write_archive(archive: Path, name: str, root: Path, files: Iterator[Path], extra: dict[str, bytes]) -> None:
    """extra: more files by name inside of the archive."""
    with tarfile.open(archive, "w:xz") as target:
        for path in files:
            if "__pycache__" not in path.parts:
                target.add(path.resolve(), f"{name}/{path.relative_to(root).as_posix()}", recursive=False)
        for path, content in extra.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            target.addfile(entry, io.BytesIO(content))


def stand_ins() -> dict[str, bytes]:
    source = (Path(__file__).with_name("stand_in.py")).read_bytes()
    files = {}
    for package in STAND_INS:
        files[f"stand_ins/{package}/{package}/_stand_in.py"] = source
        # transformers asks for versions, and finds this one too old for everything.
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0\n"
        files[f"stand_ins/{package}/{package}-0.0.dist-info/METADATA"] = metadata.encode()
        files[f"stand_ins/{package}/{package}/__init__.py"] = b"from ._stand_in import install\n\ninstall(__name__)\n"
    return files


def fetch_wheels(folder: Path) -> None:
    """Wheels of the host's own versions for Linux, by pip; those that this environment pins as it has them."""
    from importlib.metadata import version

    named = [f"{package}=={version(package)}" for package in WHEELS]
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17, 12)]
    options = ["--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", "-q"]
    options += [*platforms, "--platform=manylinux2014_x86_64", "--abi=cp312", "--abi=abi3", "--abi=none"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options, "-d", str(folder)]
    if subprocess.run([*command, *named]).returncode:
        raise SystemExit("[gpu-pack] pip could not fetch the wheels (its last lines are above). Check the network.")


def without_kernels(wheel: Path) -> None:
    lean = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(lean, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            if not any(kernel in entry.filename for kernel in KERNELS):
                target.writestr(entry, source.read(entry))
    lean.replace(wheel)


def pack(folder: Path) -> int:
    """Returns the size of everything in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    host = find_host()
    write_archive(folder / "project.tar.xz", "project", PROJECT, project_files(), stand_ins())
    write_archive(folder / "host.tar.xz", "ComfyUI", host, host_files(host), {})
    fetch_wheels(folder / "wheels")
    for wheel in (folder / "wheels").glob("comfy_kitchen-*.whl"):
        without_kernels(wheel)
    shutil.copy(Path(__file__).with_name("packed_run.py"), folder / "run.py")
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-pack", description=__doc__)
    parser.add_argument("--output", type=Path, default=PROJECT / "output" / "gpu-pack", help="folder to write")
    folder = parser.parse_args().output.resolve()
    size = pack(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"[gpu-pack] {path.stat().st_size / 1e6:6.2f} MB  {path.relative_to(folder).as_posix()}")
    print(f"[gpu-pack] {size / 1e6:6.2f} MB  {folder}. There: python run.py", flush=True)
    if size > LIMIT:
        print(f"[gpu-pack] That is more than {LIMIT / 1e6:.0f} MB.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
