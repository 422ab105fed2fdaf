"""Fixed points of a batch of maps, and their derivatives by the implicit function theorem."""
