"""Tables that are written twice: for people (Markdown) and for programs (JSON)."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from maskunet_core.replacing import replacing


def machine() -> dict[str, Any]:
    """What a measurement was made on."""
    versions = {}
    for package in ("torch", "safetensors", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    import comfy.model_management

    device = comfy.model_management.get_torch_device()
    name = platform.machine() if device.type == "cpu" else comfy.model_management.get_torch_device_name(device)
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}


def to_markdown(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_table(folder: Path, rows: list[dict[str, Any]], settings: dict[str, Any], name: str = "table") -> str:
    """`folder/<name>.md` and `folder/<name>.json`; returns the Markdown."""
    markdown = to_markdown(rows)
    with replacing(folder / f"{name}.md") as temporary:
        temporary.write_text(markdown + "\n", encoding="utf-8")
    with replacing(folder / f"{name}.json") as temporary:
        content = {"rows": rows, "settings": settings, "machine": machine()}
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return markdown
