"""A device that is none: a card's rules on the CPU, to find tensors on the wrong device where no card is at hand.

Its tensors hold CPU tensors and compute with them, but say that they lie on a device of their own, and what a card
refuses is refused: operations on tensors of both devices, and a random generator of the other device. The host takes
it for a DirectML device, the one kind that torch does not know itself. It is some ten times slower than the CPU.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

NAME = "imitated"
_ACROSS = ("copy_", "_to_copy", "_copy_from", "set_data")
"""Operations that may take tensors of both devices."""
_INDEXING = ("index", "index_put", "index_put_", "_unsafe_index")
"""Operations whose indices may lie on the CPU."""


class _Module:
    """What torch asks the Python module of a device, `torch.imitated`."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = manual_seed_all = synchronize = empty_cache = staticmethod(lambda *_: None)
    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda *_: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


class Imitated(Tensor):
    """raw: the CPU tensor that it holds."""

    @staticmethod
    def __new__(cls, raw: Tensor):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "layout": raw.layout}
        made = Tensor._make_wrapper_subclass(
            cls, raw.size(), **layout, dtype=raw.dtype, device=torch.device(NAME, 0), requires_grad=False
        )
        made.raw = raw
        return made

    def __repr__(self) -> str:
        return f"Imitated({self.raw!r})"

    def tolist(self) -> list:
        return self.raw.tolist()

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(operation, args, kwargs or {})

    # Torch makes tensors of lists on a way of its own, where nothing can be registered.
    def __getitem__(self, index: Any) -> Tensor:
        return Tensor.__getitem__(self, _listed(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, _listed(index), value)


def _listed(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_listed(part) for part in index)
    return torch.tensor(index).to(NAME) if isinstance(index, list) else index


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _raw(value: Any) -> Any:
    if isinstance(value, Imitated):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) and _is_ours(value) else value


def _refuse_mixture(operation: Any, tensors: list[Tensor]) -> None:
    name = operation.overloadpacket.__name__
    foreign = [t for t in tensors if not isinstance(t, Imitated) and t.ndim]
    if name in _INDEXING:
        foreign = [t for t in foreign if t.dtype not in (torch.long, torch.bool)]
    if foreign and name not in _ACROSS and any(isinstance(t, Imitated) for t in tensors):
        shapes = [tuple(t.shape) for t in foreign]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {operation} got {shapes} on cpu and others on {NAME}"
        )


def _compute(operation: Any, args: tuple, kwargs: dict) -> Any:
    """The operation on CPU tensors. Some have another name where a device registers its own."""
    aten, name = torch.ops.aten, operation.overloadpacket.__name__
    if name == "convolution_overrideable":
        return aten.convolution.default(*args, **kwargs)
    if name == "convolution_backward_overrideable":
        return aten.convolution_backward.default(*args[:3], None, *args[3:], **kwargs)
    if name == "_fused_sdp_choice":
        return 0
    return operation(*args, **kwargs)


def _run(operation: Any, args: tuple, kwargs: dict) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    name = operation.overloadpacket.__name__
    if name == "_has_compatible_shallow_copy_type":
        return len({isinstance(tensor, Imitated) for tensor in tensors}) == 1
    _refuse_mixture(operation, tensors)
    if name == "_copy_from":
        _raw(args[1]).copy_(_raw(args[0]))
        return args[1]
    raw_args, raw_kwargs = tree_map(_raw, (args, kwargs))
    if "pin_memory" in raw_kwargs:
        raw_kwargs["pin_memory"] = False
    found = _compute(operation, raw_args, raw_kwargs)
    ours = [tensor for tensor in tensors if isinstance(tensor, Imitated)]
    stays = isinstance(args[0], Imitated) if name == "copy_" else bool(ours)
    target = kwargs.get("device")
    if not (stays if target is None else _is_ours(target)):
        return found
    known = {id(tensor.raw): tensor for tensor in ours}

    def presented(value: Any) -> Any:
        return (known[id(value)] if id(value) in known else Imitated(value)) if isinstance(value, Tensor) else value

    return tree_map(presented, found)


class _Generator(torch._C.Generator):
    """A random generator that knows which device it was made for."""

    def __new__(cls, device: Any = "cpu"):
        made = super().__new__(cls, "cpu")
        made.made_for = torch.device(device)
        return made


def _same_generator(function: Callable) -> Callable:
    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Tensor:
        device = torch.device(kwargs.get("device") or "cpu").type
        place = getattr(kwargs.get("generator"), "made_for", torch.device("cpu")).type
        if kwargs.get("generator") is not None and place != device:
            raise RuntimeError(f"Expected a '{device}' device type for generator but found '{place}'")
        return function(*args, **kwargs)

    return draw


def _made_on_cpu(function: Callable) -> Callable:
    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if not _is_ours(device):
            return function(*args, **kwargs)
        learning = kwargs.pop("requires_grad", False)
        return function(*tree_map(_raw, args), **kwargs | {"device": "cpu"}).to(device).requires_grad_(learning)

    return make


_library = []
"""What is registered goes when its library does."""


def install() -> torch.device:
    """Make the device known to torch, for the life of the process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
    _library.append(library)
    torch.Generator = _Generator
    for name in ("rand", "randn", "randint", "randperm"):
        setattr(torch, name, _same_generator(getattr(torch, name)))
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _made_on_cpu(getattr(torch, name)))
    return torch.device(NAME, 0)


def enter_host() -> None:
    """The host takes the device for a DirectML one. After its arguments can be imported, before all else of it."""
    from comfy.cli_args import args

    directml = ModuleType("torch_directml")
    directml.device = lambda index=None: torch.device(NAME, 0)
    directml.device_name = lambda index=None: "an imitated card"
    directml.device_count, directml.default_device = (lambda: 1), (lambda: 0)
    sys.modules["torch_directml"] = directml
    args.directml = 0
    args.disable_pinned_memory = True
    import comfy.model_management

    comfy.model_management.lowvram_available = True
    plenty = 2**36
    comfy.model_management.get_total_memory = lambda dev=None, torch_total_too=False: (
        (plenty, plenty) if torch_total_too else plenty
    )
    comfy.model_management.get_free_memory = lambda dev=None, torch_free_too=False: (
        (plenty, plenty) if torch_free_too else plenty
    )
    for name in ("supports_fp8_compute", "supports_nvfp4_compute", "supports_mxfp8_compute"):
        if hasattr(comfy.model_management, name):
            setattr(comfy.model_management, name, lambda *_, **__: False)
