"""The host's own nodes in this process, and their inputs filled from what their schemas say."""

import asyncio
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

from trainer.host import find_host


class CannotFill(Exception):
    """An input of a node for which there is nothing; the message names it."""


@functools.cache
def host_nodes() -> dict[str, type]:
    """All nodes that the host brings along, by id, loaded as it loads them when it starts."""
    # The project has a folder of this name, too, which stands in front of the host's module.
    path = find_host() / "nodes.py"
    spec = importlib.util.spec_from_file_location("nodes", path)
    nodes = sys.modules["nodes"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)
    asyncio.run(nodes.init_builtin_extra_nodes())
    return dict(nodes.NODE_CLASS_MAPPINGS)


def inputs_of(node: type) -> dict[str, tuple[Any, dict[str, Any], bool]]:
    """(type, options, whether it is required) of each input."""
    described = {}
    for section, inputs in node.INPUT_TYPES().items():
        if section in ("required", "optional"):
            for name, (kind, *options) in inputs.items():
                described[name] = (kind, options[0] if options else {}, section == "required")
    return described


def takes(node: type, kind: str) -> bool:
    return any(kind_of(found) == kind for found, _, _ in inputs_of(node).values())


def gives(node: type, kind: str) -> bool:
    return kind in map(kind_of, node.RETURN_TYPES)


def kind_of(found: Any) -> str:
    """An input's type as text; COMBO for lists of choices."""
    return str(getattr(found, "value", found)) if isinstance(found, str) else "COMBO"


def function_of(node: type) -> Any:
    """What computes a node; several nodes may share it."""
    found = getattr(node, "execute", None) or getattr(node, node.FUNCTION)
    return getattr(found, "__func__", found)


def fill(node: type, value_for: Callable[[str, str, bool], Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a node: `chosen` ones, those that `value_for` (name, type, whether required) has, else the schema's
    defaults. Optional inputs are filled like the others, where that is possible. Raises CannotFill.
    """
    filled = {}
    for name, (kind, options, required) in inputs_of(node).items():
        if name in chosen:
            filled[name] = chosen[name]
            continue
        value = value_for(name, kind_of(kind), required)
        if value is None:
            value = _default(kind, options)
        if value is not None:
            filled[name] = value
        elif required:
            raise CannotFill(f"nothing for its input {name} ({kind_of(kind)})")
    return filled


def _default(kind: Any, options: dict[str, Any]) -> Any:
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if "default" in options:
        return options["default"]
    if choices or isinstance(kind, list):
        return choices[0] if choices else None
    return {"INT": options.get("min", 0), "FLOAT": options.get("min", 0.0), "BOOLEAN": False, "STRING": ""}.get(
        kind_of(kind)
    )


def run_node(node: type, inputs: dict[str, Any]) -> tuple:
    """The outputs of a node, which is called as the executor calls it."""
    from comfy_api.latest import io

    if issubclass(node, io.ComfyNode):
        node = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        result = getattr(node, node.FUNCTION)(**inputs)
    else:
        result = getattr(node(), node.FUNCTION)(**inputs)
    if inspect.iscoroutine(result):
        result = asyncio.run(result)
    return tuple(result.result if isinstance(result, io.NodeOutput) else result)
