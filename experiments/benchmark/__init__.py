"""What a step, a product or a measurement costs: `python -m experiments benchmark STUDY`."""
