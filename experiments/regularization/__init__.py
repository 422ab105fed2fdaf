"""Does a small bias-Jacobian generalize better: `python -m experiments regularization`."""
