"""A run, round by round, as the server sees it: ask, collect, merge, commit.

Clients and server take turns (CoMiGS, 2409.13931). In each round the server asks clients to train.
A client receives the generalists as they were merged, trains its generalists and specialists on its
train text and its router on its valid text, and sends its generalists back. The server merges what
it has collected, and that is what clients receive in the next round. Specialists and routers stay
where they are. Other methods differ in what clients share and in how it is merged, not in this
loop; nor does it matter to the loop which engine carries the messages.
"""

from __future__ import annotations

from dataclasses import replace

from comigs.config import Config, Split
from comigs.errors import UserError
from comigs.files import command
from comigs.methods.method import Method, RoundContext
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import Absent, Line, Note, RoundEnd, Timing
from comigs.runs.track.tracks import Tracks
from comigs.server.collect import NO_ANSWER, RoundCollector, ServerState
from comigs.server.communication import last_download
from comigs.server.diagnostics import diagnose, drift
from comigs.server.participation import (
    has_trained,
    late_line,
    left_out,
    measured_base,
    stopped_line,
)
from comigs.server.pending import next_downloads, pack_server, unpack_server, unpack_started
from comigs.server.private_mean import PrivateMean, spent
from comigs.server.protocol import Answers, Engine, Reply, Report, Task
from comigs.server.routing_prior import latest_priors, priors_of_round
from comigs.server.validation import (
    check_lines,
    common_start,
    expected_upload,
    most_figures,
    read_reply,
)

SHOWN = 4  # clients whose reason is told where a round is asked again


def run_rounds(
    config: Config, method: Method, engine: Engine, folder: RunFolder, report: Report
) -> None:
    """Take a run from its folder's last commit to its end.

    Each round is committed before the next begins, so a run that is stopped loses no whole round.
    Raises UserError where too few clients are left that answer; every whole round is kept.
    """
    last = folder.rewind()
    # Trackers are told what is committed, and first what an earlier start could not tell them.
    with Tracks(config, folder, report) as tracks:
        if last.finished:
            return
        start, history = common_start(config.seed), folder.metrics()
        server = ServerState(config, method, engine.shapes, start, history)
        if last.round:
            packed = folder.load("server/state")
            server.downloads, server.memory = unpack_server(packed)
            server.started = unpack_started(packed)

        # Nobody hears of a round before it cannot be lost any more.
        for round in range(last.round + 1, config.rounds + 1):
            lines = _run_round(server, round, engine, folder, report)
            if not lines:
                break
            _tell(lines, report, tracks)
        lines = _deliver_the_last_download(server, engine, folder)
        _tell(lines, report, tracks)


def _tell(lines: list[Line], report: Report, tracks: Tracks) -> None:
    for line in lines:
        report(line)
    tracks.write(lines)


def _run_round(
    server: ServerState, round: int, engine: Engine, folder: RunFolder, report: Report
) -> list[Line]:
    """Take a run one round further, and return the lines that were committed.

    There are none where too few clients have privacy left to train.
    """
    # Ask: clients receive what waits for them, train on text that stays with them, and send.
    # Collect: only what is as it should be counts, and a round needs enough of it.
    config, method = server.config, server.method
    collector = RoundCollector(server, round)
    if not _ask(collector, engine, folder, report):
        return []

    # Merge: the method makes of the uploads what each client receives next. Whoever was not
    # reached still has what it missed to come, so its next download is both.
    private_mean = None
    if config.privacy.by_client:
        first = config.clients[0].name
        slots = expected_upload(method, server.shapes[first], round)
        everybodys = server.downloads.get(first, {})
        private_mean = PrivateMean(config, round, slots, everybodys, server.start)
    context = RoundContext(
        clients=tuple(config.names),
        weights=collector.weights(),
        peer_nats=engine.probe(collector.uploads, round) if method.reads_peers else {},
        upload=config.upload,
        private_mean=private_mean,
    )
    merged, server.memory = method.aggregate(collector.uploads, server.memory, context)
    sent = server.downloads
    server.downloads = next_downloads(sent, merged, collector.reached)

    # Commit: the round is whole once its lines and the server's state are on the disk.
    lines = collector.lines()
    priors = priors_of_round(config, server.shapes, collector.uploads, sent, server.start, lines)
    # How far uploads are apart is seen by nobody where their sum alone is known.
    summed = config.privacy.secure_aggregation
    apart = None if summed else drift(collector.uploads, sent)
    asked, epsilon = collector.asked(), spent(config, round)
    lines.append(RoundEnd(round=round, drift=apart, asked=asked, prior=priors, epsilon=epsilon))
    lines += collector.warnings
    lines += _diagnosed(server, lines)
    packed = pack_server(server.downloads, server.memory, server.started)
    folder.stage("server/state", packed, round)
    folder.commit(round, lines, collector.timings())
    server.history += lines
    return lines


