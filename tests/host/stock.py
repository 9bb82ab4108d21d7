"""A stock ComfyUI's packages: what its own requirements bring, and nothing that this project adds for itself."""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trainer.host import find_host


def _applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def required_by(lines: Iterable[str]) -> set[str]:
    """Names of the installed packages that requirements name, and of all that those require."""
    found: set[str] = set()
    waiting = [(Requirement(line), ()) for line in lines]
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or not _applies(requirement, extras):
            continue
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [(Requirement(line), tuple(requirement.extras)) for line in needed]
    return found


def link_stock_packages(folder: Path) -> set[str]:
    """Fill an empty folder with links to what ComfyUI requires, for `Server(packages=...)`. Returns the names."""
    lines = (line.split("#")[0].strip() for line in (find_host() / "requirements.txt").read_text().splitlines())
    names = required_by(line for line in lines if line)
    for name in names:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(distribution.locate_file(top)))
    return names
