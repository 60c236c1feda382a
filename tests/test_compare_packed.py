"""Runs in packed form are compared as their folders are, and done for a sweep; what is wrong with a
file is one line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import pytest

from comigs.experiments.compare.compared import compare_runs
from comigs.experiments.compare.write import FILES
from comigs.experiments.csv_file import from_csv, to_csv
from comigs.experiments.packed import PACKED, read_packed
from comigs.experiments.run_data import read_run_folder
from comigs.text import NONE
from tests.compared_runs import change, measured, three_methods
from tests.runs import comigs, files, finished, refused, write_config

RESULTS = Path(__file__).parent.parent / "results"

SWEEP = 'name = "three"\nbaseline = "local"\nseeds = [42, 43, 44]\n[axes.method]\n'
METHODS = ("comigs", "fedavg", "local")


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of three methods and three seeds, with what a run may have to say."""
    monkeypatch.chdir(tmp_path)
    folder = three_methods(Path("runs"))
    lines = "".join(f'{name} = {{ method = "{name}", config = "c.toml" }}\n' for name in METHODS)
    (folder / "sweep.toml").write_text(SWEEP + lines)
    change(folder / "local/seed-43", "env.json", commit="f" * 40, versions={"torch": "2.9"})
    change(folder / "local/seed-43", "summary.json", weights="-by tokens")
    return folder


def without_folders(folder: Path) -> None:
    for name in METHODS:
        shutil.rmtree(folder / name)


def compared(capsys, folder: Path, out: str) -> tuple[str, dict[str, bytes]]:
    done = comigs(capsys, "compare", folder, "--out", out)
    assert (done.code, done.err) == (0, "")
    return done.out.replace(out, "OUT"), files(Path(out))


def test_packed_runs_compare_as_their_folders_do(sweep: Path, capsys) -> None:
    before = files(sweep)
    said, expected = compared(capsys, sweep, "folders")
    done = comigs(capsys, "compare", sweep, "--pack")
    assert (done.code, done.out) == (0, "packed: runs, 9 runs; run folders stay as they are\n")
    after = files(sweep)
    assert {name: after.pop(name) for name in PACKED} and after == before
    assert compared(capsys, sweep, "both") == (said, expected)
    without_folders(sweep)
    assert compared(capsys, sweep, "packed") == (said, expected)
    assert expected.keys() == set(FILES) - {"by-hours.svg", "by-hours.pdf"}


def test_a_part_of_packed_runs_is_found_where_it_was(sweep: Path, capsys) -> None:
    given = [sweep / "local", sweep / "fedavg/seed-42"]
    (_, expected), *_ = compare_runs(given).tables(brief=True)
    comigs(capsys, "compare", sweep, "--pack")
    without_folders(sweep)
    (_, table), *_ = compare_runs(given).tables(brief=True)
    assert table == expected
    assert comigs(capsys, "compare", sweep / "local").code == 0
    assert (sweep / "local/compare/compare.html").exists()
    assert "nowhere: no such folder" in refused(capsys, "compare", sweep / "nowhere")


