"""Messages between two processes: JSON and arrays, never anything that could run."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgebudget.workload import Array

_LENGTH = struct.Struct("<Q")


def send(stream: IO[bytes], message: dict[str, Any], arrays: Sequence[Array] = ()) -> None:
    """Write one message."""
    head = json.dumps({**message, "arrays": len(arrays)}).encode()
    stream.write(_LENGTH.pack(len(head)) + head)
    for array in arrays:
        body = io.BytesIO()
        np.save(body, np.ascontiguousarray(array), allow_pickle=False)
        stream.write(_LENGTH.pack(body.tell()) + body.getbuffer())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[Array]]:
    """Read one message.

    Raises:
        EOFError: the other side is gone.
    """
    message: dict[str, Any] = json.loads(_block(stream))
    arrays = [
        np.load(io.BytesIO(_block(stream)), allow_pickle=False)
        for _ in range(message.pop("arrays"))
    ]
    return message, arrays


def _block(stream: IO[bytes]) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    return _exactly(stream, length)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    found = stream.read(count)
    if len(found) != count:
        raise EOFError("the other process ended in the middle of a message")
    return found
