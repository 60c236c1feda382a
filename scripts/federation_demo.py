"""This script makes a federation of four clients on this machine: `make federation`.

    python scripts/federation_demo.py [FOLDER [CONFIG]]

It gives the commands that an operator and four owners would type. Everything goes into
runs/federation (or the folder given); what it starts, it ends.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "federation.toml"
COMIGS = Path(sys.executable).absolute().with_name("comigs")
TEXT = {
    "french": "debian-faq:fr",
    "german": "debian-faq:de",
    "italian": "debian-faq:it",
    "dutch": "debian-faq:nl",
}
PATIENCE = 180  # seconds for all to be online


def main() -> int:
    """Found, invite, serve, join and run; return the exit code of the run."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/federation")
    while folder.exists():  # runs/federation-2, ...
        stem, _, number = folder.name.rpartition("-")
        following = f"{stem}-{int(number) + 1}" if number.isdecimal() else f"{folder.name}-2"
        folder = folder.with_name(following)
    folder.mkdir(parents=True)
    config = Path(sys.argv[2]).absolute() if len(sys.argv) > 2 else CONFIG
    os.chdir(folder)
    print(f"$ cd {folder}", flush=True)
    port = os.environ.get("PORT", "8443")
    comigs("federation", "init", "server", "--port", port)
    for name in TEXT:
        comigs("federation", "invite", "server", name)
    with ExitStack() as started:
        wait_for("is open at", [begin(started, "server.out", "federation", "server", "server")])
        devices = []
        for name, text in TEXT.items():
            join = ["federation", "client", f"{name}.bundle.toml", "--text", text]
            own = ["--home", f"device-{name}", "--threads", "1"]
            devices.append(begin(started, f"{name}.out", *join, *own))
        wait_for("is online", devices)
        comigs("federation", "status", "server")
        engine = ["--engine", "flower", "--federation", "server"]
        code = comigs("run", os.path.relpath(config), *engine, "--out", "run", required=False)
    return code


def comigs(*words: str, required: bool = True) -> int:
    """Run a command in the foreground, and return its exit code."""
    print(f"$ {shlex.join(['comigs', *words])}", flush=True)
    code = subprocess.run([COMIGS, *words]).returncode
    if code and required:
        sys.exit(code)
    return code


def begin(started: ExitStack, out: str, *words: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a command that ends with `started`; return its process and the file of its output."""
    print(f"$ {shlex.join(['comigs', *words])} > {out} &", flush=True)
    file = started.enter_context(Path(out).open("wb"))  # noqa: SIM115  it is one
    process = subprocess.Popen([COMIGS, *words], stdout=file, stderr=file, start_new_session=True)
    started.callback(process.wait)
    started.callback(process.send_signal, signal.SIGTERM)
    return process, Path(out)


def wait_for(said: str, programs: list[tuple[subprocess.Popen[bytes], Path]]) -> None:
    """Wait until every program has said that; end where one does not."""
    end = time.monotonic() + PATIENCE
    for process, out in programs:
        while said not in out.read_text(encoding="utf-8"):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{out}: {out.read_text(encoding='utf-8').strip() or 'nothing said'}")
            time.sleep(0.2)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