def test_packed_runs_say_what_the_runs_said(sweep: Path, capsys) -> None:
    folder = sweep / "local/seed-42"
    lines = [
        {"kind": "warning", "round": 1, "client": "ann", "sign": "a", "message": "b"},
        {"kind": "warning", "round": 1, "client": "ann", "sign": "c", "message": "d"},
        {"kind": "absent", "round": 2, "client": "bob", "reason": "=late"},
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    run = read_run_folder(folder)
    comigs(capsys, "compare", sweep, "--pack")
    (back,) = (r for r in read_packed(sweep) if r.folder == folder)
    assert (back.config, back.last_round, back.finished) == (run.config, 2, True)
    assert back.environment == {k: v for k, v in run.environment.items() if k != "command"}
    for rows, others in ((run.clients, back.clients), (run.rounds, back.rounds)):
        assert [{k: row[k] for k in own} for own, row in zip(rows, others, strict=True)] == [*rows]
    said = [
        row["warning"] or row["absent"] for row in back.rounds if row["warning"] or row["absent"]
    ]
    assert said == ["a: b; c: d", "=late"]


def test_a_run_of_its_own_is_packed_beside_its_files(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = measured(Path("mine"), {"ann": 5.0, "bob": 5.4})
    said, expected = compared(capsys, folder, "folders")
    comigs(capsys, "compare", folder, "--pack")
    for path in [p for p in folder.iterdir() if p.name not in PACKED]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert compared(capsys, folder, "packed") == (said, expected)


def test_a_run_of_the_product_is_packed_and_compared(tmp_path: Path, capsys) -> None:
    assert comigs(capsys, "compare", finished() / "run", "--pack", "--out", tmp_path).code == 0
    assert comigs(capsys, "compare", tmp_path, "--out", tmp_path / "out").code == 0


def test_nothing_is_overwritten_and_new_runs_are_packed_with_packed_ones(
    sweep: Path, capsys
) -> None:
    comigs(capsys, "compare", sweep, "--pack")
    without_folders(sweep)
    measured(sweep / "local/seed-45", {"ann": 5.0, "bob": 5.4}, 45, method="local")
    before = files(Path())
    assert "runs/runs.csv: exists already; nothing was changed" in refused(
        capsys, "compare", sweep, "--pack"
    )
    assert files(Path()) == before
    (title, expected), *_ = compare_runs([sweep]).tables(brief=True)
    done = comigs(capsys, "compare", sweep, "--pack", "--out", "deeper/all")
    assert "packed: deeper/all, 10 runs" in done.out
    (again, table), *_ = compare_runs([Path("deeper/all")]).tables(brief=True)
    assert (again, table) == (title, expected)
    assert 'config = "../../runs/c.toml"' in Path("deeper/all/sweep.toml").read_text()


def asked(folder: Path, personal: dict[str, float], base: float, items: int = 8, **how) -> None:
    """Give a run what its models got right of a task."""
    clients = {}
    for name, mean in personal.items():
        right = {"items": items, "base": {"mean": base}, "personal": {"mean": mean, "error": 0.125}}
        result = {"by": "=lm_eval", "round": 2, "settings": {}, "measures": {"acc": right}, **how}
        clients[name] = {"quiz": result}
    (folder / "tasks.json").write_text(json.dumps({"clients": clients}))


def test_what_models_got_right_is_compared_and_packed(sweep: Path, capsys) -> None:
    asked(sweep / "local/seed-42", {"ann": 0.25, "bob": 0.75}, 0.25)
    asked(sweep / "local/seed-43", {"ann": 0.5, "bob": 0.75}, 0.5)
    asked(sweep / "local/seed-44", {"ann": 0.125}, 0.0)  # bob was not asked: no mean over clients
    asked(sweep / "comigs/seed-42", {"ann": 1.0, "bob": 0.5}, 0.25)
    tables = dict(compare_runs([sweep]).tables())
    (table,) = (table for name, table in tables.items() if name.endswith(": tasks"))
    sd = stdev([0.5, 0.625])
    assert table.headers == ("setting", "quiz: acc")
    said = {row[0]: row[1] for row in table.rows}
    assert said["local"] == f"{0.5625:.3f} ± {sd:.3f}"
    assert float(said["comigs"]) == 0.75 and said["fedavg"] == NONE
    assert table.last is not None and float(table.last[1]) == round(1 / 3, 3)  # of the three runs

    whole, expected = compared(capsys, sweep, "folders")
    assert b"<h3>Tasks</h3>" in expected["compare.html"]
    comigs(capsys, "compare", sweep, "--pack")
    without_folders(sweep)
    assert compared(capsys, sweep, "packed") == (whole, expected)
    edited(sweep / "tasks.csv", cell("personal", "high"))
    assert "tasks.csv: line 3: column personal" in refused(capsys, "compare", sweep)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"settings": {"limit": 1, "max_new_tokens": 2}}, "limit = 1, max_new_tokens = 2, 8 items"),
        ({"by": "lm_eval 0.5"}, "by lm_eval 0.5, 8 items"),
        ({"round": 1}, "by =lm_eval, after round 1, 8 items"),
        ({"items": 1}, "by =lm_eval, 1 item;"),
    ],
)
def test_what_was_measured_otherwise_is_not_averaged(sweep: Path, capsys, how, says) -> None:
    asked(sweep / "local/seed-42", {"ann": 0.25, "bob": 0.75}, 0.25)
    asked(sweep / "local/seed-43", {"ann": 1.0, "bob": 1.0}, 1.0, **how)
    asked(sweep / "comigs/seed-42", {"ann": 0.5, "bob": 0.5}, 0.25)
    for source in ("folders", "packed"):
        found = compare_runs([sweep])
        tables = found.tables()
        (table,) = (table for name, table in tables if name.endswith(": tasks"))
        said = {row[0]: row[1] for row in table.rows}
        assert float(said["local"]) == 0.5 and float(table.last[1]) == 0.25, source
        (note,) = (line for line in found.notes if "left out" in line)
        assert "quiz: left out: local seed 43, asked by" in note and says in note
        assert note.endswith("the others by =lm_eval, 8 items")
        if source == "folders":
            comigs(capsys, "compare", sweep, "--pack")
            without_folders(sweep)


