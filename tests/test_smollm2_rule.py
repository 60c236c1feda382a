"""SmolLM2 is read by its own rule, and runs from before go on with GPT-2's (decision 14)."""

from __future__ import annotations

import pytest

from comigs.bases.load import load_base
from comigs.bases.text_rules import gpt2s_rule, smollms_rule
from comigs.config import BaseSection, parse_config, to_toml
from comigs.errors import UserError
from comigs.runs.folder import RunFolder
from tests.exports import base_of

BEFORE = "ada530ed358dac7297693a96d50f7051dccf1bf253881606d4564bcd8adcf41a"
TOKENIZER_BEFORE = "7e0b8f35ca7f836d92d824d9e3db5747c22d9a1e2753ccf2ec9af24a8614e979"


def folder_with(path, base):
    """A run folder whose config has this [base], as it was written."""
    config = parse_config({"base": base, "clients": [{"name": "ann", "text": "ann"}]})
    folder = RunFolder.create(path, config, {})
    assert 'tokenizer = "own"' in to_toml(config)
    return folder


def without_the_field(folder):
    path = folder.path / "config.toml"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if not line.startswith("tokenizer =")))


def test_a_run_of_smollm2_from_before_goes_on_with_gpt2s_rule(tmp_path):
    folder = folder_with(tmp_path / "run", {"name": "smollm2-135m"})
    assert folder.config().base.tokenizer == "own"
    without_the_field(folder)
    assert folder.config().base.tokenizer == "gpt-2"


def test_a_run_of_another_base_from_before_has_its_own_rule(tmp_path):
    folder = folder_with(tmp_path / "run", {"name": "mini"})
    without_the_field(folder)
    assert folder.config().base.tokenizer == "own"


def test_gpt2s_rule_is_for_smollm2_only():
    with pytest.raises(
        UserError, match=r'base.tokenizer: given "gpt-2", which is for smollm2-135m'
    ):
        load_base(BaseSection(name=str(base_of("llama")), tokenizer="gpt-2", device="cpu"))


def test_the_rules_differ_only_where_spaces_stand_before_a_digit():
    def cut(rule, text):
        return [word for word, _ in rule.pre_tokenize_str(text)]

    own, gpt2s = smollms_rule(), gpt2s_rule()
    assert cut(own, "a   7") == ["a", "ĠĠĠ", "7"] and cut(gpt2s, "a   7") == ["a", "ĠĠ", "Ġ7"]
    for text in ("it's what we'll read", "a  b", "\n\n\tx", "Größe"):
        assert cut(own, text) == cut(gpt2s, text)


@pytest.mark.slow
def test_old_runs_find_their_base_again_and_new_ones_have_another():
    """Fingerprint and tokenizer of runs that were made before the field was there."""
    section = BaseSection(name="smollm2-135m", dtype="float32", device="cpu")
    before = load_base(section.model_copy(update={"tokenizer": "gpt-2"}))
    assert before.fingerprint == BEFORE and before.encoder.id == TOKENIZER_BEFORE
    now = load_base(section)
    assert now.fingerprint != BEFORE
    text = "in  1999 and   7"
    assert now.encoder.encode([text]) != before.encoder.encode([text])
    assert now.tokenizer.decode(now.encoder.encode([text])[0]) == text
