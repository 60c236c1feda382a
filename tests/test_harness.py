"""Tasks of lm-evaluation-harness, on clients' own models and on the base, without a network."""

from __future__ import annotations

import json
import math
import socket
from contextlib import closing
from pathlib import Path

import datasets
import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from comigs.app.export import export
from comigs.bases.chat_encoder import ChatEncoder
from comigs.bases.tiny import byte_tokenizer, tiny_llama
from comigs.personal.tasks.harness import AsHarnessModel
from comigs.personal.tasks.task_files import offline
from comigs.runs.tasks import read_tasks
from tests.chats import write_lines
from tests.runs import comigs, copied_run, refused, write_config

ITEMS = [
    {"question": f"{word} {n}?", "choices": ["the cat", "a dog", "mats"], "label": n % 3}
    for n, word in enumerate(["who", "what sat", "which", "where on"] * 2)
]
CHOICE = """\
task: pets
dataset_path: json
dataset_kwargs: {data_files: items.jsonl}
output_type: multiple_choice
test_split: train
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
ROLLING = """\
task: words
dataset_path: json
dataset_kwargs: {data_files: items.jsonl}
output_type: loglikelihood_rolling
test_split: train
doc_to_text: ""
doc_to_target: "{{question}} {{choices[label]}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITTEN = """\
task: writes
dataset_path: json
dataset_kwargs: {data_files: items.jsonl}
output_type: generate_until
test_split: train
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module", autouse=True)
def no_cache_and_no_network(tmp_path_factory):
    """What the library keeps of data goes into a folder of the tests'; nobody is connected to.

    Attempts are counted: libraries catch what one raises.
    """
    attempts = []

    def refuse(*to, **_):
        attempts.append(to)
        raise OSError("there is no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield
    assert attempts == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks whose data are beside them."""
    made = tmp_path_factory.mktemp("tasks")
    write_lines(made / "items.jsonl", ITEMS)
    for name, text in {"pets": CHOICE, "words": ROLLING, "writes": WRITTEN}.items():
        (made / f"{name}.yaml").write_text(text)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from comigs import load_config
    from comigs.app import api

    made = tmp_path_factory.mktemp("run")
    changes = [f'data.cache="{made / "cache"}"', 'base.name="tiny-llama"', "client.lr=0.02"]
    changes.append('options.specialists="apart"')  # which exports have exactly
    return api.run(load_config(write_config(made), changes), made / "run")


@pytest.fixture(scope="module")
def asked(run, folder, tmp_path_factory):
    """What `evaluate --tasks` says of both clients, as JSON."""
    from comigs.app.tasks import evaluate_tasks
    from comigs.personal.tasks.extra import TaskFiles

    files = TaskFiles([str(folder / "pets.yaml"), "words", "writes"], folder)
    return evaluate_tasks(run.path, files)


def by_the_harness(model, folder, **more):
    """The same tasks on a model that is given to the harness as it is."""
    manager = TaskManager(include_path=folder, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch, offline():
        patch.chdir(folder)
        tasks = manager.load(["pets", "words", "writes"])
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    found = evaluate(
        lm=HFLM(pretrained=model, tokenizer=byte_tokenizer(), batch_size=1, **more),
        task_dict=tasks,
        log_samples=False,
    )
    return found["results"]


def require_same(asked, client, which, found):
    """All figures of one model are the harness's own, with their standard errors."""
    names = {
        "pets": ("acc", "brier_score"),
        "words": ("bits_per_byte",),
        "writes": ("exact_match",),
    }
    for task, metrics in names.items():
        result = asked.clients[client][task]
        assert list(result.measures) == list(metrics) and result.by.startswith("lm_eval 0.4")
        for metric in metrics:
            measure = result.measures[metric]
            estimate, error = getattr(measure, which), found[task][f"{metric}_stderr,none"]
            assert measure.items == len(ITEMS)
            assert estimate.mean == pytest.approx(found[task][f"{metric},none"], rel=1e-4)
            if error == "N/A":
                assert estimate.error is None
            elif metric == "acc":
                assert estimate.error == pytest.approx(error)


def test_the_base_is_what_the_harness_says_of_it(asked, folder):
    found = by_the_harness(tiny_llama()[0], folder)
    for client in ("ann", "bob"):
        require_same(asked, client, "base", found)
    error = asked.clients["ann"]["pets"].measures["acc"].base.error
    right = asked.clients["ann"]["pets"].measures["acc"].base.mean
    assert error == pytest.approx(math.sqrt(right * (1 - right) / (len(ITEMS) - 1)))


def test_a_personal_model_is_what_the_harness_says_of_its_export(asked, run, folder, tmp_path):
    export(run.path, "ann", "transformers", tmp_path / "model", "float32")
    found = by_the_harness(str(tmp_path / "model"), folder, device="cpu", dtype="float32")
    require_same(asked, "ann", "personal", found)
    measure = asked.clients["ann"]["words"].measures["bits_per_byte"]
    assert measure.personal.mean != pytest.approx(measure.base.mean, rel=1e-3)


def test_results_are_kept_and_a_task_that_is_asked_again_is_replaced(asked, run, folder, capsys):
    assert read_tasks(run.files) == asked
    before = torch.random.get_rng_state()
    words = ("--tasks", folder / "pets.yaml", "--client", "ann", "--limit", "3")
    done = comigs(capsys, "evaluate", run.path, *words)
    assert done.code == 0 and "pets" in done.out and "acc" in done.out and done.err == ""
    assert torch.equal(torch.random.get_rng_state(), before)
    kept = read_tasks(run.files).clients
    assert kept["ann"].pop("pets (first 3)").measures["acc"].items == 3
    assert kept == asked.clients  # a quick look does not take the place of the whole
    done = comigs(capsys, "evaluate", run.path, *words, "--json")
    assert json.loads(done.out)["clients"]["ann"]["pets (first 3)"]["settings"]["limit"] == 3
    done = comigs(capsys, "evaluate", run.path, *words[:4])
    assert done.code == 0 and read_tasks(run.files).clients["ann"]["pets"] == kept["ann"]["pets"]
    assert "brier_score (lower is better)" in done.out and "acc (lower" not in done.out


def changed(folder, tmp_path, *replaced, text=CHOICE):
    """A copy of the task with words replaced, beside its data."""
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "task.yaml").write_text(text)
    (tmp_path / "items.jsonl").write_bytes((folder / "items.jsonl").read_bytes())
    return tmp_path / "task.yaml"


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        ([("task: pets\n", "")], "the field `task`, a task's name, is missing"),
        ([("dataset_path: json\n", "")], "the field `dataset_path` is missing"),
        ([('doc_to_text: "{{question}}"\n', "")], "the field `doc_to_text` is missing"),
        ([("dataset_path: json\n", "dataset_path: allenai/ai2_arc\n"),
          ("dataset_kwargs: {data_files: items.jsonl}\n", "")],
         "its data (allenai/ai2_arc) are not on this machine, and nothing is downloaded here"),
        ([("items.jsonl", "https://example.org/items.jsonl")], "its data are on the network"),
        ([("items.jsonl", "none.jsonl")], "its data are not there"),
        ([("{{question}}", "{{query}}")], "item 1: doc_to_text: 'query' is undefined"),
        ([('"{{question}}"', "query")], "doc_to_text: its data have no field `query`; there are"),
        ([("multiple_choice", "guessing")], "the harness refuses it"),
        ([("metric: acc,", "metric: acuracy,")],
         "metric_list: acuracy is no metric of the harness"),
        ([("metric: acc, aggregation: mean,", "metric: rouge,")],
         "metric_list: rouge is no metric of the harness"),
        ([("metric: acc,", "metric: acc, hf_evaluate: true,")], "is a script on the network"),
        ([("aggregation: mean", "aggregation: meen")], 'none of the harness\'s: bits_per_byte, '),
        ([("metric: acc,", "metric: bleu,")],
         "metric_list: bleu is not measured with output_type: multiple_choice"),
        ([("doc_to_choice: choices\n", "")], "the field `doc_to_choice`, the answers to choose"),
        ([("doc_to_choice: choices", "doc_to_choice: choises")],
         "doc_to_choice: its data have no field `choises`; there are: question, choices, label"),
        ([("doc_to_choice: choices", 'doc_to_choice: "{{choices[0]}}"')],
         "item 1: doc_to_choice: makes no list of answers ("),
        ([("test_split: train", "test_split: test")],
         "test_split: its data have no split `test`; there are: train"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_asked_is_one_line(run, folder, tmp_path, capsys, replaced, says):
    before = (run.path / "tasks.json").read_bytes()
    task = changed(folder, tmp_path, *replaced)
    line = refused(capsys, "evaluate", run.path, "--tasks", task)
    assert says in line and line.startswith(("error: --tasks pets: ", f"error: --tasks {task}: "))
    assert (run.path / "tasks.json").read_bytes() == before


def test_an_item_that_lacks_a_field_is_named(run, folder, tmp_path, capsys):
    task = changed(folder, tmp_path)
    write_lines(tmp_path / "items.jsonl", [*ITEMS, {"choices": ["a", "b"], "label": 1}])
    line = refused(capsys, "evaluate", run.path, "--tasks", task)
    assert "pets: item 9: lacks a field that is asked for: question" in line
    done = comigs(capsys, "evaluate", run.path, "--tasks", task, "--limit", "2", "--client", "ann")
    assert done.code == 0


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"choices": [1, 2, 3]}, "doc_to_choice: [1, 2, 3] is no list of texts"),
        ({"choices": ["", "b"]}, "is no list of texts"),
        ({"choices": None}, "lacks a field that is asked for: choices"),
        ({"label": ["a cat"]}, "cannot be measured: "),
    ],
)
def test_what_the_harness_cannot_measure_is_one_line(run, folder, tmp_path, capsys, item, says):
    task = changed(folder, tmp_path)
    items = [{**each, **item} for each in ITEMS]
    if "label" in item:
        items = [{**each, "label": [each["choices"][0]]} for each in ITEMS]
    write_lines(tmp_path / "items.jsonl", items)
    line = refused(capsys, "evaluate", run.path, "--tasks", task)
    assert "pets: item 1: " in line and says in line


