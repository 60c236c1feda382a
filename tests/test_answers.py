"""What models get right: answers as they are written, and the likeliest of four."""

from __future__ import annotations

import json
import math
from contextlib import closing
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.tasks.mlqa.utils import exact_match_score, f1_score

from comigs.app import api
from comigs.app.tasks import evaluate_answers, measures_of
from comigs.data.document import chat
from comigs.data.prepare import prepare
from comigs.errors import UserError
from comigs.personal.tasks.answers import AnswerSettings, AnswerTask
from comigs.personal.tasks.extra import OwnQuestions
from comigs.personal.tasks.likelihood import candidate, nats_of
from comigs.personal.tasks.questions import Question, questions_of, wrong_answers
from comigs.personal.tasks.text_scores import (
    UnicodeWords,
    exact_match,
    normalized,
    rouge_l,
    token_f1,
)
from comigs.personal.tasks.writing import Written, write_answers
from comigs.runs.report.page import write_report
from comigs.runs.report.tasks_table import tasks_table
from comigs.runs.tasks import TASKS, TaskResult, estimate, read_tasks
from tests.chats import PLAIN, TALKS, messages_of, questions, tiny_chat, write_lines
from tests.conftest import run_config
from tests.runs import comigs, refused

MEASURES = ["exact match", "token F1", "ROUGE-L", "cut off", "choice per token", "choice"]


def chat_run(root, **tree):
    """A short run of two clients with questions and answers of their own."""
    names = "ada bob"
    for name in names.split():
        write_lines(root / f"{name}.jsonl", questions(60, name))
    entries = {name: {"text": f"{name}.jsonl"} for name in names.split()}
    base = {"chat_template": PLAIN, "name": "tiny-llama", **tree.pop("base", {})}
    settings = {"sequence_length": 60}
    config = run_config(root, names, entries, data=settings, base=base, rounds=1, **tree)
    return api.run(config, root / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return chat_run(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def asked(run):
    return evaluate_answers(run.path, how=OwnQuestions(longest=8))


def test_words_are_compared_as_squad_does():
    """By the harness's copy of MLQA's script, in English, and by hand."""
    pairs = [
        ("The cat, sat.", "cat sat on a mat"),
        ("An apple", "apple"),
        ("a b b c", "b b d"),
        ("$5 + 3", "5 3"),
        ("«Où» … ça ?", "où: ça là"),
    ]
    for answer, right in pairs:
        assert exact_match(answer, right) == exact_match_score(answer, right, "en")
        assert token_f1(answer, right) == pytest.approx(f1_score(answer, right, "en"))
    assert token_f1("the", "") == exact_match("the", "") == 1 and token_f1("cat", "the") == 0
    # Two words of three and of four are common: precision 2/3, recall 2/4.
    assert token_f1("one two six", "one two three four") == pytest.approx(4 / 7)


def test_words_of_every_language_are_compared():
    assert normalized("«Été»… ça ?") == "été ça"
    assert exact_match("Où ? Là !", "« où là »") == 1
    assert exact_match("e\u0301te\u0301", "été") == 1
    assert rouge_l("été là", "été là-bas") == pytest.approx(0.8)  # 2 of 2 and 2 of 3
    assert rouge_l("привет мир", "привет, мир!") == 1
    assert rouge_l("Größe", "Große") == 0 and token_f1("Größe", "Große") == 0


def test_marks_are_of_their_letters_and_scripts_without_spaces_have_words_of_one_character():
    """Against MLQA's script where it knows the language, and by hand."""
    chinese = [("我喜欢北京。", "他喜欢北京"), ("在 Debian 中", "Debian中的包"), ("是", "不")]
    for answer, right in chinese:
        assert token_f1(answer, right) == pytest.approx(f1_score(answer, right, "zh"))
    hindi = ("हिन्दी में लिखो", "हिन्दी लिखो।")
    assert token_f1(*hindi) == pytest.approx(f1_score(*hindi, "hi")) == rouge_l(*hindi) == 0.8
    # Two words that share their letters and differ in their vowels are two.
    assert rouge_l("की", "का") == token_f1("की", "का") == 0
    assert UnicodeWords().tokenize("क्षत्रिय लिखो") == ["क्षत्रिय", "लिखो"]
    assert UnicodeWords().tokenize("ที่นี่ 12 ラーメン") == ["ที่", "นี่", "12", *"ラーメン"]
    assert rouge_l("我爱北京", "我去北京") == 0.75 and rouge_l(
        "שָׁלוֹם עולם", "שָׁלוֹם"
    ) == pytest.approx(2 / 3)


def test_rouge_is_the_longest_common_subsequence():
    """By hand: of (a b c d) and (a c b d e), (a b d) is the longest, of four and of five words."""
    assert rouge_l("w x y z", "w y x z v") == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))


