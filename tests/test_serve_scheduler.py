"""Continuous batching: requests join and leave between passes, each writes what it would write
alone, all is bounded.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

from comigs.personal.serve.jobs import BROKEN, BUSY, LATE, STOPPING, Refused
from comigs.personal.serve.packed import PackedClient
from tests.serving import clients_on, job_for, prompt_of, run_until_idle, scheduler_on, word_base


@pytest.fixture(scope="module")
def base():
    return word_base()


@pytest.fixture(scope="module")
def clients(base):
    return clients_on(base)


def ids(heard, choice=0):
    return [token.id for token in heard.tokens(choice)]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "top_p": 0.7, "seed": 1}]
)
def test_a_text_is_the_same_alone_and_in_a_crowd(base, clients, settings):
    def jobs(scheduler):
        return [
            job_for(scheduler, clients[n % 4], prompt_of(n, 3 + n), max_tokens=10, **settings)
            for n in range(8)
        ]

    with scheduler_on(base) as scheduler:
        alone = []
        for job, heard in jobs(scheduler):
            scheduler.submit([job])
            run_until_idle(scheduler)
            alone.append(ids(heard))
        crowd = jobs(scheduler)
        for job, _ in crowd:
            scheduler.submit([job])
            scheduler.step()  # the next joins while this one writes
        run_until_idle(scheduler)
    assert [ids(heard) for _, heard in crowd] == alone
    assert all(len(written) == 10 for written in alone) and len(set(map(tuple, alone))) > 4


def test_a_new_request_is_heard_of_after_one_pass_under_load(base, clients):
    with scheduler_on(base) as scheduler:
        load = [
            job_for(scheduler, clients[n % 4], prompt_of(n, 8), max_tokens=40) for n in range(8)
        ]
        scheduler.submit([job for job, _ in load])
        for _ in range(5):
            scheduler.step()
        job, heard = job_for(scheduler, clients[0], prompt_of(9, 32))
        scheduler.submit([job])
        before = scheduler.passes
        run_until_idle(scheduler)
    assert heard.passes[0] - before == 1
    for _, each in load:  # and nobody missed a pass for it
        assert each.passes == list(range(each.passes[0], each.passes[0] + 40))


def test_a_long_prompt_is_read_in_parts_beside_those_who_write():
    base = word_base(window=256)
    clients = clients_on(base)
    with scheduler_on(base, pass_tokens=64) as scheduler:
        job, heard = job_for(scheduler, clients[0], prompt_of(1, 8), max_tokens=20)
        scheduler.submit([job])
        scheduler.step()
        long, answer = job_for(scheduler, clients[1], prompt_of(2, 180), max_tokens=4)
        other, second = job_for(scheduler, clients[2], prompt_of(3, 30), max_tokens=4)
        scheduler.submit([long, other])
        before = scheduler.passes
        run_until_idle(scheduler)
        alone, expected = job_for(scheduler, clients[1], prompt_of(2, 180), max_tokens=4)
        scheduler.limits = replace(scheduler.limits, pass_tokens=512)
        scheduler.submit([alone])
        run_until_idle(scheduler)
    assert answer.passes[0] - before == 3  # 64 + 64 + 52 tokens
    assert second.passes[0] - before == 4  # 12 tokens in the third pass, 18 in the fourth
    assert heard.passes == list(range(1, 21))
    assert ids(answer) == ids(expected)


def test_choices_share_one_reading_of_the_prompt_and_differ(base, clients):
    with scheduler_on(base) as scheduler:
        made = [
            job_for(
                scheduler, clients[1], prompt_of(1, 20), 3, temperature=1.0, seed=seed, max_tokens=6
            )
            for seed in (5, 5, 6)
        ]
        texts = []
        for job, heard in made:
            before = scheduler.passes
            scheduler.submit([job])
            run_until_idle(scheduler)
            assert (
                scheduler.passes - before == 6
            )  # one for the prompt and the first token of all three
            texts.append([ids(heard, choice) for choice in range(3)])
            assert [heard.finish(choice) for choice in range(3)] == ["length"] * 3
        greedy, heard = job_for(scheduler, clients[1], prompt_of(1, 20), 2)
        scheduler.submit([greedy])
        run_until_idle(scheduler)
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(written) for written in texts[0]}) == 3
    assert ids(heard, 0) == ids(heard, 1)


def test_without_a_seed_each_request_draws_anew(base, clients):
    with scheduler_on(base) as scheduler:
        made = [job_for(scheduler, clients[0], prompt_of(1, 5), temperature=1.0) for _ in range(3)]
        scheduler.submit([job for job, _ in made])
        run_until_idle(scheduler)
    assert len({tuple(ids(heard)) for _, heard in made}) == 3


def test_what_ends_a_text_is_no_part_of_it(base, clients):
    with scheduler_on(base) as scheduler:
        job, heard = job_for(scheduler, clients[0], prompt_of(1, 5))
        scheduler.submit([job])
        run_until_idle(scheduler)
    written = ids(heard)
    end = next(n for n in range(1, 8) if written[n] not in written[:n])
    with scheduler_on(base, frozenset([written[end]])) as scheduler:
        job, heard = job_for(scheduler, clients[0], prompt_of(1, 5))
        scheduler.submit([job])
        run_until_idle(scheduler)
    assert ids(heard) == written[:end] and heard.finish() == "stop"
    assert heard.events[-1].num_tokens == end


def test_rows_are_bounded_and_first_come_first_served(base, clients):
    with scheduler_on(base, rows=3) as scheduler:
        made = [
            job_for(scheduler, clients[n % 4], prompt_of(n, 4), 1 + n % 2, max_tokens=5)
            for n in range(6)
        ]
        scheduler.submit([job for job, _ in made])
        most = 0
        while scheduler.load() != (0, 0):
            scheduler.step()
            most = max(most, scheduler.load()[0])
    assert most == 3
    firsts = [heard.passes[0] for _, heard in made]
    assert firsts == sorted(firsts)
    assert all(len(ids(heard)) == 5 for _, heard in made)


def test_choices_that_have_not_forked_yet_keep_their_rows(base, clients):
    with scheduler_on(base, rows=4, pass_tokens=4) as scheduler:
        slow, heard = job_for(scheduler, clients[0], prompt_of(1, 12), 3, max_tokens=3)
        others = [job_for(scheduler, clients[1], prompt_of(n, 2), max_tokens=9) for n in range(3)]
        scheduler.submit([slow, *(job for job, _ in others)])
        most = 0
        while scheduler.load() != (0, 0):
            scheduler.step()
            most = max(most, scheduler.load()[0])
    assert most <= 4 and [len(ids(heard, n)) for n in range(3)] == [3, 3, 3]


def test_a_full_queue_refuses_all_of_a_request(base, clients):
    with scheduler_on(base, rows=1, queue=2) as scheduler:
        jobs = [job_for(scheduler, clients[0], prompt_of(1, 4))[0] for _ in range(4)]
        scheduler.submit(jobs[:1])
        scheduler.step()
        scheduler.submit(jobs[1:2])
        with pytest.raises(Refused) as refused:
            scheduler.submit(jobs[2:])
        assert refused.value.failure is BUSY and scheduler.load() == (1, 1)


def test_who_leaves_frees_rows_before_the_next_pass(base, clients):
    with scheduler_on(base, rows=2) as scheduler:
        first, heard = job_for(scheduler, clients[0], prompt_of(1, 4), 2, max_tokens=50)
        queued, nothing = job_for(scheduler, clients[1], prompt_of(2, 4))
        last, answer = job_for(scheduler, clients[2], prompt_of(3, 4))
        scheduler.submit([first, queued, last])
        for _ in range(3):
            scheduler.step()
        assert scheduler.load() == (2, 2)
        first.cancelled = queued.cancelled = True
        told = len(heard.events)
        scheduler.step()
        assert scheduler.load() == (1, 0) and len(heard.events) == told
        run_until_idle(scheduler)
    assert not nothing.events and len(ids(answer)) == 8


def test_a_deadline_ends_what_writes_and_what_waits(base, clients):
    with scheduler_on(base, rows=1) as scheduler:
        running, heard = job_for(
            scheduler, clients[0], prompt_of(1, 4), seconds=0.4, max_tokens=10**6
        )
        # it is late before the only row is free
        waiting, also = job_for(scheduler, clients[0], prompt_of(1, 4), seconds=0.2)
        scheduler.submit([running, waiting])
        began = time.monotonic()
        run_until_idle(scheduler, 10**6)
        assert 0.4 <= time.monotonic() - began < 20
    assert heard.failure is LATE and len(ids(heard)) > 1
    assert also.events == [LATE]


def test_a_model_of_numbers_that_are_none_fails_alone(base, clients):
    broken = replace(clients[3], blocks=tuple(map(nan_block, clients[3].blocks)))
    with scheduler_on(base) as scheduler:
        good, heard = job_for(scheduler, clients[0], prompt_of(1, 4))
        bad, failed = job_for(scheduler, broken, prompt_of(1, 4), 2)
        scheduler.submit([good, bad])
        run_until_idle(scheduler)
    assert failed.events == [BROKEN]
    assert len(ids(heard)) == 8


def nan_block(block):
    return replace(block, experts=replace(block.experts, B_RD=block.experts.B_RD * torch.nan))


def test_a_pass_that_fails_ends_its_rows_and_not_the_server(base, clients, caplog):
    wrong = PackedClient("run/wrong", 9, clients[0].blocks[:1])  # the base has two blocks
    with scheduler_on(base) as scheduler:
        bad, failed = job_for(scheduler, wrong, prompt_of(1, 4))
        scheduler.submit([bad])
        run_until_idle(scheduler)
        good, heard = job_for(scheduler, clients[0], prompt_of(1, 4))
        scheduler.submit([good])
        run_until_idle(scheduler)
    assert failed.events == [BROKEN] and "a forward pass failed" in caplog.text
    assert len(ids(heard)) == 8


def test_stopping_refuses_what_waits_and_ends_what_writes_in_time(base, clients):
    with scheduler_on(base, rows=2) as scheduler:
        short, done = job_for(scheduler, clients[0], prompt_of(1, 4), max_tokens=5)
        endless, cut = job_for(scheduler, clients[1], prompt_of(1, 4), max_tokens=10**6)
        waiting, refused = job_for(scheduler, clients[2], prompt_of(1, 4))
        scheduler.submit([short, endless, waiting])
        scheduler.step()
        began = time.monotonic()
        scheduler.stop(0.3)  # before the short one can have ended, and left its row
        scheduler.start()
        with pytest.raises(Refused) as late:
            scheduler.submit([waiting])
        scheduler.join()
        assert 0.3 <= time.monotonic() - began < 20
    assert late.value.failure is STOPPING
    assert done.finish() == "length" and cut.failure is STOPPING and refused.events == [STOPPING]


def test_a_second_stop_can_only_bring_the_end_nearer(base, clients):
    with scheduler_on(base) as scheduler:
        endless, cut = job_for(scheduler, clients[1], prompt_of(1, 4), max_tokens=10**6)
        scheduler.submit([endless])
        scheduler.start()
        scheduler.stop(60)
        scheduler.stop(0.1)
        scheduler.stop(60)
        began = time.monotonic()
        scheduler.join()
        assert time.monotonic() - began < 5
    assert cut.failure is STOPPING


def test_the_thread_sleeps_until_it_is_asked_and_ends_when_stopped(base, clients):
    with scheduler_on(base) as scheduler:
        scheduler.start()
        began = time.process_time()
        time.sleep(0.5)
        assert scheduler.passes == 0 and time.process_time() - began < 0.25
        ended = threading.Event()
        job, heard = job_for(scheduler, clients[0], prompt_of(1, 4))
        told = job.deliver
        job.deliver = lambda event: (told(event), ended.set() if event.finish else None)
        scheduler.submit([job])
        assert ended.wait(5)
        scheduler.stop(0)
        scheduler.join()
    assert len(ids(heard)) == 8
