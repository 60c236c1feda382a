"""Where tokens go: the weights of a naive mixture, every token in one group, and text that only its
owner sees.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import re
import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from comigs import text as f
from comigs.app import api
from comigs.data.prepare import prepare
from comigs.personal.model import PersonalModel
from comigs.personal.routes import languages
from comigs.personal.routes.coloured import GENERALIST, SPECIALIST, WHOLE, coloured
from comigs.personal.routes.kinds import frequencies_of, kinds_of
from comigs.runs.routes import Routes
from comigs.slots import Slot
from tests import naive
from tests.conftest import APART, run_config, tiny
from tests.local_grid import Federation
from tests.runs import comigs, copied_run, refused
from tests.test_on_top import apart
from tests.test_report import Page

RUNS = {  # name -> experts, base and options
    "default": ({}, "tiny-gpt2", {}),
    "token": ({}, "tiny-gpt2", APART),
    "two-on-top": ({"specialists": 2}, "tiny-llama", {}),
    "sequence": ({"routing": "sequence"}, "tiny-gpt2", APART),
    "client": ({"routing": "client"}, "tiny-gpt2", APART),
    "two-of-three": ({"generalists": 2, "top_k": 2}, "tiny-llama", APART),
    "one-of-two": ({"top_k": 1}, "tiny-llama", APART),
}
LENGTH = 12  # of a window, in run_config
EVIL = "<script>alert(1)</script> \x1b[31mred\u202e & engine wheel.\nNo engine 42\n"


@functools.cache
def run_of(name: str) -> Path:
    """A run of two clients whose routers have learnt something, made once."""
    root = Path(tempfile.mkdtemp(prefix="comigs-routes-"))
    experts, base, options = RUNS[name]
    client = {"steps": 6, "router_steps": 3, "lr": 0.05, "router_lr": 0.03}
    config = run_config(
        root / "text",
        experts={"strength": "each", **experts},
        base={"name": base},
        client=client,
        options={"finish": "mixture", **options},
    )
    return api.run(config, root / name).path


@pytest.fixture
def evil(tmp_path) -> Path:
    """A text that would do something to whoever shows it as it is."""
    path = tmp_path / "evil.txt"
    path.write_text(EVIL, encoding="utf-8")
    return path


def routes_of(capsys, *words: object) -> list[dict]:
    """What `comigs routes --json` says."""
    done = comigs(capsys, "routes", *words, "--json")
    assert done.code == 0, done
    return json.loads(done.out)


def naive_weights(run: Path, base_name: str, text: str, top_k: int, routing: str) -> np.ndarray:
    """The generalists' weights (tokens, blocks) in a model whose every expert is a whole MLP."""
    base = tiny(base_name)
    tensors = load_file(run / "clients" / "ada" / "personal.safetensors")
    parts = sorted({name.split(".")[2] for name in tensors} - {"router", "attention"})
    shared, lead, gate = [part.startswith("g") for part in parts], 0.0, None
    if "rest" in parts:
        # everybody's generalist is the last expert, and the router is as far open to it as it says
        slots, specialists = {Slot.parse(name): t for name, t in tensors.items()}, len(parts) - 2
        tensors = apart(slots, specialists)
        shared, lead = [*[False] * specialists, True], math.log(9)
        (gate,) = {float(tensor) for slot, tensor in slots.items() if slot.is_gate}
        assert gate > 0
    model = naive.naive_model(base.model, tensors, top_k, routing=routing, lead=lead, gate=gate)
    ids = [base.encoder.separator, *base.tokenizer(text)["input_ids"]]
    rows = []
    for start in range(0, len(ids), LENGTH):
        with torch.no_grad():
            model(torch.tensor([ids[start : start + LENGTH]]))
        chosen = [
            [dict(mixture.choose(row)) for row in mixture.logits_TE]
            for mixture in naive.mixtures(model)
        ]
        for of_blocks in zip(*chosen, strict=True):
            rows.append(
                [sum(float(w) for e, w in weights.items() if shared[e]) for weights in of_blocks]
            )
    return np.array(rows)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.few(3)
