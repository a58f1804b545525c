"""A process that tokenises: `python -m llama1m_ext.data.worker`. Frames of pickle come in, frames go out, in order."""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
import traceback
from typing import IO, Any

_SIZE = struct.Struct("<Q")


def send(file: IO[bytes], content: Any) -> None:
    """One frame."""
    frame = pickle.dumps(content, protocol=5)
    file.write(_SIZE.pack(len(frame)))
    file.write(frame)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """One frame.

    Raises:
        EOFError: the other side is gone.
    """
    head = file.read(_SIZE.size)
    if len(head) < _SIZE.size:
        raise EOFError
    (size,) = _SIZE.unpack(head)
    frame = file.read(size)
    if len(frame) < size:
        raise EOFError
    return pickle.loads(frame)


def main() -> None:
    """Until the pipe closes: the one who made this process ended, or was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who made us
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a tokenizer prints must not get between the frames
    requests = sys.stdin.buffer
    try:
        encoder = receive(requests)
        while True:
            texts = receive(requests)
            try:
                reply = encoder(texts)
            except Exception:
                reply = traceback.format_exc()
            send(replies, reply)
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    main()
