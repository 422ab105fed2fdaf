"""Reads the size of a PNG file."""

import struct


def size(png: bytes) -> tuple[int, int]:
    """Width and height."""
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])
