"""A subgraph that ships, as a person gets it: from the search box onto the canvas, and run there."""

from tests.host.graph import load_blueprint

NAME, TOY, SHOWN = "MaskUNet masks off and on", "MaskUNet Toy Model", "Preview Image"
SMALL = {"width": 64, "height": 64, "steps": 4, "cfg": 1.0}
SET = """([title, values]) => {
    const node = app.graph._nodes.find(node => node.title === title)
    for (const [name, value] of Object.entries(values))
        node.widgets.find(widget => widget.name === name).value = value
}"""
SLOTS = """title => {
    const node = app.graph._nodes.find(node => node.title === title)
    return [node.inputs, node.outputs].map(slots => slots.map(slot => slot.label ?? slot.name))
}"""


def test_masks_off_and_on_is_taken_from_the_search_and_run(desk):
    desk.start_blank()
    for title, at in ((TOY, (300, 300)), (NAME, (850, 250)), (SHOWN, (1250, 250))):
        assert title in desk.search(title)
        desk.take(title, at)
    (subgraph,) = load_blueprint(NAME)["definitions"]["subgraphs"]
    expected = [[slot["name"] for slot in subgraph[side]] for side in ("inputs", "outputs")]
    assert desk.page.evaluate(SLOTS, NAME) == expected
    for output, name in (("MODEL", "model"), ("CLIP", "clip"), ("VAE", "vae")):
        desk.connect(TOY, output, NAME, name)
    desk.connect(NAME, "with masks", SHOWN, "images")
    desk.page.evaluate(SET, [NAME, SMALL | {"prompt": "a red circle"}])
    desk.press_run()
    assert desk.wait_for_end() == "success"
    desk.wait_for_pictures()
    assert desk.pixels(SHOWN).std() > 5
    desk.screenshot("blueprint_masks_off_and_on")
    assert desk.unknown_nodes() == []
    assert desk.mistakes == []
