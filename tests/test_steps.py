"""Bi-level steps: equal to an independent loop, and the two levels never touch each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from comigs.client import steps
from comigs.client.state import new_train_state
from comigs.client.steps import (
    MethodHooks,
    NonFiniteLoss,
    RoundLog,
    StepSettings,
    experts_differ,
    local_round,
    step,
)
from comigs.config import ClientSection
from comigs.data.batches import Batch
from comigs.experts.init import starting_tensors
from tests import naive
from tests.authors_loop import leaky_gradients_for
from tests.conftest import attach, bits, copy_of, random_tensors, same, shape_of, tiny

EVERYTHING = lambda slot: True  # noqa: E731
LEVELS = [("experts",), ("router",), ("experts", "router")]


SPLIT = {"experts": "train", "router": "valid"}


def draw(split, number, windows=3, length=5):
    """A batch that depends on nothing but what is asked for."""
    random = np.random.default_rng([number, *split.encode()])
    return Batch(*(random.integers(0, 257, (windows, length)) for _ in range(2)))


def settings_of(**changes):
    defaults = {
        "steps": 3,
        "batch_size": 3,
        "router_every": 2,
        "router_steps": 2,
        "lr": 2e-3,
        "balance_coef": 0.01,
    }
    return ClientSection(**{**defaults, **changes})


def plan_of(settings, dtype=torch.float32, total_steps=20, **more):
    return StepSettings(
        settings,
        lr=settings.lr,
        router_lr=settings.router_lr or settings.lr,
        total_steps=total_steps,
        dtype=dtype,
        **more,
    )


class Case:
    """A client in the middle of its training: experts that differ, and moments in both
    optimisers.
    """

    def __init__(
        self,
        name="tiny-gpt2",
        shape=None,
        top_k=2,
        dtype="float32",
        fresh=False,
        schedule="alternating",
        **settings,
    ):
        self.base = tiny(name, dtype)
        self.attachment = attach(self.base.model, self.base.architecture, top_k)
        shape, self.settings = shape or shape_of(1, 2), settings_of(**settings)
        if fresh:
            tensors = starting_tensors(self.attachment.slot_shapes(shape, True), 42, "ada")
            tensors = {slot: t.to(self.base.dtype) for slot, t in tensors.items()}
        else:
            tensors = random_tensors(self.attachment, shape, True, dtype=self.base.dtype)
        self.start = copy_of(tensors)
        self.train_state = new_train_state(tensors, self.settings)
        self.plan = plan_of(self.settings, self.base.dtype, schedule=schedule)
        self.attachment.bind(tensors)
        if not fresh:
            for number in range(2):
                self.step("experts", "router", number=number)

    def step(self, *groups, number=7, trains=EVERYTHING, log=None, batch=None):
        batch = batch or draw("train", number)
        outcome = step(
            self.attachment, self.train_state, self.plan, MethodHooks(trains), groups, batch
        )
        if log is not None:
            log.note(outcome)
        return outcome.nats

    def round(self, trains=EVERYTHING, drawn=None, seen=None):
        def noting_draw(level, number):
            split = SPLIT[level]
            if drawn is not None:
                drawn.append((split, number))
            return draw(split, number)

        def on_step(group, nats):
            if seen is not None:
                seen.append((group, nats))

        return local_round(
            self.attachment, self.train_state, self.plan, noting_draw, MethodHooks(trains), on_step
        )

    def of(self, group):
        """Tensors and moments of one level, by name."""
        by_id = {id(t): str(slot) for slot, t in self.train_state.tensors.items()}
        members = self.train_state.of(group)
        state = self.train_state.optimizers[group].state
        moments = {
            f"{by_id[id(p)]}/{key}": v for p, values in state.items() for key, v in values.items()
        }
        return copy_of({by_id[id(t)]: t for t in members} | moments)

    def everything(self):
        return self.of("experts") | self.of("router")

    def nothing_is_left(self):
        return all(
            t.grad is None and not t.requires_grad for t in self.train_state.tensors.values()
        )

    def gradients_of(self, *groups, batch=None):
        """What a step of these groups would have applied."""
        applied = {}

        def record(group):
            by_id = {id(t): slot for slot, t in self.train_state.tensors.items()}
            applied.update({by_id[id(t)]: t.grad.clone() for t in self.train_state.of(group)})

        for group in groups:
            self.train_state.optimizers[group].step = lambda group=group: record(group)
        nats = self.step(*groups, log=(log := RoundLog()), batch=batch)
        for group in groups:
            del self.train_state.optimizers[group].step
        return nats, applied, log


@pytest.mark.parametrize("schedule", ["alternating", "joint", "both"])
@pytest.mark.parametrize(
    ("name", "shape", "top_k", "tolerance"),
    [
        ("tiny-gpt2", shape_of(1, 2), 1, 1e-8),
        ("tiny-gpt2", shape_of(1, 1), 2, 1e-5),  # K >= 2 takes its softmax in float32
        ("tiny-llama", shape_of(1, 2, 2, 4), 2, 1e-5),
        ("tiny-llama", shape_of(1, 0), 2, 1e-8),
    ],
)
def test_two_rounds_equal_an_independent_training_loop(name, shape, top_k, tolerance, schedule):
    case = Case(name, shape, top_k, "float64", fresh=True, schedule=schedule, router_lr=3e-3)
    seen, s = [], case.settings
    case.round(seen=seen)
    case.round(seen=seen)
    case.attachment.detach()
    expected, nats = naive.naive_train(
        case.base.model,
        case.start,
        top_k,
        draw,
        lr=s.lr,
        router_lr=s.router_lr,
        steps=6,
        total_steps=20,
        router_every=2,
        router_steps=2,
        balance_coef=s.balance_coef,
        share=s.generalist_share,
        betas=s.betas,
        weight_decay=s.weight_decay,
        schedule=schedule,
    )
    assert [nats for _, nats in seen] == pytest.approx(nats, rel=1e-6)
    for slot, tensor in case.train_state.tensors.items():
        assert (tensor - case.start[slot]).abs().max() > 1e-5  # it learnt
        torch.testing.assert_close(
            tensor, expected[str(slot)], rtol=0, atol=tolerance, msg=lambda m, s=slot: f"{s}: {m}"
        )


@pytest.mark.parametrize(("stepped", "other"), [("experts", "router"), ("router", "experts")])
@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_a_step_of_one_level_changes_nothing_of_the_other_and_leaves_no_gradient(
    name, stepped, other
):
    case = Case(name)
    before = {group: case.of(group) for group in (stepped, other)}
    case.step(stepped)
    after = {group: case.of(group) for group in (stepped, other)}
    assert same(before[other], after[other])
    assert all(bits(before[stepped][key]) != bits(after[stepped][key]) for key in before[stepped])
    assert case.nothing_is_left()
    assert all(p.grad is None for p in case.base.model.parameters())


@pytest.mark.parametrize("group", ["experts", "router"])
def test_a_step_computes_the_gradient_of_its_own_level_only(group):
    case, seen = Case(), {}

    def look():
        seen.update({slot: t.grad is not None for slot, t in case.train_state.tensors.items()})

    case.train_state.optimizers[group].step = look
    case.step(group)
    assert seen == {
        slot: (slot.role == "router") == (group == "router") for slot in case.train_state.tensors
    }


def test_no_gradient_is_left_anywhere_after_a_round():
    case = Case()
    case.round()
    assert case.nothing_is_left()


@pytest.mark.parametrize("group", ["experts", "router"])
def test_what_a_level_applies_does_not_depend_on_what_the_other_did_before(group):
    """The authors' loop lets ten validation gradients into the next expert step."""
    other = {"experts": "router", "router": "experts"}[group]
    case, again = Case(), Case()
    _, alone, _ = case.gradients_of(group)
    frozen = copy_of(again.train_state.tensors)
    for number in range(3):
        again.step(other, number=number)
    for slot, tensor in again.train_state.tensors.items():
        tensor.copy_(frozen[slot])  # back to the same place: only left-over gradients could differ
    _, after, _ = again.gradients_of(group)
    assert same(alone, after)


