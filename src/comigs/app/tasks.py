"""What clients' own models get right: what has to be right before one is asked, and the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from comigs.app import api
from comigs.app.setup import ignore
from comigs.app.show import answers
from comigs.bases.load import Base
from comigs.config import Split
from comigs.errors import UserError, require_extra
from comigs.personal.model import PersonalModel
from comigs.personal.tasks.answers import LOWER_IS_BETTER, AnswerSettings, AnswerTask
from comigs.personal.tasks.extra import OwnQuestions, TaskFiles
from comigs.personal.tasks.questions import WRONG, Question, questions_of, wrong_answers
from comigs.runs.folder import RunFolder
from comigs.runs.tasks import (
    ANSWERS,
    Measure,
    Settings,
    TaskResult,
    Tasks,
    add_tasks,
    estimate,
    task_name,
)
from comigs.text import Say, plural


def evaluate_answers(
    path: Path | str | RunFolder,
    client: str | None = None,
    how: OwnQuestions = OwnQuestions(),  # noqa: B008 (it is frozen)
    say: Say = ignore,
) -> Tasks:
    """Ask clients' own models, and the base, the questions of the clients' own chats.

    path: a run folder, or what `open_run` opened, where a reader has something to say. client: only
    this one; None: all. Each client's result goes into the run's tasks.json as soon as it is there.
    Returns those of these clients. Raises UserError.
    """
    split, limit = api.split_named(how.split), how.limit
    require_extra("tasks", ("rouge_score",), "comigs evaluate --answers")
    folder = api.open_run(path)
    base, data, names = api.measurable(folder, client, say)
    config = folder.config()
    length, size = config.data.sequence_length, config.evaluation.batch_size
    settings = AnswerSettings(how.longest, length, size)

    # What is wrong with any client's questions is said before the first model writes.
    asked: dict[str, AnswerTask] = {}
    for name in names:
        questions = questions_of(data.documents(name, split))
        _require_questions(questions, name, split)
        _require_room(base, how.longest)
        wrong = wrong_answers(questions, config.seed, name, limit)
        asked[name] = AnswerTask(base, questions[:limit], wrong, settings)
        if not asked[name].choices:
            say(
                f"{name}: no question has {WRONG} answers to others beside its own that fit whole "
                f"into data.sequence_length ({length} tokens), so no choice is measured"
            )
        if longer := asked[name].longer():
            say(
                f"{name}: {longer} of {len(asked[name].questions)} right answers have more than "
                f"{how.longest} tokens, the most that a model may write (--max-new-tokens)"
            )

    # One client's experts are on the base at a time; what is measured of it is kept at once.
    told: Settings = {"split": split, "limit": limit, "max_new_tokens": how.longest}
    task = task_name(ANSWERS, limit, split)
    results = {}
    for name, task_of_client in asked.items():
        say(f"{name}: {plural(len(task_of_client.questions), 'question')}")
        with closing(PersonalModel(folder, name, base)) as model:
            own = task_of_client.written(model)
            personal = task_of_client.scores(model, own)
            with model.without_experts():
                of_base = task_of_client.written(model)
                untouched = task_of_client.scores(model, of_base)
        for line in answers(task_of_client.questions[: how.shown], of_base, own):
            say(line)
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
    require_extra("tasks", ("lm_eval",), "comigs evaluate --tasks")
    from comigs.personal.tasks import harness
    from comigs.personal.tasks.task_files import load_tasks

    # What is wrong with a task is said before the base is loaded.
    loaded = load_tasks(files, limit)
    folder = api.open_run(path)
    base, names = api.measurable_models(folder, client, say)
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
            results[name][task_name(task, limit)] = TaskResult(
                by=harness.BY,
                round=folder.checkpoint().round,
                settings=told,
                measures=harness.side_by_side(untouched[task], asked),
            )
        add_tasks(folder.files, name, results[name])
    return Tasks(clients=results)


def measures_of(
    base: Mapping[str, Sequence[float]], personal: Mapping[str, Sequence[float]]
) -> dict[str, Measure]:
    """Return by name the means of items' scores, of the base and of a personal model."""
    found = {}
    for name, scores in personal.items():
        # Both answered the same items, so what these have in common is in no difference.
        differences = [own - other for own, other in zip(scores, base[name], strict=True)]
        found[name] = Measure(
            items=len(scores),
            base=estimate(base[name]),
            personal=estimate(scores),
            difference_error=estimate(differences).error,
            lower_is_better=name in LOWER_IS_BETTER,
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
