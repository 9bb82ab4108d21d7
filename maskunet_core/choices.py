"""What people choose among by name, in nodes and in configurations.

It stands apart from what acts on a choice and imports nothing, as ComfyUI reads it whenever it starts.
"""

THIRDS = ("down", "mid", "up")
"""The parts of a model, in the order of execution: encoder, middle and decoder of a U-Net, thirds of a transformer."""
TARGETS: dict[str, tuple[tuple[str, ...], bool]] = {
    "decoder attention": (("up",), False),
    "decoder attention and feed-forward": (("up",), True),
    "all attention": (THIRDS, False),
}
"""Target sets by name: the thirds of the model, and whether feed-forward layers join those of attention."""

BRANCHES = ("both", "positive")
"""Branches of classifier-free guidance that masks act on, where an image has one mask."""
GUIDANCE = ("positive", "negative")
"""The branches, by the number that the host gives them."""

ATTENTION_METHODS = ("attend-and-excite", "syngen")
PUBLISHED_STEP, PERCENT_STEP = "times the gradient", "percent of the latent"
"""Units of the size of attention guidance's steps: the published one, and percent of the latent's norm whatever the
gradient's size is."""

FIRST, PREVIOUS = "first", "previous"
REFERENCES = (FIRST, PREVIOUS)
"""Frames of a video that the others look at."""
MOTION_SIDE = 512
"""Pixels of a picture's side in which motion is told, whatever the picture's size."""