def test_leaking_gradients_on_purpose_is_another_training(monkeypatch):
    strict, leaky = Case(fresh=True), Case(fresh=True)
    strict.round()
    monkeypatch.setattr(steps, "gradients_for", leaky_gradients_for)
    leaky.round()
    assert not same(strict.train_state.tensors, leaky.train_state.tensors)
    assert strict.nothing_is_left()
    assert any(t.grad is not None for t in leaky.train_state.tensors.values())


def test_the_leak_is_the_other_levels_gradients_and_no_more(monkeypatch):
    """A leaky expert step applies its own gradient plus those of the router steps before it."""
    case, leaky = Case(), Case()
    _, own, _ = case.gradients_of("experts")
    monkeypatch.setattr(steps, "gradients_for", leaky_gradients_for)
    frozen = copy_of(leaky.train_state.tensors)
    leaky.step("router", number=3)
    for slot, tensor in leaky.train_state.tensors.items():
        tensor.copy_(frozen[slot])
    left = {
        slot: t.grad.clone() for slot, t in leaky.train_state.tensors.items() if t.grad is not None
    }
    _, applied, _ = leaky.gradients_of("experts")
    assert left.keys() == own.keys() == applied.keys()
    for slot in own:
        torch.testing.assert_close(applied[slot], own[slot] + left[slot], rtol=0, atol=1e-6)