def test_weights_are_those_of_the_naive_mixture_window_by_window(capsys, evil, name):
    experts, base, options = RUNS[name]
    routing, top_k = experts.get("routing", "token"), experts.get("top_k", 2)
    (found,) = routes_of(capsys, run_of(name), "--client", "ada", "--text", evil)
    shown = np.array([token["weights"] for token in found["passage"]])
    expected = naive_weights(run_of(name), base, EVIL, top_k, routing)
    assert found["routing"] == routing and found["text"] == "evil.txt"
    assert shown == pytest.approx(expected, abs=2e-5)
    assert found["every"]["mean"] == pytest.approx(expected.mean(0), abs=2e-5)
    assert found["every"]["deviation"] == pytest.approx(expected.std(0), abs=2e-5)
    assert found["beside_others"] == (not options)
    # the router has an opinion, and where it reads tokens, it is about tokens
    assert np.abs(expected - (0.5 if options else 0.1)).max() > 0.02
    assert (expected.std(0) > 1e-4).any() == (routing != "client")


def test_over_the_test_text_they_are_what_the_run_measured_itself(capsys):
    run = run_of("token")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [
        line["generalist_share_by_layer"]
        for line in lines
        if line["kind"] == "kept" and line["client"] == "ada"
    ]
    (found,) = routes_of(capsys, run, "--client", "ada")
    assert found["every"]["mean"] == pytest.approx(measured[-1], abs=1e-4)


