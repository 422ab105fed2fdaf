"""Which saliency map finds the pixels that a model goes by: `python -m experiments saliency`."""
