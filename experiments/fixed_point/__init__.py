"""A small convolutional fixed-point network, with and without the Jacobian penalty.

`python -m experiments fixed_point --config configs/fixed_point.yaml`.
"""
