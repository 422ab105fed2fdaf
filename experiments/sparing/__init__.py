"""Does a penalty that is computed less often do the same: `python -m experiments sparing`."""
