"""Masks of one sampling run: recorded while it runs, kept as bits, replayed, and counted."""
