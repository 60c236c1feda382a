"""This module says how many bytes an answer of a device may have: a run knows it from the shapes of
what clients share, and the gateway, which knows nothing of runs, reads it here.
"""

from __future__ import annotations

from pathlib import Path

from comigs.federation.security.private_files import write_private

FILE = "answer-bytes"  # in the federation's folder


def largest_answer(federation: Path) -> int:
    """Return the bytes of the largest answer of any run so far, 0 before the first."""
    try:
        return int((federation / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return 0


def allow_answers(federation: Path, size: int) -> None:
    """Let devices send answers of so many bytes. Raises OSError."""
    if size > largest_answer(federation):
        write_private(federation / FILE, str(size))
