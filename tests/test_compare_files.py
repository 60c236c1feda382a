"""What `comigs compare` prints and writes: whole, offline, escaped, deterministic, and nobody
else's files touched.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from comigs import text as f
from comigs.experiments.compare.compared import compare_runs
from comigs.experiments.compare.discover import common_folder
from comigs.experiments.compare.export import latex_table, markdown_table, tex
from comigs.experiments.compare.plots import GLYPHS, SHAPES, key
from comigs.experiments.compare.statistics import metric_named
from comigs.experiments.compare.tables import WORDS
from comigs.experiments.compare.write import FILES, write_comparison
from comigs.text import Table
from tests.compared_runs import CLIENTS, change, measured, three_methods
from tests.runs import comigs, files, finished, refused
from tests.test_report import Page

NATS = {"ann": 5.0, "bob": 5.4}
_SEEDS = [
    (math.exp(4.9 + 0.01 * n) + math.exp(5.3 - 0.03 * n)) / 2 for n in range(3)
]  # of comigs in three_methods
COMIGS = f"{mean(_SEEDS):.2f} ± {stdev(_SEEDS):.2f}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of three methods with three seeds each, to be read only."""
    return write(three_methods(tmp_path_factory.mktemp("runs")))


def write(root: Path, **options: str) -> Path:
    """The folder of a comparison of everything below `root`."""
    return write_comparison(compare_runs([root], **options))[0].parent


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f.spread(95.274, 0.4151, 2), "95.27 \N{PLUS-MINUS SIGN} 0.42"),
        (f.spread(95.274, None, 1), "95.3"),
        (f.spread(None, None, 1), "\N{EN DASH}"),
        (f.signed(-0.03112, 0.0042, 4), "-0.0311 \N{PLUS-MINUS SIGN} 0.0042"),
        (f.signed(-0.00001, None, 3), "+0.000"),
        (f.change(-0.0311), "-3.1 %"),
        (f.change(-0.00001), "0.0 %"),
        (f.probability(0.0004), "<0.001"),
        (f.probability(0.0312), "0.031"),
        (f.probability(0.426), "0.43"),
        (f.probability(0.0999), "0.10"),
        (f.ratio(1.0096), "1.010\N{MULTIPLICATION SIGN}"),
        (f.ratio(0.5), "0.50\N{MULTIPLICATION SIGN}"),
        (f.places([150.0, 160.0], [1.5, 0.9]), 1),
        (f.places([150.0], [12.0]), 0),
        (f.places([150.0], [None]), 1),
        (f.places([5.023], [None, None]), 3),
        (f.places([], []), 0),
    ],
)
def test_format(text: object, expected: object) -> None:
    assert text == expected


SIMULATED = {"by-hours.svg", "by-hours.pdf"}  # tests/test_conditions.py


def test_writes_every_file_beside_the_runs(folder: Path) -> None:
    assert folder.name == "compare" and (folder.parent / "local").is_dir()
    assert {p.name for p in folder.iterdir()} == set(FILES) - SIMULATED


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["local"], "local"),
        (["local", "comigs"], "."),
        (["local/seed-42", "local/seed-43"], "local"),
        (["local/seed-42"], "local"),
        (["local", "local/../comigs"], "."),
    ],
)
def test_the_default_folder_holds_the_runs_and_is_none(
    tmp_path: Path, given: list[str], expected: str
) -> None:
    three_methods(tmp_path)
    assert common_folder([tmp_path / name for name in given]) == (tmp_path / expected).resolve()


def test_equal_runs_give_equal_bytes(folder: Path) -> None:
    before = files(folder)
    assert files(write(folder.parent)) == before


def test_the_page_is_whole_and_opens_offline(folder: Path) -> None:
    html = (folder / "compare.html").read_text(encoding="utf-8")
    without_namespaces = re.sub(r' xmlns(:xlink)?="http://www\.w3\.org/[^"]*"', "", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|@font-face", without_namespaces)
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "base"}
        assert not {"src", "srcset", "href", "action"} & set(attributes)
        assert attributes.get("xlink:href", "#").startswith("#")
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert page.count("svg") == 3


def test_the_page_shows_the_figures_and_what_to_know_before_them(folder: Path) -> None:
    text = Page((folder / "compare.html").read_text()).text
    assert f"Lowest mean test perplexity: comigs, {COMIGS} over 3 seeds" in text
    assert "-0.115 nats/token against local, p = 0.006" in text
    assert "3 common seeds give a paired test little power" in text
    assert "3 settings, 1 dataset, 9 runs" in text