def _ask(collector: RoundCollector, engine: Engine, folder: RunFolder, report: Report) -> bool:
    """Ask the clients of a round, and while too few uploads are usable, ask again who is missing.

    Asking ends: who fails too often is left out, and nobody is asked who has answered. Returns
    whether enough came; where not, clients have spent their privacy. Raises UserError when too few
    are left for other reasons.
    """
    config, round = collector.config, collector.round
    needed, everyone = config.participation.min_clients, len(config.clients)
    # A sample is what it is: who came decides nothing where the mean has noise of its own.
    if config.privacy.by_client:
        needed = 0
    measured = measured_base(collector.server.history)
    priors = latest_priors(collector.server.history)
    while True:
        # Waiting for clients that will not come back is no use.
        names, left = collector.to_ask(), everyone - len(collector.out)
        if not names and needed == 0 < left:
            return True
        if everyone - len(collector.spent) < needed:
            return False
        if left < needed or not names:
            advice = f"When they are back, go on with: {command('resume', folder.path)}"
            if config.conditions.given:  # which are the same the next time
                advice = (
                    "Simulated clients fail again: start a new run with a higher "
                    "participation.max_failures or deadline, or a lower min_clients"
                )
            reasons = _reasons(collector)
            raise UserError(
                f"round {round}: {len(collector.uploads)} of the {needed} usable uploads that it "
                f"needs (participation.min_clients), and {everyone - left} of {everyone} clients "
                f"are left out, so too few are left to ask{reasons}; every whole round is kept. "
                f"{advice}"
            )
        tasks = {}
        for name in names:
            task = task_of(config, round, base_known=name in measured)
            tasks[name] = replace(task, prior=priors.get(name))
        waiting = collector.downloads
        downloads = {name: waiting[name] for name in names if name in waiting}
        collector.take(tasks, engine.exchange(tasks, downloads))
        if len(collector.uploads) >= needed:
            return True

        # Whoever watches the run should know why a round takes longer than others.
        usable = f"{len(collector.uploads)} of the {needed} uploads it needs"
        note = f"round {round}: {usable}; asking again{_reasons(collector)}"
        report(Note(message=note, say=True))


def _reasons(collector: RoundCollector) -> str:
    """Return why clients' answers are missing, in brackets."""
    reasons = [f"{name}: {reason}" for name, reason in collector.absent.items()]
    if len(reasons) > SHOWN:
        reasons[SHOWN:] = [f"{len(reasons) - SHOWN} more"]
    return f" ({'; '.join(reasons)})" if reasons else ""


def _deliver_the_last_download(
    server: ServerState, engine: Engine, folder: RunFolder
) -> list[Line]:
    """Give everybody who is not left out the last download, and let them measure their own model.

    Returns the lines that were committed. Raises UserError where nobody takes the download: there
    is no result then.
    """
    # Whoever did not take part in the last round is asked here, too: each client ends with a model.
    config, round = server.config, server.config.rounds + 1
    out, measured = left_out(server.history), measured_base(server.history)
    tasks = {
        client.name: task_of(config, round, base_known=client.name in measured)
        for client in config.clients
        if client.name not in out
    }
    waiting = server.downloads
    downloads = {name: waiting[name] for name in tasks if name in waiting}
    answers = engine.exchange(tasks, downloads) if tasks else Answers({})

    # What a client says of its own model counts under the same conditions as in a round.
    replies: dict[str, Reply] = {}
    absent: dict[str, str] = {}
    keeps, private = config.evaluation.keep == "best", config.privacy.by_document
    for name, task in tasks.items():
        if name not in answers.replies:
            absent[name] = answers.absent.get(name, NO_ANSWER)
            continue
        most = most_figures(config, server.shapes[name])
        if fault := check_lines(answers.replies[name], name, task, keeps, private, most):
            absent[name] = fault
        else:
            replies[name] = answers.replies[name]
    if not replies:
        raise UserError(
            "nobody took the last download, so there is no result yet; every whole round is kept. "
            f"When clients are back, go on with: {command('resume', folder.path)}"
        )

    # The run ends with a commit as each round does, after which nothing but models is kept.
    lines: list[Line] = []
    timings: list[Timing] = []
    for name in replies:
        lines.append(last_download(name, round, waiting.get(name, {}), config.upload.format))
    for reply in replies.values():
        own, timing = read_reply(reply, private)
        lines += own
        timings.append(timing)
    for name, why in absent.items():
        lines.append(Absent(round=round, client=name, reason=why))
    if stopped := stopped_line(config, server.history):
        lines.append(stopped)
    for name, late in answers.late.items():
        if not has_trained(server.history, name, late.round):
            lines.append(late_line(late.round, name, round, "dropped"))
    lines += _diagnosed(server, lines)
    folder.commit(config.rounds, lines, timings, finished=True)
    return lines


def _diagnosed(server: ServerState, new: list[Line]) -> list[Line]:
    """Return the signs of going wrong that these lines show."""
    return [*diagnose(server.history, new, server.method.beside_others(server.config))]


def task_of(config: Config, round: int, base_known: bool) -> Task:
    """Return what a client is asked in a round, rounds + 1 being the exchange at the end.

    Evaluations of round r travel with the exchange of round r + 1, after its download: one message
    a round. base_known: the base was measured on this client's text already.
    """
    # Routers learn from valid, so the result is measured on test, once, at the very end.
    evaluation, is_last = config.evaluation, round == config.rounds + 1
    watched = evaluation.splits if evaluation.every > 0 else ()
    with_test = tuple(dict.fromkeys((*watched, "test")))
    due = evaluation.every > 0 and round > 1 and (round - 1) % evaluation.every == 0
    evaluate = watched if due else ()
    if is_last:
        evaluate = with_test

    # The base does not change: it is measured with the first exchange, and at the end where a
    # client comes in only there, whose valid counts as the base's in all rounds before.
    evaluate_base: tuple[Split, ...] = () if base_known else with_test
    return Task(round=round, train=not is_last, evaluate=evaluate, evaluate_base=evaluate_base)
