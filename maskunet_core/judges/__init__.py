"""What benchmarks and nodes judge pictures by: networks read from their published files, and rules. Torch only; equal
to the reference implementations, whose numbers the tests hold.
"""
