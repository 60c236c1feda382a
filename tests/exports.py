"""What the tests of exports share: small bases of several families, and runs on them that route.

The bases are random, as wide as they must be for every number type of llama.cpp, and read text by
merges learnt from a few sentences. Routers start large and rates are high, so that experts differ
and tokens are routed.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from comigs.app import api
from comigs.bases.load import load_base
from comigs.config import parse_config
from comigs.data.prepare import prepare
from comigs.personal.export.export import Exported
from comigs.personal.export.source import windows_of
from tests.conftest import APART
from tests.runs import write_text

SHAPE = {
    "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rms_norm_eps": 1e-4},
    "llama-scaled": {
        "head_dim": 32,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "llama-gpt2s-rule": {},
    "llama-untied": {},
    "llama-relu": {"hidden_act": "relu"},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3-wide": {"head_dim": 128},
    "gemma3_text": {"head_dim": 16, "layer_types": ["full_attention"] * 2},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "1g1s": {"experts": {"generalists": 1, "specialists": 1}},
    "others": {"method": "comigs-others"},
    "on-top": {"experts": {"specialist_rank": 2}, "options": {"specialists": "on-top"}},
    "top1": {"experts": {"generalists": 1, "specialists": 2, "top_k": 1}},
    "four": {"experts": {"generalists": 2, "specialists": 2, "top_k": 3, "specialist_rank": 2}},
    "client": {"experts": {"generalists": 1, "specialists": 1, "routing": "client"}},
    "sequence": {"experts": {"generalists": 1, "specialists": 1, "routing": "sequence"}},
    "fedavg": {"method": "fedavg"},
    "by-document": {"privacy": {"level": "document", "epsilon": 8.0, "delta": 0.01}},
    "fedavg-by-document": {
        "method": "fedavg",
        "privacy": {"level": "document", "epsilon": 8.0, "delta": 0.01},
    },
    "fdlora": {"method": "fdlora"},
    "fedalt": {"method": "fedalt"},
    "flora": {"method": "flora"},
}
CLIENTS = ("ann", "bob")


@functools.cache
def root() -> Path:
    """A folder that goes when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="comigs-exports-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in CLIENTS:
        write_text(folder, name, documents=60)
    return folder


SENTENCES = """The cat sat on the mats and the dogs sat on the cat in 2024, at 12 or 99 o'clock.
It's what we'll read: the merges of words that are here, of spaces   and of numbers, are learnt.
Größe und Straße, façade et déjà vu; all else is bytes. Ann and bob sat there, they didn't go.
"""


def small_tokenizer(digits: bool = True) -> Any:
    """Byte-level BPE that knows these sentences, with every digit a word, or by GPT-2's rule."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    each = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([each, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES.splitlines() * 3, trainer)
    if not digits:
        tokenizer.pre_tokenizer = byte_level
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


@functools.cache
def base_of(family: str) -> Path:
    """A random base of a family, as a folder that transformers loads."""
    folder = root() / "bases" / family
    model_type = family.partition("-")[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = AutoConfig.for_model(model_type, **{**SHAPE, **FAMILIES[family]})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.2)
    model.save_pretrained(folder)
    if family == "llama-untied":
        untie(folder / "model.safetensors")
    small_tokenizer(digits=not family.endswith("gpt2s-rule")).save_pretrained(folder)
    return folder


def untie(file: Path) -> None:
    """Give a base a head of its own, as training both with `modules_to_save` does; its config goes
    on saying that they are tied.
    """
    tensors = load_file(file)
    tensors["lm_head.weight"] = 1.5 * tensors["model.embed_tokens.weight"].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})


def trained(setting: str, family: str = "llama") -> Path:
    """A finished run of two clients with these experts on a base of this family, made once."""
    return _trained(setting, family)


@functools.cache
def _trained(setting: str, family: str) -> Path:
    tree = SETTINGS[setting]
    is_comigs = tree.get("method", "comigs") == "comigs"
    options = tree.get("options", APART if is_comigs else {})
    experts = {
        "rank": 4,
        "specialist_rank": 4,
        "attention_rank": 3,
        "router_start": 0.5,
        **tree.get("experts", {}),
    }
    config = parse_config({
        "name": f"{setting}-{family}",
        "rounds": 2,
        "method": tree.get("method", "comigs"),
        "base": {"name": str(base_of(family)), "dtype": "float32", "device": "cpu", "threads": 1},
        "data": {"root": str(root()), "cache": str(root() / "cache"), "sequence_length": 24},
        "experts": experts,
        "options": options,
        "privacy": tree.get("privacy", {}),
        "client": {"steps": 4, "batch_size": 4, "router_every": 2, "router_steps": 2, "lr": 2e-2},
        "evaluation": {"batch_size": 8},
        "clients": [{"name": name, "text": name} for name in CLIENTS],
    })  # fmt: skip
    return api.run(config, root() / "runs" / f"{setting}-{family}").path


def exported(run: Path, to: str, out: Path, **settings: Any) -> Exported:
    """An export of ann's model."""
    from comigs.app.export import export

    return export(run, "ann", to, out, **settings)


def valid_windows(run: Path, client: str = "ann") -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of the windows of a client's valid on which exports are measured."""
    config = api.open_run(run).config()
    base = load_base(config.base)
    stores = prepare(config, base.encoder).load(client).valid
    windows = windows_of(stores, config.data.sequence_length)
    return [(inputs[0].tolist(), targets[0].tolist()) for inputs, targets in windows]


def elsewhere(program: str, *words: object) -> Any:
    """What a Python program prints as JSON, run in a fresh process that cannot import comigs."""
    guard = "import sys; sys.modules['comigs'] = None\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", guard + program, *map(str, words)],
        capture_output=True, text=True, env=environment, timeout=300, cwd=root(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