def test_an_estimate_has_the_standard_error_of_the_mean():
    assert estimate([1.0, 0.0, 1.0, 1.0]).error == pytest.approx(math.sqrt(3 / 16 / 3))
    assert estimate([0.5]).error is None


def test_wrong_answers_are_three_others_and_the_same_each_time(run):
    data = prepare(run.config(), tiny_chat("tiny-llama").encoder)
    asked = questions_of(data.documents("ada", "test"))
    wrong = wrong_answers(asked, 42, "ada")
    for question, others in zip(asked, wrong, strict=True):
        assert len({question.answer, *others}) == 4
        assert {*others} <= {other.answer for other in asked}
    assert wrong == wrong_answers(asked, 42, "ada") != wrong_answers(asked, 43, "ada")
    assert wrong_answers(asked[:3], 42, "ada") == [[], [], []]
    assert wrong_answers(asked, 42, "ada", 2) == wrong[:2]


def test_a_wrong_answer_is_right_nowhere_and_does_not_stand_in_the_prompt():
    """Neither another answer of the chat nor one that the same question got elsewhere."""
    talks = [
        [("user", "Why?"), ("assistant", "rain"), ("user", "how"), ("assistant", "so")],
        [("system", "s"), ("user", " why? "), ("assistant", "the Sun")],
        [("user", "who"), ("assistant", "Rain!")],
        [("user", "where"), ("assistant", "here")],
        [("user", "when"), ("assistant", "now")],
        [("user", "what"), ("assistant", "that")],
    ]
    asked = questions_of([chat(tuple(talk), "messages", "x") for talk in talks])
    found = [set() for _ in asked]
    for seed in range(60):
        for own, drawn in zip(found, wrong_answers(asked, seed, "ada"), strict=True):
            own |= {normalized(words) for words in drawn}
    assert found[0] == {"here", "now", "that"}  # not "so" of its chat, not "sun" of its question
    assert found[1] == {"sun", "here", "now", "that"}  # not "rain", which stands in its prompt
    assert found[2] == {"so", "here", "now", "that"}
    assert found[3] == {"so", "sun", "here", "now", "that"}


def test_who_reads_no_question_is_right_once_in_four():
    """As right and wrong answers are drawn from the same: whichever answers somebody prefers."""
    random = np.random.default_rng(1)
    asked = [Question((("user", f"q{n}"),), f"a{n}", "", n) for n in range(40)]
    liked = {question.answer: random.normal() for question in asked}  # as short ones are
    right = []
    for seed in range(60):
        for question, others in zip(asked, wrong_answers(asked, seed, "ada"), strict=True):
            right.append(liked[question.answer] > max(liked[words] for words in others))
    assert np.mean(right) == pytest.approx(0.25, abs=0.02)


