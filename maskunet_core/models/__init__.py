"""What can be masked in which model: the structure of the host's diffusion models, found by shape and name."""
