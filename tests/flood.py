"""A harmless load on a gateway of this machine: connections that send more than they should."""

from __future__ import annotations

import asyncio
import ssl
import threading
from base64 import b64encode
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec

PIECE = bytes(range(256)) * 256  # 64 KiB


def signed(key):
    """The headers by which a device proves its (OpenSSH) key, as Flower makes them."""
    private = s.load_ssh_private_key(key.encode(), password=None)
    now = datetime.now(UTC).isoformat()
    signature = private.sign(now.encode(), ec.ECDSA(hashes.SHA256()))
    public = private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    return {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-timestamp": now,
        "flwr-signature": b64encode(signature).decode(),
    }


class Flood(threading.Thread):
    """Connections that post bodies, each again and again until the end.

    key: what they sign with; None: they do not. size: bytes of a body; 0: they say nothing at all.
    pause: seconds between pieces of 64 KiB. chunked: they say no length. statuses: what was
    answered, counted.
    """

    def __init__(self, port, authority, connections, **how):
        super().__init__(daemon=True)
        self.port, self.connections, self.how = port, connections, how
        self.context = ssl.create_default_context(cafile=authority)
        self.over, self.statuses, self.sent = threading.Event(), {}, 0

    def run(self):
        asyncio.run(self.all())

    async def all(self):
        tasks = [asyncio.create_task(self.again()) for _ in range(self.connections)]
        while not self.over.is_set():
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def again(self):
        while True:
            status = "lost"
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, ssl.SSLError):
                status = await self.post(**self.how)
            self.statuses[status] = self.statuses.get(status, 0) + 1
            await asyncio.sleep(2)

    async def post(self, size, key=None, pause=0.0, chunked=False):
        """Post one body; return the status of the answer, which may come before all is sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context)
        try:
            if not size:
                await reader.read()
                return "closed"
            length = {"transfer-encoding": "chunked"} if chunked else {"content-length": str(size)}
            headers = {"host": "here", "content-type": "application/protobuf", **length}
            headers |= signed(key) if key else {}
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            writer.write(f"POST /v1/fleet/push-object HTTP/1.1\r\n{head}\r\n".encode())
            answer = asyncio.create_task(reader.readline())
            left = size
            while left > 0 and not answer.done():
                piece = PIECE[:left]
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                await writer.drain()
                left -= len(piece)
                self.sent += len(piece)
                await asyncio.sleep(pause)
            if chunked:
                writer.write(b"0\r\n\r\n")
            line = await answer
            return int(line.split()[1]) if line else "lost"
        finally:
            writer.transport.abort()

    def end(self):
        self.over.set()
        self.join()


def memory(pid):
    """Resident bytes of a process now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


class Memory(threading.Thread):
    """Looks at the resident memory of processes ten times a second; `peak` has the most of each."""

    def __init__(self, **pids):
        super().__init__(daemon=True)
        self.pids, self.peak, self.over = pids, dict.fromkeys(pids, 0), threading.Event()

    def run(self):
        while not self.over.wait(0.1):
            for name, pid in self.pids.items():
                with suppress(OSError):
                    self.peak[name] = max(self.peak[name], memory(pid))

    def end(self):
        self.over.set()
        self.join()
