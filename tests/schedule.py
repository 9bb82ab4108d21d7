"""In which order pytest-xdist hands out files: slow ones first, so that no worker is left alone with one at the end."""

import pytest

SLOW = (
    "tests/browser",
    "tests/core/test_search.py",
    "tests/nodes/test_server.py",
    "tests/trainer/test_train.py",
    "tests/trainer/test_reward_compare.py",
    "tests/trainer/test_rewarded.py",
    "tests/trainer/test_base.py",
    "tests/trainer/test_commands.py",
    "tests/nodes/test_train.py",
    "tests/nodes/test_sd15_workflows.py",
    "tests/core/test_conditionings.py",
    "tests/trainer/test_compare.py",
    "tests/trainer/test_toy_training.py",
    "tests/trainer/test_toy_transformer.py",
    "tests/trainer/embedding/test_embedding.py",
    "tests/host/test_stock.py",
    "tests/host/test_registry.py",
)
"""Files, and a folder whose files stay together: its server and its browser start once."""


def part_of(node_id: str) -> str:
    """The name in SLOW under which a test runs, else its file."""
    file = node_id.split("::")[0]
    return next((name for name in SLOW if file == name or file.startswith(f"{name}/")), file)


def pytest_collection_modifyitems(config, items):
    """On the workers alone: xdist hands out what they collected, in their order."""
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(SLOW)}
        items.sort(key=lambda item: places.get(part_of(item.nodeid), len(SLOW)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """xdist's own, by `part_of`; it would begin with the files of the most tests."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Parts(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return part_of(nodeid)

    config.option.loadscopereorder = False
    return Parts(config, log)
