"""Where nodes and groups lie on the canvas, and whether a person can read all of them."""

import itertools
from dataclasses import dataclass

from tests.browser.desk import Desk

TITLE_BAR = 30

BOXES = """() => ({
    nodes: app.graph._nodes.map(node => [node.title, ...node.pos, ...node.size, ...node.computeSize()]),
    groups: app.graph._groups.map(group => [group.title, ...group.pos, ...group.size]),
})"""

# Texts are drawn as elements of the page, and only near enough: the view moves to each of them. One that comes by a
# link is not drawn.
TEXTS = """() => app.graph._nodes.flatMap(node => (node.widgets ?? [])
    .filter(widget => widget.element && !node.inputs?.some(one => one.link && one.widget?.name === widget.name))
    .map(widget => [node.id, node.title, widget.name]))"""
SHOW = """id => {
    const node = app.graph.getNodeById(id), {ds} = app.canvas
    ds.scale = 1
    ds.offset[0] = 300 - node.pos[0]
    ds.offset[1] = 120 - node.pos[1]
    app.canvas.setDirty(true, true)
}"""
TEXT_SHOWN = (
    """([id, name]) => app.graph.getNodeById(id).widgets.find(widget => widget.name === name).element.clientHeight"""
)
TEXT_CUT = """([id, name]) => {
    const {element} = app.graph.getNodeById(id).widgets.find(widget => widget.name === name)
    // A note holds the field in which it is edited, too, unseen.
    const parts = [element, ...element.children].filter(part => part === element || part.tagName !== 'TEXTAREA')
    return parts.some(part => part.clientHeight && part.scrollHeight > part.clientHeight + 1)
}"""


@dataclass
class Box:
    """A node with its title bar, or a group: title, corner and size in the canvas's units."""

    title: str
    x: float
    y: float
    width: float
    height: float

    def meets(self, other: "Box") -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def holds(self, other: "Box") -> bool:
        return (
            self.x <= other.x
            and self.y <= other.y
            and other.x + other.width <= self.x + self.width
            and other.y + other.height <= self.y + self.height
        )


def misplaced(desk: Desk) -> list[str]:
    """A sentence for each node or group that lies over another, or sticks out of its group."""
    found = desk.page.evaluate(BOXES)
    nodes = [Box(title, x, y - TITLE_BAR, w, h + TITLE_BAR) for title, x, y, w, h, *_ in found["nodes"]]
    groups = [Box(*group) for group in found["groups"]]
    said = [
        f"'{one.title}' lies over '{other.title}'"
        for boxes in (nodes, groups)
        for one, other in itertools.combinations(boxes, 2)
        if one.meets(other)
    ]
    for node, group in itertools.product(nodes, groups):
        if node.meets(group) and not group.holds(node):
            said.append(f"'{node.title}' sticks out of '{group.title}'")
    return said


def clipped(desk: Desk) -> list[str]:
    """A sentence for each node that is too small for its title, its widgets or its text. Moves the view."""
    said = [
        f"'{title}' is {w:.0f} x {h:.0f}, and needs {least_w:.0f} x {least_h:.0f}"
        for title, _, _, w, h, least_w, least_h in desk.page.evaluate(BOXES)["nodes"]
        if w < least_w or h < least_h
    ]
    for node, title, name in desk.page.evaluate(TEXTS):
        desk.page.evaluate(SHOW, node)
        desk.page.wait_for_function(TEXT_SHOWN, arg=[node, name])
        if desk.page.evaluate(TEXT_CUT, [node, name]):
            said.append(f"'{title}' is too small for its text")
    return said
