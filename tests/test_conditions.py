"""Simulated devices and links: what is drawn, what the clock says; nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from comigs.app import api
from comigs.config import load_config, parse_config, read_trace
from comigs.engines.conditions.network import DROPPED, Message, Network, Work
from comigs.engines.conditions.weather import Weather
from comigs.errors import Stopped, UserError
from comigs.experiments.compare.settings import Setting
from comigs.experiments.compare.simulated import final_valid, hours_to, mean_by_hour
from comigs.experiments.run_data import RunData, read_run_folder
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import RoundEnd
from comigs.runs.simulated import Exchange, round_times
from comigs.server.dispatch import Dispatcher, Polling, Question
from comigs.server.protocol import Reply, Task
from comigs.text import NONE, duration, percent, perplexity
from tests.conftest import run_config
from tests.test_missing_clients import run as run_losing

NAMES = "ada bob cyd"
TRACE = "client,seconds,available\nada,0,1\nada,50,0\nada,90,1\nada,1000,0\n"
ROUGH = {  # bob is too slow for the deadline, and whoever is asked may be lost
    "conditions": {
        **{"tokens_per_second": 100, "upload": 20000, "download": 20000, "latency": 0.1},
        **{"on": 100, "off": 20, "dropout": 0.2, "jitter": 0.3, "spread": 0.5},
        "clients": {"bob": {"tokens_per_second": 4}},
    },
    "participation": {"deadline": 40, "late": "discount", "max_failures": 9},
    "evaluation": {"every": 0, "keep": "last"},
    "rounds": 4,
}


def weather(names="ada bob", seed=7, **conditions):
    clients = [{"name": name, "text": name} for name in names.split()]
    return Weather(parse_config({"seed": seed, "clients": clients, "conditions": conditions}))


def lines(folder, *kinds):
    every = map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["kind"] in kinds or not kinds]


@pytest.mark.parametrize(
    "conditions, said",
    [
        ({"upload": -5}, "conditions.upload: given -5; must be 1.0 or more"),
        (
            {"groups": {"a": {"share": 0.7}, "b": {"share": 0.6}}},
            "conditions.groups: the shares are 1.3 together; at most 1",
        ),
        (
            {"clients": {"zoe": {"specialists": [[2, 0]]}}},
            "conditions.clients.zoe: no such client; there are: ada",
        ),
        ({"trace": TRACE.replace("90", "20")}, "line 4: not sorted"),
        ({"trace": TRACE.replace("ada", "bob")}, "no line of client ada; it must cover the run"),
        ({"trace": TRACE.replace("ada,0,", "ada,3,")}, "first line must be of second 0"),
        ({"trace": TRACE[:33]}, "ada has one line only: a trace ends with a client's last line"),
        ({"specialists": [[5, 2, 1]]}, "holds [5, 2, 1]; must be [[round, number], ...]"),
        ({"specialists": [5, 2]}, "holds 5; must be [[round, number], ...]"),
        ({"trace": TRACE.replace("50,0", "50,0,7")}, "line 3: has more cells than the first line"),
        (
            {"clients": {"ada": {"trace": TRACE.replace("ada", "bob")}}},
            "conditions.clients.ada.trace: has no line of client ada",
        ),
        ({"trace": "a,b\n1,2\n"}, "begins with the line client,seconds,available"),
        ({"latency": 1e200}, "conditions.latency: given 1e+200; must be 1000000.0 or less"),
        ({"upload": 1e-150}, "conditions.upload: given 1e-150; must be 1.0 or more"),
        ({"on": 1e-300, "off": 1}, "conditions.on: given 1e-300; must be 1.0 or more"),
        ({"trace": TRACE + '"' + "x" * 200_000}, ": not CSV: "),
        ({"trace": TRACE + 'ada,"2000,0\n'}, ": not CSV: unexpected end of data"),
        ({"on": 5}, "on and off: give both or neither"),
        ({"speed": 1, "tokens_per_second": 5}, "give one of them"),
        ({"specialists": [[3, 1], [2, 0]]}, "in order, each once"),
        (
            {"clients": {"data": {"rate": 3}}},
            'conditions.clients.data.rate: unknown key. Did you mean "trace"? Allowed: tokens_per',
        ),
        (
            {"groups": {"a": {"shar": 0.7}}},
            'conditions.groups.a.shar: unknown key. Did you mean "sh',
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(conditions, said):
    with pytest.raises(UserError) as refused:
        parse_config({"clients": [{"name": "ada", "text": "a"}], "conditions": conditions})
    assert said in str(refused.value).replace("1.0 is", "1 is") and "\n" not in str(refused.value)


def test_one_client_more_changes_nobody_elses_weather():
    given = {
        **{"tokens_per_second": 9, "jitter": 0.5, "spread": 0.5, "dropout": 0.5, "latency": 1},
        **{"on": 50, "off": 30, "specialists_rate": 0.5},
        "groups": {"slow": {"share": 0.4, "upload": 10}, "fast": {"share": 0.4, "upload": 99}},
    }
    few, many = weather("ada bob", **given), weather("zoe ada dan bob", **given)
    for name in ("ada", "bob"):
        assert few.of(name) == many.of(name)
        for round in (1, 2):
            assert few.link(name, round, 0) == many.link(name, round, 0)
            assert few.link(name, round, 0) != few.link(name, round, 1)
            assert few.specialists(name, round + 3) == many.specialists(name, round + 3)
        times = np.arange(0, 3000, 7)
        one, other = few.availability(name), many.availability(name)
        assert [one.at(t) for t in times] == [other.at(t) for t in reversed(times)][::-1]
    assert few.link("ada", 1, 0) != few.link("bob", 1, 0)


def test_figures_of_a_client_count_before_its_groups_and_those_before_the_general_ones():
    one = weather(
        **{"speed": 2, "latency": 3, "upload": 5, "on": 1, "off": 1},
        groups={"all": {"share": 1, "tokens_per_second": 10, "upload": 6}},
        clients={"bob": {"upload": 7, "trace": TRACE.replace("ada", "bob")}},
    )
    ada, bob = one.of("ada"), one.of("bob")
    assert (ada.speed, ada.tokens_per_second, ada.latency, ada.upload, ada.on) == (
        None,
        10,
        3,
        6,
        1,
    )
    assert (bob.speed, bob.tokens_per_second, bob.upload, bob.on) == (None, 10, 7, None)


def test_a_trace_for_all_needs_no_line_of_who_has_another_one():
    trace, own = TRACE.replace("ada", "bob"), {"ada": {"on": 5, "off": 5}}
    both = weather(trace=trace, clients=own)
    assert both.of("ada").trace is None and both.of("bob").trace == trace
    with pytest.raises(UserError, match=r"conditions\.trace: has no line of client ada"):
        weather(trace=trace)


def test_power_changes_by_one_and_stays_at_the_ends_of_its_range():
    for number, reached in ((5, {5, 4, 3, 2, 1}), (0, {0, 1, 2, 3})):
        clients = [{"name": "ada", "text": "a", "specialists": number}]
        rates = {"specialists_rate": 1}
        drawn = Weather(parse_config({"seed": 7, "clients": clients, "conditions": rates}))
        power = [drawn.specialists("ada", round) for round in range(1, 80)]
        assert {abs(b - a) for a, b in pairwise(power)} == {0, 1}
        assert power[0] == number and set(power) == reached


def test_a_changing_power_of_one_level_replaces_that_of_a_more_general_one():
    one = weather(
        **{"specialists_rate": 1, "specialists_range": [0, 1]},
        clients={"bob": {"specialists": [[2, 2]]}},
    )
    assert [one.specialists("bob", round) for round in (1, 2, 3)] == [1, 2, 2]
    assert {one.specialists("ada", round) for round in range(1, 9)} == {0, 1}
    other = weather(
        **{"specialists": [[1, 3]], "specialists_range": [0, 1]},
        groups={"all": {"share": 1, "specialists_rate": 1}},
    )
    assert {other.specialists("ada", round) for round in range(2, 9)} == {0, 1}


def test_a_trace_is_read_once_and_from_whatever_an_editor_has_made_of_it(tmp_path):
    (tmp_path / "trace.csv").write_text(TRACE, encoding="utf-8-sig")
    text = '[[clients]]\nname = "ada"\ntext = "a"\n[conditions]\ntrace = "trace.csv"\n'
    (tmp_path / "run.toml").write_text(text)
    assert load_config(tmp_path / "run.toml").conditions.trace == TRACE
    assert read_trace(TRACE) is read_trace(TRACE)


CLIENT = '[[clients]]\nname = "ada"\ntext = "a"\n[conditions]\n'


def test_what_is_said_in_another_way_replaces_what_a_file_says(tmp_path):
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "phones.toml").write_text(
        "[conditions]\non = 5\noff = 6\ntokens_per_second = 7\nspecialists_rate = 1\n"
        "[conditions.groups.old]\nshare = 1\ntokens_per_second = 3\n"
    )
    own = 'file = "phones.toml"\ntrace = "trace.csv"\nspeed = 0.5\nspecialists = [[2, 0]]\n'
    (tmp_path / "run.toml").write_text(f"{CLIENT}{own}[conditions.groups.old]\nspeed = 2\n")
    found = load_config(tmp_path / "run.toml").conditions
    assert (found.on, found.off, found.trace) == (None, None, TRACE)
    assert (found.tokens_per_second, found.speed) == (None, 0.5)
    assert (found.specialists, found.specialists_rate) == (((2, 0),), None)
    assert (found.groups["old"].speed, found.groups["old"].tokens_per_second) == (2, None)


@pytest.mark.parametrize(
    ("section", "files", "said"),
    [
        ('trace = "t.csv"', {"t.csv": TRACE[:33]}, "conditions.trace: {}/t.csv: ada has one line"),
        (
            '[conditions.groups.old]\nshare = 1\ntrace = "no.csv"',
            {},
            "conditions.groups.old.trace: ",
        ),
        ('file = "f.toml"', {"f.toml": "[conditions]\nupload = -4\n"}, "{}/f.toml: conditions.up"),
        (
            'file = "f.toml"',
            {"f.toml": "[conditions.clients.ada]\nuplod = 4\n"},
            '{}/f.toml: conditions.clients.ada.uplod: unknown key. Did you mean "upload"?',
        ),
    ],
)
def test_what_is_wrong_in_a_file_names_the_file(tmp_path, section, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "run.toml").write_text(CLIENT + section + "\n")
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "run.toml")
    assert said.format(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_conditions_that_lead_back_to_themselves_are_refused(tmp_path):
    clients = '[[clients]]\nname = "ada"\ntext = "a"\n[conditions]\nfile = "{}.toml"\n'
    names = {"self": clients.format("self"), "run": clients.format("one")}
    names |= {
        "one": '[conditions]\nfile = "two.toml"\n',
        "two": '[conditions]\nfile = "one.toml"\n',
    }
    for name, text in names.items():
        (tmp_path / f"{name}.toml").write_text(text)
    for name in ("self", "run"):
        with pytest.raises(UserError, match=r"conditions.file: \w+.toml leads back here"):
            load_config(tmp_path / f"{name}.toml")


def test_groups_have_their_share_and_chains_their_means():
    names = " ".join(f"c{number}" for number in range(2000))
    one = weather(names, on=30, off=10, groups={"some": {"share": 0.3, "dropout": 0.1}})
    assert abs(np.mean([one.of(name).dropout == 0.1 for name in names.split()]) - 0.3) < 0.03
    there, switches = [], []
    for name in names.split()[:200]:
        chain = one.availability(name)
        there += [chain.at(t) for t in range(0, 2000, 40)]
        switch = 0.0
        while (switch := chain.next_switch(switch)) < 2000:
            switches.append(switch)
    assert abs(np.mean(there) - 30 / 40) < 0.02
    assert abs(len(switches) / (200 * 2000) - 2 / 40) < 0.002


def test_a_trace_is_followed_and_must_not_end_before_the_run():
    chain = weather("ada", trace=TRACE).availability("ada")
    assert [chain.at(t) for t in (0, 49.9, 50, 89, 90, 999)] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert (chain.next_switch(0), chain.next_switch(50), chain.lost_after(90)) == (50, 90, np.inf)
    with pytest.raises(UserError, match="client ada's ends at second 1000, but the run is at"):
        chain.at(1000)


class Clients:
    """Clients whose work is a number of tokens, behind a network: the dispatcher's own rules."""

    def __init__(self, tokens, sent=1000, deadline=100.0, patience=30.0, **conditions):
        names = list(tokens)
        self.undone, self.tokens, self.sent = [], tokens, sent
        self.network = Network(
            weather(" ".join(names), **conditions), names, 45.0, self.work, self.undone.append
        )
        polling, nodes = Polling(deadline, patience), {n: k for k, n in enumerate(names)}
        self.dispatcher = Dispatcher(self.network, nodes, polling, lambda event: None, self.network)

    def work(self, messages):
        replies = {name: Reply(None, [], round=m.task.round) for name, m in messages.items()}
        return {n: Work(r, self.tokens[n], self.tokens[n], self.sent) for n, r in replies.items()}

    def ask(self, round, size=500):
        questions = {}
        for name in self.tokens:
            message = Message(name, Task(round, True, (), ()), {}, size)
            questions[name] = Question(name, round, lambda m=message: m, lambda reply, _: reply)
        return self.dispatcher.gather(questions)


