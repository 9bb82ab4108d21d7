"""ComfyUI's front end in a browser, worked as a person works it: clicks, keys and menus. Scripts only look."""

import contextlib
import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, expect
from playwright.sync_api import TimeoutError as TooLate

from tests.host.graph import TEMPLATES
from tests.host.server import FOLDER_NAME, Server

READY = "() => window.app?.graph && document.querySelector('[data-testid=queue-button]')"

# What is there only for a moment is noted: how far each node's progress bar came, the pictures it was told of, and how
# runs ended.
WATCH = """() => {
    const seen = window.seen = {progress: {}, cached: [], files: {}, ended: []}
    app.api.addEventListener('execution_cached', event => seen.cached.push(...event.detail.nodes))
    app.api.addEventListener('executed', ({detail}) => {
        const {images, animated} = detail.output ?? {}
        if (images && !animated) seen.files[detail.display_node ?? detail.node] = images.map(({filename}) => filename)
    })
    app.api.addEventListener('execution_success', () => seen.ended.push('success'))
    app.api.addEventListener('execution_error', () => seen.ended.push('error'))
    app.api.addEventListener('execution_interrupted', () => seen.ended.push('interrupted'))
    setInterval(() => {
        for (const {title, progress} of app.graph._nodes)
            if (progress) seen.progress[title] = Math.max(progress, seen.progress[title] ?? 0)
    }, 10)
}"""

# A front end draws with each frame of the screen, which without a graphics card is most of what it costs: 25 a second
# are enough.
SLOW_SCREEN = """() => {
    window.requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 40)
    window.cancelAnimationFrame = clearTimeout
}"""

# The front end asks for files that a person may have, for pictures of templates, and for its default graph's models.
NO_MISTAKES = ("/userdata", "/user.css", ".jpg", "huggingface.co")

ON_SCREEN = """([title, right, down]) => {
    const node = app.graph._nodes.find(node => node.title === title)
    const [x, y] = app.canvas.ds.convertOffsetToCanvas([node.pos[0] + right, node.pos[1] + down])
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return [canvas.left + x, canvas.top + y]
}"""

SLOT = """([title, side, name]) => {
    const node = app.graph._nodes.find(node => node.title === title)
    const index = node[side].findIndex(slot => slot.name === name)
    const [x, y] = app.canvas.ds.convertOffsetToCanvas(node.getConnectionPos(side === 'inputs', index))
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return [canvas.left + x, canvas.top + y]
}"""

PICTURES = """() => Object.fromEntries(app.graph._nodes
    .filter(node => ['SaveImage', 'PreviewImage'].includes(node.type))
    .map(node => [node.title, (node.imgs ?? []).map(({src, complete, naturalWidth}) => {
        const query = new URL(src).searchParams
        const file = ['type', 'subfolder', 'filename'].map(key => query.get(key)).filter(Boolean).join('/')
        return {file, width: complete ? naturalWidth : 0}
    })]))"""

NEW_PICTURES = """() => Object.entries(seen.files).every(([id, files]) => {
    const shown = app.graph.getNodeById(id)?.imgs ?? []
    return shown.length === files.length && shown.every(({src, complete, naturalWidth}, index) =>
        complete && naturalWidth && new URL(src).searchParams.get('filename') === files[index])
})"""

# In the newer way of drawing, nodes are elements of the page, as high as what they hold.
GROWN = """() => [...document.querySelectorAll('[data-node-id]')].flatMap(element => {
    const node = app.graph.getNodeById(element.dataset.nodeId), {scale} = app.canvas.ds
    const {width, height} = element.getBoundingClientRect()
    const [wide, high] = [width / scale, height / scale - LiteGraph.NODE_TITLE_HEIGHT]
    return wide > node.size[0] + 2 || high > node.size[1] + 2 ? [`${node.title} is ${wide} x ${high}`] : []
})"""

TOLD = """() => Object.fromEntries(app.graph._nodes.flatMap(node => (node.widgets ?? [])
    .filter(({name}) => name === '$$node-text-preview').map(({value}) => [node.title, value])))"""

