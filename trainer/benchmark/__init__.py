"""Benchmarks: a checkpoint, plain and with methods on it, judged on the same prompts and noises."""
