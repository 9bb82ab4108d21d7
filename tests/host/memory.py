"""An NVIDIA card's memory, played on a CPU: weights that are streamed in, evicted, or moved away during a run.

The host's own code decides what lies where and moves it; stand-ins take the place of the card, its streams, and the
library (comfy-aimdo) that keeps pages on it. What the host lends for one use is filled with NaN as soon as it may be
used for something else, so that whoever keeps it without a copy computes NaN.

Load models inside the block: they learn there which card they belong to, and must not be used after it.
"""

import contextlib
import ctypes
import gc
import itertools
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

CARD = torch.device("cpu", 0)
"""Plays the card. Its tensors say that they lie on `cpu`, which the host does not take for the same device."""
PLENTY = 64 << 30
_POISON = 0xFF
"""A byte of which every floating-point type's NaN can be made."""


class Store:
    """Raw memory, as the card's is: what is made of it has no version counter that would tell autograd of a change."""

    def __init__(self, size: int):
        self.size = max(int(size), 1)
        self._bytes = mmap.mmap(-1, self.size)

    @property
    def address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))

    def view(self, offset: int, size: int) -> Tensor:
        """uint8 `[size]`, a new tensor over the same memory at each call."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._bytes, dtype=torch.uint8, count=size, offset=offset)

    def poison(self, offset: int, size: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.view(offset, size).fill_(_POISON)


class Memory:
    """The card, as far as a test wants to know and to change it.

    free: bytes that the host is told are free on it. casts: weights that were lent for one use. moved: called with
    nothing at each loading of models by the host, before it.
    """

    def __init__(self, free: int):
        self.free, self.casts, self.moved = free, 0, lambda: None
        self.page_faults = self.page_hits = self.page_misses = self.evictions = 0


class _Stream:
    """In a CUDA stream's place."""

    as_context = staticmethod(lambda stream: contextlib.nullcontext())

    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


class CastBuffer:
    """Memory that weights pass through one after another (comfy_aimdo.vram_buffer.VRAMBuffer)."""

    RESERVED = 256 << 20

    def __init__(self, max_size: int = RESERVED, device: int | None = None):
        self.store, self._used = Store(min(max_size, self.RESERVED)), 0

    def size(self) -> int:
        return self._used

    def get(self, size: int, offset: int = 0) -> tuple[Any, int, int]:
        self._used = max(self._used, offset + size)
        self.store.poison(offset, size)
        return self.store, offset, size

    def poison(self) -> None:
        self.store.poison(0, self._used)


def _replace_everywhere(patch: pytest.MonkeyPatch, module: Any, name: str, stand_in: Callable) -> None:
    """Also where it was imported by name."""
    own = getattr(module, name)
    for holder in list(sys.modules.values()):
        if getattr(holder, "__dict__", {}).get(name) is own:
            patch.setattr(holder, name, stand_in)


@contextlib.contextmanager
def card(free: int = PLENTY) -> Iterator[Memory]:
    """Models belong on CARD, of which the host is told that `free` bytes are free whatever lies there.

    Weights that the host does not leave there pass through two buffers, that are used again and again.
    """
    import comfy.model_management as management
    import comfy.ops

    memory = Memory(free)
    own_free, own_load = management.get_free_memory, management.load_models_gpu
    own_cast, own_uncast = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight

    def get_free_memory(dev=None, torch_free_too=False):
        if dev is not None and dev != CARD:
            return own_free(dev, torch_free_too)
        return (memory.free, memory.free) if torch_free_too else memory.free

    def load_models_gpu(*arguments, **options):
        memory.moved()
        return own_load(*arguments, **options)

    def get_cast_buffer(offload_stream, device, size, ref):
        memory.casts += 1
        buffer = management.STREAM_CAST_BUFFERS.setdefault(offload_stream, CastBuffer())
        store, offset, size = buffer.get(size)
        return store.view(offset, size)

    def cast_bias_weight(s, input=None, dtype=None, device=None, *arguments, **options):
        # A tensor of the card says that it lies on the CPU, where weights that are not on the card lie, too.
        if hasattr(s, "_v") or hasattr(s, "prev_comfy_cast_weights"):
            device = CARD
        return own_cast(s, input, dtype, device, *arguments, **options)

    def uncast_bias_weight(s, weight, bias, offload_stream):
        own_uncast(s, weight, bias, offload_stream)
        stream = None if offload_stream is None else offload_stream[0]
        for buffers in (management.STREAM_CAST_BUFFERS, management.STREAM_AIMDO_CAST_BUFFERS):
            if stream in buffers:
                buffers[stream].poison()

    management.unload_all_models()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(management, "get_torch_device", lambda: CARD)
        patch.setattr(management, "get_all_torch_devices", lambda exclude_current=False: [CARD])
        patch.setattr(management, "is_device_cpu", lambda device: device == torch.device("cpu"))
        patch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
        patch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
        patch.setattr(management, "NUM_STREAMS", 2)
        patch.setattr(management, "STREAMS", {CARD: [_Stream(), _Stream()]})
        patch.setattr(management, "stream_counters", {})
        for name in ("STREAM_CAST_BUFFERS", "STREAM_AIMDO_CAST_BUFFERS"):
            patch.setattr(management, name, {})
        for name in ("LARGEST_CASTED_WEIGHT", "LARGEST_AIMDO_CASTED_WEIGHT"):
            patch.setattr(management, name, (None, 0))
        patch.setattr(management, "get_cast_buffer", get_cast_buffer)
        _replace_everywhere(patch, management, "get_free_memory", get_free_memory)
        _replace_everywhere(patch, management, "load_models_gpu", load_models_gpu)
        _replace_everywhere(patch, comfy.ops, "cast_bias_weight", cast_bias_weight)
        _replace_everywhere(patch, comfy.ops, "uncast_bias_weight", uncast_bias_weight)
        try:
            yield memory
        finally:
            memory.moved = lambda: None
            management.unload_all_models()


