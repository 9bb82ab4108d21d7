"""Trains mask generators for MaskUNet: `python -m trainer --help`."""
