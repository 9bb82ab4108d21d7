"""One server and one browser for all tests of this folder. Both end with it: Playwright keeps an event loop running."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.browser.desk import Desk
from tests.host.graph import TEMPLATES, load_workflow, titled, to_prompt
from tests.host.server import Server
from trainer.host import PROJECT

SCREENSHOTS = PROJECT / "output" / "browser"


def declared_models(name: str) -> list[dict[str, str]]:
    """Files that a graph needs and does not bring: those that its nodes declare, and generators that nobody ships."""
    nodes = load_workflow(name)["nodes"]
    declared = [model for node in nodes for model in node.get("properties", {}).get("models", [])]
    chosen = [node["widgets_values"][0] for node in nodes if node["type"] == "MaskUNetLoader"]
    shipped = [file.name for file in (PROJECT / "maskunet_core" / "toy" / "generators").iterdir()]
    return declared + [{"name": name, "directory": "maskunet"} for name in chosen if name not in shipped]


@pytest.fixture(scope="package")
def comfyui(chromium):
    """A running ComfyUI in which the files that graphs declare are listed (they are empty), as after a download."""
    with Server() as server:
        for name in TEMPLATES:
            for model in declared_models(name):
                file = server.base / "models" / model["directory"] / model["name"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        yield server


@pytest.fixture(scope="package")
def stock(comfyui) -> np.ndarray:
    """`[B, H, W, 3]`: what the stock half of `generator_off_and_on` draws, sent alone before any mask was applied."""
    prompt = to_prompt(load_workflow("generator_off_and_on"), comfyui.object_info())
    # Digits, which the toy's text encoder does not see, keep this apart from what the server remembers of a graph.
    titled(prompt, "Negative prompt")["text"] = "0"
    masked = ("MaskUNetLoader", "MaskUNetApply", "MaskUNetCompareBatches", "PreviewImage")
    without = {
        key: node
        for key, node in prompt.items()
        if node["class_type"] not in masked and not node["_meta"]["title"].endswith(" with masks")
    }
    (saved,) = (output["images"] for output in comfyui.run(without).values())
    files = [comfyui.base / "output" / image["subfolder"] / image["filename"] for image in saved]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


@pytest.fixture(scope="package")
def browser(chromium, stock):
    """A headless Chromium. Asks for `stock`, because the server's own client needs an event loop, too."""
    with sync_playwright() as playwright:
        # A graphics card that is imitated costs more than drawing without one.
        running = playwright.chromium.launch(executable_path=chromium, args=["--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="package")
def new_desk(comfyui, browser) -> Callable[[], Desk]:
    """Makes front ends, to be opened by `with`, as somebody sees them who comes for the first time.

    Close each as soon as it is not needed: an open one draws its graph all the time.
    """
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return lambda: Desk(browser, comfyui, SCREENSHOTS)


@pytest.fixture
def desk(new_desk):
    """A front end of its own for one test."""
    with new_desk() as opened:
        yield opened
