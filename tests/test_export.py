"""Exports: every format that fits a model, checked after writing; what does not fit is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comigs.app import api
from comigs.app.export import evaluate_export, export
from comigs.data.prepare import prepare
from comigs.errors import UserError
from comigs.personal.export import standard
from comigs.personal.export.form import list_formats, load_format
from tests.conftest import bits, run_config
from tests.exports import exported, trained
from tests.runs import comigs, files, refused

FORMATS = ["flat", "gguf", "gguf-adapter", "gguf-base", "peft", "transformers"]
TABLE = [  # a model, and the architecture that it becomes
    ("1g1s", "llama", "MixtralForCausalLM"),
    ("four", "llama", "MixtralForCausalLM"),
    ("top1", "llama", "Qwen2MoeForCausalLM"),
    ("client", "llama", "LlamaForCausalLM"),
    ("fedavg", "llama", "LlamaForCausalLM"),
    ("fdlora", "llama", "LlamaForCausalLM"),
    ("fedalt", "llama", "MixtralForCausalLM"),
    ("flora", "llama", "LlamaForCausalLM"),
    ("1g1s", "llama-scaled", "MixtralForCausalLM"),
    ("1g1s", "llama-untied", "MixtralForCausalLM"),
    ("1g1s", "llama-relu", "MixtralForCausalLM"),
    ("client", "llama-biased", "LlamaForCausalLM"),
    ("1g1s", "mistral", "MixtralForCausalLM"),
    ("1g1s", "qwen2", "Qwen2MoeForCausalLM"),
    ("top1", "qwen2", "Qwen2MoeForCausalLM"),
    ("1g1s", "qwen3", "Qwen3MoeForCausalLM"),
    ("top1", "qwen3", "Qwen3MoeForCausalLM"),
    ("fedavg", "gemma3_text", "Gemma3ForCausalLM"),
    ("client", "gpt2", "GPT2LMHeadModel"),
]


def test_formats_are_found_by_their_files():
    assert list_formats() == FORMATS
    for name in FORMATS:
        form = load_format(name)
        assert form.summary and form.types and callable(form.write) and callable(form.read)


@pytest.mark.parametrize(("setting", "family", "architecture"), TABLE)
@pytest.mark.few(6)
def test_a_standard_model_answers_as_the_run_does(setting, family, architecture, tmp_path):
    done = exported(trained(setting, family), "transformers", tmp_path / "out", type="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert done.exact and done.difference < 1e-4  # where logits are about 1.6 wide
    assert done.export == pytest.approx(done.personal, rel=1e-5)
    assert done.base > 5 * done.personal  # and it is far from the base


@pytest.mark.parametrize(
    ("setting", "family"),
    [
        ("others", "llama"), ("sequence", "llama"), ("1g1s", "gpt2"), ("1g1s", "gemma3_text"),
        ("1g1s", "llama-biased"),
    ],
)  # fmt: skip
@pytest.mark.few(3)
def test_experts_as_peft_folders_are_exact_on_every_base(setting, family, tmp_path):
    done = exported(trained(setting, family), "peft", tmp_path / "out")
    assert done.exact and done.difference < 1e-4


def test_the_routers_of_these_runs_route():
    """Else all of the above would hold for a router that is not there."""
    model = api.open_personal_model(trained("1g1s"), "ann")
    try:
        with torch.no_grad():
            model.model(torch.arange(40, 70)[None])
        weights = torch.stack([r.weights_TE[:, 0] for r in model.attachment.routings()])
    finally:
        model.close()
    assert weights.std(dim=1).min() > 0.05


def test_a_gated_router_is_distilled_and_its_cost_is_said(tmp_path, capsys):
    run = trained("others")
    done = exported(run, "transformers", tmp_path / "out", type="float32")
    assert not done.exact
    assert abs(done.export / done.personal - 1) < 0.01
    assert "approximate" in done.lines()[0]
    assert "It is near the run's own model" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("setting", ["1g1s", "others", "four"])
@pytest.mark.few(1)
def test_flat_says_what_it_costs_and_keeps_the_better_weights(setting, tmp_path):
    done = exported(trained(setting), "flat", tmp_path / "out")
    (sentence,) = done.notes
    routed, fitted, mean = map(float, re.findall(r"\d+\.?\d*", sentence))
    assert routed == pytest.approx(done.personal, rel=1e-3)
    assert done.export == pytest.approx(min(fitted, mean), rel=1e-3)
    assert fitted < mean  # these experts differ, and twenty steps help
    assert not done.exact


def test_one_expert_is_one_lora_exactly(tmp_path):
    done = exported(trained("fdlora"), "flat", tmp_path / "out")
    assert done.exact and done.difference < 1e-4


@pytest.mark.parametrize(
    ("setting", "family", "to", "said"),
    [
        ("sequence", "llama", "transformers", 'routing = "sequence".*"peft".*"flat"'),
        ("sequence", "llama", "gguf", 'routing = "sequence".*"peft".*"flat"'),
        ("1g1s", "gpt2", "transformers", 'family "gpt2".*"peft".*"flat"'),
        ("1g1s", "gpt2", "gguf", 'family "gpt2".*"peft".*"flat"'),
        ("1g1s", "gemma3_text", "transformers", 'family "gemma3_text".*"peft".*"flat"'),
        ("fedavg", "gpt2", "gguf", 'family "gpt2".*"transformers"'),
        ("1g1s", "llama-biased", "transformers", 'attention_bias.*no place.*"peft"'),
        ("top1", "qwen3", "gguf", 'top_k = 1 on a Qwen3.*"transformers"'),
        ("flora", "llama", "flat", 'merges whole matrices.*"gguf" and "transformers"'),
        ("flora", "llama", "peft", 'merges whole matrices.*"gguf" and "transformers"'),
        ("flora", "llama", "gguf-adapter", 'merges whole matrices.*"gguf"'),
        ("1g1s", "llama-relu", "gguf", 'activation "relu".*SiLU.*"transformers"'),
        ("1g1s", "llama-relu", "gguf-base", 'activation "relu".*SiLU.*"transformers"'),
        ("client", "llama", "gguf-base", 'no LoRA on a shared base.*"gguf"'),
    ],
)
@pytest.mark.few(2)
def test_what_does_not_fit_is_refused_naming_what_does(setting, family, to, said, tmp_path):
    with pytest.raises(UserError, match=said) as raised:
        exported(trained(setting, family), to, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("type", ["q4_0", "Q4_K_M", "q5_1"])
def test_few_bits_are_refused_for_a_merged_model_with_the_reason(type, tmp_path):
    with pytest.raises(UserError, match=r'cost 83 %.*q8_0.*"gguf-base".*"gguf-adapter"'):
        exported(trained("1g1s"), "gguf", tmp_path / "out", type=type)


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_is_measured_by_comigs_evaluate(to, tmp_path):
    """The round trip: on all of test, it is the run's own perplexity."""
    run = trained("1g1s")
    widest = "float32" if "float32" in load_format(to).types else None
    exported(run, to, tmp_path / "out", type=widest)
    (figures,) = evaluate_export(run, tmp_path / "out").values()
    recorded = api.open_run(run).summary().clients["ann"]
    assert figures["base"]["perplexity"] == pytest.approx(recorded.base_test.perplexity)
    rel = 0.5 if to == "flat" else 1e-5
    assert figures["personal"]["perplexity"] == pytest.approx(recorded.test.perplexity, rel=rel)
    assert figures["personal"]["tokens"] == recorded.test.tokens
    # a tool may have put another file beside it
    if list((tmp_path / "out").glob("*.gguf")):
        (tmp_path / "out" / "a-smaller-one.gguf").touch()
        with pytest.raises(UserError, match=r"one \.gguf file, and holds a-smaller-one\.gguf and "):
            evaluate_export(run, tmp_path / "out")


