"""Who is asked, who is asked again, who is left out, and what a late upload counts for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comigs.config import parse_config
from comigs.errors import UserError
from comigs.methods.loading import load_method
from comigs.privacy.budget import SPENT
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Absent, RoundEnd, Train
from comigs.runs.summary import summarize
from comigs.server.participation import failures, left_out, participants
from comigs.server.pending import unpack_server, unpack_started
from comigs.server.sums import FEWEST, threshold_of, with_mean, without_sum
from tests.conftest import same
from tests.fake_engine import (
    GONE,
    SHAPE,
    A,
    B,
    Numbers,
    averaging,
    evaluation_of,
    lines_of,
    rounds_of,
    train_of,
)

FOUR = "ada bob cyd dan"


def config_of(number, seed=42, **participation):
    clients = [{"name": f"c{n:03}", "text": "x"} for n in range(number)]
    return parse_config({"clients": clients, "seed": seed, "participation": participation})


def gone(*when):
    """A trouble: (round, name) pairs in which a client does not answer."""
    return lambda name, task, reply: GONE if (task.round, name) in when else reply


def asked(engine):
    return [list(tasks) for tasks in engine.tasks]


# --- whom to ask


def test_participants_are_drawn_by_seed_and_round_and_come_in_the_configs_order():
    config = config_of(50, clients_per_round=7)
    drawn = [participants(config, round, ()) for round in range(1, 101)]
    assert drawn == [participants(config, round, ()) for round in range(1, 101)]
    assert drawn != [
        participants(config_of(50, seed=43, clients_per_round=7), round, ())
        for round in range(1, 101)
    ]
    assert all(len(names) == 7 == len(set(names)) and names == sorted(names) for names in drawn)
    turns = {name: sum(name in names for names in drawn) for names in drawn for name in names}
    assert (
        len(turns) == 50 and min(turns.values()) >= 3 and max(turns.values()) <= 30
    )  # 14 on average


def test_who_is_left_out_is_replaced_by_the_next_and_nobody_else_changes():
    config = config_of(20, clients_per_round=5)
    for round in range(1, 20):
        before = participants(config, round, ())
        after = participants(config, round, {before[2]})
        assert len(after) == 5 and len(set(after) & set(before)) == 4 and before[2] not in after
    assert participants(config, 1, {f"c{n:03}" for n in range(17)}) == ["c017", "c018", "c019"]


def test_all_are_asked_where_no_number_is_wanted():
    config = config_of(4)
    assert participants(config, 3, {"c001"}) == ["c000", "c002", "c003"]


def test_a_round_asks_as_many_as_wanted_says_whom_and_the_end_asks_everybody(tmp_path):
    engine = Numbers(FOUR)
    folder = rounds_of(tmp_path, engine, rounds=3, participation={"clients_per_round": 2})
    assert asked(engine) == [
        *(participants(folder.config(), r, ()) for r in (1, 2, 3)),
        FOUR.split(),
    ]
    assert [line["asked"] for line in lines_of(folder, "server")] == asked(engine)[:3]
    everybody = rounds_of(tmp_path, Numbers(FOUR), name="all", rounds=2)
    assert not any("asked" in line for line in lines_of(everybody, "server"))


def test_bytes_are_counted_when_they_are_delivered_also_to_who_is_asked_seldom_or_never(tmp_path):
    """Updates add up while a client is idle (flora, fedex-lora), so what waits for it grows."""

    class Deaf(Numbers):
        def answer(self, name, task, download):
            return super().answer(name, task, {})

    def aggregate(uploads, memory, facts):
        merged = {replace(A, part="update"): torch.zeros(2, 3)}
        return dict.fromkeys(facts.clients, merged), memory

    engine, method = Deaf(FOUR), replace(averaging(), aggregate=aggregate)
    folder = rounds_of(tmp_path, engine, method, rounds=4, participation={"clients_per_round": 1})
    got = dict.fromkeys(FOUR.split(), 0)
    for received in engine.received:
        for name, download in received.items():
            got[name] += sum(tensor.nbytes for tensor in download.values())
    summary = summarize(folder.config(), method, folder.metrics()).as_json()
    assert {name: c["downloaded_bytes"] for name, c in summary["clients"].items()} == got
    assert max(got.values()) == 4 * 24
    assert len(lines_of(folder, "train")) == 4 and len(lines_of(folder, "download")) == 4


def test_the_base_is_measured_when_a_client_is_first_asked_and_at_the_end_at_the_latest(tmp_path):
    engine = Numbers(FOUR)
    folder = rounds_of(tmp_path, engine, rounds=3, seed=3, participation={"clients_per_round": 1})
    met = set()
    for tasks in engine.tasks[:3]:
        for name, task in tasks.items():
            assert task.evaluate_base == (() if name in met else ("valid", "test"))
            met.add(name)
    assert met < set(FOUR.split())
    for name, task in engine.tasks[3].items():
        assert task.evaluate_base == (() if name in met else ("valid", "test"))
    base = [line for line in lines_of(folder, "evaluation") if line["model"] == "base"]
    for split in ("valid", "test"):
        assert sorted(x["client"] for x in base if x["split"] == split) == FOUR.split()


def test_who_did_not_answer_when_first_asked_is_asked_about_the_base_again(tmp_path):
    engine = Numbers(trouble=gone((1, "bob")))
    rounds_of(tmp_path, engine, rounds=2)
    assert [tasks["bob"].evaluate_base for tasks in engine.tasks] == [
        ("valid", "test"),
        ("valid", "test"),
        (),
    ]


# --- who is absent


def test_an_absence_is_a_line_and_the_round_goes_on_without(tmp_path):
    engine = Numbers(trouble=gone((2, "bob")))
    folder = rounds_of(tmp_path, engine, rounds=3)
    assert lines_of(folder, "absent") == [
        {"kind": "absent", "round": 2, "client": "bob", "reason": GONE}
    ]
    trained = [(line["round"], line["client"]) for line in lines_of(folder, "train")]
    assert trained == [(1, "ada"), (1, "bob"), (2, "ada"), (3, "ada"), (3, "bob")]
    assert same(
        engine.received[2]["bob"], engine.received[2]["ada"]
    )  # what it missed, it gets with the next


def absence(round, client):
    return Absent(round=round, client=client, reason=GONE)


def server(round, *names):
    return RoundEnd(round=round, asked=list(names) or None)


TRAINED = Train(**train_of(1, "bob"), uploaded_bytes=0, downloaded_bytes=0)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], 0),
        ([absence(1, "bob"), server(1)], 1),
        ([absence(1, "bob"), server(1), absence(2, "bob"), server(2)], 2),
        ([absence(1, "bob"), server(1), server(2)], 0),  # it answered
        ([absence(1, "bob"), server(1), server(2, "ada")], 1),  # it was not asked
        ([absence(1, "bob"), server(1), server(2, "ada"), absence(3, "bob"), server(3)], 2),
        ([absence(1, "bob"), server(1), server(2, "ada", "bob"), absence(3, "bob"), server(3)], 1),
        (
            [absence(1, "bob"), server(1), absence(1, "bob"), server(2)],
            0,
        ),  # a late one, dropped, and it answered
        (
            [absence(1, "bob"), server(1), TRAINED, absence(2, "bob"), server(2)],
            0,
        ),  # a late one that counted
    ],
)
def test_failures_in_a_row_follow_from_the_metrics(history, expected):
    assert failures(history)["bob"] == expected and "ada" not in failures(history)


def test_who_fails_too_often_is_left_out_which_is_said_once(tmp_path):
    trouble = gone((2, "bob"), (3, "bob"), (5, "bob"), (6, "bob"), (7, "bob"))
    engine = Numbers("ada bob cyd", trouble)
    folder = rounds_of(tmp_path, engine, rounds=9)
    assert [("bob" in names) for names in asked(engine)] == [True] * 7 + [False] * 3
    (warning,) = lines_of(folder, "warning")
    assert (warning["sign"], warning["client"], warning["round"]) == ("left-out", "bob", 7)
    assert "3 times in a row" in warning["message"] and GONE in warning["message"]
    assert left_out(folder.metrics()) == {"bob"}


def test_a_run_without_one_of_its_clients_has_a_result_of_the_others(tmp_path):
    engine = Numbers("ada bob cyd", lambda name, task, reply: "gone" if name == "bob" else reply)
    folder = rounds_of(tmp_path, engine, rounds=4, evaluation={"splits": ["valid", "test"]})
    config = folder.config()
    summary = summarize(config, load_method(config), folder.metrics()).as_json()
    assert (
        summary["clients"]["bob"]["test"] is None and summary["clients"]["bob"]["base_test"] is None
    )
    assert summary["clients"]["bob"]["uploaded_bytes"] == 0
    others = [summary["clients"][name]["test"]["nats_per_token"] for name in ("ada", "cyd")]
    assert summary["mean"]["clients"] == 2
    assert summary["mean"]["test"]["nats_per_token"] == pytest.approx(sum(others) / 2)


def test_who_is_gone_at_the_end_has_no_result_though_its_test_was_measured_on_the_way(tmp_path):
    engine = Numbers(trouble=gone((4, "bob")))
    folder = rounds_of(tmp_path, engine, rounds=3, evaluation={"splits": ["test"]})
    config = folder.config()
    bob = summarize(config, load_method(config), folder.metrics()).as_json()["clients"]["bob"]
    assert bob["test"] is None and bob["base_test"] is not None
    assert lines_of(folder, "absent") == [absence(4, "bob").as_json()]


@pytest.mark.parametrize("round", [2, 3, 4, 5])
def test_a_resumed_run_knows_who_failed_before(tmp_path, round):
    trouble = gone((1, "bob"), (2, "bob"), (3, "bob"))
    tree = {"rounds": 5, "participation": {"clients_per_round": 3}}
    whole = rounds_of(tmp_path, Numbers(FOUR, trouble), name="whole", **tree)
    first = participants(
        whole.config(), round, left_out(x for x in whole.metrics() if x.round < round)
    )[0]
    with pytest.raises(KeyboardInterrupt):
        rounds_of(tmp_path, Numbers(FOUR, trouble, fail_at=(round, first)), name="stopped", **tree)
    resumed = rounds_of(tmp_path, Numbers(FOUR, trouble), name="stopped", **tree)
    assert (resumed.path / "metrics.jsonl").read_bytes() == (
        whole.path / "metrics.jsonl"
    ).read_bytes()


# --- too few


def first_time(round, *names):
    """A trouble: clients that do not answer when first asked in that round."""
    left = {(round, name) for name in names}

    def trouble(name, task, reply):
        if (task.round, name) in left:
            left.remove((task.round, name))
            return GONE
        return reply

    return trouble


def test_a_round_with_too_few_uploads_is_asked_again_of_those_whose_upload_is_missing(tmp_path):
    notes = []
    engine = Numbers(FOUR, first_time(2, "bob", "cyd"))
    folder = rounds_of(
        tmp_path, engine, rounds=2, report=notes.append, participation={"min_clients": 3}
    )
    assert asked(engine) == [FOUR.split(), FOUR.split(), ["bob", "cyd"], FOUR.split()]
    assert engine.tasks[2]["bob"] == engine.tasks[1]["bob"]
    assert same(engine.received[2]["bob"], engine.received[1]["bob"])
    (note,) = [event for event in notes if event.kind == "note"]
    assert (
        "round 2: 2 of the 3 uploads" in note.message
        and f"bob: {GONE}" in note.message
        and note.say
    )
    whole = rounds_of(
        tmp_path, Numbers(FOUR), name="whole", rounds=2, participation={"min_clients": 3}
    )
    assert folder.metrics() == whole.metrics()  # the same rounds in the end, and nobody absent


def test_an_answer_to_the_first_asking_counts_when_asked_again(tmp_path):
    engine = Numbers("ada bob")

    def trouble(name, task, reply):
        if (task.round, name) == (2, "bob"):
            engine.late["bob"] = reply
            return GONE
        return reply

    engine.trouble = trouble
    folder = rounds_of(tmp_path, engine, rounds=2, participation={"min_clients": 2})
    whole = rounds_of(
        tmp_path, Numbers("ada bob"), name="whole", rounds=2, participation={"min_clients": 2}
    )
    assert folder.metrics() == whole.metrics() and asked(engine)[2] == ["bob"]


def test_others_take_the_place_of_who_never_answers(tmp_path):
    engine = Numbers(FOUR, lambda name, task, reply: "gone" if name == "bob" else reply)
    folder = rounds_of(
        tmp_path, engine, rounds=3, participation={"clients_per_round": 2, "min_clients": 2}
    )
    assert all(
        len([x for x in lines_of(folder, "train") if x["round"] == r]) == 2 for r in (1, 2, 3)
    )
    assert [line["client"] for line in lines_of(folder, "warning")] == ["bob"]
    (round,) = {line["round"] for line in lines_of(folder, "absent")}
    (line,) = [line for line in lines_of(folder, "server") if line["round"] == round]
    assert len(line["asked"]) == 3 and "bob" in line["asked"]


def test_where_too_few_are_left_the_run_stops_and_goes_on_when_they_are_back(tmp_path):
    engine = Numbers(
        "ada bob cyd",
        lambda name, task, reply: "gone" if name != "ada" and task.round == 2 else reply,
    )
    tree = {"rounds": 3, "participation": {"min_clients": 2, "max_failures": 4}}
    with pytest.raises(UserError) as error:
        rounds_of(tmp_path, engine, **tree)
    assert "\n" not in str(error.value) and str(error.value).startswith(
        "round 2: 1 of the 2 usable uploads"
    )
    assert "participation.min_clients" in str(error.value) and "comigs resume" in str(error.value)
    assert asked(engine)[1:] == [["ada", "bob", "cyd"], *[["bob", "cyd"]] * 3]
    folder = rounds_of(tmp_path, Numbers("ada bob cyd"), **tree)
    whole = rounds_of(tmp_path, Numbers("ada bob cyd"), name="whole", **tree)
    assert folder.metrics() == whole.metrics()


def test_a_spent_budget_ends_no_run_that_others_will_come_back_to(tmp_path):
    def answer(name, task, reply):
        gone = name != "ada" and task.round == 3
        return SPENT if name == "ada" and task.round > 1 else "gone" if gone else reply

    tree = {"rounds": 4, "participation": {"max_failures": 2}}
    tree["privacy"] = {"level": "document", "epsilon": 8.0}
    with pytest.raises(UserError, match=r"round 3: 0 of the 1 usable .* comigs resume"):
        rounds_of(tmp_path, Numbers("ada bob cyd", answer), **tree)


@pytest.mark.parametrize("first", [1, 2])
def test_where_no_budget_is_kept_to_say_that_it_is_spent_is_a_failure_like_any_other(
    tmp_path, first
):
    """No client ends a run so, nor is it out for good: all three say it, once."""
    names = "ada bob cyd"
    said = first_time(first, *names.split())

    def trouble(name, task, reply):
        return SPENT if said(name, task, reply) == GONE else reply

    engine = Numbers(names, trouble)
    folder = rounds_of(tmp_path, engine, rounds=3)
    whole = rounds_of(tmp_path, Numbers(names), name="whole", rounds=3)
    assert folder.metrics() == whole.metrics() and len(engine.tasks) == 5

    # In a round that goes on without it, it is absent, and asked again in the next.
    engine = Numbers(names, lambda n, t, r: SPENT if (t.round, n) == (2, "bob") else r)
    folder = rounds_of(tmp_path, engine, name="one", rounds=4)
    assert [("bob" in names) for names in asked(engine)] == [True] * 5
    assert not lines_of(folder, "warning")


# --- sums


class Summed(Numbers):
    """An engine whose uploads are summed, where so many come that there is a sum."""

    def exchange(self, tasks, downloads):
        answers = super().exchange(tasks, downloads)
        if not next(iter(tasks.values())).train:
            return answers
        needed = threshold_of(len(tasks), 0.66) if len(tasks) >= FEWEST else FEWEST
        if len(answers.replies) < needed:
            return without_sum(answers, tasks, f"{len(answers.replies)} of {needed} came")
        uploads = [reply.upload[A] for reply in answers.replies.values()]
        return with_mean(answers, answers.replies, {A: torch.stack(uploads).mean(0)})


SUMS = {"privacy": {"secure_aggregation": True}}


def test_who_spoils_a_sum_is_left_out_and_nobody_else(tmp_path):
    """Ten clients need seven, and four refuse; without these, six are enough."""
    names = [f"c{number}" for number in range(10)]

    def trouble(name, task, reply):
        return "would take longer" if name in names[:4] and task.train else reply

    engine = Summed(" ".join(names), trouble)
    folder = rounds_of(tmp_path, engine, rounds=2, **SUMS)
    assert asked(engine)[:5] == [names] * 3 + [names[4:]] * 2
    assert {line["client"] for line in lines_of(folder, "warning")} == set(names[:4])
    assert {line["client"] for line in lines_of(folder, "train")} == set(names[4:])


def test_where_nobody_has_spoiled_a_sum_asking_ends_nevertheless(tmp_path):
    engine = Summed("ada bob cyd", lambda name, task, reply: "gone" if name == "cyd" else reply)
    with pytest.raises(UserError, match="no sum of this round: 2 of 3 came"):
        rounds_of(tmp_path, engine, **SUMS)
    assert asked(engine) == [["ada", "bob", "cyd"]] * 3 + [["ada", "bob"]] * 3


def test_a_sum_is_asked_for_again_of_all_where_one_of_its_clients_does_not_count(tmp_path):
    """A sum of the one that is missing would be none."""
    left = ["bob"]

    def trouble(name, task, reply):
        if task.round == 2 and name in left:
            left.remove(name)
            return replace(reply, metrics=[line | {"client": "eve"} for line in reply.metrics])
        return reply

    tree = {"participation": {"min_clients": 3}, **SUMS}
    engine = Summed("ada bob cyd", trouble)
    folder = rounds_of(tmp_path, engine, **tree)
    whole = rounds_of(tmp_path, Summed("ada bob cyd"), name="whole", **tree)
    assert asked(engine) == [["ada", "bob", "cyd"]] * 4 and folder.metrics() == whole.metrics()


@pytest.mark.parametrize("answer", ["none", "no upload", "NaN", "somebody else's"])
def test_a_run_ends_whatever_clients_answer(tmp_path, answer):
    def trouble(name, task, reply):
        other = {
            "none": "gone",
            "no upload": type(reply)(None, [], reply.timing, 9, reply.round),
            "NaN": type(reply)(
                {A: torch.full(SHAPE, torch.nan)}, reply.metrics, reply.timing, 9, reply.round
            ),
            "somebody else's": type(reply)(
                reply.upload, [x | {"client": "eve"} for x in reply.metrics], reply.timing
            ),
        }
        return other[answer]

    engine = Numbers(trouble=trouble)
    with pytest.raises(UserError, match="too few are left to ask"):
        rounds_of(tmp_path, engine)
    assert len(engine.tasks) <= 3 and RunFolder.open(tmp_path / "run").checkpoint().round == 0


# --- late uploads


def late_in(round, *names):
    """An engine whose clients answer that round with the next exchange."""
    engine = Numbers("ada bob cyd")

    def trouble(name, task, reply):
        if task.round == round and name in names:
            engine.late[name] = reply
            return GONE
        return reply

    engine.trouble = trouble
    return engine


def test_a_late_upload_is_dropped_and_said_so(tmp_path):
    folder = rounds_of(tmp_path, late_in(2, "bob"), rounds=4)
    assert [(x["round"], x["client"], x["reason"]) for x in lines_of(folder, "absent")] == [
        (2, "bob", GONE),
        (2, "bob", "too late, in round 3: dropped"),
    ]
    without = rounds_of(
        tmp_path, Numbers("ada bob cyd", gone((2, "bob"))), name="without", rounds=4
    )
    assert lines_of(folder, "train") == lines_of(without, "train")


DISCOUNT = {"late": "discount", "late_discount": 0.25}


def watched(seen):
    """Plain averaging that shows what counted."""

    def aggregate(uploads, memory, facts):
        seen.append(
            {
                name: {slot: t.clone() for slot, t in upload.items()}
                for name, upload in uploads.items()
            }
        )
        return dict.fromkeys(facts.clients, facts.mean(uploads.values())), memory

    return averaging(aggregate=aggregate)


def test_a_late_upload_counts_as_its_step_from_the_newest_download_at_a_discount(tmp_path):
    seen, engine = [], late_in(2, "bob")
    steady, engine.trouble = engine.trouble, None

    def trouble(name, task, reply):
        return GONE if (task.round, name) == (3, "bob") else steady(name, task, reply)

    engine.trouble = trouble
    late = {}
    answer = engine.answer
    engine.answer = lambda name, task, download: late.setdefault(
        (name, task.round), answer(name, task, download)
    )
    folder = rounds_of(tmp_path, engine, watched(seen), rounds=4, participation=DISCOUNT)
    started, now = engine.received[1]["bob"][A], engine.received[2]["bob"][A]
    upload = late["bob", 2].upload[A]
    assert list(seen[2]) == ["ada", "bob", "cyd"]
    torch.testing.assert_close(seen[2]["bob"][A], now + 0.25 * (upload - started))
    trained = [line["round"] for line in lines_of(folder, "train") if line["client"] == "bob"]
    assert trained == [1, 2, 4]  # what it reported of the round in which it was late is kept
    assert [line["round"] for line in lines_of(folder, "absent")] == [2, 3]
    assert failures(folder.metrics())["bob"] == 0


def test_a_late_upload_does_not_count_beside_a_newer_one(tmp_path):
    seen = []
    folder = rounds_of(tmp_path, late_in(2, "bob"), watched(seen), rounds=4, participation=DISCOUNT)
    plain = []
    rounds_of(tmp_path, Numbers("ada bob cyd", gone((2, "bob"))), watched(plain), "plain", rounds=4)
    assert all(same(a[name], b[name]) for a, b in zip(seen, plain, strict=True) for name in b)
    assert [line["reason"] for line in lines_of(folder, "absent")] == [
        GONE,
        "too late, in round 3: it sent a newer one",
    ]


def test_whoever_is_always_a_round_late_is_not_left_out_where_that_counts(tmp_path):
    engine = Numbers("ada bob cyd")

    def trouble(name, task, reply):
        if name == "bob" and task.train:
            engine.late[name] = reply
            return GONE
        return reply

    engine.trouble = trouble
    seen = []
    folder = rounds_of(tmp_path, engine, watched(seen), rounds=8, participation=DISCOUNT)
    assert all("bob" in names for names in asked(engine)) and not lines_of(folder, "warning")
    assert [list(uploads) for uploads in seen] == [["ada", "cyd"]] * 2 + [["ada", "bob", "cyd"]] * 6


@pytest.mark.parametrize("pending, most, kept", [(None, 99, 4), (set(), 99, 0), (None, 2, 0)])
def test_of_who_never_answers_little_is_kept_to_discount_by(tmp_path, pending, most, kept):
    """pending: whom the engine still expects. most: failures after which it is left out."""
    engine = Numbers("ada bob cyd", lambda name, task, reply: GONE if name == "bob" else reply)
    exchange = engine.exchange
    engine.exchange = lambda tasks, sent: replace(exchange(tasks, sent), pending=pending)
    tree = {"rounds": 9, "participation": {**DISCOUNT, "max_failures": most}}
    assert len(started(tmp_path, engine, 9, **tree).get("bob", ())) == kept


def started(root, engine, end, **tree):
    """What late uploads may have started from when a run is in the round of that number."""
    engine.fail_at = end, "ada"
    with pytest.raises(KeyboardInterrupt):
        rounds_of(root, engine, **tree)
    return unpack_started(engine.folder.load("server/state"))


def test_what_was_answered_late_is_needed_no_more_and_of_who_answers_nothing_is_kept(tmp_path):
    tree = {"rounds": 4, "participation": DISCOUNT}
    assert list(started(tmp_path / "a", late_in(2, "bob"), 3, **tree)["bob"]) == [2]
    assert not started(tmp_path / "b", late_in(2, "bob"), 4, **tree)


def test_a_late_upload_that_started_from_no_download_is_dropped(tmp_path):
    folder = rounds_of(tmp_path, late_in(1, "bob"), rounds=3, participation=DISCOUNT)
    assert lines_of(folder, "absent")[1]["reason"].startswith("too late, in round 2: ")


@pytest.mark.parametrize(
    ("upload", "says"),
    [
        ({A: torch.full(SHAPE, torch.nan)}, f"not finite: {A}"),
        ({A: torch.zeros(3, 2)}, f"shape (3, 2) instead of (2, 3): {A}"),
        ({}, f"missing: {A}"),
        ({A: torch.full(SHAPE, 1e9)}, "(upload.max_norm_ratio)"),
        (None, "metrics of something else than it was asked for"),
    ],
)
def test_a_late_upload_is_checked_like_any_other(tmp_path, upload, says):
    """dan is late in round 2 and silent in round 3, so that what came late would count."""
    engine = Numbers(FOUR)

    def trouble(name, task, reply):
        if (task.round, name) == (2, "dan"):
            engine.late[name] = replace(reply, upload=upload)
        return GONE if (task.round, name) in ((2, "dan"), (3, "dan")) else reply

    engine.trouble, seen = trouble, []
    folder = rounds_of(tmp_path, engine, watched(seen), rounds=4, participation=DISCOUNT)
    assert [list(uploads) for uploads in seen] == [
        FOUR.split(),
        *[["ada", "bob", "cyd"]] * 2,
        FOUR.split(),
    ]
    (line,) = [x for x in lines_of(folder, "absent") if x["reason"] != GONE]
    assert (
        line["round"] == 2
        and line["reason"].startswith("too late, in round 3: ")
        and says in line["reason"]
    )


def test_what_comes_late_from_who_is_left_out_is_dropped(tmp_path):
    engine = late_in(2, "bob")
    folder = rounds_of(tmp_path, engine, rounds=4, participation={**DISCOUNT, "max_failures": 1})
    assert lines_of(folder, "absent")[1]["reason"] == "too late, in round 3: dropped"


def test_what_comes_late_at_the_very_end_is_dropped(tmp_path):
    folder = rounds_of(tmp_path, late_in(3, "bob"), rounds=3, participation=DISCOUNT)
    assert [(x["round"], x["reason"]) for x in lines_of(folder, "absent")] == [
        (3, GONE),
        (3, "too late, in round 4: dropped"),
    ]


def test_a_late_upload_of_other_slots_than_the_rounds_is_dropped(tmp_path):
    """As in a method that shares by turns: half an upload is of no use."""
    by_turns = averaging(trains=lambda slot, round: slot == (B if round % 2 else A))

    def trouble(name, task, reply):
        if reply.upload:
            slot = B if task.round % 2 else A
            reply = type(reply)(
                {slot: reply.upload[slot]}, reply.metrics, reply.timing, 9, reply.round
            )
        if (task.round, name) == (3, "bob"):
            engine.late[name] = reply
        return GONE if (task.round, name) in ((3, "bob"), (4, "bob")) else reply

    engine = Numbers("ada bob cyd", trouble, slots=(A, B))
    folder = rounds_of(tmp_path, engine, by_turns, rounds=5, participation=DISCOUNT)
    assert [(x["round"], x["reason"]) for x in lines_of(folder, "absent")] == [
        (3, GONE),
        (3, "too late, in round 4: it does not fit this round"),
        (4, GONE),
    ]


# --- what idle clients cost


@pytest.mark.parametrize("by_turns", [False, True])
def test_idle_clients_cost_the_server_a_number_each(tmp_path, by_turns):
    """300 clients, 2 a round: what waits for all of them is a handful of tensors, and is what they
    end with.
    """
    names = " ".join(f"c{n}" for n in range(300))

    def trouble(name, task, reply):
        if by_turns and reply.upload:
            slot = B if task.round % 2 else A
            return type(reply)(
                {slot: reply.upload[slot]}, reply.metrics, reply.timing, 9, reply.round
            )
        return reply

    method = averaging(trains=lambda slot, round: not by_turns or slot == (B if round % 2 else A))
    engine = Numbers(names, trouble, slots=(A, B))
    kept = []

    def watch(event):
        if event.kind == "server":
            kept.append(engine.folder.load("server/state"))

    tree = {
        "rounds": 4,
        "participation": {"clients_per_round": 2},
        "evaluation": {"every": 0, "keep": "last"},
    }
    rounds_of(tmp_path, engine, method, report=watch, **tree)
    for packed in kept:
        assert sum(t.is_floating_point() for t in packed.values()) <= 3
        assert len({id(d) for d in unpack_server(packed)[0].values()}) <= 3
    last = engine.received[-1]
    assert len(last) == 300 and len({id(t) for d in last.values() for t in d.values()}) <= 3


# --- bad input


@pytest.mark.parametrize(
    ("participation", "says"),
    [
        (
            {"clients_per_round": 5},
            "participation.clients_per_round: given 5, but there are 4 clients; allowed: 1 to 4",
        ),
        ({"clients_per_round": 0}, "participation.clients_per_round: given 0; must be 1 or more"),
        (
            {"clients_per_round": 2, "min_clients": 3},
            "participation.min_clients: given 3, but 2 clients are asked in a round; "
            "allowed: 1 to 2",
        ),
        (
            {"min_clients": 5},
            "participation.min_clients: given 5, but 4 clients are asked in a round; "
            "allowed: 1 to 4",
        ),
        ({"deadline": 0}, "participation.deadline: given 0; must be above 0"),
        ({"late_discount": 1.5}, "participation.late_discount: given 1.5; must be 1.0 or less"),
        ({"max_failures": 0}, "participation.max_failures: given 0; must be 1 or more"),
        ({"late": "discard"}, "participation.late: given 'discard'; must be 'drop' or 'discount'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(participation, says):
    with pytest.raises(UserError) as error:
        config_of(4, **participation)
    assert str(error.value).startswith(f"config: {says}") and "\n" not in str(error.value)


@pytest.mark.parametrize("participation", [{"clients_per_round": 2}, {"min_clients": 2}])
def test_one_model_on_pooled_text_has_nobody_to_choose_from(participation):
    config = config_of(4, **participation).model_copy(update={"method": "centralized"})
    with pytest.raises(
        UserError,
        match=r"^participation\.\w+: given 2, but centralized trains one model in one place",
    ):
        load_method(config)
    load_method(config_of(4, clients_per_round=4).model_copy(update={"method": "centralized"}))


def test_weights_are_given_to_all_clients_or_none():
    clients = [{"name": "ann", "text": "x", "weight": 2}, {"name": "bob", "text": "y"}]
    with pytest.raises(UserError, match=r"^config: clients\.bob\.weight: missing, but ann has one"):
        parse_config({"clients": clients})


def test_lines_about_somebody_else_do_not_count(tmp_path):
    """A client cannot leave another out, or report for it, by what it writes about."""
    forged = {"kind": "warning", "round": 1, "client": "bob", "sign": "left-out", "message": "x"}
    for line in (
        forged,
        evaluation_of(0, "bob", "test", "base"),
        evaluation_of(0, "eve", "test", "base"),
    ):

        def trouble(name, task, reply, line=line):
            return (
                type(reply)(reply.upload, [*reply.metrics, line], reply.timing, 9, reply.round)
                if (name == "eve")
                else reply
            )

        folder = rounds_of(
            tmp_path,
            Numbers("ada bob eve", trouble),
            name=f"run {len(line)} {line['client']}",
            rounds=1,
        )
        assert {x["client"] for x in lines_of(folder, "train")} == {"ada", "bob"}
        assert {x["client"] for x in lines_of(folder, "absent")} == {"eve"}
        assert not lines_of(folder, "warning")
