"""Files that a user brings: prompt lists, known by their digests, and judges, found by their content."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskunet_core.errors import MaskUNetError
from maskunet_core.judges.files import JudgeFile, told_digest
from maskunet_core.rewards.files import files_in_host
from maskunet_core.training.data import sha256

from ..host import JUDGES, REWARD
from ..pictures import file_digest


class BadSuite(MaskUNetError):
    """Files of a suite are missing or are no such files; the message names them."""


@dataclass(frozen=True)
class PromptList:
    """versions: what is published, by its SHA-256. size: for people."""

    name: str
    address: str
    versions: Mapping[str, str]
    size: str

    def read(self, folder: Path | None) -> str:
        """Its content. Raises BadSuite."""
        if not self.is_in(folder):
            where = f"'{folder}'" if folder else "a folder, and name that by --data"
            raise BadSuite(
                f"The list '{self.name}' is missing: put it into {where}. It is published at {self.address}."
            )
        try:
            return (folder / self.name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BadSuite(f"'{folder / self.name}' is no text: download it again from {self.address}.") from None

    def is_in(self, folder: Path | None) -> bool:
        return folder is not None and (folder / self.name).is_file()

    def version(self, folder: Path) -> str:
        digest = sha256((folder / self.name).read_bytes())
        return self.versions.get(digest, f"{'not published, ' if self.versions else ''}SHA-256 {digest}")

    def __str__(self) -> str:
        told = [f"{version}: {told_digest(digest)}" for digest, version in self.versions.items()] or [told_digest("")]
        return f"{self.name} ({self.size}, {self.address}; {'; '.join(told)}), to the folder --data"


def find(judge: JudgeFile) -> Path | None:
    return judge.find(files_in_host(JUDGES, REWARD, "clip_vision"))


def loaded(judge: JudgeFile) -> tuple[Any, str]:
    """The model on the host's device, and its file's digest. Raises BadSuite where there is none."""
    import comfy.model_management

    path = find(judge)
    if path is None:
        raise BadSuite(f"A judge is missing: {judge}.")
    model = judge.load(path)
    for module in model.modules():
        module.to(comfy.model_management.get_torch_device())
    return model, file_digest(path)
