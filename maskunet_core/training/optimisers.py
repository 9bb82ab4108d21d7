"""Optimisers by name."""

import importlib
from typing import Any

import torch

from ..errors import MaskUNetError


class UnknownOptimiser(MaskUNetError):
    """No such class, or it does not take the options."""


def find_optimiser(name: str) -> type[torch.optim.Optimizer]:
    """A class of torch.optim, or `package.Class` of an installed package. Raises UnknownOptimiser."""
    if "." not in name:
        found = getattr(torch.optim, name, None)
        if not isinstance(found, type):
            raise UnknownOptimiser(
                f"optimiser.name: torch.optim has no '{name}'. Name one of its classes (AdamW, SGD, ...), or one of an "
                "installed package, for instance prodigyopt.Prodigy or bitsandbytes.optim.AdamW8bit."
            )
        return found
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a package may raise anything while it is imported
        raise UnknownOptimiser(
            f"optimiser.name: '{name}' cannot be imported ({error}). Install the package that has it, or name a class "
            "of torch.optim."
        ) from None
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise UnknownOptimiser(f"optimiser.name: '{name}' is no optimiser of torch. Name a class of torch.optim.")
    return found


def build_optimiser(groups: list[dict[str, Any]], name: str, arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimiser over parameter groups, which may bring learning rates of their own."""
    chosen = find_optimiser(name)
    try:
        return chosen(groups, **arguments)
    except RuntimeError:
        # Not every device has the kernels for `fused`, which is no one's wish but for speed.
        if not arguments.get("fused"):
            raise
        return chosen(groups, **arguments | {"fused": False})
    except (TypeError, ValueError) as error:
        raise UnknownOptimiser(f"optimiser.options: {name} does not take them ({error}).") from None
