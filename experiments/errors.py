"""The errors that a user of the studies can mend, printed as one line without a traceback."""

import errno
import sys
from argparse import ArgumentError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


class ExperimentError(Exception):
    """Something to change in the configuration, the data or the run folder; the message says what."""


def say(message: str) -> None:
    """Tell a user in one line, on the standard error: what was found damaged and mended, or why there is no result."""
    print(" ".join(message.split()), file=sys.stderr)


def without_traceback(error: Exception) -> str | None:
    """What to tell a user of an error that is not one of the code; None if it is."""
    if disk_is_full(error):
        return "the disk is full. Free some space, then give the same command again; `train` with --resume=true."
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename}: "
        what = f"{place}{error.strerror or error}"
        return f"{what}. Choose another folder with --folder=PATH." if error.errno in NOT_ALLOWED else what
    # A penalty that is not finite ends a training as an error of this kind.
    return str(error) if isinstance(error, (ArgumentError, ExperimentError, FloatingPointError)) else None


def disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is the reason, directly or at the beginning of a chain of errors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return True
        if "No space left on device" in str(error):  # HDF5 and TensorFlow have errors of their own
            return True
        error = error.__cause__ or error.__context__
    return False
