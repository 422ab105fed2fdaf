"""Zoos of small models: what keras-hub has, and what the tutorials of keras.io build; `verify --zoo` takes one."""
