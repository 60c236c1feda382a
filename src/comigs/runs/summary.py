"""The result of a run from its metrics: summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from comigs.config import ClientEntry, Config
from comigs.methods.method import Method
from comigs.perplexity import perplexity_of
from comigs.runs.folder import RunFolder
from comigs.runs.metrics import (
    ClientLine,
    ClientSummary,
    Evaluation,
    Kept,
    LastDownload,
    Line,
    MeanSummary,
    RoundEnd,
    Score,
    Summary,
    Train,
)
from comigs.runs.simulated import Attempt, wasted_bytes
from comigs.slots import num_specialists


def write_summary(folder: RunFolder, config: Config, method: Method) -> None:
    """Write the summary.json of a finished run. Raises UserError where the disk refuses."""
    # A client may have gained or lost specialists; where its model is here, it says how many.
    specialists: dict[str, int] = {}
    for client in config.clients:
        path = f"clients/{client.name}/personal"
        if folder.holds(path):
            specialists[client.name] = num_specialists(folder.load(path))
    folder.write_summary(summarize(config, method, folder.metrics(), specialists))


def summarize(
    config: Config,
    method: Method,
    metrics: Sequence[Line],
    specialists: Mapping[str, int] = MappingProxyType({}),
) -> Summary:
    """Return the result of a finished run from all of its lines.

    specialists: how many a client has at the end, where that is known; else those it began with.
    """
    by_client: dict[str, list[ClientLine]] = {entry.name: [] for entry in config.clients}
    for line in metrics:
        if isinstance(line, ClientLine):
            by_client.setdefault(line.client, []).append(line)
    clients = {
        entry.name: _of_client(config, method, entry, by_client[entry.name])
        for entry in config.clients
    }
    for name, number in specialists.items():
        clients[name] = clients[name].model_copy(update={"specialists": number})

    # A mean over clients compares base and personal model, so it is of those that have both.
    both = [c for c in clients.values() if Score() not in (c.test, c.base_test)]
    last = [client.last_test or client.test for client in both]
    went_back = any(client.last_test is not None for client in both)
    return Summary(
        method=method.name,
        weights=method.weights,
        base=config.base.name,
        seed=config.seed,
        rounds=max((line.round for line in metrics if isinstance(line, RoundEnd)), default=0),
        clients=clients,
        mean=MeanSummary(
            clients=len(both),
            test=_mean([client.test for client in both]),
            base_test=_mean([client.base_test for client in both]),
            last_test=_mean(last) if went_back else None,
        ),
    )


def _of_client(
    config: Config, method: Method, entry: ClientEntry, lines: Sequence[ClientLine]
) -> ClientSummary:
    # Later lines overwrite earlier ones: what counts is the last measurement of each model.
    test = base_test = Score()
    last: Evaluation | None = None
    kept: Kept | None = None
    trained = [line for line in lines if isinstance(line, Train)]
    attempts = [line for line in lines if isinstance(line, Attempt)]
    uploaded, downloaded = wasted_bytes(attempts, [line.round for line in trained])
    uploaded += sum(line.uploaded_bytes for line in trained)
    downloaded += sum(line.downloaded_bytes for line in trained)
    for line in lines:
        if isinstance(line, LastDownload):
            downloaded += line.downloaded_bytes
        elif isinstance(line, Kept):
            kept = line
        elif isinstance(line, Evaluation) and line.split == "test":
            if line.model == "base":
                base_test = line.score
            elif line.round == config.rounds:
                last, test = line, line.score

    # The result is the personal model's; where it is not the last round's, both are told.
    shape = method.shape(config.shape_of(entry))
    went_back = kept is not None and kept.round != config.rounds
    own = kept or last
    return ClientSummary(
        test=test if kept is None else kept.score,
        base_test=base_test,
        kept_round=None if kept is None else kept.round,
        kept_part=None if own is None else own.kept_part,
        adopted_share=None if own is None else own.adopted_share,
        last_test=test if went_back else None,
        uploaded_bytes=uploaded,
        downloaded_bytes=downloaded,
        trained_parameters=max((line.trained_parameters for line in trained), default=0),
        generalists=shape.generalists,
        specialists=shape.specialists,
        rank=shape.rank,
        specialist_rank=shape.specialist_rank,
    )


def _mean(scores: Sequence[Score]) -> Score:
    """Return the means over clients, each client counting once; nothing where none said any."""
    if not scores:
        return Score()
    nats = _mean_of([score.nats_per_token for score in scores])
    return Score(
        nats_per_token=nats,
        perplexity=_mean_of([score.perplexity for score in scores]),
        bits_per_byte=_mean_of([score.bits_per_byte for score in scores]),
        perplexity_of_mean=perplexity_of(nats),
    )


def _mean_of(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(values)
