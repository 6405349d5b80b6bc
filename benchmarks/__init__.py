"""Measurements of mmdet_softnms against its alternatives; ``python -m benchmarks --help`` lists them."""
