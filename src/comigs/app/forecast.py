"""This module says how the rounds of a run would go behind simulated devices, before it trains:
how long they take, and who misses them (docs/conditions.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from comigs.app.setup import ignore
from comigs.config import Config, Split
from comigs.engines.conditions.counting import Counting
from comigs.engines.conditions.engine import Conditions
from comigs.engines.conditions.weather import Weather
from comigs.errors import UserError
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
        reason, *_ = str(error).split("; every whole round is kept")
        return [f"behind these conditions the run stops: {reason}"]

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
    weather = Weather(config)
    for name in config.names:
        if (group := weather.group(name)) is not None:
            members.setdefault(group, []).append(name)
    return [
        *(f"group {group}: {listed(names)}" for group, names in members.items()),
        f"behind these conditions: {plural(config.rounds, 'round')} in {took(run)}",
        f"clients are asked {len(counted | missed):,} times: {len(counted):,} answers count, "
        f"{len(missed & tried):,} are late or lost, {len(missed - tried):,} times the client is "
        f"away; {lost:.0%} of the work is lost",
        f"a client takes part in {min(rounds)} to {max(rounds)} rounds, "
        f"{median(rounds):g} at the median",
    ]
