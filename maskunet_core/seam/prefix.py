"""The encoder and middle block of a U-Net run once and serve many calls with the same input."""

import contextlib
from collections.abc import Hashable, Iterator

from torch import Tensor, nn

from .patch import shadowed


class EncoderCache:
    """Features of the encoder and middle block (ComfyUI's UNetModel) by what they were computed from.

    Meant for one step of a sampler, in which the latent and the conditioning do not change: `serving(unet, key)` around
    a call computes the features where `key` is new, and hands out copies where it is not. What acts between the blocks
    (ControlNet's residuals, patches of the host) still acts in every call.
    """

    def __init__(self):
        self._features: dict[Hashable, dict[int, Tensor]] = {}

    @property
    def bytes(self) -> int:
        """What the features take in memory."""
        return sum(kept.nbytes for features in self._features.values() for kept in features.values())

    @contextlib.contextmanager
    def serving(self, unet: nn.Module, key: Hashable) -> Iterator[None]:
        known = key in self._features
        features = self._features.setdefault(key, {})
        try:
            with contextlib.ExitStack() as stack:
                for index, block in enumerate(_blocks(unet)):
                    layers = list(block)
                    if known:
                        for layer in layers[:-1]:
                            stack.enter_context(shadowed(layer, forward=_same))
                        stack.enter_context(shadowed(layers[-1], forward=_serve(features[index])))
                    else:
                        forward = _record(layers[-1].forward, features, index)
                        stack.enter_context(shadowed(layers[-1], forward=forward))
                yield
        except BaseException:
            if not known:
                del self._features[key]
            raise


class LiveEncoder:
    """In an EncoderCache's place where gradients flow through the encoder itself: it runs in every call.

    The host adds ControlNet's residuals to the skip connections in place, so the next block works on a copy of each.
    """

    bytes = 0

    @contextlib.contextmanager
    def serving(self, unet: nn.Module, key: Hashable) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for block in _blocks(unet):
                stack.enter_context(shadowed(block[0], forward=_on_a_copy(block[0].forward)))
            yield


def _blocks(unet: nn.Module) -> list[nn.Module]:
    return [*unet.input_blocks, *([unet.middle_block] if unet.middle_block is not None else [])]


def _on_a_copy(forward):
    return lambda x, *args, **kwargs: forward(x.clone(), *args, **kwargs)


def _same(x: Tensor, *_, **__) -> Tensor:
    return x


# The host adds ControlNet's residuals in place: both sides keep a tensor of their own.
def _serve(features: Tensor):
    return lambda *_, **__: features.clone()


def _record(forward, features: dict[int, Tensor], index: int):
    def compute(*args, **kwargs) -> Tensor:
        result = forward(*args, **kwargs)
        features[index] = result.detach().clone()
        return result

    return compute