@contextlib.contextmanager
def streamed() -> Iterator[Memory]:
    """A card with no room: every weight of every model is streamed in for each use."""
    with card(free=0) as memory:
        yield memory


@contextlib.contextmanager
def shrinking_memory(plenty_for: int = 1, then: int = 800 << 20) -> Iterator[Memory]:
    """A card on which another program takes the room: models are loaded `plenty_for` times with room for everything,
    and from then on the host is told that `then` bytes are free, and takes apart what lies there.
    """
    with card() as memory:
        loads = itertools.count(1)

        def shrink() -> None:
            if next(loads) > plenty_for:
                memory.free = then

        memory.moved = shrink
        yield memory


# Dynamic VRAM -----------------------------------------------------------------------------------------------------


class _Pages:
    """The pages of all models: which are on the card, and which are in use."""

    def __init__(self, share: float, memory: Memory):
        self.share, self.memory = share, memory
        self.order: list[VBAR] = []
        self._versions, self._unpins = itertools.count(1), itertools.count()

    @property
    def room(self) -> float:
        return self.share * sum(vbar.offset for vbar in self.order)

    def resident(self) -> int:
        return sum(vbar.loaded_size() for vbar in self.order)

    def evict(self, vbar: "VBAR", offset: int) -> int:
        size = vbar.pages.pop(offset)[0]
        vbar.store.poison(offset, size)
        self.memory.evictions += 1
        return size

    def fault(self, vbar: "VBAR", offset: int, size: int) -> Any:
        if offset in vbar.pages:
            self.memory.page_hits += 1
        else:
            # Models of lower priority give way, and of this one what lies behind.
            others = [(other, at) for other in reversed(self.order) if other is not vbar for at in list(other.pages)]
            behind = [(vbar, at) for at in sorted(vbar.pages, reverse=True) if at > offset]
            for other, at in others + behind:
                if self.resident() + size > self.room and not other.pages[at][1]:
                    self.evict(other, at)
            if self.resident() + size > self.room:
                self.memory.page_misses += 1
                return None
            vbar.store.poison(offset, size)
            vbar.pages[offset] = [size, 0, next(self._versions)]
            self.memory.page_faults += 1
        page = vbar.pages[offset]
        page[1] += 1
        return memoryview(page[2].to_bytes(8, "little"))

    def unpin(self, vbar: "VBAR", offset: int) -> None:
        """Whatever is not in use may go at any time: here every second time, at once."""
        page = vbar.pages.get(offset)
        if page is None or not page[1]:
            return
        page[1] -= 1
        if not page[1] and next(self._unpins) % 2 == 0:
            self.evict(vbar, offset)


class VBAR:
    """One model's pages (comfy_aimdo.model_vbar.ModelVBAR). pages: [size, uses, version] by offset."""

    def __init__(self, shared: _Pages, size: int):
        self.shared, self.store, self.offset = shared, Store(size), 0
        self.pages: dict[int, list[int]] = {}
        shared.order.append(self)

    def prioritize(self) -> None:
        self.shared.order.remove(self)
        self.shared.order.insert(0, self)

    def alloc(self, size: int) -> tuple[Any, int, int]:
        offset = (self.offset + 511) & ~511
        if offset + size > self.store.size:
            raise MemoryError("VBAR OOM")
        self.offset = offset + size
        return self, offset, size

    def fault(self, offset: int, size: int) -> Any:
        return self.shared.fault(self, offset, size)

    def unpin(self, offset: int, size: int) -> None:
        self.shared.unpin(self, offset)

    def loaded_size(self) -> int:
        return sum(page[0] for page in self.pages.values())

    def free_memory(self, wanted: float) -> int:
        freed = 0
        for offset in sorted(self.pages, reverse=True):
            if freed < wanted and not self.pages[offset][1]:
                freed += self.shared.evict(self, offset)
        return freed