@pytest.mark.parametrize("name", ["default", "token"])
def test_what_routing_is_worth_is_measured_against_the_mean_weights(name):
    file = Path(__file__).parent.parent / "benchmarks" / "routing_worth.py"
    spec = importlib.util.spec_from_file_location("routing_worth", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    folder = api.open_run(run_of(name))
    base = api.base_of(folder)
    test = prepare(folder.config(), base.encoder).load("ada").test
    with closing(PersonalModel(folder, "ada", base)) as model:
        before = model.evaluate(test)
        mixture, constant = benchmark.perplexities(model, test)
        after = model.evaluate(test)
    assert (mixture, constant) == (before.perplexity, after.perplexity) and mixture != constant
    for were, are in zip(before.expert_share_LE, after.expert_share_LE, strict=True):
        assert are == pytest.approx(were, abs=1e-5)


def test_a_router_that_is_closed_to_what_all_know_is_named(capsys):
    (found,) = routes_of(capsys, run_of("token"), "--client", "ada")
    routes = Routes.model_validate(found)
    closed = routes.every.model_copy(update={"mean": [0.0] * routes.blocks})
    shown = routes.model_copy(update={"every": closed})
    assert "no token" not in routes.who and shown.who.endswith(", no token to generalists")
    shown = shown.model_copy(update={"beside_others": True})
    assert shown.who.endswith(", no token to what all know")


def test_a_model_that_is_one_part_has_no_routes_and_says_which(capsys, evil, tmp_path):
    run = Path(shutil.copytree(run_of("token"), tmp_path / "run"))
    summary = json.loads((run / "summary.json").read_text())
    summary["clients"]["ada"]["kept_part"] = "specialist 0"
    (run / "summary.json").write_text(json.dumps(summary))
    line = refused(capsys, "routes", run, "--client", "ada")
    assert line.endswith('client "ada": its model is one part: specialist 0; no token is routed')
    assert len(routes_of(capsys, run, "--client", "bob", "--text", evil)) == 1


@pytest.mark.parametrize("text", ["", "evil"])
def test_every_token_is_in_one_kind_and_one_frequency(capsys, evil, text):
    words = ("--text", evil) if text else ()
    (found,) = routes_of(capsys, run_of("token"), "--client", "ada", "--tokens", 5000, *words)
    total = found["every"]["tokens"]
    assert total == len(found["passage"])
    for groups in (found["kinds"], found["frequencies"]):
        assert sum(group["tokens"] for group in groups) == total
        for block, mean in enumerate(found["every"]["mean"]):
            sums = [g["tokens"] * g["mean"][block] for g in groups if g["tokens"]]
            assert sum(sums) / total == pytest.approx(mean, abs=1e-5)
    by_kind = {group["name"]: group for group in found["kinds"]}
    for name, group in by_kind.items():
        own = [token["weights"] for token in found["passage"] if token["kind"] == name]
        assert group["tokens"] == len(own)
        if own:
            assert group["mean"] == pytest.approx(np.mean(own, axis=0), abs=1e-5)


def test_a_token_is_at_one_end_of_a_ranking_and_at_none_where_all_weigh_the_same(capsys, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("engine wheel")
    (found,) = routes_of(capsys, run_of("default"), "--client", "ada", "--text", short)
    for extremes in found["extremes"]:
        most, least = ({one["text"] for one in ranking} for ranking in extremes.values())
        assert most and len(most) == len(least) and not most & least
    (found,) = routes_of(capsys, run_of("client"), "--client", "ada", "--text", short)
    assert all(not one["most_generalist"] + one["most_specialist"] for one in found["extremes"])
    shown = comigs(capsys, "routes", run_of("client"), "--client", "ada").out
    assert "kind of token" in shown
    assert "most to" not in shown


def test_what_is_weighed_has_the_words_of_the_model(capsys, tmp_path):
    out = tmp_path / "page.html"
    for name, (shared, own) in (
        ("default", ("what all know", "its own")),
        ("token", ("generalists", "specialists")),
    ):
        shown = comigs(capsys, "routes", run_of(name), "--client", "ada").out
        assert f"(weight of {shared}, " in shown
        assert f"most to {shared}" in shown and f"most to {own}" in shown
        assert comigs(capsys, "routes", run_of(name), "--client", "ada", "--out", out).code == 0
        legend = f'<span>{own}</span><span class="scale"></span><span>{shared}</span>'
        assert legend in out.read_text(encoding="utf-8")


def test_extremes_are_the_outermost_means_of_the_vocabulary(capsys, evil):
    (found,) = routes_of(capsys, run_of("token"), "--client", "ada", "--text", evil)
    by_text: dict[str, list[float]] = {}
    for token in found["passage"]:
        by_text.setdefault(token["text"], []).append(token["weights"][1])
    means = {text: np.mean(weights) for text, weights in by_text.items()}
    known = {text: mean for text, mean in means.items() if text.isascii() and text}
    extremes = found["extremes"][1]
    top, bottom = extremes["most_generalist"][0], extremes["most_specialist"][0]
    assert top["weight"] >= max(known.values()) - 1e-5
    assert bottom["weight"] <= min(known.values()) + 1e-5
    assert all(means[one["text"]] == pytest.approx(one["weight"], abs=1e-5) for one in (top,))
    assert top["times"] == len(by_text[top["text"]])


KINDS = [  # tokens, with | between them, and their kinds by first letters
    ("Le| nom|bre| d|'|un|it|és| de| Par|is| est| 42|.", "f b i f p b i i f b i f n p"),
    ("Les clients de Paris sont dans le réseau et les autres sont à Lyon.", None),
    (
        "|Le| réseau| de| Paris| est| dans| la| ville| de| Lyon|,| N|\n",
        "s f c f m f f f c f m p m s",
    ),
    (
        "Der| Hund| ist| in| der| Stadt| und| mit| USB| auf| dem| Tisch|.",
        "f c f f f c f f m f f c p",
    ),
    ("De| hond| is| in| Amsterdam| en| op| het| net|  |x86|_|64", "f c f f m f f f c s c p n"),
    ("«|Il| cane| è| in| Italia|»|,| con| il| gatto|:| Poi| va", "p f c f f m p p f f c p c c"),
]
LETTERS = {
    "f": "function words", "c": "content words", "m": "names", "n": "numbers", "p": "punctuation",
    "b": "beginnings of words", "i": "inside words", "s": "spaces",
}  # fmt: skip


@pytest.mark.parametrize(("tokens", "letters"), [pair for pair in KINDS if pair[1]])
def test_a_token_is_what_its_first_character_or_its_whole_word_is(tokens, letters):
    kinds, _ = kinds_of([piece.encode() for piece in tokens.split("|")])
    assert kinds == [LETTERS[letter] for letter in letters.split()]


def test_a_paragraph_has_its_own_language():
    french = "Le nombre de clients est dans le réseau et les autres sont à la maison."
    english = "The number of clients is in the network and all the others are at home."
    _, words = kinds_of([f"{french}\n\n{english}\n\nUn mot".encode()])
    found = {word.text: word.language for word in words}
    assert found["réseau"] == "fr" and found["network"] == "en"
    assert found["mot"] in ("fr", "en")  # too short to tell: its document's
    assert {word.language for word in kinds_of([b"xyz qrs tuv"])[1]} == {languages.NO_LANGUAGE}


def test_bytes_may_be_cut_anywhere():
    random = np.random.default_rng(0)
    raw = "Größe: 12 €, l'été «à» \U0001f600\n\tΩμ x²\u00a0…".encode() * 3
    for _ in range(50):
        cuts = sorted(random.integers(0, len(raw) + 1, size=9))
        pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        assert len(kinds_of(pieces)[0]) == len(pieces)
    assert len(kinds_of([b"\xff", b"\xc3", b"(", b""])[0]) == 4  # no text at all


def test_the_first_half_of_a_text_is_frequent_and_its_last_tenth_rare():
    ids = np.array([7] * 50 + [3] * 20 + [5] * 20 + [9] * 4 + [*range(10, 16)])
    levels = dict(zip(ids.tolist(), frequencies_of(ids), strict=True))
    assert levels[7] == "frequent" and levels[3] == levels[5] == "in between"
    assert {levels[n] for n in (9, *range(10, 16))} == {"rare"}


def test_lists_of_function_words_hold_no_content_word():
    known = languages.function_words()
    assert {"fr", "de", "it", "nl", "en"} <= known.keys()
    for code, words in {"fr": "le de et", "de": "der und", "it": "il di", "nl": "het van"}.items():
        assert set(words.split()) <= known[code]
    assert not {"computer", "lavoro", "pièce", "click"} & frozenset().union(*known.values())


def test_without_the_lists_it_says_what_to_install(capsys, monkeypatch):
    languages.function_words.cache_clear()
    monkeypatch.setitem(sys.modules, "bm25s", None)
    line = refused(capsys, "routes", run_of("token"), "--client", "ada")
    assert "pip install 'comigs[routes]'" in line
    languages.function_words.cache_clear()


# what is shown


def test_the_terminal_shows_text_weights_and_tables(capsys, evil):
    done = comigs(capsys, "routes", run_of("token"), "--client", "ada", "--text", evil)
    assert done.code == 0 and not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", done.out)
    assert "<|endoftext|>" + f.harmless(EVIL) in re.sub(r"\[\d\.\d\d\]", "", done.out)
    for word in ("most to generalists", "beginnings of words", "punctuation", "rare", "tokens"):
        assert word in done.out
    one = comigs(capsys, "routes", run_of("token"), "--client", "ada", "--block", 1, "--relative")
    assert "block 1 of 0 to 1" in one.out


def test_colours_are_between_the_reports_two():
    assert WHOLE.ground(1.0) == GENERALIST and WHOLE.ground(0.0) == SPECIALIST
    with click.Context(click.Command("x"), color=True):
        shown = coloured([("a\n", 1.0), ("\x1b[5m", 0.0)])
    assert "48;2;31;99;181" in shown and "48;2;214;112;30" in shown
    # a ground ends before a line does, and nobody else's escape goes through
    assert shown.index("\x1b[0m") < shown.index("\n") and "\x1b[5m" not in shown


def test_the_page_shows_runs_side_by_side_without_script(capsys, evil, tmp_path):
    runs = [run_of(name) for name in ("token", "sequence", "client")]
    out = tmp_path / "page.html"
    words = (*runs, "--client", "ada", "--text", evil)
    done = comigs(capsys, "routes", *words, "--out", out)
    assert done.code == 0 and "it holds text of ada" in done.out
    assert out.stat().st_mode & 0o777 == 0o600
    html = out.read_text(encoding="utf-8")
    page = Page(html)
    assert not page.count("script") and not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", html)
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
    # every choice has a label, one of each kind is chosen, and blocks have rules
    boxes = [a for tag, a in page.tags if tag == "input"]
    labels = [a["for"] for tag, a in page.tags if tag == "label"]
    assert [box["id"] for box in boxes] == labels == list(dict.fromkeys(labels))
    assert sum("checked" in box for box in boxes) == 2
    assert all(f".routes>.b{block}:checked~" in html for block in ("m", 0, 1))
    # each passage is the whole text, and its variables are the weights
    spans = [a for tag, a in page.tags if tag == "span" and "title" in a]
    found = routes_of(capsys, *words)
    passages = re.findall(r'<p class="passage".*?</p>', html, flags=re.DOTALL)
    assert len(passages) == 3 and "".join(Page(passages[0]).words) == "<|endoftext|>" + f.harmless(
        EVIL
    )
    tokens = [token for one in found for token in one["passage"]]
    assert len(spans) == len(tokens)
    for span, token in zip(spans, tokens, strict=True):
        shown = dict(part.split(":") for part in span["style"].split(";"))
        assert float(shown["--w1"]) == pytest.approx(token["weights"][1], abs=6e-4)
        assert float(shown["--wm"]) == pytest.approx(np.mean(token["weights"]), abs=6e-4)
    # it may be written again, and a file of somebody else's may not
    assert comigs(capsys, "routes", *words, "--out", out).code == 0


def test_side_by_side_one_weight_per_token_per_sequence_and_per_client(capsys):
    names = ("token", "sequence", "client")
    found = routes_of(capsys, *map(run_of, names), "--client", "ada")
    assert [one["routing"] for one in found] == list(names)
    texts = [[token["text"] for token in one["passage"]] for one in found]
    assert texts[0] == texts[1] == texts[2] and "".join(texts[0]).count("engine")
    assert max(found[2]["every"]["deviation"]) == 0 < max(found[1]["every"]["deviation"])


def test_a_report_holds_text_only_where_it_is_asked_to(capsys, tmp_path):
    run, out = run_of("token"), tmp_path / "report.html"
    assert comigs(capsys, "report", run, "--out", out).code == 0
    without = Page(out.read_text(encoding="utf-8"))
    assert not any(word in without.text for word in ("loom", "wheel"))
    assert (
        comigs(capsys, "report", run, "--out", out, "--routes", "ada", "--routes", "bob").code == 0
    )
    assert out.stat().st_mode & 0o777 == 0o600
    page = Page(out.read_text(encoding="utf-8"))
    assert page.text.count("This page holds text of") == 2 and not page.count("script")
    passages = re.findall(r'<p class="passage".*?</p>', out.read_text(), flags=re.DOTALL)
    assert "engine" in "".join(Page(passages[0]).words)
    assert "paint" in "".join(Page(passages[1]).words)
    ids = [a["id"] for tag, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    # and the page that a run writes by itself again
    assert comigs(capsys, "report", run, "--out", out).code == 0
    assert "holds text of" not in out.read_text(encoding="utf-8")
    two = refused(capsys, "report", run, run_of("client"), "--routes", "ada")
    assert "--routes: is for one run; 2 are given" in two


# what is wrong is one line, and nothing is written


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no text"),
        (b" \n\t\n", "holds no text"),
        (b"caf\xe9", "not UTF-8 at byte 3 (0xe9)"),
        (None, "no such file"),
    ],
)
def test_a_text_that_is_none(capsys, tmp_path, content, said):
    path, out = tmp_path / "text.txt", tmp_path / "page.html"
    if content is not None:
        path.write_bytes(content)
    words = ("--client", "ada", "--text", path, "--out", out)
    assert f"{path}: {said}" in refused(capsys, "routes", run_of("token"), *words)
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--client", "zed"), '"zed"'),
        (("--client", "ada", "--block", 2), "--block: given 2; the blocks of this base are 0 to 1"),
        (("--client", "ada", "--block", -1), "--block"),
        (("--client", "ada", "--tokens", 0), "--tokens"),
        ((), "--client"),
    ],
)
def test_words_that_fit_nothing(capsys, words, said):
    assert said in refused(capsys, "routes", run_of("token"), *words)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"method": "local", "experts": {"specialists": 0}}, "has no router"),
        ({"method": "fedavg"}, "experts that all weigh the same"),
        ({"method": "ffa-lora"}, "as it has one expert"),
        ({"experts": {"generalists": 0, "specialists": 2}}, "has specialists only"),
        (
            {"experts": {"generalists": 2, "specialists": 0}, "options": APART},
            "has generalists only",
        ),
    ],
)
def test_a_client_that_has_nothing_to_choose(capsys, tmp_path, tree, said):
    run = api.run(run_config(tmp_path / "text", rounds=1, **tree), tmp_path / "run").path
    line = refused(capsys, "routes", run, "--client", "ada")
    assert said in line and 'client "ada"' in line