def test_questions_to_choose_from_may_differ_with_the_seed_and_errors_say_that_less_is_better(
    sweep: Path,
) -> None:
    for seed, items in ((42, 8), (43, 7)):
        folder = sweep / f"local/seed-{seed}"
        asked(folder, {"ann": 0.25, "bob": 0.75}, 0.25, items, by="comigs")
        text = (folder / "tasks.json").read_text()
        less = text.replace('"items"', '"lower_is_better": true, "items"')
        (folder / "tasks.json").write_text(less)
    found = compare_runs([sweep])
    (table,) = (table for name, table in found.tables() if name.endswith(": tasks"))
    assert table.headers == ("setting", "quiz: acc (lower is better)")
    assert {row[0]: row[1] for row in table.rows}["local"] == "0.5000 ± 0.0000"
    assert not any("left out" in line for line in found.notes)


def test_packed_tasks_of_before_are_read(sweep: Path, capsys) -> None:
    """Files whose tasks do not say how they were asked."""
    asked(sweep / "local/seed-42", {"ann": 0.25, "bob": 0.75}, 0.25)
    comigs(capsys, "compare", sweep, "--pack")
    without_folders(sweep)
    lines = (sweep / "tasks.csv").read_text().splitlines()
    assert lines[0].endswith(",difference_error,lower_is_better,settings")
    old = "".join(",".join(line.split(",")[:-3]) + "\n" for line in lines)
    (sweep / "tasks.csv").write_text(old)
    (table,) = (t for name, t in compare_runs([sweep]).tables() if name.endswith(": tasks"))
    assert float({row[0]: row[1] for row in table.rows}["local"]) == 0.5


def test_a_run_that_is_not_finished_is_not_packed(sweep: Path, capsys) -> None:
    measured(sweep / "local/seed-45", {"ann": 5.0, "bob": 5.4}, 45, method="local", done=1)
    said = refused(capsys, "compare", sweep, "--pack")
    assert "seed-45: not finished; go on with: comigs resume" in said
    assert not (sweep / "runs.csv").exists()


