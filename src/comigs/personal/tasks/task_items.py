"""This module tries out a task of the harness's on its items, before a model is asked.

The harness itself leaves out, or guesses, what a task lacks; here that is one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from comigs.errors import UserError
from comigs.text import brief, listed

NULL = "\ue000"  # a character of no language, which stands where a template wrote what is null
LIKELIHOODS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


class Null:
    """This value stands for a null of an item: it is false, and seen where it is written out."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return NULL


def try_out(name: str, task: Any, limit: int | None) -> None:
    """Make question, answer and choices of each item, of the first `limit`, and measure one.

    Raises UserError, naming the field of the task, and the item that lacks something.
    """
    _require_fields(name, task)
    for number, item in enumerate(islice(task.eval_docs, limit), start=1):
        where = f"--tasks {name}: item {number}"
        made = _made(where, task, {key: _present(value) for key, value in item.items()})
        choices = made.get("doc_to_choice", ["any"])
        answers = choices if isinstance(choices, list) else [choices]
        texts = [made["doc_to_text"], made["doc_to_target"], *answers]
        if any(isinstance(text, Null) or NULL in str(text) for text in texts):
            empty = [key for key, value in item.items() if value is None]
            raise UserError(f"{where}: lacks a field that is asked for: {listed(empty)}")
        if not answers or not all(isinstance(text, str) and text for text in answers):
            raise UserError(f"{where}: doc_to_choice: {brief(choices)} is no list of texts")
        # With code of its own a task says itself what is right, and what it measures.
        if getattr(getattr(task, "config", None), "process_results", None) is None:
            _require_right_answer(where, task, made)
            if number == 1:
                _require_measured(name, task, item, made)


def require_splits(name: str, task: Any) -> None:
    """Raise UserError where a task's data lack a split that it names."""
    splits = list(getattr(task, "dataset", {}))
    for part in SPLITS:
        split = getattr(task.config, part, None)
        if split is not None and splits and split not in splits:
            raise UserError(
                f"--tasks {name}: {part}: its data have no split `{split}`; there are: "
                f"{', '.join(splits)}"
            )


def _require_fields(name: str, task: Any) -> None:
    """Refuse a task of a kind that is not asked here, or whose fields are not those of its data."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"--tasks {name}: runs code that a model writes, which is not done here")
    if task.OUTPUT_TYPE not in (*LIKELIHOODS, "generate_until"):
        raise UserError(f"--tasks {name}: output_type {task.OUTPUT_TYPE} is not known here")
    config, fields = getattr(task, "config", None), list(getattr(task, "features", []))
    if task.OUTPUT_TYPE == "multiple_choice" and getattr(config, "doc_to_choice", None) is None:
        raise UserError(
            f"--tasks {name}: the field `doc_to_choice`, the answers to choose from, is missing"
        )
    for part in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        words = getattr(config, part, None)
        # The harness takes a name of no field for the words themselves.
        if isinstance(words, str) and words.isidentifier() and fields and words not in fields:
            raise UserError(
                f"--tasks {name}: {part}: its data have no field `{words}`; there are: "
                f"{', '.join(fields)}"
            )


def _made(where: str, task: Any, item: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a task makes of an item, by the field that says how."""
    parts = ["doc_to_text", "doc_to_target"]
    if getattr(getattr(task, "config", None), "doc_to_choice", None) is not None:
        parts.append("doc_to_choice")
    made = {}
    for part in parts:
        try:
            made[part] = getattr(task, part)(item)
        except Exception as error:
            words = brief(str(error) or type(error).__name__)
            # The harness reads choices that are no field as Python, and Python's words say little.
            if part == "doc_to_choice" and isinstance(error, SyntaxError | ValueError):
                words = f"makes no list of answers ({words})"
            raise UserError(f"{where}: {part}: {words}") from None
    return made


def _require_right_answer(where: str, task: Any, made: Mapping[str, Any]) -> None:
    """Refuse an item whose right answer is none of its choices; the harness would call it wrong."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    # Where choices stand in the question, the question says which of them is right.
    part = "doc_to_text" if getattr(task, "multiple_input", 0) else "doc_to_target"
    choices, right = made["doc_to_choice"], made[part]
    for one in right if isinstance(right, list) else [right]:
        is_there = one in choices
        if isinstance(one, int):
            is_there = 0 <= one < len(choices)
        if not is_there:
            raise UserError(
                f"{where}: {part}: {brief(one)} is none of its {len(choices)} choices, which are "
                f"counted from 0"
            )


def _require_measured(
    name: str, task: Any, item: Mapping[str, Any], made: Mapping[str, Any]
) -> None:
    """Refuse a metric that the harness would leave out of the results of such a task."""
    answers: Sequence[Any] = [(-1.0, False)]
    if task.OUTPUT_TYPE == "generate_until":
        return  # there all of them are computed
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        answers = [-1.0]
    wanted = list(getattr(task, "_metric_fn_list", {}))
    if task.OUTPUT_TYPE == "multiple_choice":
        # What is compared with the answer alone, without its question, is asked twice.
        times = 2 if "acc_mutual_info" in wanted else 1
        answers = [(-1.0, False)] * (times * len(made["doc_to_choice"]))
    try:
        measured = task.process_results(item, answers)
    except Exception as error:
        words = brief(str(error) or type(error).__name__)
        raise UserError(f"--tasks {name}: item 1: cannot be measured: {words}") from None
    for metric in wanted:
        if metric not in measured and metric != "bypass":
            raise UserError(
                f"--tasks {name}: metric_list: {metric} is not measured with output_type: "
                f"{task.OUTPUT_TYPE}"
            )


def _present(value: Any) -> Any:
    """Return a field's value, or what is found again in a text that was made of none."""
    return Null() if value is None else value