GRAPH = """() => {
    const {nodes, links, groups} = app.graph.serialize()
    for (const node of nodes) node.title ??= app.graph.getNodeById(node.id).title
    return {nodes, links, groups}
}"""


SET = """([title, values]) => {
    const node = app.graph._nodes.find(node => node.title === title)
    for (const [name, value] of Object.entries(values))
        node.widgets.find(widget => widget.name === name).value = value
}"""

SCROLL_TEMPLATES = """count => {
    const cards = [...document.querySelectorAll("[data-testid^='template-workflow-MaskUNet']")]
    cards.at(-1)?.scrollIntoView()
    return cards.length >= count
}"""
"""The template browser draws 24, and the next when somebody comes to the last of them."""

TRIES = 3
"""Of a double click."""
PATIENCE = 120_000
"""ms to wait for what a busy machine does late."""
expect.set_options(timeout=PATIENCE)
POLLING = 100
"""ms between two looks at a run; Playwright looks at each frame, which makes the page draw one."""


class Desk:
    """A front end that was just opened. mistakes: what the browser's console and scripts complained of."""

    def __init__(self, browser: Browser, server: Server, screenshots: Path):
        self.server = server
        self.screenshots = screenshots
        self.mistakes: list[str] = []
        # Panels and dialogs come and go at once, as the system's own setting asks for.
        self._context = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
        self._context.add_init_script(f"({SLOW_SCREEN})()")
        self.page = self._context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.goto(server.url)
        self.page.wait_for_function(READY)
        self._tidy_up()
        self._note_mistakes()
        self.page.evaluate(WATCH)

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, *exception) -> None:
        self._context.close()

    def _note_mistakes(self) -> None:
        def note(text: str) -> None:
            if not any(known in text for known in NO_MISTAKES):
                self.mistakes.append(text)

        self.page.on("pageerror", lambda error: note(str(error)))
        self.page.on("console", lambda line: note(f"{line.text} {line.location}") if line.type == "error" else None)

    def _tidy_up(self) -> None:
        """Closes the templates that greet whoever opens a server first (later ones meet the front end's default graph),
        and the panel that an error or a help page opened: the server remembers it."""
        self.page.wait_for_function(
            "() => app.graph._nodes.length || document.querySelector('[data-testid=template-workflows-content]')"
        )
        if self.page.get_by_test_id("template-workflows-content").is_visible():
            self.page.keyboard.press("Escape")
        panel = self.page.get_by_test_id("properties-panel")
        if panel.is_visible():
            panel.get_by_role("button", name="Toggle properties panel").click()
            expect(panel).to_be_hidden()

    def screenshot(self, name: str) -> None:
        """Without the small map, which covers a corner of the canvas."""
        no_map = "[data-testid=minimap-container] {visibility: hidden}"
        self.page.screenshot(path=self.screenshots / f"{name}.png", style=no_map)

    def open_template(self, name: str) -> None:
        """name: the short one."""
        self.browse_templates()
        title = TEMPLATES[name]
        self.page.get_by_test_id(f"template-workflow-{title}").click()
        expect(self.page.get_by_test_id("template-workflows-content")).to_be_hidden()
        self._settle(title)

    def browse_templates(self) -> None:
        """The template browser at this extension's graphs."""
        self.page.get_by_role("button", name="Templates").first.click()
        self.page.get_by_role("dialog").get_by_text(FOLDER_NAME).first.click()
        self.page.wait_for_function(SCROLL_TEMPLATES, arg=len(TEMPLATES))

    def _settle(self, tab: str) -> None:
        """Waits until the graph stands under the tab's name and was drawn: nodes get their sizes while drawn."""
        self.page.wait_for_function(
            "name => app.extensionManager.workflow.activeWorkflow?.filename?.startsWith(name)", arg=tab
        )
        self.page.evaluate("() => new Promise(done => setTimeout(done, 500))")

    def start_blank(self) -> None:
        before = self.page.evaluate("() => app.extensionManager.workflow.activeWorkflow?.path")
        self.page.get_by_role("button", name="Create a new blank workflow").click()
        # The graph before may have been blank too.
        self.page.wait_for_function(
            "before => ![before, undefined].includes(app.extensionManager.workflow.activeWorkflow?.path)"
            " && app.graph._nodes.length === 0",
            arg=before,
        )
        self._settle("Unsaved Workflow")

    def show_all(self) -> None:
        self.page.get_by_role("button", name="Fit View").click()

    def unknown_nodes(self) -> list[str]:
        """Types of nodes that the front end does not know."""
        return self.page.evaluate(
            "() => app.graph._nodes.map(node => node.type).filter(type => !LiteGraph.registered_node_types[type])"
        )

    def complaint(self) -> str | None:
        """What the front end tells in its box of errors or in a dialog, if it shows one."""
        for place in (self.page.get_by_test_id("error-overlay"), self.page.get_by_role("dialog")):
            if place.first.is_visible():
                return place.first.inner_text()
        return None

    def on_screen(self, title: str, right: float, down: float) -> tuple[float, float]:
        """Where on the screen a point of a node lies; the node's corner is below its title bar."""
        return tuple(self.page.evaluate(ON_SCREEN, [title, right, down]))

    def select(self, title: str) -> None:
        self.page.mouse.click(*self.on_screen(title, 60, -15))
        self.page.wait_for_function(
            "title => Object.values(app.canvas.selected_nodes).some(node => node.title === title)", arg=title
        )

    def press_key_on_canvas(self, key: str) -> None:
        self.page.locator("canvas#graph-canvas").press(key)

    def type_into(self, title: str, text: str) -> None:
        """Replaces the text of a node that shows one."""
        self.page.mouse.click(*self.on_screen(title, 60, 60))
        self.page.keyboard.press("Control+a")
        self.page.keyboard.type(text)

    def set_values(self, title: str, **values: Any) -> None:
        """Gives a node's widgets values, without a look at how each is set by hand."""
        self.page.evaluate(SET, [title, values])

    def press_run(self) -> None:
        self.page.evaluate("() => Object.assign(seen, {progress: {}, cached: [], files: {}, ended: []})")
        self.page.get_by_test_id("queue-button").click()

    def press_cancel(self) -> None:
        self.page.get_by_role("button", name="Cancel current run").first.click()

    def wait_for_end(self) -> str:
        """'success', 'error' or 'interrupted'."""
        self.page.wait_for_function("() => seen.ended.length", timeout=300_000, polling=POLLING)
        return self.seen()["ended"][0]

    def seen(self) -> dict[str, Any]:
        return self.page.evaluate("() => seen")

    def readable(self) -> bool:
        """Whether texts are drawn at this distance."""
        return not self.page.evaluate("() => app.canvas.low_quality")

    def shown_settings(self, title: str) -> list[str]:
        """Names of a node's widgets that are shown."""
        return self.page.evaluate(
            "title => app.graph._nodes.find(node => node.title === title).widgets"
            ".filter(({hidden, options}) => !hidden && !options.hidden).map(({name}) => name)",
            title,
        )

    def height(self, title: str) -> float:
        return self.page.evaluate("title => app.graph._nodes.find(node => node.title === title).size[1]", title)

    def sent(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """What the front end would send of a saved graph."""
        return self.page.evaluate(
            "async graph => (await app.loadGraphData(graph), (await app.graphToPrompt()).output)", workflow
        )

    def told(self) -> dict[str, str]:
        """Lines of text on nodes, by title."""
        return self.page.evaluate(TOLD)

    def grown(self) -> list[str]:
        """Nodes that do not fit into their saved sizes, in the newer way of drawing."""
        return self.page.evaluate(GROWN)

    def pictures(self) -> dict[str, list[dict[str, Any]]]:
        """By the title of each node that shows pictures: their files ("output/..."), and the width shown (0: none)."""
        return self.page.evaluate(PICTURES)

    def wait_for_pictures(self) -> None:
        """Until each node shows just the pictures that the run gave it; those of the run before stay for a moment."""
        self.page.wait_for_function(NEW_PICTURES)

    def pixels(self, title: str) -> np.ndarray:
        """`[B, H, W, 3]`: the files that a node shows."""
        files = [self.server.base / picture["file"] for picture in self.pictures()[title]]
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])

    def graph(self) -> dict[str, Any]:
        """Nodes, links and groups as they would be saved."""
        return self.page.evaluate(GRAPH)

    def save_as(self, name: str) -> None:
        self.press_key_on_canvas("Control+s")
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_role("textbox").fill(name)
        dialog.get_by_role("button", name="Confirm").click()
        expect(dialog).to_be_hidden()

    def open_saved(self, name: str) -> None:
        self._show_workflows(True)
        self.page.get_by_role("button", name="Refresh").last.click()
        self.page.get_by_text(name, exact=True).first.click()
        self._settle(name)
        self._show_workflows(False)

    def _show_workflows(self, shown: bool) -> None:
        """Opens or closes the panel of saved graphs."""
        search = self.page.get_by_placeholder("Search Workflow")
        if search.is_visible() != shown:
            self.page.get_by_role("button", name="Workflows (w)").click()
        expect(search).to_be_visible(visible=shown)

    def open_file(self, file: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.press_key_on_canvas("Control+o")
        chooser.value.set_files(file)
        self._settle(file.stem)

    def search(self, words: str) -> list[str]:
        """Names of the nodes that a double click on the empty canvas and these words find."""
        box = self.page.get_by_placeholder("Add a node")
        for _ in range(TRIES):
            # On a busy machine the halves of a double click may come too far apart to be one.
            self.page.mouse.dblclick(600, 500)
            with contextlib.suppress(TooLate):
                box.wait_for(timeout=10_000)
                break
        box.fill(words)
        results = self.page.get_by_test_id("result-item")
        # The list follows the words after a moment.
        self.page.evaluate("() => new Promise(done => setTimeout(done, 700))")
        return [text.splitlines()[0] for text in results.all_inner_texts()]

    def end_search(self) -> None:
        self.page.keyboard.press("Escape")
        expect(self.page.get_by_placeholder("Add a node")).to_be_hidden()

    def take(self, found: str, at: tuple[int, int] = (700, 400)) -> None:
        """Puts a node from the list of `search` onto the canvas, at a point of the screen, and selects it."""
        before = self.page.evaluate("() => app.graph._nodes.length")
        self.page.get_by_test_id("result-item").filter(has_text=found).first.click()
        expect(self.page.get_by_placeholder("Add a node")).to_be_hidden()
        # It hangs on the pointer until a click; a blueprint is read first.
        self.page.wait_for_function("before => app.graph._nodes.length > before", arg=before)
        self.page.mouse.move(*at)
        self.page.mouse.click(*at)
        self.select(found)

    def connect(self, origin: str, output: str, target: str, input: str) -> None:
        """Drags a link from an output of one node to an input of another."""
        self.page.mouse.move(*self.page.evaluate(SLOT, [origin, "outputs", output]))
        self.page.mouse.down()
        self.page.mouse.move(*self.page.evaluate(SLOT, [target, "inputs", input]), steps=4)
        self.page.mouse.up()
        self.page.wait_for_function(
            "([title, name]) => app.graph._nodes.find(node => node.title === title)"
            ".inputs.find(input => input.name === name).link !== null",
            arg=[target, input],
        )

    def choose(self, title: str, name: str, entry: str) -> None:
        """Takes an entry of the list that is a node's widget of that name."""
        widget = "app.graph._nodes.find(node => node.title === title).widgets.find(widget => widget.name === name)"
        self.page.wait_for_function(
            f"([title, name, entry]) => {widget}.options.values.includes(entry)", arg=[title, name, entry]
        )
        down = self.page.evaluate(f"([title, name]) => {widget}.y", [title, name])
        self.page.mouse.click(*self.on_screen(title, 130, down + 10))
        self.page.get_by_text(entry, exact=True).click()

    def node_info(self, display_name: str) -> dict[str, Any]:
        """What the server tells the front end of a node."""
        with urllib.request.urlopen(f"{self.server.url}/object_info") as answer:
            nodes = json.load(answer).values()
        return next(node for node in nodes if node["display_name"] == display_name)