def test_seconds_follow_from_bytes_latency_and_tokens_and_the_deadline_counts_in_them():
    clients = Clients(
        {"ada": 40, "bob": 900}, tokens_per_second=10, upload=100, download=50, latency=2
    )
    came = clients.ask(1)
    assert clients.network.now() == 100  # the deadline: bob is not in
    assert list(came.answers) == ["ada"]
    assert came.absent == {"bob": "no answer by the deadline"}
    # naively: there, the download, the work, the upload, back
    ends = {name: 2 + 500 / 50 + n / 10 + 1000 / 100 + 2 for name, n in clients.tokens.items()}
    assert {a.client: a.ended for a in clients.network.attempts} == pytest.approx(ends)

    # bob's comes in the second round, after which it can be asked; ada alone is waited for.
    came = clients.ask(2)
    assert came.late["bob"].round == 1 and set(came.answers) == {"ada"}
    asked = [a.asked for a in clients.network.attempts if (a.client, a.round) == ("bob", 2)]
    assert asked == [pytest.approx(ends["bob"])]


def test_who_drops_out_is_noticed_and_not_asked_again_in_the_round():
    clients = Clients({"ada": 40, "bob": 40}, tokens_per_second=1, clients={"bob": {"dropout": 1}})
    came = clients.ask(1)
    assert came.absent == {"bob": DROPPED} and clients.undone == ["bob"]
    (lost,) = [a for a in clients.network.attempts if a.lost]
    assert 0 < lost.ended < 40 and lost.tokens == int(lost.ended)
    assert (lost.uploaded_bytes, lost.downloaded_bytes) == (0, 500)
    assert clients.network.now() == pytest.approx(max(40, lost.ended + 45))


