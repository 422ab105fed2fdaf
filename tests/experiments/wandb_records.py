"""Read the file of an offline W&B run, for which W&B has no reader in Python."""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, CHUNK_HEADER, FILE_HEADER = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path) -> list[Record]:
    """All records of a `.wandb` file: a log of chunks in blocks, each record whole or in several chunks."""
    content, found, parts = file.read_bytes(), [], b""
    position = FILE_HEADER
    while position + CHUNK_HEADER <= len(content):
        if BLOCK - position % BLOCK < CHUNK_HEADER:  # the rest of a block is too short for a header
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if position + CHUNK_HEADER + length > len(content):  # W&B is still writing it
            break
        parts += content[position + CHUNK_HEADER : position + CHUNK_HEADER + length]
        position += CHUNK_HEADER + length
        if kind in (FULL, LAST):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(folder: Path) -> list[dict[str, Any]]:
    """The logged rows of the offline run in a `wandb/` folder, whose parts are named by their time."""
    rows = []
    for record in (record for file in sorted(folder.glob("offline-run-*/*.wandb")) for record in records(file)):
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows
