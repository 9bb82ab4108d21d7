"""All nodes of the host that change a model, a conditioning or guidance, around searches, generators and replays.

The nodes come from the host's own list, so that new ones join by themselves. Of a node that a stock KSampler cannot run
on the toy model the reason is told (`pytest -rs`). MASKUNET_COMBINATIONS is how many chains of two or three are tried;
without it a few nodes and patches are.
"""

import os
import random

import pytest
import torch

from tests.host.extension import core_module
from tests.host.nodes import function_of, gives, host_nodes, takes
from tests.nodes.combinations import BRANCHES, SAMPLING, World
from tests.nodes.probes import PROBES

COMBINATIONS = int(os.environ.get("MASKUNET_COMBINATIONS", 12))
on_demand = pytest.mark.skipif(
    "MASKUNET_COMBINATIONS" not in os.environ, reason="takes long: set MASKUNET_COMBINATIONS to a number of chains"
)
SOME = ("DifferentialDiffusion", "PerturbedAttentionGuidance", "PairConditioningSetProperties", "EasyCache")
"""Tried always: nodes of the host that once were computed wrongly, in silence."""
PARTS = 4
CLOSE = 1e-3
"""Of what is right: searches compute attention and neighbouring rows by other kernels than samplers."""
ROUNDING = 1e-5
"""Of the starting noise: it moves estimates by about as much as other kernels do."""
LEFT_OUT = {"TorchCompileModel": "compiles with a C compiler, for minutes"}
WIDE = {"ContextWindowsManual", "tiles one by one", "tiles as one batch", "sliding windows"}
"""What cuts the picture into parts needs one that is wide enough."""
BEFORE = {"DifferentialDiffusion": ["SetLatentNoiseMask"]}
REFUSED = {"attention couple": {"positive", "generator"}, "tiles as one batch": {"positive"}}
"""What cannot be seen through, for an image alone: the branches of a search, or the replay of a generator's masks.
Tiles are replayed row by row, behind the same node."""


def chain_of(name: str) -> list[str]:
    """The node, and those without which it does nothing."""
    chain = [*BEFORE.get(name, []), name]
    node = host_nodes().get(name)
    if node is not None and gives(node, "HOOK_KEYFRAMES"):
        chain.append("SetHookKeyframes")
    if node is not None and (gives(node, "HOOKS") or gives(node, "HOOK_KEYFRAMES")):
        chain.append("PairConditioningSetProperties")
    if node is not None and gives(node, "CLIP") and not gives(node, "MODEL"):
        chain.append("CLIPTextEncode")
    return chain


def model_nodes() -> list[str]:
    return [name for name, node in host_nodes().items() if takes(node, "MODEL") and gives(node, "MODEL")]


def conditioning_nodes() -> list[str]:
    kinds = [(kind, kind) for kind in ("CONDITIONING", "HOOKS", "HOOK_KEYFRAMES", "CLIP")]
    kinds.append(("MODEL", "CONDITIONING"))
    found = [
        name
        for name, node in host_nodes().items()
        if any(takes(node, taken) and gives(node, given) for taken, given in kinds)
    ]
    return [name for name in found if name not in model_nodes()]


class Chain:
    """Nodes one after the other, and what has to hold for them.

    recompute: in searches for both branches; in those for the positive one it is the other way round. refused: what
    was refused, in a sentence of ours.
    """

    def __init__(self, worlds: tuple[World, World], names: list[str], batch: int = 1, recompute: bool = False):
        self.worlds, (self.world, self.plain) = worlds, worlds
        self.names, self.batch, self.recompute = [part for name in names for part in chain_of(name)], batch, recompute
        self.width = 16 if WIDE & set(names) else 8
        self.refused: set[str] = set()

    def graph(self, world: World | None = None):
        return (world or self.world).graph(self.names, self.batch, self.width)

    def why_not(self) -> str | None:
        """Why the host itself cannot run these nodes on this model, if so."""
        for name in self.names:
            if name in LEFT_OUT:
                return LEFT_OUT[name]
        try:
            self.stock = self.world.stock(self.graph())
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:100]}".splitlines()[0]
        if not all(torch.isfinite(part).all() for part in self.stock):
            return "gives what is no finite number"
        return None

    def acts(self) -> bool:
        """Whether the stock image is another one with these nodes than without."""
        size = self.batch, self.width
        if size not in self.world.before:
            self.world.before[size] = self.world.stock(self.world.graph((), *size))[0]
        return not torch.equal(self.world.before[size], self.stock[0])

    def check(self) -> None:
        """All of it. The stock run must have been tried before."""
        acts = self.acts()
        for branches in BRANCHES if acts else BRANCHES[:1]:
            self._told(branches, self._check_search, branches, acts)
        if acts:
            self._told("generator", self.check_replay_of_generator)
        assert torch.equal(self.world.stock(self.graph())[0], self.stock[0]), "the stock image afterwards"
        assert all(torch.equal(*pair) for pair in zip(self.world.weights(), self.world.untouched)), "the weights"

    def _told(self, what: str, check, *arguments) -> None:
        try:
            check(*arguments)
        except core_module("errors").MaskUNetError as refusal:
            text = str(refusal)
            assert text.endswith(".")
            assert any(verb in text for verb in ("Remove", "Connect", "Set ")), text
            self.refused.add(what)

    def _in_full_precision(self) -> "Chain | None":
        """The same with float32 where these nodes have the model compute in less, whose rounding tells runs apart."""
        if "ModelComputeDtype" not in self.names:
            return None
        precise = Chain(self.worlds, [], self.batch)
        precise.names, precise.width = [name for name in self.names if name != "ModelComputeDtype"], self.width
        return precise

    def _check_search(self, branches: str, gradients: bool) -> None:
        recompute = self.recompute == (branches == "both")
        found = self.world.search(self.graph(), branches, recompute)
        apart = distance(found.estimate, self.stock[1])
        precise = self._in_full_precision()
        # Both are as far from what is right.
        rounding = 2 * distance(precise.world.stock(precise.graph())[1], self.stock[1]) if precise else 0.0
        assert apart <= max(CLOSE, rounding), f"what the search looks at ({branches})"
        assert torch.equal(self.world.replay(self.graph(), found.masks), found.latents), f"its replay ({branches})"
        if gradients:
            direct = self.plain.direct_slopes(self.graph(self.plain), branches)
            assert found.slopes.keys() == direct.keys()
            rounded = precise.plain.direct_slopes(precise.graph(precise.plain), branches) if precise else direct
            allowed = max(CLOSE * _largest(direct), _largest_difference(rounded, direct))
            if _largest_difference(found.slopes, direct) > allowed:
                # A reward may be steep: how much is it that searches compute by other kernels?
                nearby = self.plain.direct_slopes(self.graph(self.plain), branches, louder=1 + ROUNDING)
                allowed = max(allowed, _largest_difference(nearby, direct))
            how = f"{branches}, {'recomputed' if recompute else 'kept'}"
            for layer in direct:
                apart = float((found.slopes[layer] - direct[layer]).abs().max())
                assert apart <= allowed, f"gradient of {layer} ({how})"

    def check_replay_of_generator(self, guider: str | None = None) -> None:
        drawn, replayed = self.world.generated(self.names, self.batch, self.width, guider)
        assert torch.equal(drawn, replayed), "replay of what a generator did"