def test_who_goes_away_is_waited_for_and_sends_what_was_ready():
    # ada is away from 50 to 90: its answer, ready at 45, would have been there at 55
    clients = Clients({"ada": 45}, deadline=200, tokens_per_second=1, upload=100, trace=TRACE)
    came = clients.ask(1)
    assert set(came.answers) == {"ada"} and not clients.undone
    first, again = clients.network.attempts
    assert (first.ended, first.lost, first.tokens) == (50, "gone", 45)
    # noticed at 95, when it has come back, and asked again at once
    assert (again.asked, again.ended, again.tokens) == (95, 105, 0)

    # half of the upload was through; whoever is asked again receives the question again, too
    clients = Clients(
        {"ada": 40}, deadline=200, tokens_per_second=1, upload=100, download=500, trace=TRACE
    )
    assert set(clients.ask(1).answers) == {"ada"}
    first, again = clients.network.attempts
    assert (first.ended, first.uploaded_bytes, first.downloaded_bytes) == (50, 900, 500)
    assert (again.asked, again.ended, again.uploaded_bytes) == (95, 95 + 1 + 10, 1000)

    # an answer that nobody waits for any more is sent first when its client is asked again
    clients = Clients({"ada": 500}, tokens_per_second=1, deadline=100.0)
    assert clients.ask(1).absent and clients.ask(2).absent and clients.network.now() > 200 - 1e-9
    late = clients.ask(3).late["ada"]
    assert late.round == 1 and clients.network.now() >= 500


