"""How exact the products are on whole architectures: `python -m experiments verify`."""
