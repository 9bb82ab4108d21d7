"""A real ComfyUI for demo, tests and benchmarks: set it up, start it, send it graphs."""