def test_plots_say_what_they_show_and_follow_the_colours_of_the_page(folder: Path) -> None:
    html = (folder / "compare.html").read_text()
    for plot in re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL):
        assert re.search(r'role="img" aria-label="[^"]{30,}"', plot)
        assert not re.search(r"(fill|stroke): #", plot)
        for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", plot)):
            assert f"{variable}: " in html


def test_plots_for_a_paper_stand_alone(folder: Path) -> None:
    for name in ("by-round", "by-bytes", "by-parameters"):
        svg = (folder / f"{name}.svg").read_text()
        assert "var(" not in svg and "#fe00" not in svg and "<text" not in svg
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_settings_are_told_apart_by_colour_and_from_the_ninth_on_by_shape() -> None:
    assert len(SHAPES) == len(GLYPHS)
    assert len({key(number) for number in range(8 * len(SHAPES))}) == 8 * len(SHAPES)
    assert len({glyph for _, glyph in map(key, range(8))}) == 1


def test_no_curve_where_valid_was_not_measured(tmp_path: Path) -> None:
    for method in ("local", "comigs"):
        measured(tmp_path / method, NATS, method=method)
    folder = write(tmp_path)
    assert (folder / "by-round.svg").exists()
    for metrics in tmp_path.rglob("metrics.jsonl"):
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(line for line in lines if '"valid"' not in line))
    write(tmp_path)
    assert not (folder / "by-round.svg").exists() and not (folder / "by-round.pdf").exists()
    assert Page((folder / "compare.html").read_text()).count("svg") == 2


def test_untrusted_text_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = "a|b&_<script>alert(1)<b>"
    for number in range(2):
        folder = measured(tmp_path / str(number), NATS, name=evil)
        change(
            folder,
            "env.json",
            base_fingerprint=evil + str(number),
            commit=evil,
            versions={"torch": evil},
        )
        change(folder, "summary.json", weights=evil)
    folder = write(tmp_path)
    page = Page((folder / "compare.html").read_text())
    assert page.count("script") == 0
    assert page.text.count(evil) >= 4
    assert "<script" not in (folder / "table.md").read_text().replace("\\<", "")
    assert r"a|b\&\_$<$script$>$alert(1)$<$b$>$" in (folder / "table.tex").read_text()


