"""The engine: a Keras model to a frozen graph, rule by rule, and the tangent pass over that graph."""
