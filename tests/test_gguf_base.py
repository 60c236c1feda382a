"""A GGUF file is a base: the numbers and tokens of the model it was written from, or refused."""

from __future__ import annotations

import gguf
import pytest
import torch

from comigs.app import api
from comigs.app.export import export
from comigs.bases import from_gguf
from comigs.bases.load import load_base
from comigs.config import BaseSection
from comigs.errors import UserError
from comigs.personal.export.gguf_file import write_gguf
from tests.conftest import APART, bits, run_config
from tests.exports import SENTENCES, base_of

IDS = torch.randint(600, (2, 12), generator=torch.Generator().manual_seed(0))


own_process = from_gguf.unpack


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache, that is filled without the seconds that another process takes to start."""
    monkeypatch.setenv("COMIGS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(from_gguf, "unpack", from_gguf.unpack_here)


def load(path):
    return load_base(BaseSection(name=str(path), dtype="float32", device="cpu"))


def written(tmp_path, family="llama", type="float32"):
    """A base of tests/exports.py, and a GGUF of it."""
    base, file = load(base_of(family)), tmp_path / f"{family}.gguf"
    write_gguf(file, base.model, base.tokenizer, type, "small")
    return base, file


def refusal(path):
    with pytest.raises(UserError) as raised:
        load(path)
    line = str(raised.value)
    assert "\n" not in line and str(path) in line
    return line


@pytest.mark.parametrize(
    "family", ["llama", "llama-untied", "llama-gpt2s-rule", "mistral", "qwen2", "qwen3-wide"]
)
def test_a_gguf_is_the_model_and_the_tokens_that_it_was_written_from(tmp_path, family, capfd):
    base, file = written(tmp_path, family)
    capfd.readouterr()
    again = load(file)
    assert capfd.readouterr() == ("", "")  # no bar of transformers'
    torch.testing.assert_close(again.model(IDS).logits, base.model(IDS).logits, rtol=0, atol=1e-5)
    texts = [*SENTENCES.splitlines(), "in  1999 and   7", "a   7\n\n\tx  "]
    assert again.encoder.encode(texts) == base.encoder.encode(texts)
    assert again.encoder.separator == base.encoder.separator
    assert again.title == file.name


def test_what_is_quantised_is_what_gguf_itself_dequantises(tmp_path):
    _, file = written(tmp_path, type="q8_0")
    ours = load(file).model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    (found,) = [t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight"]
    assert found.tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert bits(ours) == bits(torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type)))


def test_a_file_is_unpacked_once_wherever_it_lies_and_told_from_another(tmp_path, monkeypatch):
    _, file = written(tmp_path)
    first = load(file).fingerprint
    other = load(written(tmp_path, type="q8_0")[1]).fingerprint  # written over it
    assert first != other
    moved = tmp_path / "elsewhere.gguf"
    file.rename(moved)
    monkeypatch.setattr(from_gguf, "unpack", None)
    assert load(moved).fingerprint == other
    assert len(list((tmp_path / "cache" / "bases").iterdir())) == 2


def test_a_file_is_unpacked_by_another_process(tmp_path, monkeypatch):
    """So that a run's first load takes no more memory than its second."""
    base, file = written(tmp_path)
    monkeypatch.setattr(from_gguf, "unpack", own_process)
    monkeypatch.setattr(from_gguf, "unpack_here", None)
    again = load(file)
    torch.testing.assert_close(again.model(IDS).logits, base.model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_what_the_other_process_refuses_is_said_here(tmp_path, monkeypatch):
    _, file = written(tmp_path, "llama-biased")
    monkeypatch.setattr(from_gguf, "unpack", own_process)
    assert "it holds " in refusal(file)


@pytest.mark.parametrize("format", ["transformers", "peft", "gguf"])
@pytest.mark.few(2)
def test_a_run_on_a_gguf_is_exported_as_from_a_folder(tmp_path, format):
    _, file = written(tmp_path)
    config = run_config(
        tmp_path, "ada", base={"name": str(file)}, client={"steps": 2}, options=APART
    )
    run = api.run(config, tmp_path / "run")
    out = tmp_path / ("out.gguf" if format == "gguf" else "out")
    made = export(run.path, "ada", format, out, "float32")
    assert made.exact and made.difference < 1e-3


def test_what_is_no_gguf_or_cut_short_is_refused(tmp_path):
    _, file = written(tmp_path)
    whole = file.read_bytes()
    for length in (4, 30, 3000, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:length])
        assert "GGUF that is cut short or damaged" in refusal(file)
    file.write_bytes(b"no" + whole)
    assert "it is a file and no GGUF" in refusal(file)
    assert not (tmp_path / "cache" / "bases").exists()


def headed(path, architecture="llama", **words):
    """A GGUF with a head alone."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in words.items():
        writer.add_string(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "words", "said"),
    [
        ("nonesuch", {}, "architecture nonesuch is not supported"),
        ("llama", {"llama__rope__scaling__type": "yarn"}, 'rope.scaling.type = "yarn"'),
        (
            "llama",
            {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "tekken"},
            'by the rule "tekken"; known: gpt-2, smollm, llama-bpe, qwen2',
        ),
    ],
)
def test_what_transformers_would_leave_out_is_refused(tmp_path, architecture, words, said):
    line = refusal_of(headed(tmp_path / "x.gguf", architecture, **words))
    assert said in line
    assert not (tmp_path / "cache" / "bases").exists()


def refusal_of(path):
    with pytest.raises(UserError) as raised:
        load(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_family_that_takes_no_experts_is_refused_before_it_is_unpacked(tmp_path):
    for architecture, said in (("qwen3moe", "mixture of experts already"), ("bloom", "not known")):
        assert said in refusal_of(headed(tmp_path / "x.gguf", architecture))
    assert not (tmp_path / "cache" / "bases").exists()


def test_positions_that_are_scaled_by_a_tensor_are_refused(tmp_path):
    _, file = written(tmp_path, "llama-scaled")
    assert "rope_freqs.weight), which transformers leaves out" in refusal(file)


def test_heads_of_a_width_that_transformers_does_not_read_are_refused(tmp_path):
    """Of Qwen3 it takes 128 for granted, which all that were published have."""
    _, file = written(tmp_path, "qwen3")
    assert "its heads have 16 dimensions (qwen3.attention.key_length)" in refusal(file)
    assert not (tmp_path / "cache" / "bases").exists()


def test_what_transformers_cannot_read_names_the_file_and_no_file_that_is_not_there(tmp_path):
    """As a GGUF whose tensors are not of the shapes that its head says."""
    _, file = written(tmp_path)
    whole = file.read_bytes()
    key = b"llama.feed_forward_length"
    place = whole.index(key) + len(key) + 4
    assert int.from_bytes(whole[place : place + 4], "little") == 96
    file.write_bytes(whole[:place] + (128).to_bytes(4, "little") + whole[place + 4 :])
    line = refusal(file)
    assert "what it says of itself and its weights differ: model.layers.0.mlp" in line
    assert "config.json" not in line


def test_numbers_that_nobody_reads_are_refused(tmp_path):
    """A bias that llama.cpp knows, and transformers' reading of a GGUF does not."""
    base, file = written(tmp_path, "llama-biased")
    assert base.model.config.attention_bias
    assert "it holds " in refusal(file) and not list((tmp_path / "cache").rglob("*.safetensors"))