@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("label", [7, -1, "a rat"])
def test_a_right_answer_that_is_no_choice_is_named(run, folder, tmp_path, capsys, place, label):
    """The harness counts it as wrong, or ends with an index."""
    task, items = changed(folder, tmp_path), list(ITEMS)
    if isinstance(label, str):
        items = [{**item, "label": item["choices"][item["label"]]} for item in ITEMS]
    items[place] = {**items[place], "label": label}
    write_lines(tmp_path / "items.jsonl", items)
    line = refused(capsys, "evaluate", run.path, "--tasks", task)
    assert f"pets: item {place + 1}: doc_to_target: {label} is none of its 3 choices" in line


def test_metrics_of_a_written_answer_are_the_harness_s_own(run, folder, tmp_path, capsys):
    for word in ("rouge", "acuracy"):
        task = changed(folder, tmp_path, ("exact_match", word), text=WRITTEN)
        line = refused(capsys, "evaluate", run.path, "--tasks", task)
        assert f"metric_list: {word} is no metric of the harness; those are: acc, " in line
    own = "process_results: !function own.score\nmetric_list: [{metric: mine}]\n"
    task = changed(folder, tmp_path, (WRITTEN.splitlines(True)[-1], own), text=WRITTEN)
    (tmp_path / "own.py").write_text("def score(doc, results):\n    return {'mine': 0.25}\n")
    line = refused(capsys, "evaluate", run.path, "--tasks", task)
    assert "mine is not the harness's own, and needs the field `aggregation`" in line
    task.write_text(task.read_text().replace("mine}", "mine, aggregation: mean}"))
    words = ("--tasks", task, "--client", "ann", "--limit", "2", "--json")
    done = json.loads(comigs(capsys, "evaluate", run.path, *words).out)
    assert (
        done["clients"]["ann"]["writes (first 2)"]["measures"]["mine"]["personal"]["mean"] == 0.25
    )


