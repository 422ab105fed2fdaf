"""How fast the estimators converge: `python -m experiments estimators`."""
