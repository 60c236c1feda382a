"""Records as JSON and back: the lines of metrics.jsonl and timings.jsonl, and summary.json.

What is read may be of an earlier version, of a run that is writing it now, or damaged: a field that
is missing or of another type is named with its place in a UserError of one line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pydantic import ValidationError

from comigs.errors import UserError
from comigs.runs.metrics import (
    Absent,
    Evaluation,
    Event,
    Kept,
    LastDownload,
    Line,
    Note,
    Problem,
    RoundEnd,
    Step,
    Timing,
    Train,
    Warned,
)
from comigs.runs.record import Record
from comigs.runs.simulated import Attempt, Exchange

KINDS: dict[str, type[Event]] = {
    "train": Train, "evaluation": Evaluation, "kept": Kept, "download": LastDownload,
    "server": RoundEnd, "absent": Absent, "warning": Warned, "exchange": Exchange,
    "attempt": Attempt, "step": Step, "note": Note, "error": Problem,
}  # fmt: skip
WORDS = {  # what pydantic calls a type -> what people call it
    "int_type": "a whole number",
    "string_type": "a text",
    "string_pattern_mismatch": "a part of a model",
    "bool_type": "true or false",
    "list_type": "a list of numbers",
    "too_short": "a list of numbers",
    "dict_type": "an object",
    "model_type": "an object",
}
AnyRecord = TypeVar("AnyRecord", bound=Record)


def to_lines(records: Iterable[Record]) -> bytes:
    """Return records as a file has them, one a line. Equal records give equal bytes."""
    lines = (json.dumps(record.as_json(), allow_nan=False) + "\n" for record in records)
    return "".join(lines).encode()


def parse_json(text: bytes) -> Any:
    """Return what a JSON text says; NaN and infinity, which JSON has not, count as not measured.

    Raises JSONDecodeError where the text is no JSON, or more than Python's reader takes.
    """
    try:
        return json.loads(text.decode("utf-8"), parse_constant=lambda _: None, parse_float=_finite)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError:
        problem = "not UTF-8"
    except (ValueError, RecursionError):
        problem = "a number too long or lists too deep to be read"
    raise json.JSONDecodeError(problem, "", 0)


def _finite(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


def read_lines(raw: bytes, file: str) -> list[Line]:
    """Return the records of metrics.jsonl; lines of kinds that a later version wrote are left out.

    Raises UserError that names the file, the line and what is wrong with it.
    """
    events = [read_event(values, where) for where, values in _parsed(raw, file)]
    return [event for event in events if isinstance(event, Line)]


def read_timings(raw: bytes, file: str) -> list[Timing]:
    """Return the records of timings.jsonl. Raises UserError as `read_lines` does."""
    return [read_record(Timing, values, where) for where, values in _parsed(raw, file)]


def _parsed(raw: bytes, file: str) -> Iterator[tuple[str, Any]]:
    """Yield each line's place and what it says.

    A last line that is torn and has no line end is being written right now, and is left out.
    """
    lines = raw.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        where = f"{file}: line {number}"
        try:
            values = parse_json(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                return
            raise UserError(f"{where}: not JSON: {error.msg}") from None
        yield where, values


def read_event(values: Any, where: str) -> Event | None:
    """Return the record of one event's JSON, None where a later version wrote its kind.

    where: the place the event was read from, for the UserError that is raised where a field is
    missing or of another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object, found {_short(values)}")
    kind = values.get("kind")
    if not isinstance(kind, str):
        found = _short(kind) if "kind" in values else "nothing"
        raise UserError(f"{where}: kind: expected a text, found {found}")
    if kind not in KINDS:
        return None
    # A list of nothing but nulls says what a missing list says: nothing was measured.
    measured = {name: value for name, value in values.items() if not _is_of_nulls(value)}
    return read_record(KINDS[kind], measured, where)


def _is_of_nulls(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(each is None for each in value)


def read_record(record: type[AnyRecord], values: Any, where: str) -> AnyRecord:
    """Return a record of parsed JSON. Fields that this version does not know are left out.

    Raises UserError that names `where` and the field, what was expected and what was found.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object, found {_short(values)}")
    try:
        return record.model_validate(values, extra="ignore")
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    found = _short(problem["input"])
    if problem["type"] == "missing":
        # What is said of a null in its place tells what was expected there.
        problem["input"][problem["loc"][-1]], found = None, "nothing"
        try:
            record.model_validate(values, extra="ignore")
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
    expected = problem.get("ctx", {}).get("expected") or WORDS.get(problem["type"], "a number")
    field = ": ".join(map(str, problem["loc"]))
    raise UserError(f"{where}: {field}: expected {expected}, found {found}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
