"""The subgraphs that ship, as a person gets them: from the search box onto the canvas, and run there."""

from tests.host.graph import BLUEPRINTS, load_blueprint

BEST_OF_6, OFF_AND_ON, SCORE = BLUEPRINTS
TOY, SHOWN = "MaskUNet Toy Model", "Preview Image"
PROMPT, TOY_REWARD = "a red circle", "toy reward (bundled)"
SMALL = {"width": 64, "height": 64, "steps": 4, "cfg": 1.0}
SLOTS = """title => {
    const node = app.graph._nodes.find(node => node.title === title)
    return [node.inputs, node.outputs].map(slots => slots.map(slot => slot.label ?? slot.name))
}"""


def place(desk, **corners):
    """Takes nodes from the search onto an empty canvas, by title and place on the screen."""
    desk.start_blank()
    for title, at in corners.items():
        assert title in desk.search(title)
        desk.take(title, at)


def assert_slots_are_those_of_the_file(desk, name):
    (subgraph,) = load_blueprint(name)["definitions"]["subgraphs"]
    assert desk.page.evaluate(SLOTS, name) == [
        [slot["name"] for slot in subgraph[side]] for side in ("inputs", "outputs")
    ]


def connect_the_toy(desk, name):
    for output, input in (("MODEL", "model"), ("CLIP", "clip"), ("VAE", "vae")):
        desk.connect(TOY, output, name, input)


def run_and_show(desk, picture):
    desk.press_run()
    assert desk.wait_for_end() == "success"
    desk.wait_for_pictures()
    assert desk.pixels(SHOWN).std() > 5
    desk.screenshot(picture)


def test_they_are_taken_from_the_search_and_run(desk):
    place(desk, **{TOY: (300, 300), OFF_AND_ON: (850, 250), SHOWN: (1250, 250)})
    assert_slots_are_those_of_the_file(desk, OFF_AND_ON)
    connect_the_toy(desk, OFF_AND_ON)
    desk.connect(OFF_AND_ON, "with masks", SHOWN, "images")
    desk.set_values(OFF_AND_ON, prompt=PROMPT, **SMALL)
    run_and_show(desk, "blueprint_masks_off_and_on")

    # The largest comes last: it covers the place of the double click that opens the search.
    place(desk, **{TOY: (200, 300), SCORE: (1010, 180), SHOWN: (1010, 560), BEST_OF_6: (570, 180)})
    for name in (BEST_OF_6, SCORE):
        assert_slots_are_those_of_the_file(desk, name)
    connect_the_toy(desk, BEST_OF_6)
    desk.connect(BEST_OF_6, "candidates", SCORE, "images")
    desk.connect(SCORE, "pictures with scores", SHOWN, "images")
    desk.set_values(BEST_OF_6, prompt=PROMPT, reward=TOY_REWARD, **SMALL)
    desk.set_values(SCORE, prompt=PROMPT, reward=TOY_REWARD)
    run_and_show(desk, "blueprint_best_of_6_scored")

    assert desk.unknown_nodes() == []
    assert desk.mistakes == []
