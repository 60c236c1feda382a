"""The round loop, once, over `exchange(tasks, downloads) -> answers`, whatever carries the
messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comigs.config import Config
from comigs.errors import UserError
from comigs.files import command
from comigs.methods.method import Download, Memory, Method, RoundContext
from comigs.runs.folder import RunFolder
from comigs.server.collect import NO_ANSWER, RoundCollector, Started
from comigs.server.communication import drift, last_download
from comigs.server.diagnostics import failure_signs
from comigs.server.participation import absent_line, has_trained, late_line, left_out, measured_base
from comigs.server.pending import next_downloads, pack_server, unpack_server
from comigs.server.protocol import Answers, Engine, Event, Reply, Report, Task
from comigs.server.validation import check_lines, common_start

__all__ = ["Answers", "Engine", "Event", "Reply", "Report", "Task", "run_rounds", "task_of"]


def run_rounds(
    config: Config, method: Method, engine: Engine, folder: RunFolder, report: Report
) -> None:
    """From the folder's last commit to the end of the run. Each round is committed before the next
    begins.

    Raises UserError where too few clients are left that answer; every whole round is kept.
    """
    last = folder.rewind()
    if last.finished:
        return
    history, start, started = folder.metrics(), common_start(config.seed), Started()
    own_or_rest = any(
        method.shape(config.shape_of(client)).others != "none" for client in config.clients
    )
    downloads: dict[str, Download] = {}
    memory: Memory = {}
    if last.round:
        downloads, memory = unpack_server(folder.load("server/state"))

    for round in range(last.round + 1, config.rounds + 1):
        collector = RoundCollector(
            config, method, engine.shapes, start, started, history, downloads, round
        )
        _ask(collector, engine, folder, report, measured_base(history))
        context = RoundContext(
            clients=tuple(c.name for c in config.clients),
            weights=collector.weights(),
            peer_nats=engine.probe(collector.uploads, round) if method.reads_peers else {},
            upload=config.upload,
        )
        merged, memory = method.aggregate(collector.uploads, memory, context)
        sent, downloads = downloads, next_downloads(downloads, merged, collector.reached)

        metrics = collector.metrics()
        metrics.append(
            {
                "kind": "server",
                "round": round,
                "drift": drift(collector.uploads, sent),
                **collector.whom(),
            }
        )
        metrics += collector.warnings
        metrics += failure_signs(history, metrics, own_or_rest)
        folder.stage("server/state", pack_server(downloads, memory), round)
        folder.commit(round, metrics, collector.timings())
        history += metrics
        for line in metrics:
            report(line)
    _finish(config, engine, folder, report, history, downloads, own_or_rest)


def _ask(
    collector: RoundCollector, engine: Engine, folder: RunFolder, report: Report, measured: set[str]
) -> None:
    """Ask the clients of a round, and those of them again whose upload is missing while there are
    too few.

    It ends: who fails too often is left out, and nobody is asked who has answered. Raises UserError
    when too few are left.
    """
    config, round = collector.config, collector.round
    needed, everyone = config.participation.min_clients, len(config.clients)
    first, later = (task_of(config, round, base_known=known) for known in (False, True))
    while True:
        names, left = collector.to_ask(), everyone - len(collector.out)
        if left < needed or not names:
            raise UserError(
                f"round {round}: {len(collector.uploads)} of the {needed} usable uploads that it needs "
                f"(participation.min_clients), and {everyone - left} of {everyone} clients are left out, so too few "
                f"are left to ask; every whole round is kept. When they are back, go on with: "
                f"{command('resume', folder.path)}"
            )
        tasks = {name: later if name in measured else first for name in names}
        collector.take(
            tasks,
            engine.exchange(
                tasks, {n: collector.downloads[n] for n in names if n in collector.downloads}
            ),
        )
        if len(collector.uploads) >= needed:
            return
        reasons = [f"{name}: {reason}" for name, reason in collector.absent.items()]
        why = "; ".join(reasons[:4] + [f"{len(reasons) - 4} more"] * (len(reasons) > 4))
        note = f"round {round}: {len(collector.uploads)} of the {needed} uploads it needs; asking again ({why})"
        report({"kind": "note", "message": note, "say": True})


def _finish(
    config: Config, engine: Engine, folder: RunFolder, report: Report, history: list[dict[str, Any]],
    downloads: Mapping[str, Download], own_or_rest: bool,
) -> None:  # fmt: skip
    """The last exchange: everybody who is not left out gets the last download and measures its own
    model.
    """
    round, out, measured = config.rounds + 1, left_out(history), measured_base(history)
    tasks = {
        c.name: task_of(config, round, base_known=c.name in measured)
        for c in config.clients
        if c.name not in out
    }
    answers = engine.exchange(tasks, {name: downloads[name] for name in tasks if name in downloads})
    bad = {
        name: why
        for name, reply in answers.replies.items()
        if (why := check_lines(reply, name, tasks[name]))
    }
    replies = {
        name: answers.replies[name] for name in tasks if name in answers.replies and name not in bad
    }
    if not replies:
        raise UserError(
            f"nobody took the last download, so there is no result yet; every whole round is kept. When clients are "
            f"back, go on with: {command('resume', folder.path)}"
        )
    metrics = [
        last_download(name, round, downloads.get(name, {}), config.upload.format)
        for name in replies
    ]
    metrics += [line for reply in replies.values() for line in reply.metrics]
    absent = {
        name: bad.get(name, answers.absent.get(name, NO_ANSWER))
        for name in tasks
        if name not in replies
    }
    metrics += [absent_line(round, name, why) for name, why in absent.items()]
    late = {
        n: reply.round
        for n, reply in answers.late.items()
        if not has_trained(history, n, reply.round)
    }
    metrics += [late_line(then, name, round, "dropped") for name, then in late.items()]
    metrics += failure_signs(history, metrics, own_or_rest)
    folder.commit(
        config.rounds, metrics, [reply.timing for reply in replies.values()], finished=True
    )
    for line in metrics:
        report(line)


def task_of(config: Config, round: int, base_known: bool) -> Task:
    """What a client is asked in a round, rounds + 1 being the exchange at the end.

    Evaluations of round r travel with the exchange of round r + 1, after its download: one message
    a round.

    base_known: the base was measured on this client's text already.
    """
    evaluation, is_last = config.evaluation, round == config.rounds + 1
    due = evaluation.every > 0 and round > 1 and (round - 1) % evaluation.every == 0
    watched = evaluation.splits if evaluation.every > 0 else ()
    splits = watched if due or is_last else ()
    base = () if base_known else ("test",) if is_last else tuple(dict.fromkeys((*watched, "test")))
    return Task(
        round=round,
        train=not is_last,
        evaluate=tuple(dict.fromkeys((*splits, "test"))) if is_last else splits,
        evaluate_base=base,
    )
