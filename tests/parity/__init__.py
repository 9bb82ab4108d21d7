"""`make parity`: our rewards beside the original packages, on fresh random weights in the published layouts."""
