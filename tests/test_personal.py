"""A client's own model: an ordinary `transformers` model that writes text, and can be taken apart
again.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from comigs.app import api
from comigs.bases.load import load_base
from comigs.bases.tiny import tiny_gpt2
from comigs.config import BaseSection
from comigs.errors import UserError
from comigs.personal.model import _Pieces, model_path
from tests.conftest import run_config
from tests.runs import ENVIRONMENT, comigs, copied_run, finished


@pytest.fixture(scope="module")
def model():
    with closing(api.open_personal_model(finished() / "run", "ann")) as model:
        yield model


def logits(model, text="the cat sat"):
    with torch.no_grad():
        return model.model(**model.tokenizer(text, return_tensors="pt")).logits


def test_it_is_neither_the_base_nor_another_clients(model):
    ann = logits(model)
    with closing(api.open_personal_model(finished() / "run", "bob")) as other:
        bob = logits(other)
        other.close()
        base = logits(other)
    assert not torch.equal(ann, bob) and not torch.equal(ann, base)
    assert torch.isfinite(ann).all()


def test_greedy_text_is_the_likeliest_token_each_time(model):
    ids = model.tokenizer("the cat ", return_tensors="pt")["input_ids"]
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert model.generate("the cat ", max_new_tokens=5) == model.tokenizer.decode(ids[0])


def test_pieces_make_up_the_whole(model):
    pieces = list(model.stream("the ", max_new_tokens=8))
    assert len(pieces) > 1
    assert "the " + "".join(pieces) == model.generate("the ", max_new_tokens=8)


def test_sampling_is_repeatable_with_a_seed_and_leaves_the_generator_alone(model):
    def sample(seed):
        return model.generate("the ", max_new_tokens=10, do_sample=True, temperature=1.5, seed=seed)

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_any_token_may_be_drawn(model):
    """transformers draws from the 50 likeliest where nobody says anything else."""
    hot = {"do_sample": True, "temperature": 1e6, "max_new_tokens": 1}
    assert len({model.generate("the ", seed=seed, **hot) for seed in range(150)}) > 50


def test_an_empty_prompt_starts_a_document(model):
    assert isinstance(model.generate("", max_new_tokens=3), str)


def test_a_prompt_with_special_tokens_written_out_stays_as_it_was(model):
    assert model.generate("<|endoftext|>x", max_new_tokens=2).startswith("<|endoftext|>x")


def test_no_more_than_the_window(model):
    assert len(model.generate("x" * 60, max_new_tokens=500)) <= 64  # a token is a byte
    with pytest.raises(UserError, match="longer than the 64 tokens this base reads"):
        model.generate("x" * 64)


def test_greedy_text_leaves_the_generator_alone_with_a_seed_too(model):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    model.generate("the ", max_new_tokens=4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_error_while_writing_is_raised_here(model):
    with pytest.raises(ValueError, match="temperature"):
        model.generate("x", max_new_tokens=2, do_sample=True, temperature=-1.0)


def test_stopping_early_leaves_a_model_that_works(model):
    before = threading.active_count()
    stream = model.stream("the ", max_new_tokens=50)
    next(stream)
    stream.close()
    assert threading.active_count() == before  # nobody goes on writing unread
    assert model.generate("the ", max_new_tokens=4) == model.generate("the ", max_new_tokens=4)


def test_a_model_of_a_run_under_way(tmp_path):
    """After a round and before the end, it is the client's state of that round."""
    config = api.open_run(finished() / "run").config()

    def stop(event):
        if event.kind == "server":
            raise KeyboardInterrupt

    with pytest.raises(UserError, match="every whole round is kept"):
        api.run(config, tmp_path / "run", report=stop)
    folder = api.open_run(tmp_path / "run")
    with closing(api.open_personal_model(tmp_path / "run", "ann")) as model:
        saved = folder.load("clients/ann/experts")
        assert {str(slot) for slot in model.tensors} == saved.keys()
        assert all(torch.equal(t, saved[str(slot)]) for slot, t in model.tensors.items())
        assert model.generate("the ", max_new_tokens=3)


def test_a_client_that_was_not_asked_yet_has_no_model(tmp_path):
    config = api.open_run(finished() / "run").config()
    one = config.participation.model_copy(update={"clients_per_round": 1})

    def stop(event):
        if event.kind == "server":
            raise KeyboardInterrupt

    with pytest.raises(UserError, match="every whole round is kept"):
        api.run(config.model_copy(update={"participation": one}), tmp_path / "run", report=stop)
    folder = api.open_run(tmp_path / "run")
    (asked,) = [line.client for line in folder.metrics() if line.kind == "train"]
    api.open_personal_model(folder.path, asked).close()
    (other,) = {"ann", "bob"} - {asked}
    with pytest.raises(
        UserError, match=f'holds no model of client "{other}"; it was not asked yet'
    ) as raised:
        api.open_personal_model(folder.path, other)
    assert "\n" not in str(raised.value)
    said = []
    assert list(api.evaluate(folder.path, say=said.append)) == [asked]
    assert said == [f"no model here of {other}"]
    with pytest.raises(UserError, match=f'holds no model of client "{other}"'):
        api.evaluate(folder.path, client=other)


