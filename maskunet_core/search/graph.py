"""How the search calls the diffusion model: with gradients, and without computing twice what no update changes."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..masks.call import POSITIVE
from ..models.families.transformer import Transformer
from ..models.families.unet import UNET, execution_order
from ..models.structure import Structure
from ..seam.attach import options_of, with_options
from ..seam.attention import with_differentiable_attention
from ..seam.blocks import recomputed_blocks
from ..seam.gradients import kept_on_the_way, kept_weights, on_a_copy, recomputed
from ..seam.prefix import Prefix, TransformerPrefix, UNetPrefix, same
from ..seam.run import RUN
from ..seam.sampling import SEARCH, acts_in_blocks, joins_branches
from ..seam.shadow import Shadowed


class StepGraph(ABC):
    """The calls of one step, in which the latent and the conditioning stay as they are.

    prefix: blocks that run once. recompute: what runs again in the backward pass keeps its inputs alone; otherwise
    activations are kept. lent: weights may be others by then, so layers compute with copies. writes_in_place: whether
    the model itself writes into what autograd keeps.
    """

    writes_in_place = False

    def __init__(self, kind: str, prefix: Prefix, recompute: bool, lent: bool):
        self._kind, self._prefix, self._recompute, self._lent = kind, prefix, recompute, lent

    def options(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """The options of a call of the sampler, for calls of the search."""
        from comfy.patcher_extension import WrappersMP

        kind = getattr(WrappersMP, self._kind)
        options = model_options["transformer_options"]
        wrappers = options.get("wrappers", {})
        more = {"wrappers": wrappers | {kind: wrappers.get(kind, {}) | {SEARCH: [self._call]}}}
        return with_options(model_options, with_differentiable_attention(more))

    @staticmethod
    def of_a_look(model_options: dict[str, Any]) -> dict[str, Any]:
        """The options of one look: what it computes does not count among the sampler's own calls."""
        run = model_options["transformer_options"].get(RUN)
        return model_options if run is None else with_options(model_options, {RUN: run.fork()})

    def _call(self, executor, *args: Any, **kwargs: Any) -> Tensor:
        """Wrapper of the family's kind."""
        options = options_of(args, kwargs)
        alone = not acts_in_blocks(options)
        with contextlib.ExitStack() as stack:
            if self._prefix.blocks and alone:
                inputs = [a for a in (*args, *kwargs.values()) if a is not options]
                stack.enter_context(self._prefix.serving(*inputs))
            if torch.is_grad_enabled():
                stack.enter_context(self._with_gradients(self._recompute and alone))
            return executor(*args, **kwargs)

    @abstractmethod
    def _with_gradients(self, recompute: bool) -> contextlib.AbstractContextManager:
        """Around a call through which gradients flow."""


