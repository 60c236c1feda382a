"""CoMiGS lets devices with private text fine-tune one language model together.

Each device ends with a model of its own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comigs.app.api import open_personal_model, prepare, resume, run
    from comigs.app.export import export
    from comigs.app.routes import routes
    from comigs.config import Config, load_config
    from comigs.errors import UserError

if sys.platform == "win32":
    raise ImportError("comigs runs on Linux and macOS; on Windows use it in WSL")

__version__ = "0.1.0"
__all__ = [
    "Config", "UserError", "export", "load_config", "open_personal_model", "prepare", "resume",
    "routes", "run",
]  # fmt: skip

_ELSEWHERE = {
    "Config": "comigs.config",
    "load_config": "comigs.config",
    "UserError": "comigs.errors",
    "export": "comigs.app.export",
    "routes": "comigs.app.routes",
}


def __getattr__(name: str) -> Any:
    """Import torch only when something is run: `comigs --help` must not wait for it."""
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "comigs.app.api")), name)
    raise AttributeError(f"module 'comigs' has no attribute '{name}'")
