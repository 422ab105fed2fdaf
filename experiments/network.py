"""Whether something answers over the network, in seconds and not in minutes."""

import threading
import urllib.error
import urllib.request

TIMEOUT = 5.0
"""Seconds."""


def failure(address: str) -> str | None:
    """Why nothing answers at a web address; None if something does, whatever it says."""
    found: list[str | None] = [f"no answer within {TIMEOUT:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(address, timeout=TIMEOUT).close()
            found[0] = None
        except urllib.error.HTTPError:
            found[0] = None  # an answer came over a connection
        except (OSError, ValueError) as error:
            found[0] = str(getattr(error, "reason", error))

    # In a thread, because the timeout does not hold for the look-up of the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return found[0]
