"""A base is whole and usable, or refused in one line before any text is read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from comigs.app import api
from comigs.bases import mini, pretrained
from comigs.bases.load import load_base
from comigs.bases.pretrained import load_model
from comigs.bases.tiny import byte_tokenizer, tiny_llama
from comigs.bases.usable import highest_id
from comigs.config import BaseSection
from comigs.errors import UserError
from comigs.personal.serve.catalogue import in_dtype
from comigs.processes import Child
from tests.conftest import bits, run_config
from tests.runs import refused, write_config

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


@pytest.fixture
def folder(tmp_path):
    """A whole base, to be damaged."""
    model, tokenizer = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder):
    return load_base(BaseSection(name=str(folder), dtype="float32", device="cpu"))


def refusal(folder):
    """The one line with which a base is refused."""
    with pytest.raises(UserError) as raised:
        load(folder)
    line = str(raised.value)
    assert "\n" not in line and line.startswith(f'base.name: "{folder}" cannot be loaded: ')
    return line


def rewrite(folder, change):
    """Put other weights into a base."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def settings(folder, file="config.json", **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "base_model.model.", "module."])
def test_weights_that_a_wrapper_saved_are_refused_with_names_and_the_cause(folder, wrapper):
    rewrite(folder, lambda weights: {wrapper + key: value for key, value in weights.items()})
    line = refusal(folder)
    assert "lack model.embed_tokens.weight, " in line and f'begin with "{wrapper}"' in line


def test_every_single_tensor_is_needed(folder):
    whole = load_file(folder / "model.safetensors")
    for key in whole:
        rewrite(folder, lambda _, gone=key: {k: v for k, v in whole.items() if k != gone})
        assert f"lack {key}" in refusal(folder)
    rewrite(folder, lambda _: whole)
    assert (
        load(folder).fingerprint
        == load_base(BaseSection(name="tiny-llama", dtype="float32", device="cpu")).fingerprint
    )


def test_an_output_layer_may_be_absent_where_it_is_tied_and_only_there(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load(folder)
    settings(folder, tie_word_embeddings=False)
    assert refusal(folder).endswith("its weights lack lm_head.weight")


def test_tensors_of_another_shape_and_tensors_too_many_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    surplus = {"model.layers.2.mlp.up_proj.weight": torch.zeros(32, 16)}
    rewrite(folder, lambda whole: whole | surplus)
    assert refusal(folder).endswith("does not speak of: model.layers.2.mlp.up_proj.weight")
    rewrite(folder, lambda _: weights | {"v_head.weight": torch.zeros(1, 16)})
    load(folder)  # the head of another task is no part of the model
    short = {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:99].clone()}
    rewrite(folder, lambda _: weights | short)
    assert "model.embed_tokens.weight has the shape (99, 16), not (257, 16)" in refusal(folder)


def test_bases_by_our_own_names_and_ggufs_are_held_to_the_same(folder, monkeypatch):
    """Every file that calls `from_pretrained` for a model is pretrained.py."""
    rewrite(folder, lambda weights: {"x." + key: value for key, value in weights.items()})
    monkeypatch.setattr(mini, "files", lambda package: folder.parent)
    (folder.parent / "assets").mkdir()
    shutil.copytree(folder, folder.parent / "assets" / "mini")
    with pytest.raises(UserError, match=r"lack model\.embed_tokens"):
        load_base(BaseSection(name="mini"))
    with pytest.raises(UserError, match=r"lack model\.embed_tokens"):
        load_model(folder, dtype=torch.bfloat16)


def test_no_other_module_loads_weights():
    from pathlib import Path

    room = Path(pretrained.__file__).parent
    for file in room.glob("*.py"):
        if file.name != "pretrained.py":
            assert "ModelForCausalLM.from_pretrained" not in file.read_text(encoding="utf-8")


def as_pointer(name):
    return lambda folder: (folder / name).write_bytes(LFS)


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def quantised(method, **more):
    return lambda folder: settings(
        folder, quantization_config={"quant_method": method, "bits": 4, **more}
    )


def without(name):
    return lambda folder: (folder / name).unlink()


def as_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_adapter(folder):
    LoraConfig(target_modules=["q_proj"], base_model_name_or_path="org/x").save_pretrained(folder)
    save_file({"base_model.model.x": torch.zeros(2)}, folder / "adapter_model.safetensors")


def as_adapter(folder):
    with_adapter(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()


def marked(folder):
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())


def deep(folder):
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")


def with_code(folder):
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    settings(folder, model_type="own", auto_map={"AutoConfig": "own.C"})


