"""What can be counted of a page that is read once, top to bottom, by who has never seen it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "comigs"
FILES = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION, STAGES, TERNARIES = 300, 60, 15, 15
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def page(file):
    """Return the text of a file and its tree."""
    text = (SOURCE / file).read_text(encoding="utf-8")
    return text, ast.parse(text)


def below(node, kinds):
    """Return whether a node of these kinds is inside `node`."""
    return any(isinstance(child, kinds) for child in ast.walk(node) if child is not node)


def places(file, nodes):
    """Say where nodes are, for a failed test."""
    return [f"{file}:{node.lineno}" for node in nodes]


@pytest.mark.parametrize("file", FILES)
def test_no_comprehension_is_inside_another(file):
    _, tree = page(file)
    nested = [
        n for n in ast.walk(tree) if isinstance(n, COMPREHENSIONS) and below(n, COMPREHENSIONS)
    ]
    assert not places(file, nested)


@pytest.mark.parametrize("file", FILES)
def test_no_ternary_is_inside_an_f_string_or_a_comprehension(file):
    _, tree = page(file)
    around = (*COMPREHENSIONS, ast.JoinedStr)
    assert not places(
        file, [n for n in ast.walk(tree) if isinstance(n, around) and below(n, ast.IfExp)]
    )


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_are_short_and_long_functions_say_why_each_stage_is_there(file):
    text, tree = page(file)
    lines = text.splitlines()
    assert len(lines) <= MAX_FILE
    for function in (n for n in ast.walk(tree) if isinstance(n, FUNCTIONS)):
        body = function.body[1:] if ast.get_docstring(function) is not None else function.body
        if not body:
            continue
        length = function.end_lineno - body[0].lineno + 1
        assert length <= MAX_FUNCTION, f"{file}:{function.lineno} has {length} lines"
        own = lines[body[0].lineno - 2 : function.end_lineno]
        reasons = sum(line.strip().startswith("# ") for line in own)
        assert length <= STAGES or reasons, (
            f"{file}:{function.lineno} {function.name} says no reason"
        )


@pytest.mark.parametrize("file", FILES)
def test_docstrings_are_sentences(file):
    """Public things have one, whose first paragraph ends; a function's begins with a verb that says
    what it does, and so does not continue its name.
    """
    _, tree = page(file)
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, *FUNCTIONS))]
    for node in nodes:
        name, text = getattr(node, "name", file), ast.get_docstring(node)
        where = f"{file}:{getattr(node, 'lineno', 1)} {name}"
        assert text or name.startswith("_") or is_inner(node, tree), f"{where} says nothing"
        if not text:
            continue
        first = text.split("\n\n")[0].split()
        assert first[-1][-1] in ".:?", f"{where}: its first paragraph does not end"
        if isinstance(node, FUNCTIONS) and not is_property(node):
            assert first[0].rstrip(",") in VERBS, f"{where}: {first[0]} is no verb of VERBS"


def is_property(node):
    """Return whether a function is read as an attribute, and so is a thing and no deed."""
    names = [getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list]
    return any(name in ("property", "cached_property") for name in names)


def is_inner(node, tree):
    """Return whether a node is inside a function, or a method whose contract is elsewhere."""
    inside = (
        c for f in ast.walk(tree) if isinstance(f, FUNCTIONS) for c in ast.walk(f) if c is not f
    )
    return node in inside or getattr(node, "name", "") in ("forward", "backward", "__init__")


def test_ternaries_are_few():
    """Over the whole package, per 1,000 lines."""
    pages = [page(file) for file in FILES]
    lines = sum(text.count("\n") for text, _ in pages)
    ternaries = sum(isinstance(n, ast.IfExp) for _, tree in pages for n in ast.walk(tree))
    assert 1000 * ternaries / lines <= TERNARIES, f"{ternaries} in {lines} lines"


VERBS = frozenset(
    """
    Accept Add Agree Allow Answer Append Apply Ask Attach Average Be Begin Bind Bound Build Call
    Carry Check Choose Clear Close Collect Combine Commit Compare Compile Compute Connect
    Continue Convert Copy Count Create Cut Decide Decode Delete Deliver Describe Detach Discount
    Divide Do Drain Draw Drop Encode End Ensure Enter Estimate Evaluate Exchange Expect Explain
    Export Fill Find Finish Fit Fold Follow Forget Format Forward Found Gather Generate Get Give
    Go Group Guard Guess Handle Hash Hold Import Initialize Interrupt Invite Join Judge Keep
    Label Lay Leave Let List Listen Load Lock Look Make Map Mark Match Mean Measure Merge Mix
    Move Multiply Name Note Open Pack Pad Parse Pause Pick Place Plan Plot Point Poll Prepare
    Print Probe Project Prune Pull Push Put Queue Raise Rank Read Rebuild Receive Record Refuse
    Register Release Remove Render Repeat Replace Report Require Reset Resolve Restore Resume
    Return Revoke Rewind Round Route Run Sample Save Say Scale Scan See Select Send Serve Set
    Share Show Shut Sign Skip Sort Split Stage Stand Start State Stop Store Stream Submit Sum
    Summarize Take Talk Tell Test Time Tokenize Train Translate Truncate Try Turn Unpack
    Unregister Update Use Validate Wait Walk Warn Watch Weigh Wrap Write Yield
    """.split()  # noqa: SIM905
)
