"""The house rules: style, and which room may use which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.schedule import SLOW
from trainer.host import PROJECT


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]])
def test_code_is_clean(arguments):
    command = [sys.executable, "-m", "ruff", *arguments, "."]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what a file imports; relative imports as `project.room.module`."""
    package = ["project", *path.relative_to(PROJECT).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            names |= {prefix + (node.module or alias.name) for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("maskunet_core", ("nodes", "trainer")), ("nodes", ("trainer",)), ("trainer", ("nodes",))],
)
def test_arrows_point_one_way(room, forbidden):
    files = sorted((PROJECT / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            assert name.removeprefix("project.").split(".")[0] not in forbidden, f"{path} imports {name}"


def test_core_imports_without_comfyui():
    modules = [
        ".".join(path.relative_to(PROJECT).with_suffix("").parts)
        for path in (PROJECT / "maskunet_core").rglob("*.py")
        if path.name != "__init__.py"
    ]
    code = f"import sys; [__import__(name) for name in {modules}]; assert 'comfy' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_trainers_help_does_not_wait_for_torch():
    code = "import sys; from trainer.__main__ import parse; parse(['resume', '.']); assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_runs_first_is_there():
    assert [name for name in SLOW if not (PROJECT / name).exists()] == []


def test_the_shipped_toy_model_is_small():
    weights = list((PROJECT / "maskunet_core" / "toy" / "weights").glob("*.safetensors"))
    sizes = {path.stem: path.stat().st_size for path in weights}
    assert sizes.keys() == {"autoencoder", "reader_a", "reader_b", "text_encoder", "unet", "transformer"}
    assert sizes["transformer"] < 8_000_000
    assert sum(sizes.values()) < 23_000_000