def test_csv_holds_every_setting_and_run_in_full_precision(folder: Path) -> None:
    with (folder / "table.csv").open(newline="") as file:
        rows = {line["setting"]: line for line in csv.DictReader(file)}
    assert list(rows) == ["comigs", "fedavg", "local"]
    assert float(rows["comigs"]["difference_mean"]) == pytest.approx(-0.115, abs=1e-15)
    assert rows["local"]["difference_mean"] == rows["local"]["p"] == rows["local"]["baseline"] == ""
    assert rows["comigs"]["seeds"] == "42 43 44" and rows["comigs"]["baseline"] == "local"
    with (folder / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert len(runs) == 3 * 3 * len(CLIENTS)
    for line in runs:
        summary = json.loads((Path(line["folder"]) / "summary.json").read_text())
        client = summary["clients"][line["client"]]
        assert float(line["test_perplexity"]) == client["test"]["perplexity"]
        assert float(line["base_test_nats_per_token"]) == client["base_test"]["nats_per_token"]
        assert int(line["seed"]) == summary["seed"]


def test_latex_marks_the_best_and_has_as_many_cells_as_columns(folder: Path) -> None:
    text = (folder / "table.tex").read_text()
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert columns is not None
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") + 1 for line in lines} == {len(columns[1])}
    best = [line for line in lines if r"\textbf" in line]
    assert len(best) == 1 and best[0].startswith("comigs &")
    assert r"\underline{" in next(line for line in lines if line.startswith("local"))
    assert text.count("{") == text.count("}")
    assert text.isascii()


def test_markup_of_tables() -> None:
    table = Table(
        ("a_b", "x"),
        (("s|t", "-1.5 %"), ("u", "2")),
        best=frozenset({(0, 1)}),
        second=frozenset({(1, 1)}),
    )
    assert (
        markdown_table(table)
        == "| a\\_b | x |\n| --- | ---: |\n| s\\|t | **-1.5 %** |\n| u | *2* |\n"
    )
    assert r"\textbf{$-$1.5 \%}" in latex_table(table, "c", "Some Label!")
    assert r"\label{tab:some-label}" in latex_table(table, "c", "Some Label!")
    assert tex("ffa-lora 2-3 <0.001") == r"ffa-lora 2-3 $<$0.001"


# The folder


def test_the_table_alone_says_that_a_comparison_is_ours(tmp_path: Path) -> None:
    """Pages are often left out of a repository; their folder can be written again all the same."""
    measured(tmp_path / "runs", NATS)
    page, *_ = written = write_comparison(compare_runs([tmp_path / "runs"]))
    page.unlink()
    assert write_comparison(compare_runs([tmp_path / "runs"])) == written and page.exists()


def test_files_of_somebody_else_are_kept(tmp_path: Path) -> None:
    three_methods(tmp_path / "runs")
    out = tmp_path / "paper"
    out.mkdir()
    (out / "table.tex").write_text("mine")
    with pytest.raises(
        ValueError, match=r"table\.tex: not written by comigs compare, so it is kept"
    ):
        write_comparison(compare_runs([tmp_path / "runs"]), out)
    assert files(out) == {"table.tex": b"mine"}


def test_other_files_in_the_folder_stay_and_own_ones_are_replaced(tmp_path: Path) -> None:
    measured(tmp_path / "runs", NATS)
    out = tmp_path / "paper"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    write_comparison(compare_runs([tmp_path / "runs"]), out)
    before = (out / "table.md").read_text()
    write_comparison(compare_runs([tmp_path / "runs"], metric="bits_per_byte"), out)
    assert (out / "thesis.tex").read_text() == "mine"
    assert (out / "table.md").read_text() != before


def test_a_file_in_the_way_and_a_full_disk_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = compare_runs([measured(tmp_path / "a", NATS)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        write_comparison(compared, tmp_path / "file")

    def refuse(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        ValueError, match="no space left on the disk; choose another folder with --out"
    ):
        write_comparison(compared, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


# The command


def test_prints_the_main_table_the_notes_and_where_the_page_is(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = comigs(capsys, "compare", three_methods(tmp_path), "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert re.search(rf"comigs +3 +{COMIGS} +-0\.115 ± 0\.015 +-10\.9 % +0\.006 +6 of 6", done.out)
    assert "note: 3 common seeds" in done.out
    assert done.out.splitlines()[-1] == f"page: {tmp_path / 'out' / 'compare.html'}"


@pytest.mark.parametrize("given", ["perplexity", "nats_per_token", "bits-per-byte"])
def test_the_metric_chosen_is_the_one_of_the_main_table(folder: Path, given: str) -> None:
    compared = compare_runs([folder.parent], metric=given)
    (_, table), *_ = compared.tables(brief=True)
    assert table.headers[2] == f"test {WORDS[metric_named(given)]}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["empty"], "no run in it, nor below it"),
        (["local/seed-42/config.toml"], "a file; give run folders"),
        (
            ["local", "--baseline", "lcal"],
            'no setting "lcal" here. Did you mean "local"? There are: local',
        ),
        (
            ["local", "--metric", "perplexty"],
            'given "perplexty"; must be perplexity, nats_per_token, bits_per_byte. Did',
        ),
        ([], "Missing argument 'RUNS...'"),
    ],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, capsys, monkeypatch, words: list[str], said: str
) -> None:
    three_methods(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    assert said in refused(capsys, "compare", *words)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name = ", "cannot be read as TOML: "),
        ("[axes]\nmethod = 3", "axes.method: must be a section with a line for each value"),
        ('[axes.method]\nlocal = {}\n"\xff', "cannot be read as TOML: "),
        ("a = " + "[" * 9999, "sections or lists are nested too deeply"),
    ],
)
def test_a_damaged_sweep_file_is_named(tmp_path: Path, capsys, content: str, said: str) -> None:
    (three_methods(tmp_path) / "sweep.toml").write_bytes(content.encode("latin-1"))
    assert f"{tmp_path / 'sweep.toml'}: {said}" in refused(capsys, "compare", tmp_path)


def test_a_damaged_run_is_named(tmp_path: Path, capsys) -> None:
    three_methods(tmp_path)
    (tmp_path / "local" / "seed-42" / "summary.json").write_text("{")
    assert "seed-42/summary.json: line 1: not JSON" in refused(capsys, "compare", tmp_path)


def test_runs_of_the_product_itself(tmp_path: Path, capsys) -> None:
    done = comigs(capsys, "compare", finished() / "run", "--out", tmp_path / "out")
    assert done.code == 0 and "comigs" in done.out
    assert {"compare.html", "table.tex"} <= {p.name for p in (tmp_path / "out").iterdir()}
