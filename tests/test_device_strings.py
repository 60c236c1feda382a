"""No text that a device makes up reaches the operator: not the terminal, not a log, no file of the
run. Every string of an answer is tried, wherever it is.
"""

from __future__ import annotations

import json
import os
import sys
from unittest.mock import patch

import torch
from safetensors.torch import save

from comigs.app.console import Console
from comigs.federation.flower.engine import Flower
from comigs.federation.messages import ANSWERS, REQUESTS, Refusal
from comigs.federation.supervisor import LINE, Supervisor, problem
from comigs.runs.json_lines import read_event
from comigs.server import wire
from comigs.server.validation import check_lines
from comigs.server.wire import WireError
from comigs.text import CONTROL, brief
from tests.conftest import run_config
from tests.local_grid import Federation, TestTrainer, events
from tests.test_flower_engine import ROOM, absent, configured

OWNED = "owned-by-ada"
BAD = f"\x1b]0;{OWNED}\x07\r\n=<script>{OWNED}</script>\u202e" + "A" * 5000


def places(tree, path=()):
    """The path of every string in a JSON tree, and of every key."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key), "key"
            yield from places(value, (*path, key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from places(value, (*path, number))
    elif isinstance(tree, str):
        yield path, "value"


def spoiled(tree, path, what):
    """A copy of the tree with BAD in that place."""
    copy = json.loads(json.dumps(tree))
    at = copy
    for step in path[:-1]:
        at = at[step]
    if what == "value":
        at[path[-1]] = BAD
    else:
        at[BAD] = at.pop(path[-1])
    return copy


def header_of(raw):
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def with_header(raw, header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + int.from_bytes(raw[:8], "little") :]


def lies_about(raw):
    """Every lie that is one string of an answer changed: those of its head, and its tensors'."""
    header = header_of(raw)
    head = json.loads(header["__metadata__"][wire.HEAD])
    for path, what in places(head):
        told = {wire.HEAD: json.dumps(spoiled(head, path, what))}
        yield with_header(raw, header | {"__metadata__": told})
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    rest = {"__metadata__": header["__metadata__"]}
    for path, what in list(places(tensors))[:4]:  # all tensors are read alike
        yield with_header(raw, rest | spoiled(tensors, path, what))
    yield with_header(raw, header | {"__metadata__": {BAD: BAD}})


def many_dimensions(raw):
    """A tensor whose shape alone would fill a page."""
    _, tensors = wire.unpack(raw, ANSWERS, ROOM)
    name = next(iter(tensors))
    tensors[name] = torch.zeros([1] * 3000)
    return save(tensors, header_of(raw)["__metadata__"])


class Liar(TestTrainer):
    """ada tells the longest lie in the last round."""

    def answer(self, raw):
        request, _ = wire.unpack(raw, REQUESTS, ROOM)
        honest = super().answer(raw)
        if self.device.name == "ada" and request.round == 3:
            return many_dimensions(honest)
        return honest


def test_no_string_of_an_answer_reaches_the_operator(tmp_path, capsys):
    """Each lie is told to the engine in the second round, which is answered honestly in the end."""
    run_config(tmp_path / "text", "ada bob")
    federation = Federation(tmp_path / "federation", ("ada", "bob"), tmp_path / "text", Liar)
    config = configured(federation, rounds=3, client={"steps": 1, "router_steps": 0})
    reply, reasons = Flower._reply, []

    def lied_to(engine, name, round, raw, size):
        if name == "ada" and round == 2:
            refusal = wire.pack(Refusal(code="failed", comigs="1.0", error="OSError"))
            for lie in (*lies_about(raw), *lies_about(refusal)):
                try:
                    reasons.append(check_lines(reply(engine, name, round, lie, size), name))
                except WireError as error:
                    reasons.append(str(error))
        return reply(engine, name, round, raw, size)

    with patch.object(Flower, "_reply", lied_to):
        federation.run(tmp_path / "run", config)
    last = [reason for round, _, reason in absent(tmp_path / "run") if round == 3]
    assert len(reasons) > 50 and None not in reasons and len(last[0]) == 300
    for reason in (*reasons, *last):
        assert len(reason) <= 300 and not CONTROL.search(reason) and OWNED not in reason, reason

    console = Console(config)
    for event in events(tmp_path / "run"):
        console.report(read_event(event, "progress"))
    shown = capsys.readouterr().out
    assert last[0] in shown and not CONTROL.search(shown)
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or OWNED.encode() not in file.read_bytes(), file


def test_what_a_server_program_prints_is_text_in_log_and_terminal(tmp_path):
    code = f"print({BAD!r}); import sys; sys.exit(3)"
    (tmp_path / "program.py").write_text(f"def main():\n    {code}\n")
    heard, environment = (
        [],
        {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    with Supervisor(tmp_path / "log", environment, tmp_path) as programs:
        programs.start("program", ["program:main"], heard.append)
        gone = programs.ended(60)
    lines = [*heard, *(tmp_path / "log" / "program.log").read_text().splitlines()]
    assert len(lines) == 4 and OWNED in "".join(lines)
    for line in (*lines, str(problem(gone))):
        assert len(line) < LINE + 200 and not CONTROL.search(line), line


def test_brief_is_one_line_of_at_most_so_many_characters():
    assert brief("as it is") == "as it is"
    assert brief("a\nb\x1b" + "c" * 400, 10) == "a b\N{REPLACEMENT CHARACTER}ccc..."
    assert len(brief("c" * 300)) == 300 and len(brief("c" * 301)) == 300
