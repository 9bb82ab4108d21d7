"""`make parity`: our rewards and judges beside the original packages, on fresh random weights in the published layouts.

`golden.py` and `authors.py` make the golden files of the tests anew, with the original code.
"""