class HostBuffer:
    """Pinned memory (comfy_aimdo.host_buffer.HostBuffer)."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True):
        self.store, self.size = Store(max(size, max_grow_size)), int(size)

    def get_raw_address(self) -> int:
        return self.store.address

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        if self.size + size > self.store.size:
            raise RuntimeError("HostBuffer.extend failed")
        self.size += size
        return self.get_raw_address()

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        self.store.poison(size, self.size - size)
        self.size = size

    def read_file_slice(self, file, file_offset, size, offset=0, stream=0, device_ptr=0, device=None) -> None:
        read = os.pread(file, size, file_offset)
        for address in (self.get_raw_address() + offset, device_ptr):
            if address:
                ctypes.memmove(address, read, size)


def _read_file_to_device(file, file_offset, size, stream, device_ptr, device, mark_cold=True) -> None:
    ctypes.memmove(device_ptr, os.pread(file, size, file_offset), size)


class ModelMMAP:
    """A model's file (comfy_aimdo.model_mmap.ModelMMAP)."""

    def __init__(self, path: Any):
        self._file = open(path, "rb")  # noqa: SIM115 - stays open as long as the model does
        # The host takes the address of its bytes, for which Python wants them to be writable.
        self._bytes = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def get(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._bytes))

    def get_file_handle(self) -> int:
        return self._file.fileno()

    def bounce(self) -> bool:
        return True


def _tensor_of(allocation: tuple[Any, int, int], device: Any) -> Tensor:
    owner, offset, size = allocation
    return (owner if isinstance(owner, Store) else owner.store).view(offset, size)


@contextlib.contextmanager
def dynamic_vram(share: float = 0.45, free: int = PLENTY) -> Iterator[Memory]:
    """The host as it starts on an NVIDIA machine: every MODEL, VAE and ControlNet has a ModelPatcherDynamic.

    share: of all models' weights, what fits on the card at once; the rest passes through the streams' buffers. free:
    what the host is told when it asks for room for models that are not dynamic.
    """
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_mmap
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer

    registered = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0)
    with card(free) as memory, pytest.MonkeyPatch.context() as patch:
        pages = _Pages(share, memory)
        patch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", lambda size, device: VBAR(pages, size))
        patch.setattr(comfy_aimdo.model_vbar, "vbars_analyze", lambda device=None: pages.resident())
        patch.setattr(comfy_aimdo.vram_buffer, "VRAMBuffer", CastBuffer)
        patch.setattr(comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
        patch.setattr(comfy_aimdo.host_buffer, "read_file_to_device", _read_file_to_device)
        patch.setattr(comfy_aimdo.model_mmap, "ModelMMAP", ModelMMAP)
        patch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", _tensor_of)
        patch.setattr(comfy_aimdo.torch, "hostbuf_to_tensor", lambda buffer: buffer.store.view(0, buffer.size))
        patch.setattr(torch.cuda, "cudart", lambda: registered)
        patch.setattr(management, "MAX_PINNED_MEMORY", PLENTY)
        patch.setattr(management, "TOTAL_PINNED_MEMORY", 0)
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        patch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
        try:
            yield memory
        finally:
            management.unload_all_models()


SCARCE = {"streamed": streamed, "dynamic": dynamic_vram, "shrinking": shrinking_memory}
CARDS = {"roomy": card, **SCARCE}


@pytest.fixture(params=SCARCE)
def scarce(request) -> Iterator[Memory]:
    """Each way in which weights may not stay where they are, one after the other."""
    with SCARCE[request.param]() as memory:
        yield memory


@pytest.fixture(params=CARDS)
def any_card(request) -> Iterator[Memory]:
    """These, and a card on which everything stays."""
    with CARDS[request.param]() as memory:
        yield memory


def tensors_alive() -> dict[int, torch.Tensor]:
    """All tensors that the garbage collector knows, by id."""
    return {id(thing): thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}


def run_as_executor(node: Callable, *arguments: Any, **options: Any) -> Any:
    """Calls a node's function as the host's executor does: in inference mode, and with clean buffers after it."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_prefetch

    with torch.inference_mode():
        try:
            return node(*arguments, **options)
        finally:
            if comfy.memory_management.aimdo_enabled:
                comfy.model_management.reset_cast_buffers()
                comfy.model_prefetch.cleanup_prefetch_queues()
