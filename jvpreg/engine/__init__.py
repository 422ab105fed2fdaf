"""The engine, which makes a frozen graph of a model."""
