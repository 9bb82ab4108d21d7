"""Where the method meets ComfyUI: masks reach a model's weights for the duration of one call, and leave nothing
behind.
"""
