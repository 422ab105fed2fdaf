"""The studies that show what the package does: `python -m experiments STUDY --config FILE`."""