def test_only_whole_answers_are_compared(run):
    base, long = tiny_chat("tiny-llama"), "x" * 50
    asked = [Question((("user", f"{n}?"),), "ab", "", n) for n in range(3)]
    wrong = [["c", "d", "e"], ["c", "d", long], []]
    task = AnswerTask(base, asked, wrong, AnswerSettings(4, 40, 2))
    assert len(task.choices) == 1
    assert [one.tokens for one in task.choices[0]] == [4, 3, 3, 3]


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("<think>\n\n</think>\n\nyes", "yes"),
        (" \n<think>so\nor so</think> yes </think>", "yes </think>"),
        ("a <think>b</think> c", "a <think>b</think> c"),
        ("<think>cut", "<think>cut"),
    ],
)
def test_what_is_thought_before_an_answer_is_none_of_it(written, answer):
    base = tiny_chat("tiny-llama")
    ids = torch.tensor([base.tokenizer(written)["input_ids"]])
    model = SimpleNamespace(
        device="cpu", generate=lambda input_ids, **_: torch.cat([input_ids, ids], 1)
    )
    ((text, is_cut),) = write_answers(model, base.encoder.chats, [[7]], 40, 1)
    assert text == answer and is_cut


def test_every_answer_of_a_chat_is_a_question():
    asked = questions_of([chat(tuple(talk), "messages", "x") for talk in TALKS])
    assert [one.answer for one in asked] == ["ho", "oui, toi ?", "b c", "e", "1"]
    assert [len(one.before) for one in asked] == [1, 2, 1, 3, 1]


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_batches_write_what_one_alone_writes(name):
    """Against `generate` of transformers, a question at a time, without a cache."""
    base = tiny_chat(name)
    turns = [talk[:1] for talk in TALKS]
    prompts = [base.encoder.chats.prompt(before, "") for before in turns]
    together = write_answers(base.model, base.encoder.chats, prompts, 9, 3)
    for before, answer in zip(turns, together, strict=True):
        ids = base.tokenizer.apply_chat_template(
            messages_of(before), add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        alone = base.model.generate(ids, max_new_tokens=9, do_sample=False, use_cache=False)
        text = base.tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.text == text.strip()
        assert answer.is_cut == (base.tokenizer.eos_token_id not in alone[0, ids.shape[1] :])


def test_a_prompt_with_little_room_costs_the_others_nothing():
    base = tiny_chat("tiny-llama")
    prompts = [[7] * 60, [8] * 5]
    long, short = write_answers(base.model, base.encoder.chats, prompts, 20, 2)
    assert write_answers(base.model, base.encoder.chats, prompts[1:], 20, 2) == [short]
    assert len(long.text) <= 4


def naive_nats(model, tokenizer, before, answer):
    """-ln p of an answer and its end, a token after the other, by transformers alone."""
    prompt = tokenizer.apply_chat_template(
        messages_of(before), add_generation_prompt=True, tokenize=False
    )
    first = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(f"{prompt} {answer}{tokenizer.eos_token}")["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(log_p[place - 1, ids[place]]) for place in range(first, len(ids)))


def test_the_likelihood_of_an_answer_is_that_of_transformers(run):
    """Of the personal model, in batches of unequal length."""
    with closing(api.open_personal_model(run.path, "ada")) as model:
        encoder = tiny_chat("tiny-llama").encoder.chats
        befores, answers = [talk[:1] for talk in TALKS], ["ho", "a much longer one", "x y"]
        pairs = [(before, answer) for before in befores[:2] for answer in answers]
        possible = [candidate(encoder, *pair, 60, "") for pair in pairs]
        found = nats_of(model.attachment, possible, 4, torch.float32)
        for pair, nats, one in zip(pairs, found, possible, strict=True):
            assert nats == pytest.approx(naive_nats(model.model, model.tokenizer, *pair), rel=1e-4)
            assert one.tokens == len(pair[1]) + 2  # the space before it, and what ends it


def test_of_a_longer_chat_only_the_last_answer_counts():
    encoder, before = tiny_chat("tiny-llama").encoder.chats, TALKS[2][:3]
    one = candidate(encoder, before, "e", 60, "")
    assert one.tokens == 3 and one.is_whole  # a space, the letter and what ends it
    cut = candidate(encoder, before, "e", one.window.inputs.size - 1, "")
    assert cut.tokens == 2 and not cut.is_whole
    assert candidate(encoder, before, "e", 4, "").tokens == 0


def test_each_model_is_asked_and_the_result_is_kept(run, asked):
    again = evaluate_answers(run.path, "bob", OwnQuestions(longest=8)).clients["bob"]
    assert again == asked.clients["bob"]
    kept = read_tasks(run.files)
    assert kept.clients.keys() == {"ada", "bob"} and kept == asked
    result = kept.clients["ada"]["answers"]
    assert list(result.measures) == MEASURES and result.round == 1
    assert result.settings == {"split": "test", "limit": None, "max_new_tokens": 8}
    # The same from the models themselves, one question at a time.
    data = prepare(run.config(), tiny_chat("tiny-llama").encoder)
    questions = questions_of(data.documents("ada", "test"))
    wrong = wrong_answers(questions, run.config().seed, "ada")
    with closing(api.open_personal_model(run.path, "ada")) as model:
        for kind, name in product(("personal", "base"), ("choice per token", "choice")):
            if kind == "base":
                model.attachment.unbind()
            right = []
            for question, others in zip(questions, wrong, strict=True):
                own, *rest = (
                    naive_nats(model.model, model.tokenizer, question.before, words) / size
                    for words in (question.answer, *others)
                    for size in (len(words) + 2 if name == "choice per token" else 1,)
                )
                right.append(own < min(rest))
            measured = getattr(result.measures[name], kind)
            assert measured.mean == pytest.approx(sum(right) / len(right))


def test_they_are_on_the_page_and_in_the_terminal(run, asked, capsys):
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "<h2>Tasks</h2>" in page and "choice per token" in page
    few = ("--answers", "--max-new-tokens", "8")
    done = comigs(capsys, "evaluate", run.path, *few, "--limit", "2", "--json")
    told = json.loads(done.out)["clients"]["ada"]["answers (first 2)"]
    assert told["measures"]["ROUGE-L"]["items"] == 2 and told["settings"]["limit"] == 2
    assert read_tasks(run.files).clients["ada"]["answers"] == asked.clients["ada"]["answers"]
    words = ("--client", "ada", "--split", "valid", "--show", "2")
    done = comigs(capsys, "evaluate", run.path, *few, *words)
    assert done.code == 0 and "answers (valid, at most 8 tokens)" in done.out
    assert "difference" in done.out and "cut off (lower is better)" in done.out
    # The same answers as they were written, with the question and the right answer.
    data = prepare(run.config(), tiny_chat("tiny-llama").encoder)
    for number, question in enumerate(questions_of(data.documents("ada", "valid"))[:2], 1):
        assert (
            f"question {number}: {question.before[-1][1]}\n  right: {question.answer}" in done.out
        )
    assert done.out.count("  base: ") == done.out.count("  own: ") == 2
    assert "question 3" not in done.out


def test_answers_that_had_not_ended_are_counted_and_long_right_ones_are_told(run):
    said = []
    how = OwnQuestions(limit=3, longest=2)
    result = evaluate_answers(run.path, "ada", how, said.append).clients["ada"]["answers (first 3)"]
    assert result.measures["cut off"].lower_is_better
    data = prepare(run.config(), tiny_chat("tiny-llama").encoder)
    asked = questions_of(data.documents("ada", "test"))[:3]
    longer = sum(len(question.answer.encode()) > 2 for question in asked)  # a byte is a token
    assert longer and any(f"{longer} of 3 right answers have more than 2 tokens" in s for s in said)
    base = tiny_chat("tiny-llama")
    task = AnswerTask(base, asked, [[]] * 3, AnswerSettings(2, 60, 2))
    answers = [Written("a", True), Written("b", False), Written("c", True)]
    assert task.scores(None, answers)["cut off"] == [1, 0, 1]


def test_a_difference_has_the_error_of_the_differences_of_items():
    """Both models answer the same items: what is hard for both is in no difference."""
    base, own = [0.0, 0.2, 0.9, 0.5], [0.1, 0.3, 1.0, 0.7]
    measure = measures_of({"x": base}, {"x": own})["x"]
    gains = np.subtract(own, base)
    assert measure.difference_error == pytest.approx(gains.std(ddof=1) / 2)
    assert measure.difference_error < measure.base.error / 5
    table = tasks_table({"ada": {"quiz": task_of(measure)}})
    assert table.rows[0][-1] == "+0.125 ± 0.025"


def task_of(measure, **settings):
    """A result of round 3 of that one measure."""
    return TaskResult(by="x", round=3, settings=settings, measures={"m": measure})


def test_what_was_asked_otherwise_than_always_says_so():
    measure = measures_of({"x": [0.0, 1.0]}, {"x": [1.0, 1.0]})["x"]
    results = {
        "answers": task_of(measure, split="test", limit=None, max_new_tokens=128),
        "answers (first 2)": task_of(measure, limit=2, max_new_tokens=256),
        "quiz": task_of(measure, limit=5, chat_template="yes"),
    }
    names = [row[0] for row in tasks_table({"ada": results}, 3).rows]
    assert names == [
        "answers",
        "answers (first 2, at most 256 tokens)",
        "quiz (first 5, by the chat template)",
    ]
    names = [row[0] for row in tasks_table({"ada": results}, 28).rows]
    assert names[0] == "answers (after round 3 of 28)"


def test_what_cannot_be_asked_is_one_line(run, asked, capsys, tmp_path):
    line = refused(capsys, "evaluate", run.path, "--answers", "--max-new-tokens", "64")
    assert "--max-new-tokens: given 64, but base tiny-llama reads at most 64 tokens" in line
    assert "--model: is measured on text alone" in refused(
        capsys, "evaluate", run.path, "--answers", "--model", "x"
    )
    (run.path / TASKS).write_text("{")
    assert "tasks.json: not JSON" in refused(capsys, "report", run.path)
    (run.path / TASKS).write_text('{"clients": {"ada": {"answers": {"by": 3}}}}')
    assert "tasks.json: clients: ada: answers: by: " in refused(capsys, "report", run.path)
    (run.path / TASKS).unlink()
    (run.path / TASKS).symlink_to(tmp_path / "elsewhere")
    assert "a symbolic link" in refused(capsys, "evaluate", run.path, "--answers")
    (run.path / TASKS).unlink()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--limit", "3"], "--limit: has no effect without --answers or --tasks"),
        (["--chat", "--answers"], "--chat: has no effect without --tasks"),
        (["--tasks-dir", "x"], "--tasks-dir: has no effect without --tasks"),
        (
            ["--max-new-tokens", "9", "--tasks", "x"],
            "--max-new-tokens: has no effect",
        ),
        (["--show", "1"], "--show: has no effect without --answers"),
        (["--split", "valid", "--tasks", "x"], "--split: has no effect on --tasks"),
        (["--answers", "--show", "1", "--json"], "--show: prints text beside a table"),
    ],
)
def test_an_option_without_effect_is_refused(run, capsys, words, says):
    assert says in refused(capsys, "evaluate", run.path, *words)


def test_plain_text_asks_nothing(tmp_path):
    folder = api.run(run_config(tmp_path, "ada", rounds=1), tmp_path / "run")
    with pytest.raises(UserError, match=r'client "ada": test is plain text, which asks nothing'):
        evaluate_answers(folder.path)


def test_a_router_that_reads_the_whole_text_is_asked_one_by_one(tmp_path):
    folder = chat_run(tmp_path, experts={"routing": "sequence"})
    how = OwnQuestions(limit=2, longest=4)
    result = evaluate_answers(folder.path, "ada", how).clients["ada"]["answers (first 2)"]
    assert list(result.measures) == MEASURES