def test_runs_that_cannot_be_side_by_side(capsys, tmp_path):
    run = run_of("token")
    other = refused(capsys, "routes", run, run_of("two-of-three"), "--client", "ada")
    assert "trained on another base than" in other
    assert "given twice" in refused(capsys, "routes", run, run, "--client", "ada")
    changed = Path(shutil.copytree(run, tmp_path / "changed"))
    environment = json.loads((changed / "env.json").read_text())
    environment["data"]["ada"]["test"]["sha256"] = ["0" * 64]
    (changed / "env.json").write_text(json.dumps(environment))
    assert "has another test text of ada" in refused(
        capsys, "routes", run, changed, "--client", "ada"
    )


def test_a_run_of_a_federation_has_no_text_here(capsys, tmp_path):
    run = copied_run(tmp_path)
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps(environment | {"federation": {}}))
    assert "on its devices" in refused(capsys, "routes", run, "--client", "ann")
    assert "on its devices" in refused(capsys, "report", run, "--routes", "ann")


def test_a_device_shows_its_own_text_and_the_server_nobodys(capsys, tmp_path):
    names = ("ada", "bob")
    whole = {"finish": "mixture"}
    config = run_config(tmp_path / "text", " ".join(names), rounds=1, options=whole)
    federation = Federation(tmp_path, names, tmp_path / "text")
    federation.run(tmp_path / "server", config)
    api.run(config, tmp_path / "here")
    (own,) = routes_of(capsys, federation.device_run("ada"), "--client", "ada")
    (here,) = routes_of(capsys, tmp_path / "here", "--client", "ada")
    assert own["passage"] == here["passage"] and own["kinds"] == here["kinds"]
    assert "on its own device" in refused(capsys, "routes", tmp_path / "server", "--client", "ada")


@pytest.mark.parametrize("place", ["notes.html", "none/page.html", "."])
def test_a_page_where_none_can_be(capsys, tmp_path, place):
    (tmp_path / "notes.html").write_text("mine")
    out = tmp_path / place
    line = refused(capsys, "routes", run_of("token"), "--client", "ada", "--out", out)
    assert "choose another file with --out" in line
    assert (tmp_path / "notes.html").read_text() == "mine"
