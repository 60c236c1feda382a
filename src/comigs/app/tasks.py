"""What clients' own models get right: what has to be right before one is asked, and the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from comigs.app import api
from comigs.app.setup import ignore
from comigs.bases.load import Base
from comigs.config import Split
from comigs.errors import UserError
from comigs.personal.model import PersonalModel
from comigs.personal.tasks.answers import AnswerSettings, AnswerTask
from comigs.personal.tasks.extra import TaskFiles, require_extra
from comigs.personal.tasks.questions import WRONG, Question, questions_of, wrong_answers
from comigs.runs.folder import RunFolder
from comigs.runs.tasks import Estimate, Measure, Settings, TaskResult, Tasks, add_tasks, estimate
from comigs.text import Say, plural

LONGEST = 128  # tokens of a written answer


def evaluate_answers(
    path: Path | str | RunFolder,
    client: str | None = None,
    split: Split = "test",
    limit: int | None = None,
    longest: int = LONGEST,
    say: Say = ignore,
) -> Tasks:
    """Ask clients' own models, and the base, the questions of the clients' own chats.

    path: a run folder, or what `open_run` opened, where a reader has something to say. client: only
    this one; None: all. limit: of each client only so many questions, the first ones.
    longest: tokens of a written answer at most. Each client's result goes into the run's tasks.json
    as soon as it is there. Returns those of these clients. Raises UserError.
    """
    api.split_named(split)
    require_extra("rouge_score")
    folder = api.open_run(path)
    base, data, names = api.measurable(folder, client)
    config = folder.config()
    length, size = config.data.sequence_length, config.evaluation.batch_size
    settings = AnswerSettings(longest, length, size)

    # What is wrong with any client's questions is said before the first model writes.
    asked: dict[str, AnswerTask] = {}
    for name in names:
        questions = questions_of(data.documents(name, split))
        _require_questions(questions, name, split)
        _require_room(base, longest)
        wrong = wrong_answers(questions, config.seed, name)
        asked[name] = AnswerTask(base, questions[:limit], wrong[:limit], settings)
        if not asked[name].choices:
            say(
                f"{name}: no question has {WRONG} answers to others beside its own that fit whole "
                f"into data.sequence_length ({length} tokens), so no choice is measured"
            )

    # One client's experts are on the base at a time; what is measured of it is kept at once.
    told: Settings = {"split": split, "limit": limit, "max_new_tokens": longest}
    task = "answers" if split == "test" else f"answers ({split})"
    results = {}
    for name, task_of_client in asked.items():
        say(f"{name}: {plural(len(task_of_client.questions), 'question')}")
        with closing(PersonalModel(folder, name, base)) as model:
            personal = task_of_client.scores(model)
            with model.without_experts():
                untouched = task_of_client.scores(model)
        result = TaskResult(
            by="comigs",
            round=folder.checkpoint().round,
            settings=told,
            measures=measures_of(untouched, personal),
        )
        add_tasks(folder.files, name, {task: result})
        results[name] = {task: result}
    return Tasks(clients=results)


def evaluate_tasks(
    path: Path | str | RunFolder,
    files: TaskFiles,
    client: str | None = None,
    limit: int | None = None,
    say: Say = ignore,
) -> Tasks:
    """Ask clients' own models, and the base, tasks of lm-evaluation-harness; otherwise as above.

    Nothing is downloaded, and the base is asked once. limit: items of each task, the first ones.
    Returns the results of these clients. Raises UserError.
    """
    require_extra("lm_eval")
    from comigs.personal.tasks import harness
    from comigs.personal.tasks.task_files import load_tasks

    # What is wrong with a task is said before the base is loaded.
    loaded = load_tasks(files, limit)
    folder = api.open_run(path)
    base, names = api.measurable_models(folder, client)
    if files.chat and not base.tokenizer.chat_template:
        raise UserError(f"--chat: base {base.title} has no chat template; leave it out")

    # The base is the same for all clients, so it is asked beside the first one alone.
    told: Settings = {"limit": limit, "chat_template": "yes" if files.chat else "no"}
    results: dict[str, dict[str, TaskResult]] = {}
    untouched: dict[str, harness.Asked] = {}
    for name in names:
        say(f"{name}: {', '.join(loaded.asked)}")
        with closing(PersonalModel(folder, name, base)) as model:
            harness.require_askable(loaded, model)
            if not untouched:
                with model.without_experts():
                    untouched = harness.ask(loaded, model, limit, files.chat)
            personal = harness.ask(loaded, model, limit, files.chat)
        results[name] = {}
        for task, asked in personal.items():
            results[name][task] = TaskResult(
                by=harness.BY,
                round=folder.checkpoint().round,
                settings=told,
                measures=side_by_side(untouched[task].measures, asked.measures, asked.items),
            )
        add_tasks(folder.files, name, results[name])
    return Tasks(clients=results)


def side_by_side(
    base: Mapping[str, Estimate], personal: Mapping[str, Estimate], items: int
) -> dict[str, Measure]:
    """Return by name the estimates of a measure, over so many items, that both models have."""
    found = {}
    for name, own in personal.items():
        if name in base:
            found[name] = Measure(items=items, base=base[name], personal=own)
    return found


def measures_of(
    base: Mapping[str, Sequence[float]], personal: Mapping[str, Sequence[float]]
) -> dict[str, Measure]:
    """Return by name the means of items' scores, of the base and of a personal model."""
    found = {}
    for name, scores in personal.items():
        found[name] = Measure(
            items=len(scores), base=estimate(base[name]), personal=estimate(scores)
        )
    return found


def _require_questions(questions: Sequence[Question], client: str, split: Split) -> None:
    """Raise UserError where a client's text asks nothing."""
    if not questions:
        raise UserError(
            f'client "{client}": {split} is plain text, which asks nothing; --answers is for chats '
            "(docs/data.md)"
        )


def _require_room(base: Base, longest: int) -> None:
    """Raise UserError where an answer of so many tokens leaves no room for a question."""
    window = base.encoder.chats.longest
    if longest >= window:
        raise UserError(
            f"--max-new-tokens: given {longest}, but base {base.title} reads at most {window} "
            "tokens at once, question and answer together"
        )
