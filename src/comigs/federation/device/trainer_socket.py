"""This module is the local socket between a device's SuperNode and its resident trainer. It carries
bytes only: no pickle, no torch.

Both know a key, which the trainer draws anew whenever it starts and leaves in a file beside the
socket.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from comigs.errors import UserError
from comigs.files import write_whole, writing

LONGEST = 100  # bytes in a socket's path; the system's limit is 104 or 108
MOST = 1 << 33  # bytes of a message
LOST = (OSError, EOFError)  # the other end is gone


def key_beside(socket: Path) -> Path:
    """Return where the key of a socket is."""
    return socket.with_suffix(".key")


def ask(socket: Path, request: bytes) -> bytes:
    """Return the trainer's answer to a request, however long that takes. Raises OSError or EOFError
    where there is none.
    """
    key = key_beside(socket).read_bytes()
    with Client(str(socket), family="AF_UNIX", authkey=key) as connection:
        connection.send_bytes(request)
        return connection.recv_bytes(MOST)


def serve(
    socket: Path,
    key_path: Path,
    answer: Callable[[bytes], bytes],
    most: Callable[[], int] = lambda: MOST,
) -> None:
    """Answer one request after the other, for ever. most: bytes that one may have now; of a larger
    one nothing is read. Raises UserError where there can be no socket.
    """
    # This process is a device's from now on: whatever file it makes is for its owner only.
    os.umask(0o077)
    if len(str(socket).encode()) > LONGEST:
        raise UserError(
            f"{socket}: too long for a socket's path (at most {LONGEST} bytes); "
            "choose a shorter folder"
        )

    # The key is there before the socket is, so whoever finds the socket can speak.
    key = secrets.token_bytes(32)
    with writing(socket.parent, "choose another folder"):
        socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        socket.unlink(missing_ok=True)
        write_whole(key_path, lambda path: path.write_bytes(key))
        listener = Listener(str(socket), family="AF_UNIX", authkey=key)
    with listener:
        while True:
            try:
                connection = listener.accept()
            except (*LOST, AuthenticationError):
                continue  # whoever came has left, or has no key
            with connection:
                _answer_one(connection, answer, most())


def _answer_one(
    connection: Connection[bytes, bytes], answer: Callable[[bytes], bytes], most: int
) -> None:
    try:
        request = connection.recv_bytes(most)
    except LOST as lost:
        # The system's errors have a number; this one is of what the other end wants to send.
        if isinstance(lost, OSError) and lost.errno is None:
            print(
                f"the server sent more than the {most:,} bytes that are allowed (--max-memory)",
                flush=True,
            )
        return
    reply = answer(request)
    try:
        connection.send_bytes(reply)
    except LOST:
        return  # it was ended while we worked: what was done is kept, and said when asked again