def test_what_a_spreadsheet_saves_is_read(sweep: Path, capsys) -> None:
    comigs(capsys, "compare", sweep, "--pack")
    without_folders(sweep)
    expected = compare_runs([sweep]).tables()
    text = (sweep / "runs.csv").read_text().replace("\n", "\r\n")
    (sweep / "runs.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert compare_runs([sweep]).tables() == expected


# For a sweep


def test_a_sweep_takes_packed_runs_for_done(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    assert comigs(capsys, "run", "tiny.toml", "--quiet", "--out", "runs/main/a/seed-42").code == 0
    Path("main.toml").write_text('config = "tiny.toml"\n[axes.method]\na = { method = "comigs" }\n')
    said = comigs(capsys, "sweep", "main.toml", "--dry-run").out
    assert "1 run in runs/main: 1 done" in said and "perplexity" in said
    comigs(capsys, "compare", "runs/main", "--pack")
    shutil.rmtree("runs/main/a")
    assert comigs(capsys, "sweep", "main.toml", "--dry-run").out == said
    done = comigs(capsys, "sweep", "main.toml")
    assert done.code == 0 and not Path("runs/main/a").exists()
    with Path("main.toml").open("a") as file:
        file.write("[set]\nrounds = 9\n")
    assert "a run with another config is there: rounds is 2 in it and 9 in this sweep" in refused(
        capsys, "sweep", "main.toml"
    )


# What is wrong with a file


def edited(path: Path, change_) -> None:
    """Give the text of a packed file to a function, and write what comes back."""
    packed = path.suffix == ".gz"
    text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()
    data = change_(text).encode()
    path.write_bytes(gzip.compress(data) if packed else data)


def cell(column: str, value: str, row: int = 1):
    """A change of one cell."""

    def changed(text: str) -> str:
        rows = list(csv.DictReader(io.StringIO(text)))
        rows[row][column] = value
        return to_csv(rows)

    return changed


def left_out(column: str):
    """A change that leaves a column out."""

    def changed(text: str) -> str:
        rows = list(csv.DictReader(io.StringIO(text)))
        return to_csv({k: v for k, v in row.items() if k != column} for row in rows)

    return changed


@pytest.mark.parametrize(
    ("file", "change_", "said"),
    [
        ("runs.csv", left_out("test_perplexity"), "column test_perplexity: missing"),
        ("runs.csv", left_out("run"), "column run: missing"),
        ("rounds.csv.gz", left_out("valid_perplexity"), "column valid_perplexity: missing"),
        (
            "runs.csv",
            cell("test_perplexity", "many"),
            'line 3: column test_perplexity: "many" is no number',
        ),
        (
            "runs.csv",
            cell("test_perplexity", "nan"),
            'line 3: column test_perplexity: "nan" is no number',
        ),
        (
            "runs.csv",
            cell("uploaded_bytes", "1.5"),
            'column uploaded_bytes: "1.5" is no whole number',
        ),
        (
            "runs.csv",
            cell("uploaded_bytes", ""),
            "line 3: column uploaded_bytes: empty; must be a whole number",
        ),
        ("runs.csv", cell("client", "eve"), "clients: ann, eve; the run's config has ann, bob"),
        (
            "runs.csv",
            cell("config", "99", 0),
            "line 2: column config: 99; environment.json has 1 to 9",
        ),
        ("runs.csv", cell("seed", "7"), "line 3: column seed: 7; the first line of the run has 42"),
        (
            "runs.csv",
            lambda text: text + "1,2\n",
            "line 20: column config: empty; must be a whole number",
        ),
        ("runs.csv", lambda text: text + "," * 99 + "\n", "more cells than the first line names"),
        ("runs.csv", lambda text: text + '"', "not CSV: unexpected end of data"),
        ("runs.csv", lambda text: "", "column run: missing"),
        (
            "rounds.csv.gz",
            cell("round", "first"),
            'line 3: column round: "first" is no whole number',
        ),
        ("rounds.csv.gz", cell("run", "other"), "column run: other is not in runs.csv"),
        ("environment.json", lambda text: text[:-9], "not JSON"),
        ("environment.json", lambda text: "[]", "damaged: no list of configs and environments"),
        ("environment.json", lambda text: "[" * 9999, "damaged: lists or objects are nested too"),
        ("environment.json", lambda text: text.replace('"method"', '"methd"'), "configs: 1: methd"),
    ],
)
def test_a_damaged_packed_file_is_named(sweep: Path, capsys, file: str, change_, said: str) -> None:
    comigs(capsys, "compare", sweep, "--pack")
    without_folders(sweep)
    edited(sweep / file, change_)
    line = refused(capsys, "compare", sweep)
    assert line.startswith(f"error: runs/{file}: ") and said in line


@pytest.mark.parametrize("keep", [0, 5, 40, -4])
def test_a_damaged_gz_is_named(sweep: Path, capsys, keep: int) -> None:
    comigs(capsys, "compare", sweep, "--pack")
    without_folders(sweep)
    path = sweep / "rounds.csv.gz"
    path.write_bytes(path.read_bytes()[:keep] + b"\0" * 9)
    assert "error: runs/rounds.csv.gz: " in refused(capsys, "compare", sweep)


def test_a_missing_packed_file_is_named(sweep: Path, capsys) -> None:
    comigs(capsys, "compare", sweep, "--pack")
    without_folders(sweep)
    (sweep / "rounds.csv.gz").unlink()
    assert "runs/rounds.csv.gz: cannot be read" in refused(capsys, "compare", sweep)


# CSV


@pytest.mark.parametrize(
    ("value", "cell_"),
    [
        ("=1+1", "'=1+1"),
        ("+a", "'+a"),
        ("-a", "'-a"),
        ("@a", "'@a"),
        ("'a", "''a"),
        ("\ta", "'\ta"),
        ("a=b", "a=b"),
        ("-", "-"),
        ("-1.5", "-1.5"),
        ("a", "a"),
        ("x'y", "x'y"),
    ],
)
def test_no_spreadsheet_runs_what_is_in_a_cell(value: str, cell_: str) -> None:
    text = to_csv([{"a": value, "b": -0.5}])
    assert next(iter(csv.DictReader(io.StringIO(text))))["a"] == cell_
    assert from_csv(Path("x"), text, {"a": str, "b": float}, ()) == [{"a": value, "b": -0.5}]


def test_names_are_safe_in_the_csv_of_a_comparison(tmp_path: Path, capsys) -> None:
    for number in (1, 2):
        folder = measured(tmp_path / str(number), {"ann": 5.0}, name="=HYPERLINK(1)")
        change(folder, "env.json", base_fingerprint=str(number))
    comigs(capsys, "compare", tmp_path, "--out", tmp_path / "out")
    for name in ("table.csv", "runs.csv"):
        text = (tmp_path / "out" / name).read_text()
        assert "'=HYPERLINK(1)" in text and "\n=" not in text and ",=" not in text


# pandas


def test_without_pandas_one_line_says_what_to_install(sweep: Path, capsys, monkeypatch) -> None:
    for name in [n for n in sys.modules if n.startswith("comigs.experiments.compare")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pandas", None)
    said = refused(capsys, "compare", sweep)
    assert said == "error: comigs compare needs pandas: pip install 'comigs[compare]'"
    assert comigs(capsys, "compare", sweep, "--pack").code == 0


def test_pandas_is_imported_for_comparing_only() -> None:
    code = (
        "import sys, comigs.app.cli, comigs.experiments.sweep.run\n"
        "import comigs.experiments.compare.pack\n"
        "assert 'pandas' not in sys.modules and 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/rounds.csv.gz")))
def test_every_committed_result_is_read_whatever_columns_came_later(folder):
    runs = read_packed(folder)
    assert runs and all(run.clients and run.rounds for run in runs)
