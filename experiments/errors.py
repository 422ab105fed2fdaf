"""The errors that a user of the studies can mend, printed as one line without a traceback."""


class ExperimentError(Exception):
    """Something to change in the configuration, the data or the run folder; the message says what."""
