"""A small transformer on sentences with negation, penalized by its token embeddings: `python -m experiments text`."""