@pytest.mark.parametrize("to", ["transformers", "peft"])
def test_an_export_is_measured_on_another_clients_text_as_what_it_is(to, tmp_path):
    """Whose text it is does not say which experts there are."""
    tree = {"base": {"name": "tiny-llama"}, "options": {"specialists": "apart"}, "rounds": 1}
    config = run_config(tmp_path, "ada bob", {"ada": {"specialists": 2}}, **tree)
    folder = api.run(config, tmp_path / "run")
    export(folder.path, "ada", to, tmp_path / "out", type="float32")
    (figures,) = evaluate_export(folder.path, tmp_path / "out", client="bob").values()
    with closing(api.open_personal_model(folder.path, "ada")) as model:
        stores = prepare(config, api.base_of(folder).encoder).load("bob").test
        expected = model.evaluate(stores)
    assert figures["personal"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)


def test_bfloat16_is_stored_where_nothing_else_is_asked(tmp_path):
    done = exported(trained("1g1s"), "transformers", tmp_path / "out")
    assert done.type == "bfloat16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert abs(done.export / done.personal - 1) < 0.01


def test_the_model_card_says_what_it_is(tmp_path):
    run = trained("1g1s")
    exported(run, "gguf", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    test = api.open_run(run).summary().clients["ann"].test.perplexity
    for part in (
        "llama (its own licence applies)", "comigs: generalists averaged", "seed 42", "commit ",
        "generalist 0, specialist 0", "**yes**: router, specialist 0 never left the client before",
        "no differential privacy", f"{test:.4g} (its own)", "llama-cli -m ann.gguf",
        "llama-server", "import xllamacpp", "2 of 2 rounds",
    ):  # fmt: skip
        assert part in card, part
    assert str(Path(run).parents[1]) not in card  # no path of this machine
    assert "\n\n\n" not in card and card.startswith("---\nlibrary_name: gguf\n")


@pytest.mark.parametrize(
    ("run", "own"), [("by-document", "attention, generalist 0"), ("fedavg-by-document", "")]
)
def test_the_card_of_a_private_run_says_what_was_protected_and_what_was_not(tmp_path, run, own):
    """The client's own model takes steps without noise; fedavg's ends as everybody's."""
    exported(trained(run), "peft", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of what left clients, with epsilon 8 for one document (delta 0.01)," in card
    kept = f"**yes**: {own}" if own else "nothing that the other participants' server has not seen"
    assert kept in card, card


def test_what_holds_nothing_of_a_client_says_so(tmp_path):
    done = exported(trained("1g1s"), "gguf-base", tmp_path / "base")
    assert done.private_parts == ()
    assert "nothing of any client" in (tmp_path / "base" / "README.md").read_text()
    assert exported(trained("1g1s"), "flat", tmp_path / "flat").private_parts == ("s0",)


def test_one_base_file_serves_every_client_with_as_many_experts(tmp_path):
    run = trained("1g1s")
    for name in ("ann", "bob"):
        export(run, name, "gguf-base", tmp_path / f"{name}.gguf")
    assert (tmp_path / "ann.gguf").read_bytes() == (tmp_path / "bob.gguf").read_bytes()


def test_a_single_file_has_its_card_beside_it(tmp_path):
    exported(trained("1g1s"), "gguf", tmp_path / "mine.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.gguf", "mine.gguf.md"]
    with pytest.raises(UserError, match=r"mine.gguf: is a single file"):
        evaluate_export(trained("1g1s"), tmp_path / "mine.gguf")
    card = (tmp_path / "mine.gguf.md").read_text()
    assert "llama-cli -m mine.gguf" in card and "ann.gguf" not in card
    with pytest.raises(UserError, match=r"mine.gguf: exists already; nothing was changed"):
        exported(trained("1g1s"), "gguf", tmp_path / "mine.gguf")
    (tmp_path / "mine.gguf").unlink()
    with pytest.raises(UserError, match=r"mine.gguf.md: exists already"):
        exported(trained("1g1s"), "gguf", tmp_path / "mine.gguf")
    with pytest.raises(UserError, match="peft is a folder"):
        exported(trained("1g1s"), "peft", tmp_path / "other.gguf")


@pytest.mark.slow  # two exports of each format
def test_equal_exports_are_equal_files(tmp_path):
    for to in FORMATS:
        for name in ("a", "b"):
            exported(trained("1g1s"), to, tmp_path / f"{to}-{name}")
        assert files(tmp_path / f"{to}-a") == files(tmp_path / f"{to}-b"), to


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match=r"out: exists already; nothing was changed"):
        exported(trained("1g1s"), "flat", tmp_path / "out")
    assert files(tmp_path / "out") == {"thesis.txt": b"all of it"}


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    real = Path.write_text

    def full(path, *args, **settings):
        if path.name == "README.md":
            raise OSError(28, os.strerror(28))
        return real(path, *args, **settings)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"out: no space left on the disk; choose another place"):
        exported(trained("1g1s"), "transformers", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from comigs.app.export import export
for to in sys.argv[3:]:
    try:
        export(sys.argv[1], "ann", to, f"{sys.argv[2]}/{to}")
    except ValueError as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow  # for each format
def test_a_disk_that_takes_no_more_is_one_line_whatever_library_writes(tmp_path):
    """Each library has its own way to say so: here a file may not grow beyond 20 kB."""
    words = [trained("1g1s"), tmp_path, *FORMATS]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, words)], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(FORMATS), done.stderr
    for to, line in zip(FORMATS, lines, strict=True):
        assert re.fullmatch(
            rf"UserError .*/{to}: .*(too large|left on the disk).*; choose another.*", line
        )
    assert list(tmp_path.iterdir()) == []


