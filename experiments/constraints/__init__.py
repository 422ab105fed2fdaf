"""What constraints on the Jacobian do to a fit: `python -m experiments constraints`."""
