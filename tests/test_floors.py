"""The house: imports go down only, siblings are blind to each other, and heavy things stay in their
rooms.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "comigs"
FLOORS = [
    {"errors", "text", "seeds", "slots", "perplexity"},
    {"files", "processes", "connections"},
    {"csrc"},
    {"config"},
    {"data", "bases", "methods", "privacy"},
    {"experts"},
    {"runs", "client"},
    {"server", "personal"},
    {"engines"},
    {"federation", "experiments"},
    {"app"},
    {"__init__", "__main__"},  # the front door; opens what is below when it is asked for
]
PINNED = (
    "engines/flower/apps.py"  # the address that devices were given leads up to where the apps are
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ONLY = {  # a third-party module -> where it may be imported
    "transformers": ("bases/", "personal/"),
    "matplotlib": ("runs/report/plots.py", "experiments/compare/plots.py"),
    "dp_accounting": ("privacy/accountant.py",),
    "tensorboard": ("runs/track/trackers/tensorboard.py",),
    "mlflow": ("runs/track/trackers/mlflow.py",),
    "wandb": ("runs/track/trackers/wandb.py",),
    "flwr": ("federation/flower", "server/secure_sum/primitives.py"),
    "pandas": ("experiments/compare/",),
    "uvicorn": ("federation/security/", "personal/serve/", "connections.py"),
    "starlette": ("federation/security/", "personal/serve/"),
    "lm_eval": ("personal/tasks/",),
    "rouge_score": ("personal/tasks/",),
    "typer": ("app/cli",),
    "rich": ("app/console.py", "app/tables.py"),
}
NEVER = {  # a place -> what it must do without, so that it starts fast and reads files only
    "runs/report/": ("torch", "safetensors", "transformers"),
    "experiments/": ("torch", "safetensors", "transformers"),
    "data/": ("torch",),
    "config": ("torch", "numpy"),
    "errors.py": ("torch", "numpy"), "slots.py": ("torch", "numpy"), "seeds.py": ("torch",),
    "app/cli": ("torch",),
    "methods/": ("transformers", "safetensors"),
}  # fmt: skip
FILES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py"))


def imports_of(file):
    """Every module imported anywhere in a file: in functions, and only for types, too."""
    for node in ast.walk(ast.parse((SOURCE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            yield from (
                [f"comigs.{name}" for name in names] if node.module == "comigs" else [node.module]
            )


def room_of(path):
    return path.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_and_third_parties_stay_in_their_rooms(file):
    own = room_of(file)
    for name in imports_of(file):
        first, *rest = name.split(".")
        if first == "comigs" and rest:
            room = rest[0] if rest[0] in FLOOR else "__init__"
            assert room == own or FLOOR[room] < FLOOR[own] or file == PINNED, (
                f"{file} on floor {FLOOR[own]} imports {name} on floor {FLOOR[room]}"
            )
        assert file.startswith(ONLY.get(first, ("",))), (
            f"{file} imports {first}, which belongs in {ONLY[first]}"
        )
        for place, unwanted in NEVER.items():
            assert not (file.startswith(place) and first in unwanted), (
                f"{file} must do without {first}"
            )


def test_every_room_has_a_floor():
    assert {room_of(file) for file in FILES} <= FLOOR.keys()
