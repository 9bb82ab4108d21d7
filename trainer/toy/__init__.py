"""The toy world's trainer: renders pictures, trains the embedded model, scores it."""
