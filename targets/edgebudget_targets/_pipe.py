"""Messages between two processes: JSON and arrays, never anything that could run."""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edgebudget_runtime.errors import EdgeBudgetError

if TYPE_CHECKING:
    from edgebudget.workload import Array

_LENGTH = struct.Struct("<Q")
_PARENT_DIED = 1  # prctl's PR_SET_PDEATHSIG
Message = dict[str, Any]


def send(stream: IO[bytes], message: Message, arrays: Sequence[Array] = ()) -> None:
    """Write one message."""
    head = json.dumps({**message, "arrays": len(arrays)}).encode()
    stream.write(_LENGTH.pack(len(head)) + head)
    for array in arrays:
        body = io.BytesIO()
        np.save(body, np.ascontiguousarray(array), allow_pickle=False)
        stream.write(_LENGTH.pack(body.tell()) + body.getbuffer())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[Message, list[Array]]:
    """Read one message.

    Raises:
        EOFError: the other side is gone.
    """
    message: Message = json.loads(_block(stream))
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


def serve(answer: Callable[[Message, Sequence[Array]], tuple[Message, list[Array]]]) -> None:
    """Answer requests on the standard streams until they are closed; the process ends with it.

    What an engine prints goes to standard error.
    """
    if sys.platform == "linux":  # a killed compile must not leave an engine running
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the messages
    while True:
        try:
            request, arrays = receive(sys.stdin.buffer)
        except EOFError:
            break
        try:
            reply, results = answer(request, arrays)
            send(answers, {"ok": True, **reply}, results)
        except EdgeBudgetError as e:
            error = {"kind": type(e).__name__, "code": e.code, "what": e.what, "hint": e.hint}
            send(answers, {"ok": False, **error})
        except Exception as e:  # engines raise a dozen unrelated types
            send(answers, {"ok": False, "kind": "", "what": f"{type(e).__name__}: {e}"})
    sys.stderr.flush()
    os._exit(0)  # an engine's own clean-up at exit may crash
