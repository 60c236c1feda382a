"""This module says how the rounds of a run would go behind simulated devices, before it trains:
how long they take, and who misses them (docs/conditions.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from comigs.app.setup import attached, everybody_trains, ignore
from comigs.bases.load import Base
from comigs.config import SPLITS, Config, Split
from comigs.data.prepare import Texts
from comigs.engines.conditions.availability import TraceEnds
from comigs.engines.conditions.counting import Counting
from comigs.engines.conditions.engine import Conditions
from comigs.errors import UserError
from comigs.methods.loading import load_method
from comigs.methods.method import Method
from comigs.runs.folder import RunFolder
from comigs.runs.report.read import Run, read_run
from comigs.runs.report.timeline import took, work_lost
from comigs.server.rounds import run_rounds
from comigs.slots import Shapes
from comigs.text import listed, plural


def forecast(
    config: Config,
    method: Method,
    shapes: Mapping[str, Shapes],
    tokens: Mapping[str, Mapping[Split, int]],
) -> Run:
    """Let all rounds of a config with conditions go by without training; return what is left.

    Its exchanges and attempts are those of the run itself, to the second where windows are full.
    tokens: of each client's splits. Raises UserError where the run would.
    """
    unseen = config.model_copy(update={"track": config.track.model_copy(update={"to": ()})})
    with TemporaryDirectory(prefix="comigs-forecast-") as scratch:
        with RunFolder.create(Path(scratch) / "run", unseen, environment={}) as folder:
            clients = Counting(unseen, method, shapes, tokens, folder)
            engine = Conditions(unseen, method, clients, folder, ignore)
            run_rounds(unseen, method, engine, folder, ignore)
        return read_run(folder.path)


def require_covered(config: Config, base: Base, texts: Texts) -> None:
    """Raise UserError where a client's trace ends before the run does.

    What is drawn, or not known before it is read, is left to the run itself.
    """
    has_trace = any(condition.trace for condition in config.conditions.everyone())
    is_drawn = config.privacy.is_on or texts.has_chats or not everybody_trains(config)
    if not has_trace or is_drawn:
        return
    # whole texts in full windows are measured and trained on as they are counted here
    tokens: dict[str, dict[Split, int]] = {}
    for name in texts.names:
        own, length = texts.load(name), config.data.sequence_length
        tokens[name] = {}
        for split in SPLITS:
            stores = getattr(own, split)
            tokens[name][split] = sum(store.num_learnt(length) - 1 for store in stores)
    try:
        with attached(config, base) as (_, shapes):
            forecast(config, load_method(config), shapes, tokens)
    except TraceEnds as error:
        raise UserError(f"{_reason(error)}; give one that covers it") from None
    except UserError:
        return  # which the run says where it comes to that


def forecast_lines(
    config: Config,
    method: Method,
    shapes: Mapping[str, Shapes],
    tokens: Mapping[str, Mapping[Split, int]],
) -> list[str]:
    """Return the forecast in a few lines; of a run that would stop on the way, why."""
    try:
        run = forecast(config, method, shapes, tokens)
    except UserError as error:
        return [f"behind these conditions the run stops: {_reason(error)}"]

    # what was late and counts in a later round has trained, too
    counted = {(line.client, line.round) for line in run.train}
    tried = {(line.client, line.round) for line in run.attempts}
    missed = {
        (line.client, line.round) for line in run.absent if line.round <= config.rounds
    } - counted
    times = Counter(client for client, _ in counted)
    rounds = [times[name] for name in config.names]
    lost = work_lost(run) or 0.0
    members: dict[str, list[str]] = {}
    for name in config.names:
        if (group := config.conditions.group_of(name, config.seed)) is not None:
            members.setdefault(group, []).append(name)
    return [
        *(f"group {group}: {listed(names)}" for group, names in members.items()),
        f"behind these conditions: {plural(config.rounds, 'round')} in {took(run)}",
        f"of {len(counted | missed):,} answers wanted {len(counted):,} count, "
        f"{len(missed & tried):,} are late or lost, and for {len(missed - tried):,} the client is "
        f"away; {lost:.0%} of the work is lost",
        f"a client takes part in {min(rounds)} to {max(rounds)} rounds, "
        f"{median(rounds):g} at the median",
    ]


def _reason(error: UserError) -> str:
    """Return why a run stops, without what holds of a real one alone."""
    reason, *_ = str(error).split("; every whole round is kept")
    return reason