def test_a_written_model_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    """The check reads the files: one number in one of them is changed before it does."""
    form = load_format("flat")

    def write(source, folder, type):
        written = form.write(source, folder, type)
        tensors = load_file(folder / "adapter_model.safetensors")
        name = next(n for n in tensors if "up_proj.lora_B" in n)
        tensors[name][0] += 0.5
        save_file(tensors, folder / "adapter_model.safetensors")
        return written

    monkeypatch.setattr("comigs.app.export.load_format", lambda name: replace(form, write=write))
    with pytest.raises(UserError, match="does not answer as it must: its logits are off by"):
        exported(trained("1g1s"), "flat", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("type", ["float32", "bfloat16"])
def test_what_would_not_compute_what_the_run_does_is_not_called_exact(type, tmp_path, monkeypatch):
    """Whatever it is stored in: a number of the base's config that is not carried over shows."""
    real = standard.sparse_config

    def forgetful(source):
        config = real(source)
        config.rms_norm_eps = 1e-2
        return config

    monkeypatch.setattr(standard, "sparse_config", forgetful)
    with pytest.raises(UserError, match="does not compute what the run's own model does"):
        exported(trained("1g1s"), "transformers", tmp_path / "out", type=type)
    assert list(tmp_path.iterdir()) == []


def test_exporting_leaves_the_run_and_the_base_as_they_were(tmp_path):
    run = trained("1g1s")
    before = files(run)
    first = exported(run, "flat", tmp_path / "a")
    model = api.open_personal_model(run, "ann")
    weights = {name: bits(t) for name, t in model.model.state_dict().items()}
    model.close()
    assert exported(run, "flat", tmp_path / "b").personal == first.personal
    model = api.open_personal_model(run, "ann")
    assert {name: bits(t) for name, t in model.model.state_dict().items()} == weights
    model.close()
    assert files(run) == before


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trained("1g1s")
    done = comigs(capsys, "export", run, "--client", "ann", "--to", "peft")
    assert done.code == 0, done
    assert "exports/1g1s-llama-ann-peft: peft, float32" in done.out.replace("\n", "")
    assert "never seen by anybody else before: router, specialist 0" in done.out
    again = refused(capsys, "export", run, "--client", "ann", "--to", "peft")
    assert "exists already" in again
    measured = comigs(capsys, "evaluate", run, "--model", "exports/1g1s-llama-ann-peft", "--json")
    test = api.open_run(run).summary().clients["ann"].test.perplexity
    assert json.loads(measured.out)["ann"]["personal"]["perplexity"] == pytest.approx(test)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--client", "nobody"], 'no client "nobody" in this run; there are: ann, bob'),
        (["--client", "ann", "--to", "gguff"], 'given "gguff".*Did you mean "gguf"'),
        (["--client", "ann", "--to", "gguf", "--type", "float17"], 'given "float17".*float16'),
        (["--client", "ann", "--to", "peft", "--out", "x.gguf"], "peft is a folder"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(said, refused(capsys, "export", trained("1g1s"), *words))
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_round_and_a_folder_that_is_no_export_are_refused(tmp_path, capsys):
    assert "no such run folder" in refused(capsys, "export", tmp_path / "no", "--client", "ann")
    run = Path(shutil.copytree(trained("1g1s"), tmp_path / "run"))
    state = json.loads((run / "checkpoint.json").read_text())
    (run / "checkpoint.json").write_text(json.dumps({**state, "round": 0, "finished": False}))
    assert "no round is finished yet" in refused(capsys, "export", run, "--client", "ann")
    assert "no export of comigs" in refused(
        capsys, "evaluate", trained("1g1s"), "--model", tmp_path
    )


def test_another_base_is_refused(tmp_path, capsys):
    run = trained("1g1s")
    run = Path(shutil.copytree(run, run.with_name("another-base")))  # beside it, to find the text
    environment = json.loads((run / "env.json").read_text())
    (run / "env.json").write_text(json.dumps({**environment, "base_fingerprint": "0"}))
    said = refused(capsys, "export", run, "--client", "ann", "--out", tmp_path / "out")
    assert "is not the one this run began with" in said
