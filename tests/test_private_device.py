"""What leaves a private device: the same bytes whatever its text, but for noised numbers."""

from __future__ import annotations

import json

import pytest

from comigs.federation.device.limits import Limits
from comigs.slots import Slot
from tests.conftest import WORDS
from tests.device import RUN, Setting, opened, require_unsaid

PRIVACY = {"level": "document", "delta": 1e-3, "expected_batch": 3}


def whole_run(setting):
    """Every answer of a run, each download the upload before."""
    raws, given = [], {}
    for round in range(1, setting.config.rounds + 2):
        raws.append(setting.trainer.answer(setting.request(round, given)))
        given = {Slot.parse(name): tensor for name, tensor in opened(raws[-1])[1].items()}
    return raws


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """Two devices that answered the same, of which one has other text, as many documents of it."""
    root, ran = tmp_path_factory.mktemp("private-device"), []
    for home in ("one", "other"):
        setting = Setting(root, home, privacy={**PRIVACY, "noise_multiplier": 1.0})
        if home == "other":
            (root / "elsewhere").mkdir()
            for number in range(9):
                text = " ".join(WORDS["bob"].split()[number % 5 :] * (2 + number))
                (root / "elsewhere" / f"{number}.txt").write_text(f"{text} {number}")
            setting = Setting(
                root,
                home,
                privacy={**PRIVACY, "noise_multiplier": 1.0},
                device={"text": "elsewhere"},
            )
        ran.append((setting, whole_run(setting)))
    return ran


def test_beside_noised_numbers_an_answer_says_nothing_of_the_text(devices):
    (_, one), (_, other) = devices
    for mine, yours in zip(one, other, strict=True):
        heads = [opened(raw)[0] for raw in (mine, yours)]
        assert heads[0] == heads[1]
        header = 8 + int.from_bytes(mine[:8], "little")
        assert mine[:header] == yours[:header]  # whatever is not a tensor's numbers
        assert len(mine) == len(yours)
        assert (mine == yours) == (len(mine) == header)


def test_no_figure_of_the_devices_own_is_in_any_byte(devices):
    for setting, raws in devices:
        require_unsaid(setting.folder, b"".join(raws))


def test_what_it_spent_is_rounded_up_so_that_nobody_counts_documents(devices):
    setting, raws = devices[0]
    told = [opened(raw)[0].metrics[0]["epsilon"] for raw in raws[:-1]]
    lines = [json.loads(x) for x in (setting.folder / "metrics.jsonl").read_text().splitlines()]
    own = [line["epsilon"] for line in lines if line["kind"] == "train"]
    assert all(0 <= said - real < 0.1 for said, real in zip(told, own, strict=True))
    assert told == [round(said, 1) for said in told]


def test_asked_again_it_sends_the_same_noise(devices):
    setting, raws = devices[0]
    before = (setting.device.home / "privacy.json").read_bytes()
    last = setting.config.rounds + 1
    again = setting.trainer.answer(setting.request(last, after=last - 1))
    assert again == raws[-1]
    assert (setting.device.home / "privacy.json").read_bytes() == before


def limited(root, home, epsilon, **tree):
    return Setting(root, home, device={"limits": Limits(epsilon=epsilon)}, **tree)


def test_the_owners_budget_holds_over_runs_and_the_server_learns_a_code(tmp_path):
    noise = {**PRIVACY, "noise_multiplier": 1.0}
    setting = limited(tmp_path, "device", 5.0, privacy=noise)
    head, _ = setting.ask(1)  # at delta 1e-5: 4.49, and 6.05 with one round more
    assert head.trained
    assert setting.refused(1, run="another-run-of-the-same-operator") == "budget"
    assert "(--max-epsilon)" in setting.said[-1]
    entries = json.loads((setting.device.home / "privacy.json").read_bytes())
    assert [(entry["run"], entry["round"]) for entry in entries] == [(RUN, 1)]

    # Nor does a process that was killed and started anew, or an operator who asks for no privacy.
    setting.trainer = setting.restarted()
    assert setting.refused(1, run="a-third-run-of-the-operator") == "budget"
    loud = limited(tmp_path, "device", 5.0)
    assert loud.refused(1, run="a-run-without-any-privacy") == "unbounded"
    assert 'allows "document" only' in loud.said[-1]


def test_a_server_cannot_choose_the_noise(tmp_path):
    setting = Setting(tmp_path, privacy={**PRIVACY, "epsilon": 1.0, "noise_seed": 3})
    assert setting.refused(1) == "refused"
    assert "privacy.noise_seed" in setting.said[-1] and "decides that itself" in setting.said[-1]


def test_nobody_measures_uploads_in_its_place_whose_method_does_without(tmp_path):
    """A probe is answered with a loss on valid, exactly and as often as it is asked for."""
    setting = Setting(tmp_path, privacy={**PRIVACY, "noise_multiplier": 1.0})
    setting.ask(1)
    assert setting.refused(1, kind="probe", train=False, after=1, probed=1) == "refused"
    assert "comigs measures nobody's uploads" in setting.said[-1]


@pytest.mark.parametrize(
    "change", [{"client": {"steps": 10**6}}, {"data": {"sequence_length": 800}}]
)
def test_why_it_cannot_would_tell_how_long_its_text_is(tmp_path, change):
    """Its owner reads it, the server of a private run learns that it failed."""
    private = {**PRIVACY, "noise_multiplier": 1.0}
    silent = Setting(tmp_path, "silent", privacy=private, base={"name": "tiny-llama"}, **change)
    open_ = Setting(tmp_path, "open", base={"name": "tiny-llama"}, **change)
    assert silent.refused(1) == "failed"
    assert open_.refused(1) in ("time", "not-ready")
    assert silent.said[-1].split(":")[0] == open_.said[-1].split(":")[0]
