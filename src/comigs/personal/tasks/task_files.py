"""This module loads tasks of lm-evaluation-harness (`lm_eval`), without a network, and checks them.

A task is a YAML file of the harness's: where its items are, and templates that make a question and
an answer of each. What would go wrong with the hundredth item is said before the first model is
asked.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
from huggingface_hub import constants
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from comigs.errors import UserError, nearest
from comigs.personal.tasks.extra import TaskFiles
from comigs.personal.tasks.task_items import require_splits, try_out
from comigs.personal.tasks.task_metrics import own_metrics
from comigs.runs.tasks import ANSWERS
from comigs.text import brief, listed

YAML = (".yaml", ".yml")
DEFAULT_SEED = 1234  # of few-shot examples, as the harness has it


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
        _require_own_names(loaded)
        for name, task in loaded.all()["tasks"].items():
            try_out(name, task, limit)
            task.set_fewshot_seed(seed=DEFAULT_SEED)
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
    return loaded


def _require_own_names(loaded: LoadedTasks) -> None:
    """Refuse a name under which the answers to the clients' own questions are kept."""
    record = loaded.all()
    for name in (*record["tasks"], *record["groups"]):
        if name == ANSWERS or name.startswith(f"{ANSWERS} ("):
            raise UserError(
                f"--tasks {name}: task: is what the clients' own questions (--answers) are called; "
                "give the task another name"
            )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let no library look for data, models or metrics on the hub inside."""
    switches = (
        (constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (evaluate.config, "HF_EVALUATE_OFFLINE"),
    )
    before = [getattr(of, switch) for of, switch in switches]
    for of, switch in switches:
        setattr(of, switch, True)
    try:
        yield
    finally:
        for (of, switch), value in zip(switches, before, strict=True):
            setattr(of, switch, value)


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
        with contextlib.chdir(folder), own_metrics(name):
            return manager.load([spec])
    except (KeyboardInterrupt, MemoryError, UserError):
        raise
    except Exception as error:
        _require_loadable(error)
        raise _in_one_line(name, config, error) from None


def _require_loadable(error: Exception) -> None:
    """Say in our own words why a task could not be loaded, where we find out. Raises UserError.

    The harness tries out the first item itself while it loads, and what it says of that is a
    traceback's last line; the task that it had half made says what is wrong.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        task = frame.f_locals.get("self")
        if isinstance(task, Task):
            require_splits(task.task_name, task)
            if hasattr(task, "features"):
                try_out(task.task_name, task, limit=1)
            return


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
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return UserError(f"--tasks {name}: the harness refuses it: {kind}{words}")
