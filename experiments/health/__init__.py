"""Whether the Jacobian tells a sick training run before the loss does: `python -m experiments health`."""
