"""One sampling run of the host: what its calls of the diffusion model have in common."""

import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..masks.call import NEGATIVE, POSITIVE, Call, Chunk
from .layers import modules_of

RUN = "maskunet_run"
"""Key of a Run in `transformer_options`."""


class Run:
    """Knows to which conditioning the rows of a call belong, and keeps what need not be found again.

    guider: the host's CFGGuider that samples; None for calls outside of a run.
    """

    def __init__(self, guider: Any = None):
        # The guider holds the options in which this lies: a circle would outlive the run.
        self._guider = (lambda: None) if guider is None else weakref.ref(guider)
        self.sampling = None if guider is None else guider.model_patcher.get_model_object("model_sampling")
        self.kept: dict[Any, Any] = {}
        self._modules: dict[int, dict[str, nn.Module]] = {}
        self._sigma: tuple[Tensor | None, float | None] = (None, None)
        self._entries: dict[Any, list[tuple[str, int]]] | None = None
        self._computed: Counter = Counter()

    def fork(self) -> "Run":
        """For calls that are not the sampler's own: they count apart."""
        fork = Run(self._guider())
        fork.kept, fork._modules = self.kept, self._modules
        fork._computed = self._computed.copy()
        return fork

    def modules(self, diffusion_model: nn.Module) -> dict[str, nn.Module]:
        """By name; looked for once in a run. With several devices each has a model of its own."""
        if id(diffusion_model) not in self._modules:
            self._modules[id(diffusion_model)] = modules_of(diffusion_model)
        return self._modules[id(diffusion_model)]

    def call(self, options: Mapping[str, Any], rows: int) -> Call:
        """A call of the diffusion model with these `transformer_options` and so many rows in its batch."""
        chunks = self._chunks(options)
        sigmas = options.get("sigmas")
        counted: list[int] = []

        def occurrences() -> tuple[int, ...]:
            if not counted:
                for chunk in chunks:
                    place = (self._value(sigmas), chunk.entry)
                    counted.append(self._computed[place])
                    self._computed[place] += 1
            return tuple(counted)

        return Call(
            rows=rows,
            chunks=chunks,
            sigma_of=lambda: self._value(sigmas),
            occurrences=occurrences,
            kept=self.kept,
            sampling=self.sampling,
            sigmas=sigmas,
        )

    def _value(self, sigmas: Tensor | None) -> float | None:
        """Calls of one step get the same tensor: the device is waited for once."""
        known, value = self._sigma
        if sigmas is not None and sigmas is not known:
            value = float(sigmas.max())
            self._sigma = sigmas, value
        return None if sigmas is None else value

    def _chunks(self, options: Mapping[str, Any]) -> tuple[Chunk, ...]:
        """By the identity that the host gives each conditioning: its place in a call may be another one's elsewhere."""
        guidance = options.get("cond_or_uncond") or (0,)
        identities = options.get("uuids") or (None,) * len(guidance)
        return tuple(self._chunk(identity, guided) for identity, guided in zip(identities, guidance))

    def _chunk(self, identity: Any, guided: int) -> Chunk:
        assumed = POSITIVE if guided == 0 else NEGATIVE
        places = self._places().get(identity, ())
        # An area that only one branch has gets an opposite in the other, of the same identity.
        fitting = [place for place in places if (place[0] == "positive") == (assumed == POSITIVE)] or places
        if not fitting:
            return Chunk(assumed, "positive.0" if assumed == POSITIVE else "negative.0")
        name, index = fitting[0]
        return Chunk(POSITIVE if name == "positive" else NEGATIVE, f"{name}.{index}")

    def _places(self) -> dict[Any, list[tuple[str, int]]]:
        """(name of the conditioning, number in its list) by identity."""
        if self._entries is None:
            self._entries = {}
            for name, conditions in getattr(self._guider(), "conds", {}).items():
                for index, condition in enumerate(conditions or ()):
                    self._entries.setdefault(condition.get("uuid"), []).append((name, index))
        return self._entries
