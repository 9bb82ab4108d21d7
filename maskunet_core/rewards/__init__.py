"""Rewards: differentiable functions that tell how well pictures show a prompt.

`reward.py` is the protocol, `files.py` reads published weight files; one file per architecture family does the rest.
"""