class UNetGraph(StepGraph):
    """Through ComfyUI's UNetModel.

    structure: what is masked. fixed: whether the latent is the same in all calls; where it is searched for, gradients
    flow through the whole model.
    """

    def __init__(self, unet: nn.Module, structure: Structure, fixed: bool, recompute: bool, lent: bool):
        order = execution_order(unet)
        decoder = len(unet.input_blocks) + (unet.middle_block is not None)
        first = min(first_masked([name for name, _ in order], structure), decoder) if fixed else 0
        blocks = [block for _, block in order]
        super().__init__(UNET.wrapper, UNetPrefix(blocks[:first]), recompute, lent)
        self._encoder = blocks[first:decoder]
        self._layers = [layer for block in blocks[first:] for layer in block]
        self._layers.append(unet.out)

    @contextlib.contextmanager
    def _with_gradients(self, recompute: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if recompute:
                stack.enter_context(recomputed(self._layers))
            elif self._lent:
                stack.enter_context(kept_weights(self._layers))
            # What is run again keeps its inputs: those that the host writes into have to be copied before.
            stack.enter_context(on_a_copy(self._encoder))
            yield


class TransformerGraph(StepGraph):
    """Through a transformer, whose blocks keep their inputs alone where they run again.

    learned: what is searched for, by the names of the layers. Others as in UNetGraph.
    """

    writes_in_place = True

    def __init__(
        self,
        family: Transformer,
        model: nn.Module,
        structure: Structure,
        learned: Mapping[str, Tensor],
        fixed: bool,
        recompute: bool,
        lent: bool,
    ):
        names = family.blocks(model)
        first = first_masked(names, structure) if fixed else 0
        blocks = [model.get_submodule(name) for name in names]
        before = [block for stack in family.prelude for block in model.get_submodule(stack)] + blocks[:first]
        super().__init__(family.wrapper, TransformerPrefix(before if first else ()), recompute, lent)

        def leaves(name: str) -> list[Tensor]:
            return [leaf for layer, leaf in learned.items() if layer.startswith(f"{name}.")]

        self._blocks = [(block, partial(leaves, name)) for block, name in zip(blocks, names)][first:]
        self._width = family.channels(model)
        inside = {module for block in blocks for module in block.modules()}
        self._others = [m for m in model.modules() if m not in inside and next(m.children(), None) is None]

    @contextlib.contextmanager
    def _with_gradients(self, recompute: bool) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if recompute:
                stack.enter_context(recomputed_blocks(self._blocks, self._width))
            elif self._lent:
                stack.enter_context(kept_weights(block for block, _ in self._blocks))
            if self._lent:
                stack.enter_context(kept_on_the_way(self._others))
            yield


def first_masked(blocks: Sequence[str], structure: Structure) -> int:
    """The number of the first block in which something is masked, of all blocks where nothing is."""
    masked = (n for n, name in enumerate(blocks) if any(layer.startswith(f"{name}.") for layer in structure.layers))
    return next(masked, len(blocks))


class FixedBranches:
    """In place of the host's `sampler_calc_cond_batch_function`: branches that no mask reaches are computed once.

    unmasked: options of the sampler's own call.
    """

    def __init__(self, unmasked: dict[str, Any]):
        self._unmasked = unmasked
        self._kept: dict[int, Tensor] = {}

    def __call__(self, arguments: dict[str, Any]) -> list[Tensor]:
        from comfy.samplers import calc_cond_batch

        conditions, model = arguments["conds"], arguments["model"]
        x, sigma = arguments["input"], arguments["sigma"]
        options = {k: v for k, v in arguments["model_options"].items() if k != "sampler_calc_cond_batch_function"}
        if joins_branches(options, conditions):
            return calc_cond_batch(model, conditions, x, sigma, options)

        def alone(branch: int, of_call: dict[str, Any]) -> list[Tensor]:
            # The place in this list is what tells the branch.
            only = [condition if n == branch else None for n, condition in enumerate(conditions)]
            return calc_cond_batch(model, only, x, sigma, of_call)

        results = alone(POSITIVE, options)
        for branch in range(1, len(conditions)):
            if conditions[branch] is None:
                continue
            if branch not in self._kept:
                with torch.no_grad():
                    self._kept[branch] = alone(branch, self._unmasked)[branch]
            results[branch] = self._kept[branch]
        return results


def computed_once(controls: Iterable[Any]) -> Shadowed:
    """Inside the block, a step in which the latent stays as it is, ControlNets are computed once for each input."""

    def once(control: Any):
        compute, known = control.get_control, []

        def get_control(x: Tensor, t: Tensor, cond: Any, batched_number: int, *args: Any, **kwargs: Any) -> Any:
            inputs = [x, t, *(value for value in cond.values() if isinstance(value, Tensor))]
            found = [result for before, number, result in known if number == batched_number and same(before, inputs)]
            if not found:
                with torch.no_grad():
                    found = [compute(x, t, cond, batched_number, *args, **kwargs)]
                known.append((inputs, batched_number, found[0]))
            # The host takes the residuals out of their lists as it uses them.
            return found[0] and {part: list(residuals) for part, residuals in found[0].items()}

        return get_control

    return Shadowed((control, {"get_control": once(control)}) for control in controls)
