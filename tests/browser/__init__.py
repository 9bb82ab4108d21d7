"""The extension as people meet it: ComfyUI's own front end in a real browser, against the real server."""
