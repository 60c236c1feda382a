"""Every reply is checked before it counts: a bad one is named and left out, and the run goes on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from comigs.config import UploadSection
from comigs.methods.loading import load_method
from comigs.runs.summary import summarize
from comigs.server.protocol import Reply, Task
from comigs.server.validation import (
    check_lines,
    check_upload,
    common_start,
    most_figures,
    step_length,
    too_long,
)
from comigs.slots import Slot
from tests.conftest import run_config, same, start_engine
from tests.fake_engine import (
    SHAPE,
    A,
    B,
    Numbers,
    averaging,
    evaluation_of,
    lines_of,
    rounds_of,
    timing_of,
    train_of,
)

EXPECTED = {A: (2, 3), B: (4, 2)}
OTHER = Slot(3, "up", "s0", "A")


def upload(**changes):
    return {A: torch.ones(2, 3), B: torch.zeros(4, 2)} | changes


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (upload(), None),
        (
            {A: torch.ones(2, 3, dtype=torch.float64), B: torch.zeros(4, 2, dtype=torch.bfloat16)},
            None,
        ),
        ({A: torch.ones(2, 3)}, f"missing: {B}"),
        ({}, f"missing: {A}"),
        (upload() | {OTHER: torch.ones(1)}, f"not asked for: {OTHER}"),
        (upload() | {A: torch.ones(3, 2)}, f"shape (3, 2) instead of (2, 3): {A}"),
        (upload() | {B: torch.ones(4, 2, 1)}, f"shape (4, 2, 1) instead of (4, 2): {B}"),
        (upload() | {A: torch.ones(2, 3, dtype=torch.int64)}, f"int64 instead of floating: {A}"),
        (
            upload() | {A: torch.ones(2, 3, dtype=torch.complex64)},
            f"complex64 instead of floating: {A}",
        ),
        (upload() | {B: torch.full((4, 2), torch.inf)}, f"not finite: {B}"),
        (
            upload() | {B: torch.zeros(4, 2).index_fill(0, torch.tensor([3]), torch.nan)},
            f"not finite: {B}",
        ),
    ],
)
def test_what_is_wrong_with_an_upload_is_said_by_slot(given, says):
    assert check_upload(given, EXPECTED) == says


def test_a_step_is_measured_from_the_download_and_else_from_the_common_start():
    random = np.random.default_rng(0)
    sent, start, given = ({s: random.normal(size=d) for s, d in EXPECTED.items()} for _ in range(3))
    as_tensors = [
        {s: torch.from_numpy(x) for s, x in tensors.items()} for tensors in (given, sent, start)
    ]
    drawn = lambda slot, dims: as_tensors[2][slot]  # noqa: E731
    whole = np.sqrt(sum(((given[s] - sent[s]) ** 2).sum() for s in EXPECTED))
    assert step_length(*as_tensors[:2], drawn) == pytest.approx(whole, rel=1e-12)
    half = np.sqrt(((given[A] - sent[A]) ** 2).sum() + ((given[B] - start[B]) ** 2).sum())
    assert step_length(as_tensors[0], {A: as_tensors[1][A]}, drawn) == pytest.approx(
        half, rel=1e-12
    )


def test_the_common_start_is_what_every_client_starts_with(tmp_path):
    started = start_engine(run_config(tmp_path, seed=7))
    start = common_start(7)
    for client in started.clients.values():
        for slot, tensor in client.send(1).items():
            assert torch.equal(start(slot, tuple(tensor.shape)), tensor)
            assert start(slot, tuple(tensor.shape)) is start(
                slot, tuple(tensor.shape)
            )  # drawn once


@pytest.mark.parametrize(
    ("lengths", "limits", "refused"),
    [
        ({"a": 1.0, "b": 9.9, "c": 1.0}, {}, {}),
        ({"a": 1.0, "b": 10.1, "c": 1.0}, {}, {"b": "max_norm_ratio"}),
        ({"a": 1.0, "b": 1e6}, {}, {}),  # of two, nobody knows which one is usual
        ({"a": 0.0, "b": 1e6, "c": 0.0}, {}, {}),  # nor where most did not move
        ({"a": 1.0, "b": 5.0, "c": 3.0}, {"max_norm": 2.5}, {"b": "max_norm", "c": "max_norm"}),
        ({"a": 1.0, "b": 9.0, "c": 3.0}, {"max_norm_ratio": 2.0}, {"b": "max_norm_ratio"}),
        ({"a": 1.0, "b": 1e9, "c": 3.0}, {"max_norm_ratio": 1e30}, {}),
        ({}, {"max_norm": 1.0}, {}),
    ],
)
def test_a_step_is_too_long_by_itself_or_beside_the_others(lengths, limits, refused):
    found = too_long(lengths, UploadSection(**limits))
    assert found.keys() == refused.keys()
    assert all(
        f"(upload.{refused[name]})" in why and "\n" not in why for name, why in found.items()
    )


# --- in a run

LIES = {
    "NaN": lambda u: {A: u[A] * torch.nan},
    "a million times": lambda u: {A: u[A] * 1e6},
    "another shape": lambda u: {A: torch.zeros(3, 2)},
    "another slot": lambda u: {OTHER: u[A]},
    "one more slot": lambda u: u | {B: u[A]},
    "nothing": lambda u: {},
    "whole numbers": lambda u: {A: torch.ones(SHAPE, dtype=torch.int32)},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_run_with_a_liar_is_the_run_without_it(tmp_path, lie):
    def lying(name, task, reply):
        return (
            replace(reply, upload=LIES[lie](reply.upload))
            if name == "dan" and task.train
            else reply
        )

    def away(name, task, reply):
        return "gone" if name == "dan" and task.train else reply

    tree = {"rounds": 4, "participation": {"max_failures": 9}}
    with_liar = rounds_of(tmp_path, Numbers("ada bob cyd dan", lying), name="liar", **tree)
    without = rounds_of(tmp_path, Numbers("ada bob cyd dan", away), name="without", **tree)
    absent = lines_of(with_liar, "absent")
    assert [(line["round"], line["client"]) for line in absent] == [
        (r, "dan") for r in (1, 2, 3, 4)
    ]
    assert all(line["reason"] != "gone" for line in absent)
    assert lines_of(with_liar, "train") == lines_of(without, "train")
    results = []
    for folder in (with_liar, without):
        config = folder.config()
        results.append(summarize(config, load_method(config), folder.metrics()).clients)
    for name in ("ada", "bob", "cyd"):
        assert results[0][name] == results[1][name]
        one, other = (folder.load(f"clients/{name}/personal") for folder in (with_liar, without))
        assert same(one, other)


def test_a_flipped_sign_is_no_fault_but_a_median_does_not_follow_it(tmp_path):
    """Its length is as usual: nothing shows it, which is what robust merging is for."""

    def flipping(name, task, reply):
        return (
            replace(reply, upload={A: -reply.upload[A]}) if name == "eve" and task.train else reply
        )

    ends = {}
    for merge in ("mean", "median"):
        for trouble, liar in ((flipping, "liar"), (lambda name, task, reply: reply, "honest")):
            engine = Numbers("ada bob cyd dan eve", trouble)
            folder = rounds_of(
                tmp_path, engine, name=f"{merge} {liar}", rounds=3, upload={"merge": merge}
            )
            assert not lines_of(folder, "absent")
            ends[merge, liar] = folder.load("clients/ada/personal")[str(A)].mean()
    assert abs(ends["median", "liar"] - ends["median", "honest"]) < abs(
        ends["mean", "liar"] - ends["mean", "honest"]
    )


def test_a_client_that_only_lies_is_left_out_and_what_it_was_sent_is_not_sent_again(tmp_path):
    def lying(name, task, reply):
        return (
            replace(reply, upload={A: reply.upload[A] * torch.nan})
            if name == "bob" and task.train
            else reply
        )

    def each_its_own(
        uploads, memory, facts
    ):  # in rounds, so that one that was not delivered would be seen
        return {
            name: {A: facts.mean(uploads.values())[A]} for name in facts.clients if name in uploads
        }, memory

    engine = Numbers("ada bob cyd", lying)
    folder = rounds_of(tmp_path, engine, averaging(aggregate=each_its_own), rounds=5)
    assert ["bob" in tasks for tasks in engine.tasks] == [True] * 3 + [False] * 3
    assert [line["client"] for line in lines_of(folder, "warning")] == ["bob"]
    assert not any("bob" in received for received in engine.received)


def test_an_upload_that_is_too_long_is_named_with_its_setting(tmp_path):
    def long(name, task, reply):
        return (
            replace(reply, upload={A: reply.upload[A] + 1e3})
            if (name, task.round) == ("bob", 2)
            else reply
        )

    folder = rounds_of(tmp_path, Numbers("ada bob", long), rounds=3, upload={"max_norm": 100})
    (line,) = lines_of(folder, "absent")
    assert (line["round"], line["client"]) == (2, "bob") and line["reason"].endswith(
        "above 100 (upload.max_norm)"
    )


# --- what a client says about itself

TASK = Task(round=3, train=True, evaluate=("valid",), evaluate_base=("test",))


def reply_of(*more, **timing):
    lines = [
        evaluation_of(0, "ada", "test", "base"),
        evaluation_of(2, "ada", "valid", "personal"),
        train_of(3, "ada"),
    ]
    return Reply({A: torch.zeros(SHAPE)}, [*lines, *more], timing_of(3, "ada") | timing, 9, 3)


def changed(number, **changes):
    reply = reply_of()
    reply.metrics[number] |= changes
    return reply


@pytest.mark.parametrize(
    "reply",
    [
        reply_of(evaluation_of(2, "ada", "test", "personal")),  # nobody asked
        reply_of(train_of(3, "ada")),  # twice
        reply_of(seconds=float("nan")),
        reply_of(client="bob"),
        reply_of(round=2),
        reply_of(path="/home"),
        changed(0, round=1),
        changed(1, round=3),
        changed(2, round=4),
        changed(2, client="bob"),
        changed(1, split="train"),
        changed(1, model="mine"),
        changed(1, perplexity=float("inf")),
        changed(1, tokens="9"),
        changed(1, note="x"),
        changed(2, kind="warning"),
        changed(2, kind="server"),
        changed(2, train_nats_per_token_by_step=[float("nan")]),
        changed(2, trained_tokens=True),
        changed(2, trained_tokens=-1),
        changed(1, kept_part="base"),  # while the run goes on
        changed(2, trained_tokens=10**400),
        changed(1, tokens=10**400),
        changed(1, perplexity=1.7e308),
        changed(1, expert_share_by_layer=[[]]),
        reply_of(seconds=1e308),
        changed(1, expert_share_by_layer=[[0.5, 7.0]]),
        changed(2, train_nats_per_token=-1e300),
        replace(reply_of(), metrics=[]),
        replace(reply_of(), upload=None),
        replace(reply_of(), round=2),
        replace(reply_of(), timing={}),
    ],
)
def test_lines_that_are_not_what_was_asked_for_are_refused(reply):
    assert check_lines(reply_of(), "ada", TASK) is None
    why = check_lines(reply, "ada", TASK)
    assert why is not None and "\n" not in why and "/home" not in why


@pytest.mark.parametrize(
    ("number", "field", "value"),
    [
        (2, "train_nats_per_token_by_step", [1.0] * 500_000),
        (1, "expert_share_by_layer", [[0.5] * 1000] * 500),
        (1, "expert_share_by_layer", [[0.5]] * 500_000),
        (2, "generalist_share_by_layer", [1] * 500_000),
    ],
)
def test_lists_without_end_are_refused_for_they_would_stay_in_the_servers_memory(
    tmp_path, number, field, value
):
    config = run_config(tmp_path)
    most = most_figures(config, start_engine(config).engine.shapes["ada"])
    assert check_lines(reply_of(), "ada", TASK, most=most) is None
    assert "figures" in check_lines(changed(number, **{field: value}), "ada", TASK, most=most)


def test_what_real_clients_write_is_accepted(tmp_path):
    for method in ("comigs", "fedavg", "centralized"):
        config = run_config(tmp_path, method=method)
        engine = start_engine(config).engine
        for task in (
            Task(1, True, (), ("valid", "test")),
            Task(3, False, ("valid", "test", "train"), ("test",)),
        ):
            for name, reply in engine.exchange(
                dict.fromkeys(("ada", "bob"), task), {}
            ).replies.items():
                most = most_figures(config, engine.shapes[name]) / 16  # far below
                assert check_lines(reply, name, task, not task.train, most=most) is None


def test_the_line_on_the_model_that_is_kept_says_one_round_of_this_run(tmp_path):
    engine = start_engine(run_config(tmp_path)).engine
    task = Task(3, False, ("valid", "test"), ())
    (reply,) = engine.exchange({"ada": task}, {}).replies.values()
    *measured, kept = reply.metrics

    def why(*lines, keeps=True):
        return check_lines(replace(reply, metrics=[*measured, *lines]), "ada", task, keeps)

    assert why(kept) is None and why(keeps=False) is None
    for lies in (
        [],
        [kept, kept],
        [kept.model_copy(update={"round": 0})],
        [kept.model_copy(update={"round": 3})],
        [kept.model_copy(update={"split": "valid"})],
        [kept.model_copy(update={"model": "base"})],
        [kept.model_copy(update={"client": "bob"})],
        [kept.model_copy(update={"perplexity": None})],
        [{**kept.as_json(), "perplexity": 1e305}],
        [{**kept.as_json(), "kept_part": "own expert"}],
        [{**kept.as_json(), "kept_part": "base\n"}],
        [{**kept.as_json(), "kept_part": "<b>"}],
    ):
        assert why(*lies) is not None, lies
    for part in ("base", "attention LoRA", "generalists", "specialist 12", "own expert 0"):
        assert why({**kept.as_json(), "kept_part": part}) is None
    assert why(kept, keeps=False) is not None
