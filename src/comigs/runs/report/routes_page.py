"""The page of `comigs routes`. It holds a client's text, so it is for its owner's eyes only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comigs.errors import UserError
from comigs.runs.report.page import OWN_EYES, put_page, render, require_own_page
from comigs.runs.report.routes_part import block_rules, parts_of
from comigs.runs.routes import Routes


def require_page(out: Path) -> None:
    """Refuse a place where no page can be, or where something else is. Raises UserError."""
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out}: no file can be there; choose another file with --out")
    require_own_page(out, "routes")


def write_routes(found: Sequence[Routes], out: Path) -> None:
    """Write a page of these routes. Raises UserError."""
    text = render("routes.html.j2", parts=parts_of(found), rules=block_rules(found))
    put_page(out, text, "routes", OWN_EYES)