def test_who_is_left_out_keeps_the_model_that_it_had(tmp_path):
    """bob trains in one round, drops out of the next, and is not asked again."""
    weather = {"clients": {"bob": {"dropout": 0.5}}}
    settings = {"rounds": 4, "seed": 5, "participation": {"max_failures": 1}, "conditions": weather}
    last = []

    def look(event):
        if event.kind == "server" and event.round == 4:
            folder = api.open_run(tmp_path / "run")
            last.append({k: v.clone() for k, v in folder.load(model_path(folder, "bob")).items()})

    config = run_config(tmp_path, "ada bob cyd", **settings)
    run = api.run(config, tmp_path / "run", report=look)
    rounds = [e.round for e in run.metrics() if e.kind == "train" and e.client == "bob"]
    kept = run.load("clients/bob/personal")
    assert rounds == [1] and all(torch.equal(kept[slot], last[0][slot]) for slot in last[0])
    assert list(api.evaluate(run.path)) == ["ada", "bob", "cyd"]


def test_experts_of_another_shape_are_refused(tmp_path):
    run = copied_run(tmp_path)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("rank = 8", "rank = 3"))
    with pytest.raises(
        UserError,
        match=r"client ann: saved tensor .* the checkpoint belongs to another config or base",
    ):
        api.open_personal_model(run, "ann")


def penalised():
    """The model with a base's own wishes about how tokens are chosen, as it is loaded."""
    own = GenerationConfig(
        num_beams=4, repetition_penalty=50.0, no_repeat_ngram_size=1, do_sample=True, top_k=3
    )
    folder = Path(tempfile.mkdtemp())
    loaded, tokenizer = tiny_gpt2()
    loaded.save_pretrained(folder)
    own.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_base(BaseSection(name=str(folder), dtype="float32", device="cpu"))


def test_the_bases_beams_and_penalties_change_nothing(model):
    """What is asked for decides: without sampling, the likeliest token each time."""
    base = penalised()
    before = model.model.generation_config
    try:
        plain = model.generate("the the the ", max_new_tokens=8)
        sampled = model.generate("the ", max_new_tokens=8, do_sample=True, seed=1)
        model.model.generation_config = base.model.generation_config
        assert model.generate("the the the ", max_new_tokens=8) == plain
        assert model.generate("the ", max_new_tokens=8, do_sample=True, seed=1) == sampled
    finally:
        model.model.generation_config = before


def test_a_special_token_that_the_base_does_not_read_is_refused_in_a_prompt(model):
    own = model.tokenizer
    model.tokenizer = copy.deepcopy(own)
    model.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    try:
        with pytest.raises(UserError, match=r'--prompt: holds "\[PAD\]", which this base does not'):
            model.generate("x [PAD]")
    finally:
        model.tokenizer = own


LOST = """
import sys
from comigs.app import api
keep = api.open_personal_model(sys.argv[1], "ann").stream("the ", max_new_tokens=50)
next(keep)
raise SystemExit(5)
"""


def test_a_reader_that_ends_the_process_ends_the_writer_first():
    """The iterator is kept, so that nobody closes it while Python ends."""
    command = [sys.executable, "-c", LOST, str(finished() / "run")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=False)
    assert done.returncode == 5 and not done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
@pytest.mark.slow  # processes that each import all of transformers
def test_an_output_that_is_not_utf_8_gets_replacements(encoding):
    words = ["generate", str(finished() / "run"), "--client", "ann", "--prompt", "\u65e5 the "]
    done = subprocess.run(
        [sys.executable, "-m", "comigs", *words],
        env={**ENVIRONMENT, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr and b" the " in done.stdout


def sentence_pieces():
    """A tokenizer that marks words by a space before them and falls back on bytes, as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁cats", "▁sat", "c", "a", "t", "s"]
    core = Tokenizer(
        models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    marks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*marks, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["▁cats", "▁sat"], " cats sat"),
        (["a", "t", "<0xC3>", "<0xA9>", "s", "▁sat"], "atés sat"),
        (["c", "<0xF0>", "<0x9F>", "a", "t", "▁sat", "<0xE2>"], "c�at sat�"),
    ],
)
def test_streamed_text_has_every_character_that_was_written(tokens, text):
    """The space before the first, which `transformers` loses, and parts of characters, too."""
    tokenizer = sentence_pieces()
    pieces = _Pieces(tokenizer)
    pieces.put(torch.tensor([[260]]))  # the prompt
    for token in tokens:
        pieces.put(torch.tensor([tokenizer.convert_tokens_to_ids(token)]))
    pieces.end()
    assert "".join(iter(pieces.queue.get, None)) == text


@pytest.mark.parametrize("temperature", ["1e-320", "1e-39", "1e-6"])
def test_a_temperature_of_nearly_nothing_takes_the_likeliest(temperature, capsys):
    words = ["generate", finished() / "run", "--client", "ann", "--prompt", "the "]
    cold = comigs(capsys, *words, "--temperature", temperature)
    assert cold.code == 0 and cold.out == comigs(capsys, *words).out
