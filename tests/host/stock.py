"""A stock ComfyUI's packages: what its own requirements bring, and nothing that this project adds for itself."""

import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.host.server import link_folder
from trainer.host import find_host


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def required_by(lines: Iterable[str]) -> set[str]:
    """Names of the installed packages that requirements name, and of all that those require, extras included."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(line), frozenset()) for line in lines]
    while waiting:
        requirement, extras = waiting.pop()
        package = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if package in found or not _applies(requirement, extras):
            continue
        try:
            needed = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(package)
        waiting += [(Requirement(line), package[1]) for line in needed]
    return {name for name, _ in found}


def link_stock_packages(folder: Path) -> set[str]:
    """Fill an empty folder with what ComfyUI requires, for `Server(packages=...)`. Returns the names."""
    lines = (line.split("#")[0].strip() for line in (find_host() / "requirements.txt").read_text().splitlines())
    names = required_by(line for line in lines if line)
    for name in names:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            source = Path(distribution.locate_file(top))
            if source.is_file():
                shutil.copy(source, folder)
            elif not (folder / top).exists():
                link_folder(folder / top, source)
    return names