@pytest.mark.parametrize("name", ["answers", "answers (valid)"])
def test_a_task_does_not_take_the_place_of_the_answers(run, folder, tmp_path, capsys, name):
    task = changed(folder, tmp_path, ("task: pets", f"task: {name}"))
    line = refused(capsys, "evaluate", run.path, "--tasks", task)
    assert f"--tasks {name}: task: is what the clients' own questions" in line


def test_names_are_looked_for_in_the_folder(run, folder, capsys, tmp_path):
    line = refused(capsys, "evaluate", run.path, "--tasks", "pet", "--tasks-dir", folder)
    assert "which has pets, words and writes. Did you mean" in line
    line = refused(capsys, "evaluate", run.path, "--tasks", "arc_easy")
    assert "a task by its name needs --tasks-dir" in line
    assert "no such file" in refused(capsys, "evaluate", run.path, "--tasks", tmp_path / "a.yaml")
    line = refused(capsys, "evaluate", run.path, "--tasks", "x", "--tasks-dir", tmp_path / "no")
    assert "no such folder" in line
    line = refused(capsys, "evaluate", run.path, "--tasks", folder / "pets.yaml", "--chat")
    assert "--chat: base tiny-llama has no chat template" in line


def test_questions_by_a_template_say_the_day_of_learning_and_ask_for_no_thought(run):
    """As the answers to a client's own questions do."""
    template = (
        "{{ strftime_now('%d %B %Y') }}|{% for m in messages %}{{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt and not enable_thinking %}<think></think>"
        "{% endif %}"
    )
    from comigs.app import api

    with closing(api.open_personal_model(run.path, "ann")) as model:
        model.tokenizer.chat_template = template
        asked = AsHarnessModel(model).apply_chat_template([{"role": "user", "content": "hi"}])
        assert asked == "26 July 2024|hi<|endoftext|><think></think>"
        chats = ChatEncoder("x", model.tokenizer, 99, 999, frozenset([256]))
        assert chats.decode(chats.prompt([("user", "hi")], "")) == asked
        assert model.tokenizer.chat_template == template
        model.tokenizer.chat_template = None