def test_the_router_waits_until_experts_differ():
    case = Case(fresh=True)
    W = {slot: t.clone() for slot, t in case.train_state.tensors.items() if slot.role == "router"}
    assert not experts_differ(case.train_state.tensors)
    for number in range(3):
        case.step("router", number=number)
    assert all(bits(case.train_state.tensors[slot]) == bits(t) for slot, t in W.items())
    assert not case.train_state.optimizers["router"].state
    case.step("experts", "router")  # joint: the first step moves the experts only
    assert (
        experts_differ(case.train_state.tensors) and not case.train_state.optimizers["router"].state
    )
    case.step("router")
    assert all(bits(case.train_state.tensors[slot]) != bits(t) for slot, t in W.items())


def test_while_experts_are_equal_the_routers_gradient_is_rounding_noise():
    """Why the router waits: AdamW would turn this into full steps."""
    case = Case(fresh=True, balance_coef=0)
    for slot, t in case.train_state.tensors.items():
        t.requires_grad_(slot.role == "router")
    inputs, targets = (torch.from_numpy(part) for part in draw("valid", 0)[:2])
    case.base.model(input_ids=inputs, labels=targets).loss.backward()
    assert all(
        t.grad.abs().max() < 1e-6 for s, t in case.train_state.tensors.items() if s.role == "router"
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("groups", LEVELS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(groups, size):
    whole, pieces = (
        Case(dtype="float64", balance_coef=0, micro_batch_size=m) for m in (None, size)
    )
    nats, gradients, log = whole.gradients_of(*groups)
    piece_nats, piece_gradients, piece_log = pieces.gradients_of(*groups)
    assert piece_nats == pytest.approx(nats, abs=1e-7)
    assert piece_log.trained_tokens == log.trained_tokens == 15
    torch.testing.assert_close(piece_log.share_sum_LE, log.share_sum_LE, rtol=0, atol=1e-5)
    for slot, gradient in gradients.items():
        torch.testing.assert_close(piece_gradients[slot], gradient, rtol=0, atol=1e-7)


def test_micro_batches_add_up_to_one_balance_loss():
    """It is a mean over tokens, not a sum over them: windows that are all the same show it
    exactly.
    """
    same_windows = Batch(*(np.repeat(part[:1], 4, axis=0) for part in draw("train", 0)[:2]))
    whole, pieces = (Case(dtype="float64", balance_coef=0.5) for _ in range(2))
    pieces.plan = plan_of(settings_of(balance_coef=0.5, micro_batch_size=1), torch.float64)
    _, gradients, log = whole.gradients_of("router", batch=same_windows)
    _, piece_gradients, piece_log = pieces.gradients_of("router", batch=same_windows)
    assert piece_log.balance_losses == pytest.approx(log.balance_losses, abs=1e-7)
    for slot, gradient in gradients.items():
        torch.testing.assert_close(piece_gradients[slot], gradient, rtol=0, atol=1e-7)


@pytest.mark.parametrize("others", ["none", "gated"])
@pytest.mark.parametrize("groups", LEVELS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_has_one_balance_loss_whatever_its_pieces(groups, size, others):
    """Three experts of which a token uses two: pieces differ in how often each is chosen."""
    shape = shape_of(1, 2 if others == "none" else 3).model_copy(update={"others": others})
    settings = {"shape": shape, "dtype": "float64", "balance_coef": 0.5}
    whole, pieces = Case(**settings), Case(**settings, micro_batch_size=size)
    for slot, tensor in pieces.train_state.tensors.items():
        tensor.copy_(whole.start[slot])
        whole.train_state.tensors[slot].copy_(whole.start[slot])
    _, gradients, log = whole.gradients_of(*groups)
    _, piece_gradients, piece_log = pieces.gradients_of(*groups)
    assert piece_log.balance_losses == pytest.approx(log.balance_losses, abs=1e-7)
    assert abs(log.balance_losses[0] - 1) > 1e-3  # it says something here
    for slot, gradient in gradients.items():
        torch.testing.assert_close(piece_gradients[slot], gradient, rtol=0, atol=1e-7)


def test_the_balance_loss_is_added_with_its_weight_and_not_reported_as_nats():
    case, gradients, nats = Case(), {}, set()
    for coef in (0, 0.3, 0.6):
        case.plan = plan_of(settings_of(balance_coef=coef))
        loss, applied, log = case.gradients_of("router")
        gradients[coef] = torch.cat([gradient.flatten() for gradient in applied.values()])
        nats.add(loss)
        assert log.balance_losses[0] > 0
    once, twice = gradients[0.3] - gradients[0], gradients[0.6] - gradients[0]
    assert len(nats) == 1 and once.abs().max() > 1e-4
    torch.testing.assert_close(twice, 2 * once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("groups", LEVELS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(groups, value):
    case = Case(micro_batch_size=1)
    calls = []

    def second_call_diverges(_module, _args, output):
        if torch.is_grad_enabled():  # else the choices of all pieces are counted
            calls.append(1)
        if len(calls) == 2:
            output.last_hidden_state.mul_(value)
        return output

    hook = case.base.model.base_model.register_forward_hook(second_call_diverges)
    before, steps = case.everything(), (case.train_state.local_steps, case.train_state.router_steps)
    with pytest.raises(NonFiniteLoss, match="the loss is nan"):
        case.step(*groups)
    hook.remove()
    assert len(calls) == 2
    assert same(before, case.everything()) and case.nothing_is_left()
    assert steps == (case.train_state.local_steps, case.train_state.router_steps)


@pytest.mark.parametrize("role", ["generalist", "specialist", "attention", "router"])
def test_a_gradient_that_is_not_finite_changes_nothing_of_either_level(role):
    case = Case()
    slot = next(slot for slot in case.train_state.tensors if slot.role == role)
    tensor = case.train_state.tensors[slot].requires_grad_()
    hook = tensor.register_hook(lambda gradient: gradient * math.inf)
    before = case.everything()
    with pytest.raises(NonFiniteLoss, match="gradient"):
        case.step("experts", "router")
    hook.remove()
    assert same(before, case.everything()) and case.nothing_is_left()


def test_a_loss_that_is_not_finite_is_told_with_its_batch():
    case = Case(fresh=True)
    case.round()
    poisoned = next(t for slot, t in case.train_state.tensors.items() if slot.role == "specialist")
    poisoned.fill_(math.nan)
    with pytest.raises(NonFiniteLoss) as raised:
        case.round()
    assert raised.value.batch == "train batch 3"


def test_router_phases_are_counted_over_rounds():
    case, drawn, phases = Case(steps=2, router_every=3, router_steps=2), [], []
    for _ in range(5):
        phases.append(len(case.round(drawn=drawn).router_losses))
    assert phases == [0, 2, 2, 0, 2]  # after local steps 3, 6 and 9 of 10
    train, valid = [("train", n) for n in range(10)], [("valid", n) for n in range(6)]
    assert drawn == [
        *train[:3],
        *valid[:2],
        *train[3:6],
        *valid[2:4],
        *train[6:9],
        *valid[4:6],
        train[9],
    ]
    assert (case.train_state.local_steps, case.train_state.router_steps) == (10, 6)


def test_batches_are_numbered_the_same_while_the_router_waits():
    case, drawn = Case(fresh=True, steps=1, router_every=1, router_steps=2, lr=1e-30), []
    case.plan = plan_of(case.settings)
    case.round(drawn=drawn)
    assert drawn == [("train", 0), ("valid", 0), ("valid", 1)]


def test_without_a_router_or_without_router_steps_valid_is_never_read():
    for case in (Case(shape=shape_of(1, 0), fresh=True), Case(fresh=True, router_steps=0)):
        drawn = []
        case.round(drawn=drawn)
        assert {split for split, _ in drawn} == {"train"}


def test_a_joint_round_trains_both_levels_on_train_alone():
    case, drawn, seen = Case(schedule="joint"), [], []
    before = case.everything()
    log = case.round(drawn=drawn, seen=seen)
    after = case.everything()
    assert drawn == [("train", 0), ("train", 1), ("train", 2)] and not log.router_losses
    assert [group for group, _ in seen] == ["experts"] * 3
    assert all(bits(before[key]) != bits(after[key]) for key in before)


def test_steps_are_told_in_order_with_their_loss():
    case, seen = Case(), []
    log = case.round(seen=seen)
    assert [group for group, _ in seen] == ["experts", "experts", "router", "router", "experts"]
    assert [nats for group, nats in seen if group == "experts"] == log.train_losses
    assert [nats for group, nats in seen if group == "router"] == log.router_losses


def test_the_experts_rate_falls_as_a_cosine_to_a_tenth_and_the_routers_stays():
    settings = settings_of(lr=2e-3, router_lr=5e-4)
    plan = plan_of(settings, total_steps=200)
    assert plan.rate("experts", 0) == pytest.approx(2e-3, rel=1e-12)
    assert plan.rate("experts", 100) == pytest.approx(
        1.1e-3, rel=1e-12
    )  # half way: the mean of both ends
    assert plan.rate("experts", 200) == pytest.approx(2e-4, rel=1e-12)
    assert plan.rate("experts", 50) == pytest.approx(2e-4 + 9e-4 * (1 + math.sqrt(0.5)), rel=1e-12)
    rates = [plan.rate("experts", done) for done in range(201)]
    assert rates == sorted(rates, reverse=True)
    assert {plan.rate("router", done) for done in (0, 100, 200)} == {5e-4}


def test_the_schedule_runs_over_rounds_and_is_logged():
    case = Case(steps=2)
    logged = [case.round().learning_rate for _ in range(3)]
    assert logged == [
        case.plan.rate("experts", done) for done in (1, 3, 5)
    ]  # of each round's last step


def test_adamw_equals_the_one_written_out_in_numpy():
    case = Case(fresh=True, dtype="float64", betas=(0.8, 0.9), weight_decay=0.1)
    ours, random = case.train_state, np.random.default_rng(0)
    values = {slot: t.numpy().copy() for slot, t in ours.tensors.items()}
    theirs = {
        "experts": naive.NumpyAdamW((0.8, 0.9), 0.1),
        "router": naive.NumpyAdamW((0.8, 0.9), 0.1),
    }
    for number in range(5):
        for group, optimizer in ours.optimizers.items():
            optimizer.param_groups[0]["lr"] = rate = 0.01 / (1 + number)
            for slot in [s for s in ours.tensors if (s.role == "router") == (group == "router")]:
                gradient = random.normal(size=values[slot].shape) * 10.0 ** random.integers(-6, 3)
                ours.tensors[slot].grad = torch.from_numpy(gradient)
                values[slot] = theirs[group].step(str(slot), values[slot], gradient, rate)
            optimizer.step()
    for slot, value in values.items():
        np.testing.assert_allclose(ours.tensors[slot].numpy(), value, rtol=0, atol=1e-12)


def test_slots_not_trained_in_a_round_stay_to_the_bit_and_gather_no_moments():
    case = Case(fresh=True)
    case.round(trains=lambda slot: slot.matrix != "A")
    for slot, tensor in case.train_state.tensors.items():
        if slot.matrix == "A":
            assert bits(tensor) == bits(case.start[slot])
            assert tensor not in set(case.train_state.optimizers["experts"].state)
        else:
            assert bits(tensor) != bits(case.start[slot])
    assert case.nothing_is_left()


def test_in_bfloat16_trained_tensors_and_moments_stay_float32():
    case = Case(dtype="bfloat16", fresh=True)
    case.train_state = new_train_state(
        {slot: t.float() for slot, t in case.start.items()}, case.settings
    )
    case.attachment.bind(case.train_state.tensors)
    first = case.round().train_losses[0]
    assert math.isfinite(first) and {t.dtype for t in case.everything().values()} == {torch.float32}
    exact = Case(fresh=True)
    assert first == pytest.approx(exact.round().train_losses[0], rel=0.02)


def test_what_is_logged_of_a_round_is_what_happened():
    case = Case(router_steps=0)
    log = case.round()
    assert log.trained_tokens == 3 * 15 and len(log.balance_losses) == 3
    torch.testing.assert_close(
        log.share_sum_LE.sum(dim=1), torch.full((2,), 45.0), rtol=0, atol=1e-4
    )
