"""Compares masks with what else could be trained, at equal data, steps and tuning: `python -m trainer compare`."""