def as_sentences(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\0\0\0\0\x18\x02")
    settings(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


def in_python(folder):
    (folder / "tokenizer.json").unlink()
    settings(folder, "tokenizer_config.json", tokenizer_class="ByT5Tokenizer")


def without_separator(folder):
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer).save_pretrained(
        folder
    )


def with_tokens(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(folder)


DAMAGES = [
    (as_pointer("model.safetensors"), "model.safetensors is a git-lfs pointer.*git lfs pull"),
    (as_pointer("tokenizer.json"), "tokenizer.json is a git-lfs pointer"),
    (cut("model.safetensors", 0), "model.safetensors is cut short or damaged"),
    (cut("model.safetensors", 5), "model.safetensors is cut short or damaged"),
    (cut("model.safetensors", 3000), "model.safetensors is cut short or damaged"),
    (cut("config.json", 50), "not a valid JSON file"),
    (quantised("gptq", group_size=8), r"weights are quantised \(gptq\)"),
    (quantised("awq"), r"weights are quantised \(awq\)"),
    (quantised("bitsandbytes", load_in_4bit=True), r"weights are quantised \(bitsandbytes\)"),
    (quantised("compressed-tensors", config_groups={}), r"quantised \(compressed-tensors\)"),
    (quantised("fp8"), r"weights are quantised \(fp8\)"),
    (quantised("new-method"), r"weights are quantised \(new-method\)"),
    (with_adapter, r"an adapter \(PEFT\), not a whole model; merge"),
    (as_adapter, r"an adapter \(PEFT\), not a whole model; merge"),
    (without("config.json"), "has no config.json"),
    (without("tokenizer.json"), "has no tokenizer|tokenizer"),
    (as_bin, r"no weights as safetensors"),
    (marked, "config.json begins with a byte order mark"),
    (deep, "nested too deep"),
    (with_code, "needs code of its own, and none is run"),
    (as_sentences, "needs the package sentencepiece; pip install sentencepiece"),
    (in_python, r"\(ByT5Tokenizer\) is written in Python alone; a fast one"),
    (without_separator, "no token that ends or begins a text"),
    (with_tokens, r'ids up to 258 \("two"\), but its embedding has 257 rows'),
    (lambda folder: settings(folder, hidden_act="nonesuch"), "KeyError: 'nonesuch'"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_base_that_cannot_be_used_is_one_line(folder, damage, said, monkeypatch, capfd):
    find = pretrained.importlib.util.find_spec
    monkeypatch.setattr(
        pretrained.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "sentencepiece" else find(name, *rest),
    )
    damage(folder)
    with pytest.raises(UserError, match=said):
        load(folder)
    refusal(folder)
    assert not (folder / "ran").exists()
    assert capfd.readouterr().err.count("\n") == 0  # no report of the library's beside it


def test_a_refused_base_makes_no_run_and_reads_no_text(folder, tmp_path, capsys):
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("tiny-gpt2", str(folder)))
    rewrite(folder, lambda weights: {"_orig_mod." + key: v for key, v in weights.items()})
    before = sorted(tmp_path.rglob("*"))
    line = refused(capsys, "run", config, "--out", tmp_path / "run")
    assert "lack model.embed_tokens.weight" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_highest_id_counts_and_special_tokens_that_text_never_becomes_do_not():
    tokenizer = byte_tokenizer()
    assert highest_id(tokenizer) == 256
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    assert highest_id(tokenizer) == 256
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": 70_000, "content": "high"})
    spec["added_tokens"][-1]["special"] = False
    holes = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(spec)),
        eos_token="<|endoftext|>",
    )
    assert highest_id(holes) == max(holes.get_vocab().values()) >= len(holes) - 1


def test_a_wider_embedding_than_the_tokenizer_needs_is_fine(tmp_path):
    model, tokenizer = tiny_llama()
    model.resize_token_embeddings(320)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path).encoder.vocabulary_size == 257


def test_a_bases_own_way_to_choose_tokens_reaches_nobody(folder):
    own = GenerationConfig(
        num_beams=4, repetition_penalty=1.8, no_repeat_ngram_size=2, eos_token_id=[256, 3]
    )
    own.save_pretrained(folder)
    generation = load(folder).model.generation_config
    assert generation.eos_token_id == [256, 3]
    assert generation.num_beams in (None, 1) and generation.repetition_penalty in (None, 1.0)
    assert generation.no_repeat_ngram_size in (None, 0)


@pytest.mark.slow  # processes that each import all of transformers
def test_a_worker_that_loads_other_weights_ends_the_run(tmp_path, folder, monkeypatch):
    """The base's folder changes after the main process has loaded it."""
    config = run_config(tmp_path, "ada bob", workers=2, base={"name": str(folder)})
    monkeypatch.setattr("comigs.engines.workers.cpus", lambda: 2)
    start = Child.__init__

    def change_and_start(*given, **more):
        rewrite(folder, lambda weights: {key: value + 1 for key, value in weights.items()})
        start(*given, **more)

    monkeypatch.setattr(Child, "__init__", change_and_start)
    with pytest.raises(UserError, match=r'base ".*" is not the one this run began with'):
        api.run(config, tmp_path / "run")


def test_reading_back_gives_the_model_that_was_saved(folder):
    ours = load(folder).model
    ours.set_attn_implementation("eager")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_positions_keep_their_precision_whatever_the_weights_have(folder):
    """Logits after hundreds of tokens are those of `from_pretrained` in that type, to the bit."""
    ids = torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        plain = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
        section = BaseSection(name=str(folder), dtype=str(dtype).removeprefix("torch."))
        loaded = load_base(section.model_copy(update={"device": "cpu"}))
        # A base may also be given another type afterwards, as `comigs serve --dtype` does.
        again = in_dtype(load(folder), dtype)
        for base in (loaded, again):
            base.model.set_attn_implementation("eager")
        with torch.no_grad():
            expected = bits(plain(ids).logits)
            assert bits(loaded.model(ids).logits) == bits(again.model(ids).logits) == expected


def test_a_head_that_is_not_the_embedding_is_not_taken_for_tied(folder):
    """The config says that they are tied; the file has both, and they differ."""
    name, embedding = "lm_head.weight", "model.embed_tokens.weight"
    assert load(folder).model.config.tie_word_embeddings
    rewrite(folder, lambda tensors: {**tensors, name: tensors[embedding].flip(0)})
    model = load(folder).model
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight.flip(0))