def test_a_router_of_whole_texts_does_not_write_token_by_token(run, folder, capsys, tmp_path):
    copy = copied_run(tmp_path)
    config = copy / "config.toml"
    text = config.read_text()
    assert 'routing = "token"' in text
    config.write_text(text.replace('routing = "token"', 'routing = "sequence"'))
    line = refused(capsys, "evaluate", copy, "--tasks", folder / "writes.yaml")
    assert "--tasks writes: lets models write token by token" in line
    done = comigs(capsys, "evaluate", copy, "--tasks", folder / "pets.yaml", "--limit", "2")
    assert done.code == 0 and Path(copy / "tasks.json").exists()


def test_the_task_that_ships_is_asked_and_cannot_be_guessed_by_place(run):
    """The one that configs/instruct names, general.yaml."""
    from comigs.app.tasks import evaluate_tasks
    from comigs.personal.tasks.extra import TaskFiles

    home = Path(__file__).parent.parent / "configs" / "instruct" / "tasks"
    asked = evaluate_tasks(run.path, TaskFiles([str(home / "general.yaml")]), "ann", limit=6)
    result = asked.clients["ann"]["general (first 6)"]
    assert list(result.measures) == ["acc", "acc_norm"] and result.measures["acc"].items == 6
    items = [json.loads(line) for line in (home / "general.jsonl").read_text().splitlines()]
    assert len({item["question"] for item in items}) == len(items) > 300
    for item in items:
        assert len(set(item["choices"])) == 4 and 0 <= item["label"] < 4
    # Whoever always chooses the same place is right once in four.
    shares = [sum(item["label"] == place for item in items) / len(items) for place in range(4)]
    assert max(shares) < 0.3 and min(shares) > 0.2
