"""The page: whole, self-contained, escaped, deterministic, and with the right numbers for every
kind of run.
"""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from comigs import text as f
from comigs.errors import UserError
from comigs.methods.loading import load_method
from comigs.runs.report import page, provenance, tables
from comigs.runs.report.page import report_page, write_report, write_reports
from comigs.runs.report.read import read_run
from comigs.runs.report.results import results
from comigs.runs.summary import summarize
from tests.fake_engine import Numbers, rounds_of
from tests.test_report_runs import change_metrics, write_run

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Tags, attributes and text; asserts that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def warning(round_: int, client: str | None, sign: str, message: str) -> dict[str, Any]:
    return {"kind": "warning", "round": round_, "client": client, "sign": sign, "message": message}


def test_shows_every_client_and_the_figures_of_the_summary(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path)).text
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name, client in summary["clients"].items():
        base, personal = client["base_test"], client["test"]
        gain = 100 * (base["perplexity"] - personal["perplexity"]) / base["perplexity"]
        for figure in (
            name,
            f"{base['perplexity']:.0f}",
            f"{gain:.1f} %",
            f"{personal['bits_per_byte']:.3f}",
        ):
            assert figure in text
    assert "590,592" in text
    assert "1.2 MB uploaded per client and round" in text
    assert "Failure signs: none detected" in text
    assert "comigs on base mini" in text.replace("  ", " ")


def test_opens_offline_without_scripts(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    without_namespaces = re.sub(r' xmlns(:xlink)?="http://www\.w3\.org/[^"]*"', "", html)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|@font-face", without_namespaces)
    parsed = Page(html)
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "base"}
        assert not {"src", "srcset", "href", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("xlink:href", "#").startswith("#")


def test_plots_say_what_they_show_and_follow_the_colours_of_the_page(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path)).read_text(encoding="utf-8")
    plots = re.findall(r"<svg .*?</svg>", html, flags=re.DOTALL)
    assert len(plots) == 6  # a loss plot per client, generalist share, drift
    for plot in plots:
        assert re.search(r'role="img" aria-label="[^"]{30,}"', plot)
        assert not re.search(r"(fill|stroke): #", plot)
        for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", plot)):
            assert f"{variable}: " in html


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    evil = '"><script>alert(1)<b>'
    folder = write_run(
        tmp_path,
        name=evil,
        base={"name": evil},
        rounds=3,
        warnings=(warning(2, "fr", "overfitting", evil),),
    )
    (folder / "env.json").write_text(
        json.dumps({evil: evil, "data": {evil: {evil: {"tokens": 1, "sha256": evil}}}})
    )
    parsed = page_of(folder)
    assert parsed.count("script") == 0
    assert parsed.text.count(evil) >= 6


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (write_report(write_run(tmp_path / name)) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    before = one.read_bytes()
    assert write_report(tmp_path / "one").read_bytes() == before


def test_unfinished_run(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path, done=3)).text
    assert "unfinished: round 3 of 10" in text
    assert "mean valid perplexity" in text


def test_run_before_its_first_round(tmp_path: Path) -> None:
    text = page_of(write_run(tmp_path, done=0)).text
    assert "unfinished: round 0 of 10; no result yet" in text
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No loss has been measured yet" in page_of(tmp_path).text


def test_failure_signs_are_gathered_by_client(tmp_path: Path) -> None:
    seen = [warning(r, "fr", "collapsed-router", f"99 % to s0 at {r}") for r in (3, 4, 5, 8)]
    text = page_of(
        write_run(
            tmp_path, warnings=(*seen, warning(9, None, "drifting-generalists", "0.1 to 0.6"))
        )
    ).text
    assert "none detected" not in text
    assert "fr , rounds 3 to 5, 8: 99 % to s0 at 8" in text
    assert "server , round 9: 0.1 to 0.6" in text


def test_who_was_absent_and_who_has_no_result_is_said_and_the_mean_says_over_whom(
    tmp_path: Path,
) -> None:
    def trouble(name: str, task: Any, reply: Any) -> Any:
        gone = name == "bob" or (name == "cyd" and task.round in (2, 3, 5))
        return "no answer by the deadline" if gone else reply

    folder = rounds_of(tmp_path, Numbers("ada bob cyd dan", trouble), rounds=4)
    config = folder.config()
    folder.write_summary(summarize(config, load_method(config), folder.metrics()))
    run = read_run(folder.path)
    table = tables.absence_table(run)
    assert table is not None
    assert [row[:2] for row in table.rows] == [("bob", "1 to 3"), ("cyd", "2 to 3, at the end")]
    clients = tables.client_table(run)
    assert clients.last is not None and clients.last[0] == "mean of 2"
    assert [row[3] for row in clients.rows].count(f.NONE) == 2
    assert tables.headline(run).startswith("4 clients (2 measured), mean test perplexity")
    page = report_page(run)
    assert (
        "Who was asked and did not answer" in page
        and "left out" in page
        and "asked several times in a row" in page
    )
    assert tables.absence_table(read_run(write_run(tmp_path / "whole"))) is None


