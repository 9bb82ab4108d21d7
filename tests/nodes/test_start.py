import sys

from tests.host.extension import NAME

OFFERED = {"attention.parsers", "choices", "errors", "search.settings"}
"""What the nodes' inputs are made of."""
LINKED = {"judges.statistics", "judges.verdict", "rewards.preprocess", "rewards.reward"}
"""Small modules about what travels on links."""


def test_comfyui_starts_without_what_acts_on_models(extension):
    for node in ("attention", "generator", "masks", "reward_sampler", "train", "video"):
        extension(node)
    core = f"{NAME}.maskunet_core."
    loaded = {name.removeprefix(core) for name in sys.modules if name.startswith(core)}
    assert {name for name in loaded if "." in name or name in OFFERED} == OFFERED | LINKED
