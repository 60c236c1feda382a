"""This module loads tasks of lm-evaluation-harness (`lm_eval`), without a network, and checks them.

A task is a YAML file of the harness's: where its items are, and templates that make a question and
an answer of each. What would go wrong with the hundredth item is said before the first model is
asked.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from comigs.errors import UserError, nearest
from comigs.personal.tasks.extra import TaskFiles
from comigs.text import brief, listed

YAML = (".yaml", ".yml")
NULL = "\ue000"  # a character of no language, which stands where a template wrote what is null
LIKELIHOODS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
DEFAULT_SEED = 1234  # of few-shot examples, as the harness has it


class Null:
    """This value stands for a null of an item: it is false, and seen where it is written out."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return NULL


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks as the harness has them: `asked` is what its TaskManager returns, by what was named."""

    asked: dict[str, Any] = field(default_factory=dict)

    def all(self) -> dict[str, Any]:
        """Return the harness's own record of all of them: tasks, groups, and which is in which."""
        merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for loaded in self.asked.values():
            for part in merged:
                merged[part] |= loaded[part]
        return merged


def load_tasks(files: TaskFiles, limit: int | None) -> LoadedTasks:
    """Load tasks and try out their templates on each item that is asked; of each task `limit`.

    Raises UserError for a task that is not there, that needs a network, or whose data lack a field.
    """
    if files.folder is not None and not files.folder.is_dir():
        raise UserError(f"--tasks-dir {files.folder}: no such folder")
    with quiet(), offline():
        manager = TaskManager(include_path=files.folder, include_defaults=False)
        asked = {}
        for name in dict.fromkeys(files.names):
            asked[name] = _load(name, files, manager)
        loaded = LoadedTasks(asked)
        for name, task in loaded.all()["tasks"].items():
            _try_out(name, task, limit)
            task.set_fewshot_seed(seed=DEFAULT_SEED)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
    return loaded


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let no library look for data or models on the hub inside."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what the harness and its libraries tell beside errors: warnings, and bars."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load(name: str, files: TaskFiles, manager: Any) -> Any:
    """Return what the harness makes of a file or a name. Raises UserError."""
    path = Path(name)
    if path.suffix in YAML or path.is_file():
        if not path.is_file():
            raise UserError(f"--tasks {name}: no such file")
        path = path.resolve()
        config, spec, folder = _read(name, path), str(path), path.parent
    elif name in manager.task_index:
        config, spec = manager.task_index[name].cfg or {}, name
        folder = (files.folder or Path()).resolve()
    elif files.folder is None:
        raise UserError(
            f"--tasks {name}: no such file; a task by its name needs --tasks-dir, the folder that "
            "its file is in"
        )
    else:
        own = sorted(manager.task_index)
        there = listed(own) if own else "nothing"
        raise UserError(
            f"--tasks {name}: neither a file nor a task of {files.folder}, which has {there}."
            f"{nearest(name, own)}"
        )
    _require_local(name, config)
    # Paths of data in a task start from where its file is.
    try:
        with contextlib.chdir(folder):
            return manager.load([spec])
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise _in_one_line(name, config, error) from None


def _read(name: str, path: Path) -> Mapping[str, Any]:
    """Return what a task file says. Raises UserError where it lacks what every task has."""
    try:
        config = load_yaml(path, resolve_func=False)
    except Exception as error:
        raise UserError(f"--tasks {name}: cannot be read: {brief(str(error))}") from None
    if not isinstance(config, dict) or not {"task", "group"} & config.keys():
        raise UserError(f"--tasks {name}: the field `task`, a task's name, is missing")
    return config


def _require_local(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a task whose own file says what is missing, or that its data are elsewhere."""
    if "group" in config or "class" in config:
        return
    if not {"dataset_path", "custom_dataset"} & config.keys():
        raise UserError(
            f"--tasks {name}: the field `dataset_path` is missing; of a file of your own it is "
            "json, and dataset_kwargs: data_files names the file"
        )
    for required in ("doc_to_text", "doc_to_target"):
        if required not in config and config.get("output_type") != "loglikelihood_rolling":
            raise UserError(f"--tasks {name}: the field `{required}` is missing")
    if "://" in str((config.get("dataset_kwargs") or {}).get("data_files", "")):
        raise UserError(
            f"--tasks {name}: its data are on the network, and nothing is downloaded here; put "
            "them beside the file, and name them in dataset_kwargs: data_files"
        )


def _in_one_line(name: str, config: Mapping[str, Any], error: Exception) -> UserError:
    """Return why the harness could not load a task."""
    words = brief(str(error) or type(error).__name__)
    if isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError):
        what = config.get("dataset_path", "see its file")
        return UserError(
            f"--tasks {name}: its data ({what}) are not on this machine, and nothing is downloaded "
            "here; give a task whose data are local (dataset_path: json)"
        )
    if isinstance(error, FileNotFoundError):
        return UserError(f"--tasks {name}: its data are not there: {words}")
    if type(error).__name__ == "UndefinedError":
        return UserError(f"--tasks {name}: its data lack a field that it names: {words}")
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return UserError(f"--tasks {name}: the harness refuses it: {kind}{words}")


def _try_out(name: str, task: Any, limit: int | None) -> None:
    """Make question and answer of each item. Raises UserError, naming an item that lacks some."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"--tasks {name}: runs code that a model writes, which is not done here")
    if task.OUTPUT_TYPE not in (*LIKELIHOODS, "generate_until"):
        raise UserError(f"--tasks {name}: output_type {task.OUTPUT_TYPE} is not known here")
    fields = list(getattr(task, "features", []))
    config = getattr(task, "config", None)
    for part in ("doc_to_text", "doc_to_target"):
        words = getattr(config, part, None)
        # The harness takes a name of no field for the words themselves.
        if isinstance(words, str) and words.isidentifier() and fields and words not in fields:
            raise UserError(
                f"--tasks {name}: {part}: its data have no field `{words}`; there are: "
                f"{', '.join(fields)}"
            )
    for number, item in enumerate(islice(task.eval_docs, limit), start=1):
        whole = {key: _present(value) for key, value in item.items()}
        try:
            texts = [task.doc_to_text(whole), task.doc_to_target(whole)]
            if getattr(config, "doc_to_choice", None) is not None:
                texts += task.doc_to_choice(whole)
        except Exception as error:
            words = brief(str(error) or type(error).__name__)
            raise UserError(f"--tasks {name}: item {number}: {words}") from None
        if any(isinstance(text, Null) or NULL in str(text) for text in texts):
            empty = [key for key, value in item.items() if value is None]
            raise UserError(
                f"--tasks {name}: item {number}: lacks a field that is asked for: {listed(empty)}"
            )


def _present(value: Any) -> Any:
    """Return a field's value, or what is found again in a text that was made of none."""
    return Null() if value is None else value