def test_clients_that_are_drawn_and_robust_merges_are_settings_that_are_shown(
    tmp_path: Path,
) -> None:
    engine = Numbers("ada bob cyd dan")
    folder = rounds_of(
        tmp_path,
        engine,
        rounds=2,
        participation={"clients_per_round": 2},
        upload={"merge": "median"},
    )
    run = read_run(folder.path)
    settings = dict(provenance.settings(run))
    assert settings["clients in a round"] == "2 of 4" and settings["upload.merge"] == "median"
    assert results(run).uploaded_per_client_and_round == 2 * 3 * 4  # of those that were asked
    table = tables.client_table(run)
    assert table.last[-1] == "12 B"  # half of them are, in each round


@pytest.mark.parametrize("shares", [None, [None] * 6])
def test_method_without_router(tmp_path: Path, shares: Any) -> None:
    folder = write_run(tmp_path, experts=1)
    change_metrics(folder, generalist_share_by_layer=shares, expert_share_by_layer=shares)
    parsed = page_of(folder)
    assert "Nothing is routed here" in parsed.text
    assert parsed.count("svg") == 5


def test_method_that_shares_nothing(tmp_path: Path) -> None:
    parsed = page_of(write_run(tmp_path, uploaded=0, method="local"))
    assert "nothing uploaded" in parsed.text
    assert "Nothing: this run has not uploaded anything." in parsed.text
    assert "No drift of generalists" in parsed.text
    assert "left the device " not in parsed.text


def test_what_left_is_told_from_what_was_uploaded(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    text = page_of(folder).text
    assert "generalists and attention LoRA, 48.0 MB from all clients" in text
    assert "specialists and routers stayed home" in text
    change_metrics(folder, uploaded_by_role=None)
    assert "only the tensors this method shares, 48.0 MB" in page_of(folder).text


def test_nothing_measured_is_a_dash_never_nan(tmp_path: Path) -> None:
    folder = write_run(tmp_path, done=4)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(
        re.sub(r'"(perplexity|train_nats_per_token)": [\d.]+', r'"\1": NaN', metrics.read_text())
    )
    change_metrics(folder, balance_loss=None)
    text = page_of(folder).text.lower()
    for said in ("none detected", 'level = "none"'):
        text = text.replace(said, "")
    assert not re.search(r"\b(nan|inf|none)\b", text)


@pytest.mark.parametrize(
    "kind", [{"clients": ("me",), "rounds": 1, "steps": 1, "layers": 1}, {"experts": 4}]
)
def test_smallest_run_and_many_experts(tmp_path: Path, kind: dict[str, Any]) -> None:
    parsed = page_of(write_run(tmp_path, **kind))
    assert ("its own 2" in parsed.text) == ("experts" in kind)


def test_fifty_clients_draw_twelve_and_say_so(tmp_path: Path) -> None:
    names = tuple(f"client-{i:02d}" for i in range(50))
    parsed = page_of(write_run(tmp_path, clients=names, rounds=2, layers=2))
    assert parsed.count("svg") == 14
    assert "12 of 50 clients are drawn : those with the least gain" in re.sub(
        r"\s*:", " :", parsed.text
    )
    assert all(name in parsed.text for name in names)


@pytest.mark.parametrize("where", ["missing/x.html", "folder"])
def test_failing_to_write_leaves_nothing_behind(tmp_path: Path, where: str) -> None:
    folder = write_run(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="cannot be written"):
        write_report(folder, tmp_path / where)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_no_report_is_kept(tmp_path: Path) -> None:
    folder, thesis = write_run(tmp_path / "run"), tmp_path / "thesis.md"
    thesis.write_text("mine")
    for mine in (thesis, folder / "config.toml"):
        before = mine.read_bytes()
        with pytest.raises(
            UserError,
            match=r"not written by comigs report, so it is kept; choose another file with",
        ):
            write_report(folder, mine)
        assert mine.read_bytes() == before
    assert write_report(folder, tmp_path / "page.html") == write_report(
        folder, tmp_path / "page.html"
    )  # its own


def test_failing_half_way_keeps_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path)
    old = write_report(folder).read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="no space left"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == old
    assert not list(folder.glob(".*"))


def test_several_runs_get_a_page_each(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, method=name) for name in ("comigs", "fedavg")]
    written = write_reports(folders)
    assert written == [folder / "report.html" for folder in folders]
    assert ["comigs on base" in page_of(folder).text.replace("  ", " ") for folder in folders] == [
        True,
        False,
    ]
    assert write_reports(folders[:1], tmp_path / "one.html") == [tmp_path / "one.html"]


def test_one_page_for_several_runs_is_another_command(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(UserError, match="comigs compare"):
        write_reports(folders, tmp_path / "all.html")
    assert not list(tmp_path.rglob("*.html"))


def test_one_bad_run_of_several_writes_nothing(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good")
    with pytest.raises(UserError, match="no such run folder"):
        write_reports([good, tmp_path / "bad"])
    assert not list(tmp_path.rglob("*.html"))


def test_no_global_plotting_state(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    write_report(write_run(tmp_path, rounds=2))
    assert dict(mpl.rcParams) == before
    assert not hasattr(page, "plt")
