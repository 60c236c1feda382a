"""This module lets tasks have only the harness's own metrics.

Any other name the harness looks for on the network, as a script of the library `evaluate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import lm_eval.api.metrics  # noqa: F401 (which fills the registry)
from lm_eval.api import registry, task

from comigs.errors import UserError, nearest


@contextlib.contextmanager
def own_metrics(name: str) -> Iterator[None]:
    """Raise UserError for any other metric of a task that is loaded inside.

    name: what was asked for, for messages.
    """
    known = sorted(registry.metric_registry)

    # These are the three doors through which the harness looks up what a task file names.
    def get_metric(metric: str, from_evaluate: bool = False) -> Callable[..., Any] | None:
        if from_evaluate:
            raise UserError(
                f"--tasks {name}: metric_list: {metric} with hf_evaluate is a script on the "
                "network, and nothing is downloaded here; leave hf_evaluate out where the harness "
                f"has the metric itself: {', '.join(known)}"
            )
        if metric not in known:
            raise UserError(
                f"--tasks {name}: metric_list: {metric} is no metric of the harness; those are: "
                f"{', '.join(known)}.{nearest(metric, known)}"
            )
        found: Callable[..., Any] | None = registry.get_metric(metric)
        return found

    def get_aggregation(words: str) -> Callable[..., Any]:
        there = sorted(registry.aggregation_registry)
        if words not in there:
            raise UserError(
                f"--tasks {name}: metric_list: aggregation: {words} is none of the harness's: "
                f"{', '.join(there)}.{nearest(words, there)}"
            )
        found: Callable[..., Any] = registry.get_aggregation(words)
        return found

    def get_metric_aggregation(metric: str) -> Callable[..., Any]:
        found: Callable[..., Any] | None = registry.get_metric_aggregation(metric)
        if found is None:
            raise UserError(
                f"--tasks {name}: metric_list: {metric} is not the harness's own, and needs the "
                "field `aggregation`"
            )
        return found

    # They are called by their names in the module of tasks, so that is where they are replaced.
    before = task.get_metric, task.get_aggregation, task.get_metric_aggregation
    task.get_metric, task.get_aggregation = get_metric, get_aggregation
    task.get_metric_aggregation = get_metric_aggregation
    try:
        yield
    finally:
        task.get_metric, task.get_aggregation, task.get_metric_aggregation = before
