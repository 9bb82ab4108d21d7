"""What a person gets: by a clone all tracked files, from the Comfy registry those that .comfyignore does not name."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.host.graph import WORKFLOWS, load_workflow, to_prompt
from tests.host.server import FOLDER_NAME, Server
from trainer.host import PROJECT

NEEDED = (
    "__init__.py",
    "LICENSE",
    "README.md",
    "maskunet_core",
    "nodes",
    "pyproject.toml",
    "subgraphs",
    "trainer",
    "workflows",
)
"""What ComfyUI loads, what the registry shows, and what the README tells people to run."""


def tracked(*options: str) -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", *options]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return set(listed.split("\0")) - {""}


@pytest.fixture(scope="module")
def cloned() -> set[str]:
    if not (PROJECT / ".git").exists():
        pytest.skip("This folder is no git repository: what it tracks is not known.")
    return tracked()


@pytest.fixture(scope="module")
def packed(cloned) -> set[str]:
    return cloned - tracked("--ignored", "--exclude-from=.comfyignore")


@pytest.fixture(scope="module")
def pack(packed, tmp_path_factory) -> Path:
    """The pack as a person unpacks it."""
    folder = tmp_path_factory.mktemp("registry") / FOLDER_NAME
    for name in packed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, folder / name)
    return folder


def test_a_clone_is_light(cloned):
    """The toy model is most of it; what tests need is drawn from names, see tests/drawn.py, but for golden values."""
    sizes = {name: (PROJECT / name).stat().st_size for name in cloned if (PROJECT / name).is_file()}
    assert sum(sizes.values()) < 33_000_000
    assert sum(size for name, size in sizes.items() if name.startswith("tests/")) < 2_600_000


def test_the_registry_gets_all_that_is_needed_and_nothing_else(cloned, packed):
    def first(names):
        return {name.split("/")[0] for name in names}

    assert first(packed) == set(NEEDED)
    left_out = cloned - packed
    assert first(left_out) == {".ci", ".comfyignore", ".github", ".gitignore", "Makefile", "tests"}
    assert Path(__file__).relative_to(PROJECT).as_posix() in left_out
    assert not first(left_out) & first(packed), "a folder is packed in part"


def test_what_the_registry_gets_draws_in_comfyui(pack):
    with Server(extension=pack) as server:
        info = server.object_info()
        assert f"custom_nodes.{FOLDER_NAME}" in {node["python_module"] for node in info.values()}
        prompt = to_prompt(load_workflow("generator_off_and_on"), info)
        for node in prompt.values():
            if "steps" in node["inputs"]:
                node["inputs"]["steps"] = 2
        assert any(output.get("images") for output in server.run(prompt).values())
        templates = server.get("/workflow_templates")[FOLDER_NAME]
        assert set(templates) == {path.stem for path in WORKFLOWS.glob("*.json")}


def test_the_trainer_starts_from_what_the_registry_gets(pack):
    result = subprocess.run([sys.executable, "-m", "trainer", "--help"], cwd=pack, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "convert" in result.stdout
