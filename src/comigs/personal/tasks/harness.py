"""This module asks a client's own model, or the base, tasks of lm-evaluation-harness (`lm_eval`).

What is asked, how answers are read and what an error of a mean is are the harness's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from comigs.bases.chat_template import LEARNT_ON, on_day
from comigs.errors import UserError
from comigs.personal.model import PersonalModel
from comigs.personal.tasks.task_files import LoadedTasks, offline, quiet
from comigs.personal.tasks.task_items import LIKELIHOODS
from comigs.runs.tasks import Estimate, Measure

BY = f"lm_eval {version('lm_eval')}"


@dataclass(frozen=True)
class Asked:
    """What the harness measured: by measure its estimate, over so many items.

    lower: measures of which less is better.
    """

    items: int
    measures: Mapping[str, Estimate]
    lower: frozenset[str]


class AsHarnessModel(HFLM):  # type: ignore[misc]
    """A personal model as a model of the harness, which reads whatever is attached."""

    def __init__(self, model: PersonalModel) -> None:
        size = model.config.evaluation.batch_size
        # The harness gives a tokenizer the token that fills up; the run's stays as it is.
        tokenizer = copy.deepcopy(model.tokenizer)
        # A template that asks for the day is told the same one as while chats are learnt.
        if tokenizer.chat_template:
            tokenizer.chat_template = on_day(tokenizer.get_chat_template(), LEARNT_ON)
        super().__init__(
            pretrained=model.model,
            backend="causal",
            tokenizer=tokenizer,
            enable_thinking=False,
            # What fills up a shorter text would be read by a router that reads the whole of it.
            batch_size=1 if model.config.experts.routing == "sequence" else size,
            max_length=model.model.config.max_position_embeddings,
        )


def require_askable(loaded: LoadedTasks, model: PersonalModel) -> None:
    """Raise UserError for tasks in which a model writes, where it cannot as the harness lets it."""
    if model.config.experts.routing != "sequence":
        return
    for name, task in loaded.all()["tasks"].items():
        if task.OUTPUT_TYPE not in LIKELIHOODS:
            raise UserError(
                f'--tasks {name}: lets models write token by token, and with routing = "sequence" '
                "each token changes what was read before; choose tasks with answers to choose from"
            )


def ask(
    loaded: LoadedTasks, model: PersonalModel, limit: int | None, chat: bool
) -> dict[str, Asked]:
    """Ask a model, as it is bound now, all tasks. Returns by task, and by group, what was measured.

    limit: items of each task, the first ones. chat: questions go through the base's chat template.
    Raises UserError where the harness gives up.
    """
    record = loaded.all()
    with quiet(), offline():
        try:
            found = evaluate(
                lm=AsHarnessModel(model),
                task_dict=record,
                limit=limit,
                log_samples=False,
                apply_chat_template=chat,
                fewshot_as_multiturn=True,
            )
        except (AssertionError, ValueError, KeyError, TypeError, ArithmeticError) as error:
            words = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--tasks: the harness gives up: {words[0]}") from None
    # The harness counts items of tasks only; a group has those of all its tasks.
    counts = {name: int(held["effective"]) for name, held in found["n-samples"].items()}
    asked = {}
    for name, figures in found["results"].items():
        own = [name]
        if name in record["groups"]:
            own = [task.task_name for task in record["groups"][name].get_all_tasks()]
        if measures := _measures(figures):
            higher = found["higher_is_better"].get(name, {})
            lower = frozenset(m for m in measures if higher.get(m.split(" (")[0]) is False)
            asked[name] = Asked(sum(counts[task] for task in own), measures, lower)
    return asked


def side_by_side(base: Asked, personal: Asked) -> dict[str, Measure]:
    """Return by name the measures that both models have."""
    found = {}
    for name, own in personal.measures.items():
        if name in base.measures:
            found[name] = Measure(
                items=personal.items,
                base=base.measures[name],
                personal=own,
                lower_is_better=name in personal.lower,
            )
    return found


def _measures(figures: Mapping[str, Any]) -> dict[str, Estimate]:
    """Return the harness's figures of one task by measure, each with its standard error."""
    found = {}
    for key, value in figures.items():
        metric, _, filtered = key.partition(",")
        is_number = isinstance(value, float | int) and math.isfinite(value)
        if not filtered or metric.endswith("_stderr") or not is_number:
            continue
        error = figures.get(f"{metric}_stderr,{filtered}")
        if not isinstance(error, float | int) or not math.isfinite(error):
            error = None  # the harness writes N/A where it knows none
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        found[name] = Estimate(mean=float(value), error=None if error is None else float(error))
    return found