# At second 40, the deadline of round 1, cyd comes; bob is slower than two deadlines.
EDGE = {
    "conditions": {
        "tokens_per_second": 100,
        "trace": "client,seconds,available\nada,0,1\nada,1e5,1\nbob,0,1\nbob,1e5,1\n"
        "cyd,0,0\ncyd,40,1\ncyd,1e5,1\n",
        "clients": {"bob": {"tokens_per_second": 2}},
    },
    "participation": {"deadline": 40, "late": "discount", "max_failures": 9},
    "evaluation": {"every": 0, "keep": "last"},
    "rounds": 3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that other tests look at: without the section, with it, and with no limit."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, names=NAMES, **tree):
        return api.run(run_config(root / "text", names, **tree), root / name)

    run.root = root
    run.off, run.empty = run("off"), run("empty", conditions={})
    run.free = run("free", conditions={"latency": 0.0})
    run.rough = run("rough", **ROUGH)
    return run


def test_with_every_condition_off_a_run_is_the_same_to_the_bit(runs):
    assert runs.off.config().conditions == runs.empty.config().conditions
    assert lines(runs.empty) == lines(runs.off)

    # A clock alone changes nothing, and takes no time where nothing does.
    told = [line for line in lines(runs.free) if line["kind"] not in ("exchange", "attempt")]
    assert told == lines(runs.off)
    assert {line["ended"] for line in lines(runs.free, "exchange")} == {0.0}
    tensors = {f.relative_to(runs.off.path) for f in runs.off.path.rglob("*.safetensors")}
    assert {file.parts[0] for file in tensors} == {"clients"}
    for file in (*tensors, "summary.json"):
        assert (runs.off.path / file).read_bytes() == (runs.free.path / file).read_bytes(), file


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(runs):
    assert any("no answer by" in line["reason"] for line in lines(runs.rough, "absent"))
    assert any("lost" in line for line in lines(runs.rough, "attempt"))
    stopped = stopped_after(2, runs.root, "stopped", **ROUGH)
    api.resume(stopped.path)
    assert lines(stopped) == lines(runs.rough)


def test_what_another_version_left_on_its_way_is_refused(runs, monkeypatch):
    monkeypatch.setattr("comigs.engines.conditions.saved.FORMAT", 1)
    stopped = stopped_after(2, runs.root, "other", **ROUGH)
    monkeypatch.undo()
    with pytest.raises(UserError, match="written by another version of comigs"):
        api.resume(stopped.path)


def stopped_after(round, root, name, names=NAMES, **tree):
    """The folder of a run that was stopped at the end of that round."""

    def stop(event):
        if isinstance(event, RoundEnd) and event.round == round:
            raise KeyboardInterrupt

    with pytest.raises(Stopped):
        api.run(run_config(root / "text", names, **tree), root / name, stop)
    return RunFolder.open(root / name)


def test_who_is_asked_at_the_very_moment_of_the_deadline_works_in_that_round(runs):
    whole = runs("edge", **EDGE)
    stopped = stopped_after(1, runs.root, "edge-stopped", **EDGE)
    (asked,) = [line for line in lines(stopped, "attempt") if line["client"] == "cyd"]
    assert (asked["round"], asked["asked"]) == (1, 40.0)
    api.resume(stopped.path)
    assert lines(stopped) == lines(whole)

    # What it did for round 1 and for round 2 is all kept.
    stopped = stopped_after(2, runs.root, "edge-twice", **EDGE)
    rounds = [line["round"] for line in lines(stopped, "attempt") if line["client"] == "cyd"]
    assert rounds == [1, 2]
    assert int(stopped.load("clients/cyd/optimizer")["local_steps"]) == 2 * 2


def test_a_round_whose_clients_are_away_asks_others_that_are_there(runs):
    """One is drawn for a round, and bob is never there: ada takes its place after two tries of 30
    seconds each.
    """
    conditions = {
        "latency": 0.0,
        "trace": "client,seconds,available\nada,0,1\nada,1e9,1\nbob,0,0\nbob,1e9,0\n",
    }
    draw = {"clients_per_round": 1, "max_failures": 2}
    tree = {"rounds": 3, "seed": 49, "participation": draw, "conditions": conditions}
    run = runs("drawn", "ada bob", **tree)
    assert {line["client"] for line in lines(run, "train")} == {"ada"}
    ((client, reason),) = [(line["client"], line["reason"]) for line in lines(run, "absent")]
    took = [line["ended"] - line["began"] for line in lines(run, "exchange")]
    assert (client, reason) == ("bob", "gone") and len(took) == 5
    assert sum(took) == pytest.approx(60)


def test_what_is_lost_on_the_way_was_never_done(runs):
    """Bob is lost in each round: all others do what they do where he cannot be reached."""
    tree = {"participation": {"max_failures": 9}, "evaluation": {"every": 0, "keep": "last"}}
    lost = runs("lost", conditions={"clients": {"bob": {"dropout": 1}}}, **tree)
    config = run_config(runs.root / "text", NAMES, **tree)
    gone = run_losing(config, runs.root / "gone", {1: {"bob"}, 2: {"bob"}})
    for kind in ("train", "server"):
        assert lines(lost, kind) == lines(gone, kind)
    tests = [line for line in lines(lost, "evaluation") if line["model"] == "personal"]
    assert tests == [line for line in lines(gone, "evaluation") if line["model"] == "personal"]


@pytest.mark.parametrize("method", ["flora", "fedex-lora"])
def test_who_is_late_adds_no_update_twice(runs, method):
    """Bob answers after each deadline, and dan's answers are lost: all end with one sum."""
    conditions = {
        "tokens_per_second": 8,
        "clients": {"bob": {"tokens_per_second": 5.5}, "dan": {"dropout": 1}},
    }
    names = "ada bob cyd dan"
    tree = {
        **{"names": names, "method": method, "conditions": conditions, "rounds": 4},
        "participation": {"deadline": 30, "max_failures": 9},
        "evaluation": {"every": 0, "keep": "last"},
    }
    folder = runs(f"merging-{method}", **tree)
    late = [line for line in lines(folder, "attempt") if line["ended"] > 30 * line["round"]]
    assert {line["client"] for line in late} >= {"bob"}
    own, *others = (folder.load(f"clients/{name}/personal") for name in names.split())
    merged = [name for name in own if ".merged." in name]
    for name in merged:
        for other in others:
            assert (other[name] - own[name]).norm() <= 1e-5 * own[name].norm() > 0
    assert merged

    # What was added is part of the checkpoint.
    stopped = stopped_after(3, runs.root, f"merging-{method}-stopped", **tree)
    api.resume(stopped.path)
    assert lines(stopped) == lines(folder)


def test_the_speed_of_this_machine_is_measured_once(runs, monkeypatch):
    folder = runs("speed", "ada bob", conditions={"speed": 0.5}, rounds=1)
    machine = folder.config().conditions.machine
    attempt, _ = lines(folder, "attempt")
    assert machine > 0 and attempt["ended"] >= 2 * attempt["tokens"] / machine
    speed = {"conditions": {"speed": 0.5}, "rounds": 2}
    stopped = stopped_after(1, runs.root, "speed-stopped", "ada bob", **speed)
    machine = stopped.config().conditions.machine
    monkeypatch.setattr("comigs.app.dry_run.with_machine", None)
    api.resume(stopped.path)
    ended = [line for line in lines(stopped, "attempt") if line["round"] == 2]
    assert stopped.config().conditions.machine == machine and len(ended) == 2


def test_the_report_has_a_timeline_and_a_comparison_hours_and_work_lost(runs, tmp_path):
    from comigs.experiments.compare.compared import compare_runs
    from comigs.experiments.compare.write import write_comparison
    from comigs.runs.report.page import report_page
    from comigs.runs.report.read import read_run
    from comigs.runs.report.timeline import timeline, took, worked_tokens

    read = read_run(runs.rough.path)
    shown = timeline(read)
    lost = [line for line in read.attempts if line.lost is not None]
    late = [line for line in read.absent if line.reason == "no answer by the deadline"]
    assert sum(span.outcome == "lost" for span in shown.spans) == len(lost)
    assert shown.ends[-1] == read.exchanges[-1].ended and late
    # naively: what was trained on, without what has a line of training that counted
    naive = sum(line.tokens for line in read.attempts)
    naive -= sum(line.trained_tokens + line.router_tokens for line in read.train)
    worked, counted = worked_tokens(read)
    assert sum(worked.values()) - sum(counted.values()) == naive > 0
    # all that was sent, whether it counted or not, of what was lost as far as it came
    for name, result in read.summary.clients.items():
        sent = sum(attempt.uploaded_bytes for attempt in read.attempts if attempt.client == name)
        counted = sum(line.uploaded_bytes for line in read.train if line.client == name)
        assert result.uploaded_bytes == sent >= counted
    assert sum(result.uploaded_bytes for result in read.summary.clients.values()) > sum(
        line.uploaded_bytes for line in read.train
    )
    page = report_page(read)
    assert f"All rounds took {took(read)}. " in page and took(read).startswith(
        duration(read.exchanges[-1].ended)
    )
    assert (
        "<h2>Timeline</h2>" in page and "of the tokens that were trained on came to nothing" in page
    )
    assert timeline(read_run(runs.off.path)) is None

    root = tmp_path / "both"
    root.mkdir()
    for name, limit in (("fast", 200), ("slow", 100)):
        conditions = {"tokens_per_second": limit, "clients": {"bob": {"dropout": 1}}}
        runs(root / name, conditions=conditions)
    compared = compare_runs([root])
    ((_, costs),) = [each for each in compared.tables() if each[0].endswith("costs per client")]
    column = costs.headers.index("simulated time")
    seconds = [row[column] for row in costs.rows]
    ends = [read_run(root / name).exchanges[-1].ended for name in ("fast", "slow")]
    assert sorted(seconds) == sorted(f"{end:.1f} s" for end in ends)
    assert "work lost" in costs.headers
    written = write_comparison(compared, tmp_path / "out")
    assert any(path.name == "by-hours.svg" for path in written)
    assert "Against simulated hours" in (tmp_path / "out" / "compare.html").read_text()


def test_the_report_says_what_each_group_did_and_came_to(runs):
    from comigs.runs.report.groups_table import groups_table
    from comigs.runs.report.page import report_page
    from comigs.runs.report.read import read_run

    groups = {
        "lossy": {"share": 0.5, "dropout": 0.6},
        "nobody": {"share": 1e-9, "dropout": 0.9},
    }
    conditions = {"tokens_per_second": 100, "groups": groups}
    folder = runs("groups", "ada bob cyd dan", conditions=conditions, rounds=4, seed=3)
    read = read_run(folder.path)
    lossy = {a.client for a in read.attempts if a.lost is not None}
    firm = set(read.clients) - lossy
    table = groups_table(read)
    assert [row[:2] for row in table.rows] == [("lossy", str(len(lossy))), (NONE, str(len(firm)))]
    assert '<th scope="row">lossy</th>' in report_page(read)
    for row, names in zip(table.rows, (lossy, firm), strict=True):
        took_part = [sum(line.client == name for line in read.train) for name in names]
        assert row[2] == f"{np.median(took_part):g} ({min(took_part)} to {max(took_part)})"
        tried = sum(a.tokens for a in read.attempts if a.client in names)
        came = sum(t.local_tokens + t.router_tokens for t in read.train if t.client in names)
        assert row[3] == f"{100 * (1 - came / tried):.1f} %"
        scores = [read.summary.clients[name] for name in names]
        base = np.mean([score.base_test.perplexity for score in scores])
        own = np.mean([score.test.perplexity for score in scores])
        assert row[4:6] == (perplexity(base), perplexity(own))
        assert row[6] == percent(1 - own / base)
    assert groups_table(read_run(runs.rough.path)) is None


def test_a_round_that_was_asked_again_is_one_round_and_the_console_says_its_time(capsys):
    from comigs.app.console import Console

    parts = [(1, 0.0, 60.0), (2, 60.0, 70.0), (2, 70.0, 3720.0)]
    exchanges = [Exchange(round=r, began=began, ended=ended) for r, began, ended in parts]
    assert round_times(exchanges) == {1: (0.0, 60.0), 2: (60.0, 3720.0)}
    Console(load_config("configs/quickstart.toml")).report(exchanges[2])
    said = "round 2/6  took 60.8 min of simulated time; 62.0 min since the run began"
    assert capsys.readouterr().out.strip() == said


def test_work_whose_upload_was_lost_and_sent_again_is_not_lost(runs):
    from comigs.runs.report.read import read_run
    from comigs.runs.report.timeline import timeline, work_lost

    trace = "client,seconds,available\nada,0,1\nada,6,0\nada,7,1\nada,1e5,1\nbob,0,1\nbob,1e5,1\n"
    conditions = {"tokens_per_second": 100, "upload": 1000, "trace": trace}
    folder = runs("again", "ada bob", conditions=conditions, rounds=1)
    read = read_run(folder.path)
    assert [(a.client, a.lost) for a in read.attempts if a.tokens == 0] == [("ada", None)]
    assert [a.client for a in read.attempts if a.lost] == ["ada"]
    assert work_lost(read) == 0

    # What came in time and was refused is not called late.
    refused = replace(read, train=tuple(line for line in read.train if line.client == "ada"))
    assert [s.outcome for s in timeline(refused).spans if s.client == "bob"] == ["refused"]


def test_what_is_sent_in_a_later_round_is_counted_once_and_drawn_as_late(runs):
    from comigs.runs.report.read import read_run
    from comigs.runs.report.timeline import timeline

    # ada is lost while it sends its answers to rounds 2 and 3, and sends each when it is asked next
    switches = "ada,0,1\nada,65,0\nada,169.5,1\nada,180,0\nada,281,1\nada,1e6,1\n"
    trace = f"client,seconds,available\n{switches}bob,0,1\nbob,1e6,1\n"
    conditions = {"tokens_per_second": 100, "upload": 1000, "trace": trace, "patience": 1}
    folder = runs(
        "resent",
        "ada bob",
        conditions=conditions | {"clients": {"bob": {"tokens_per_second": 5}}},
        participation={"deadline": 200, "late": "discount", "max_failures": 9},
        evaluation={"every": 0, "keep": "last"},
        rounds=4,
    )
    read = read_run(folder.path)
    resent = [a for a in read.attempts if a.answers is not None]
    assert [(a.client, a.round, a.answers) for a in resent] == [("ada", 3, 2), ("ada", 4, 3)]
    assert ("ada", 2) in {(line.client, line.round) for line in read.train}
    drawn = {s.begins: s.outcome for s in timeline(read).spans if s.client == "ada"}
    assert [drawn[a.asked] for a in resent] == ["late", "late"]
    last = {line["client"]: line["downloaded_bytes"] for line in lines(folder, "download")}
    for name, result in folder.summary().clients.items():
        own = [a for a in read.attempts if a.client == name]
        assert result.uploaded_bytes == sum(a.uploaded_bytes for a in own)
        received = sum(a.downloaded_bytes for a in own)
        assert result.downloaded_bytes - last[name] == received


def test_a_client_that_is_away_counts_as_it_was_last_measured_and_at_first_as_the_base():
    config = parse_config({"clients": [{"name": name, "text": name} for name in ("ada", "bob")]})
    rounds = [{"round": 0, "client": name, "valid_perplexity": 100.0} for name in ("ada", "bob")]
    for round, seen in ((1, {"ada": 60.0}), (2, {"ada": 50.0, "bob": 80.0}), (3, {"bob": 40.0})):
        rounds.append({"round": round, "client": None, "simulated_seconds": 3600.0 * round})
        rounds += [{"round": round, "client": n, "valid_perplexity": v} for n, v in seen.items()]
    run = RunData(Path("run"), config, {}, True, 3, (), tuple(rounds))
    setting = Setting("comigs", "comigs", {}, {}, {42: run})
    points = [(hours, value.mean) for hours, value in mean_by_hour(setting, "perplexity")]
    assert points == [(1.0, 80.0), (2.0, 65.0), (3.0, 45.0)]
    assert hours_to(setting, "perplexity", 70.0) == 2.0
    assert final_valid(setting, "perplexity") == 45.0


def test_who_comes_only_at_the_end_hides_no_curve(runs):
    trace = "client,seconds,available\nada,0,1\nada,1e5,0\nbob,0,0\nbob,1e5,0\n"
    tree = {"conditions": {"tokens_per_second": 100, "trace": trace}, "rounds": 3}
    tree["participation"] = {"max_failures": 9}
    folder = runs("never", "ada bob", **tree, evaluation={"every": 1})
    data = read_run_folder(folder.path)
    points = mean_by_hour(Setting("comigs", "comigs", {}, {}, {42: data}), "perplexity")
    assert len(points) == 3
    (base,) = [
        line["perplexity"]
        for line in lines(folder, "evaluation")
        if (line["client"], line["model"], line["split"]) == ("bob", "base", "valid")
    ]
    (first,) = [
        line["perplexity"]
        for line in lines(folder, "evaluation")
        if (line["client"], line["round"], line["split"]) == ("ada", 1, "valid")
    ]
    assert points[0][1].mean == pytest.approx((base + first) / 2)


@pytest.mark.slow
def test_workers_make_no_difference(runs):
    spread = runs("spread", workers=2, **ROUGH)
    assert lines(spread) == lines(runs.rough)