def _largest(slopes: dict[str, torch.Tensor]) -> float:
    return max((float(slope.abs().max()) for slope in slopes.values()), default=0.0)


def _largest_difference(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    return _largest({layer: some[layer] - others[layer] for layer in others})


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, in units of what is right."""
    return float((found - right).abs().max() / right.square().mean().sqrt())


@pytest.fixture(scope="module")
def worlds(extension, tmp_path_factory):
    """(as the executor makes it, with gradients in mind)"""
    worlds = World(extension), World(extension, executed=False)
    worlds[0].write_files(tmp_path_factory.mktemp("models"))
    return worlds


@pytest.fixture(scope="module", autouse=True)
def _no_bars():
    import comfy.utils

    before = comfy.utils.PROGRESS_BAR_ENABLED
    comfy.utils.set_progress_bar_enabled(False)
    yield
    comfy.utils.set_progress_bar_enabled(before)


def check_alone(worlds, subtests, names: list[str]) -> None:
    functions: dict = {}
    for number, name in enumerate(names):
        with subtests.test(name):
            function = function_of(host_nodes()[name])
            if function in functions:
                pytest.skip(f"{name}: computed as {functions[function]} is")
            chain = Chain(worlds, [name], recompute=bool(number % 2))
            reason = chain.why_not()
            if reason is not None:
                pytest.skip(f"{name}: {reason}")
            if chain.acts():
                functions[function] = name
            chain.check()
            assert chain.refused == REFUSED.get(name, set())


@pytest.mark.parametrize("name", SOME)
def test_a_node_of_the_host(worlds, name):
    chain = Chain(worlds, [name])
    assert chain.why_not() is None
    chain.check()
    assert not chain.refused


@on_demand
@pytest.mark.parametrize("part", range(PARTS))
def test_a_node_that_changes_the_model(worlds, subtests, part):
    check_alone(worlds, subtests, model_nodes()[part::PARTS])


@on_demand
@pytest.mark.parametrize("part", range(PARTS))
def test_a_node_that_changes_a_conditioning(worlds, subtests, part):
    check_alone(worlds, subtests, conditioning_nodes()[part::PARTS])


@pytest.mark.parametrize("name", PROBES)
def test_a_patch_of_another_pack(worlds, name):
    chain = Chain(worlds, [name])
    assert chain.why_not() is None
    assert chain.acts()
    chain.check()
    assert chain.refused == REFUSED.get(name, set())


def test_what_draws_random_numbers_is_repeated_with_the_seed_of_a_candidate(worlds):
    """Token merging draws from torch's own generator, which KSampler's seed sets."""
    world, chain = worlds[0], ["TomePatchModel"]
    found = world.search(world.graph(chain), "both", candidates=4, candidate_percent=0.5)
    (seed,) = found.masks.record["seeds"]
    assert seed != SAMPLING["seed"]
    assert torch.equal(world.replay(world.graph(chain), found.masks, seed=seed), found.latents)


def test_a_guider(worlds, subtests):
    for name in (name for name, node in host_nodes().items() if gives(node, "GUIDER")):
        with subtests.test(name):
            Chain(worlds, [], batch=2).check_replay_of_generator(name)


@on_demand
@pytest.mark.parametrize("number", range(COMBINATIONS))
def test_a_chain_of_nodes(worlds, number):
    world = worlds[0]
    if not world.acting:
        names = [*model_nodes(), *conditioning_nodes(), *PROBES]
        alone = {name: Chain(worlds, [name]) for name in names}
        world.acting += [name for name, chain in alone.items() if chain.why_not() is None and chain.acts()]
    chance = random.Random(number)
    names = chance.sample(world.acting, chance.choice((2, 2, 3)))
    chain = Chain(worlds, names, batch=1 + number % 2, recompute=bool(number & 2))
    reason = chain.why_not()
    if reason is not None:
        pytest.skip(f"{' + '.join(names)}: {reason}")
    chain.check()
    assert not chain.refused or REFUSED.keys() & set(names)
