"""What is compared with what, and the figures that come out, against numpy over the numbers put
in.
"""

from __future__ import annotations

import json
import math
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comigs.config import parse_config, to_toml
from comigs.errors import UserError
from comigs.experiments.compare.compared import Compared, compare_runs
from comigs.experiments.compare.page import headline
from comigs.experiments.compare.statistics import (
    Results,
    Row,
    mean_by_round,
    mean_difference,
    ranks,
)
from comigs.experiments.compare.tables import (
    client_scores,
    combined_table,
    cost_table,
    main_table,
    settings_table,
)
from tests.compared_runs import BYTES_A_TOKEN, CLIENTS, change, measured, three_methods

NATS = {"ann": 5.0, "bob": 5.4}


def only(compared: Compared) -> Results:
    """The one dataset of a comparison."""
    (results,) = compared.comparison.datasets
    return results


def row(compared: Compared, name: str) -> Row:
    found = only(compared).row(name)
    assert found is not None
    return found


def names(compared: Compared) -> list[str]:
    return list(compared.comparison.settings)


def moved(by: float) -> dict[str, float]:
    return {name: value + by for name, value in NATS.items()}


def write_sweep(root: Path, baseline: str | None, **axes: list[str]) -> None:
    lines = ['name = "mine"', *([f'baseline = "{baseline}"'] if baseline else [])]
    for axis, values in axes.items():
        lines += [f"[axes.{axis}]", *(f"{value} = {{}}" for value in values)]
    (root / "sweep.toml").write_text("\n".join(lines))


# What is one setting, and what is one dataset


def test_runs_that_differ_in_their_seed_only_are_one_setting(tmp_path: Path) -> None:
    compared = compare_runs([three_methods(tmp_path)])
    assert names(compared) == ["comigs", "fedavg", "local"]
    assert [list(r.setting.runs) for r in only(compared).rows] == [[42, 43, 44]] * 3


@pytest.mark.parametrize("how", ["sweep", "datasets", "runs", "twice"])
def test_runs_are_found_at_any_depth_and_counted_once(tmp_path: Path, how: str) -> None:
    three_methods(tmp_path)
    paths = {
        "sweep": [tmp_path],
        "datasets": sorted(p for p in tmp_path.iterdir()),
        "runs": sorted(tmp_path.glob("*/*")),
        "twice": [tmp_path, tmp_path / "local", tmp_path / "local" / ".." / "local" / "seed-42"],
    }[how]
    compared = compare_runs(paths)
    assert sum(len(r.setting.runs) for r in only(compared).rows) == 9


def test_what_does_not_change_a_result_makes_no_setting(tmp_path: Path) -> None:
    measured(tmp_path / "a", NATS, 1, base={"threads": 1}, evaluation={"every": 5}, name="here")
    measured(
        tmp_path / "b", NATS, 2, base={"threads": 2}, data={"cache": "elsewhere"}, name="there"
    )
    compared = compare_runs([tmp_path])
    assert names(compared) == ["comigs"]
    assert "taken as equal: base.threads = 1 and 2" in compared.remarks


def test_what_was_measured_of_a_machine_makes_no_setting(tmp_path: Path) -> None:
    for seed, machine in enumerate((123.4, 150.0, 99.9)):
        simulated = {"speed": 0.5, "machine": machine}
        measured(tmp_path / str(seed), NATS, seed, conditions=simulated)
    compared = compare_runs([tmp_path])
    assert names(compared) == ["comigs"] and len(row(compared, "comigs").setting.runs) == 3
    assert "taken as equal: conditions.machine = 123.4, 150 and 99.9" in compared.remarks


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([{"experts": {"rank": r}} for r in (16, 4, 8)], ["rank=4", "rank=8", "rank=16"]),
        ([{"client": {"lr": r}} for r in (0.00200000001, 0.002)], ["lr=0.002", "lr=0.00200000001"]),
        ([{"method": m} for m in ("fedavg", "local")], ["fedavg", "local"]),
        (
            [{}, {"experts": {"generalists": 2, "specialists": 0}}, {"method": "local"}],
            ["comigs", "comigs, generalists=2, specialists=0", "local"],
        ),
        (
            [{"method": m, "rounds": n} for m in ("comigs", "local") for n in (1, 2)],
            ["comigs, rounds=1", "comigs, rounds=2", "local, rounds=1", "local, rounds=2"],
        ),
        (
            [{"client": {"lr": 1e-3}}, {"client": {"lr": 1e-3, "router_lr": 1e-3}}],
            ["router_lr=none", "router_lr=0.001"],
        ),
        (
            [
                {"conditions": {"upload": 1e6, "download": 4e6, "latency": latency, **both}}
                for latency, both in ((0.1, {"on": 9, "off": 9}), (0.2, {"on": 9, "off": 9}))
            ]
            + [{}, {"conditions": {"upload": 1e5, "dropout": 0.5}}],
            [
                "comigs",
                "upload=100000, dropout=0.5",
                "upload=1000000, download=4000000, latency=0.1, …",
                "upload=1000000, download=4000000, latency=0.2, …",
            ],
        ),
    ],
)
def test_settings_are_called_by_what_sets_them_apart(
    tmp_path: Path, kinds: list[dict[str, Any]], expected: list[str]
) -> None:
    for number, tree in enumerate(kinds):
        measured(tmp_path / str(number), NATS, **tree)
    compared = compare_runs([tmp_path])
    assert sorted(names(compared)) == sorted(expected)
    table = settings_table(compared.comparison)
    assert len({row[1:] for row in table.rows}) == len(
        expected
    )  # all that is apart is in the table


def test_a_sweep_gives_names_order_and_baseline(tmp_path: Path) -> None:
    for text in ("topics", "faq"):
        for method in ("local", "comigs-2g", "comigs"):
            folder = measured(
                tmp_path / text / method / "seed-42", NATS, method=method.removesuffix("-2g")
            )
            change(folder, "env.json", base_fingerprint=text)
    write_sweep(tmp_path, "comigs", text=["topics", "faq"], method=["local", "comigs-2g", "comigs"])
    compared = compare_runs([tmp_path / "topics", tmp_path / "faq"])
    assert compared.title == "mine"
    assert [d.name for d in compared.comparison.datasets] == ["topics", "faq"]
    assert names(compared) == ["local", "comigs-2g", "comigs"]
    assert [r.is_baseline for r in compared.comparison.datasets[0].rows] == [False, False, True]


def test_a_setting_that_names_clients_is_told_for_the_clients_of_every_dataset(
    tmp_path: Path,
) -> None:
    for text, clients in (("topics", ("news", "fiction")), ("faq", ("fr", "de"))):
        for power in ("equal", "more"):
            folder = measured(tmp_path / text / power / "seed-42", dict.fromkeys(clients, 5.0))
            change(folder, "env.json", base_fingerprint=text)
            tree = tomllib.loads((folder / "config.toml").read_text())
            tree["clients"][1]["specialists"] = 3 if power == "more" else 1
            (folder / "config.toml").write_text(to_toml(parse_config(tree)))
    write_sweep(tmp_path, "equal", text=["topics", "faq"], power=["equal", "more"])
    table = settings_table(compare_runs([tmp_path]).comparison)
    assert table.headers == (
        "setting",
        "method",
        "clients.fiction.specialists",
        "clients.de.specialists",
    )
    assert table.rows == (("equal", "comigs", "1", "1"), ("more", "comigs", "3", "3"))


def test_a_baseline_on_one_of_several_axes_is_each_setting_s_own(tmp_path: Path) -> None:
    for number, rank in enumerate((4, 8)):
        for method, gain in (("local", 0.0), ("comigs", 0.1 + number)):
            tree: dict[str, Any] = {"method": method, "experts": {"rank": rank}}
            measured(tmp_path / f"r{rank}" / method / "seed-1", moved(number - gain), 1, **tree)
    write_sweep(tmp_path, "local", rank=["r4", "r8"], method=["local", "comigs"])
    for compared in (compare_runs([tmp_path]), compare_runs([tmp_path], baseline="local")):
        assert names(compared) == ["r4, local", "r4, comigs", "r8, local", "r8, comigs"]
        against = {r.setting.name: (r.baseline and r.baseline.name) for r in only(compared).rows}
        assert against == {
            "r4, local": None,
            "r4, comigs": "r4, local",
            "r8, local": None,
            "r8, comigs": "r8, local",
        }
        means = [r.difference.difference.mean for r in only(compared).rows if r.difference]
        assert means == pytest.approx([-0.1, -1.1])
    one_for_all = compare_runs([tmp_path], baseline="r4/local")
    assert [bool(r.difference) for r in only(one_for_all).rows] == [False, True, True, True]


def test_without_all_else_the_same_the_baseline_is_the_one_that_shares_most(
    tmp_path: Path,
) -> None:
    made = (("local", "none", 4), ("comigs", "none", 4), ("comigs", "eps8", 4))
    made += (("local", "none", 8), ("comigs", "eps8", 8))
    for number, (method, noise, rank) in enumerate(made):
        tree: dict[str, Any] = {"method": method, "experts": {"rank": rank}}
        if noise == "eps8":
            tree["privacy"] = {"level": "document", "epsilon": 8}
        where = tmp_path / "runs" / f"r{rank}" / method / noise / "seed-1"
        measured(where, moved(number / 10), 1, **tree)
    axes = {"rank": ["r4", "r8"], "method": ["local", "comigs"], "noise": ["none", "eps8"]}
    write_sweep(tmp_path / "runs", "local", **axes)
    compared = compare_runs([tmp_path / "runs"])
    found = {r.setting.name: (r.baseline and r.baseline.name) for r in only(compared).rows}
    assert found == {
        "r4, local, none": None,
        "r4, comigs, none": "r4, local, none",
        "r4, comigs, eps8": "r4, local, none",
        "r8, local, none": None,
        "r8, comigs, eps8": "r8, local, none",
    }
    means = [r.difference.difference.mean for r in only(compared).rows if r.difference]
    assert means == pytest.approx([0.1, 0.2, 0.1])
    said = [note for note in compared.notes if "compared against" in note]
    name = only(compared).name
    assert said == [
        f"{name}: r4, comigs, eps8: compared against r4, local, none, which differs in noise, too",
        f"{name}: r8, comigs, eps8: compared against r8, local, none, which differs in noise, too",
    ]

    # Of two that share as much neither is taken.
    shutil.rmtree(tmp_path / "runs" / "r4" / "comigs")
    measured(tmp_path / "runs" / "r2" / "comigs" / "none" / "seed-1", NATS, 1, experts={"rank": 2})
    write_sweep(tmp_path / "runs", "local", **axes | {"rank": ["r2", "r4", "r8"]})
    compared = compare_runs([tmp_path / "runs"])
    assert row(compared, "r2, comigs, none").baseline is None
    assert f"{name}: no baseline (local with most else the same) for r2, comigs, none" in (
        compared.notes
    )


def test_a_sweep_s_baseline_that_has_not_run_is_said_and_not_replaced(tmp_path: Path) -> None:
    measured(tmp_path / "local" / "seed-1", NATS, 1, method="local")
    measured(tmp_path / "fedavg" / "seed-1", NATS, 1, method="fedavg")
    write_sweep(tmp_path, "comigs", method=["local", "fedavg", "comigs"])
    compared = compare_runs([tmp_path])
    assert compared.comparison.baseline is None
    assert compared.notes[0] == 'the sweep\'s baseline "comigs" has no finished run here yet'


def test_a_run_that_is_not_the_sweep_s_is_told_apart_by_its_config(tmp_path: Path) -> None:
    for seed, rounds in ((1, 2), (2, 2), (3, 4)):
        measured(tmp_path / "local" / f"seed-{seed}", NATS, seed, rounds=rounds, method="local")
    write_sweep(tmp_path, None, method=["local"])
    assert names(compare_runs([tmp_path])) == ["local, rounds=2", "local, rounds=4"]


def test_a_run_that_does_not_know_its_tokens_is_on_the_same_text(tmp_path: Path) -> None:
    text = {"bytes": 9, "sha256": ["0"]}
    for seed, more in ((1, {"tokens": 3}), (2, {})):
        run = measured(tmp_path / str(seed), NATS, seed)
        change(
            run,
            "env.json",
            data={name: {"train": text | more, "test": text | more} for name in ("ann", "bob")},
        )
    (dataset,) = compare_runs([tmp_path]).comparison.datasets
    assert [len(row.setting.runs) for row in dataset.rows] == [2]


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("env.json", {"data": {"ann": {"train": {"sha256": ["0"]}}}}, "the text of ann and bob"),
        ("env.json", {"base_fingerprint": "other"}, "the base"),
        ("config.toml", {"distribution": ("in", "out")}, "data.distribution"),
        ("config.toml", {"sequence_length": ("128", "64")}, "data.sequence_length"),
    ],
)
def test_other_data_is_said_and_never_averaged(
    tmp_path: Path, file: str, values: dict[str, Any], said: str
) -> None:
    measured(tmp_path / "a", NATS, 1)
    other = measured(tmp_path / "b", moved(1.0), 2)
    if file == "env.json":
        change(other, file, **values)
    else:
        config = other / file
        for name, (old, new) in values.items():
            text = config.read_text()
            changed = text.replace(f'{name} = "{old}"', f'{name} = "{new}"').replace(
                f"{name} = {old}\n", f"{name} = {new}\n"
            )
            assert changed != text
            config.write_text(changed)
    compared = compare_runs([tmp_path])
    assert len({d.name for d in compared.comparison.datasets}) == 2
    assert [
        d.rows[0].scores["nats_per_token"].mean for d in compared.comparison.datasets
    ] == pytest.approx([5.2, 6.2])
    assert said in compared.notes[0] and "never averaged" in compared.notes[0]


def test_other_clients_are_other_data(tmp_path: Path) -> None:
    measured(tmp_path / "a", NATS, 1)
    measured(tmp_path / "b", {"ann": 5.0}, 2)
    compared = compare_runs([tmp_path])
    assert len(compared.comparison.datasets) == 2
    assert "their clients" in compared.notes[0]


# Figures


def test_scores_are_means_over_clients_then_over_seeds(tmp_path: Path) -> None:
    nats = np.array([[5.0, 5.4], [4.9, 5.6], [5.2, 5.3]])
    for seed, of_seed in enumerate(nats):
        measured(tmp_path / str(seed), dict(zip(CLIENTS, of_seed.tolist(), strict=True)), seed)
    found = row(compare_runs([tmp_path]), "comigs")
    per_seed = {
        "nats_per_token": nats.mean(axis=1),
        "perplexity": np.exp(nats).mean(axis=1),
        "bits_per_byte": (nats / math.log(2) / BYTES_A_TOKEN).mean(axis=1),
    }
    for metric, values in per_seed.items():
        score = found.scores[metric]
        assert score is not None
        assert (score.mean, score.sd, score.n) == pytest.approx(
            (values.mean(), values.std(ddof=1), 3)
        )
    assert found.perplexity_of_mean is not None
    assert found.perplexity_of_mean.mean == pytest.approx(np.exp(nats.mean(axis=1)).mean())
    bob = found.clients["bob"]["perplexity"]
    assert bob is not None
    assert (bob.mean, bob.sd) == pytest.approx(
        (np.exp(nats[:, 1]).mean(), np.exp(nats[:, 1]).std(ddof=1))
    )


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    compared = compare_runs([three_methods(tmp_path)])
    assert row(compared, "local").difference is None
    found = row(compared, "comigs").difference
    assert found is not None
    differences = np.array([-0.1, -0.115, -0.13])
    assert found.difference.mean == pytest.approx(differences.mean())
    assert found.difference.sd == pytest.approx(differences.std(ddof=1))
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert found.p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t))
    assert (found.better, found.pairs) == (6, 6)
    shown = main_table(compared.comparison, only(compared)).rows[0]
    assert shown[3:7] == ("-0.115 \N{PLUS-MINUS SIGN} 0.015", "-10.9 %", "0.006", "6 of 6")


def test_other_seeds_are_said_and_only_common_ones_paired(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        measured(tmp_path / f"local-{seed}", NATS, seed, method="local")
    for seed in (2, 3, 4, 5):
        measured(tmp_path / f"comigs-{seed}", moved(0.1 * seed), seed)
    compared = compare_runs([tmp_path])
    found = row(compared, "comigs")
    assert found.scores["nats_per_token"].n == 4
    assert found.difference is not None
    assert (found.difference.difference.n, found.difference.difference.mean) == (
        2,
        pytest.approx(0.25),
    )
    assert any(
        "not every setting has the same seeds" in note and "only seeds that both have" in note
        for note in compared.notes
    )
    table = main_table(compared.comparison, only(compared))
    assert table.rows[0][table.headers.index("common seeds")] == "2"


def test_nothing_is_called_best_where_settings_have_different_seeds(tmp_path: Path) -> None:
    for number in (1, 2):  # two datasets; the second has one seed of comigs more, and an easy one
        for seed, nats in ((1, 2.0), (2, 1.0)):
            for method in ("local", "comigs"):
                if (number, seed, method) != (2, 2, "local"):
                    folder = measured(
                        tmp_path / f"{number}/{method}-{seed}", {"ann": nats}, seed, method=method
                    )
                    change(folder, "env.json", base_fingerprint=str(number))
    compared = compare_runs([tmp_path])
    one, other = compared.comparison.datasets
    assert one.same_seeds and not other.same_seeds
    assert (
        main_table(compared.comparison, one).best
        and not main_table(compared.comparison, other).best
    )
    assert (
        ranks(compared.comparison) == {} and combined_table(compared.comparison).best == frozenset()
    )
    assert (
        headline(compared.comparison)
        == "Settings were measured on different seeds, so none is called best."
    )
    assert any(
        "nothing is marked best or ranked where seeds differ" in note for note in compared.notes
    )


def test_no_common_seed_is_no_difference(tmp_path: Path) -> None:
    measured(tmp_path / "a", NATS, 1, method="local")
    measured(tmp_path / "b", NATS, 2)
    compared = compare_runs([tmp_path])
    assert row(compared, "comigs").difference is None
    assert "no seed in common with the baseline: comigs" in " ".join(compared.notes)


def test_one_seed_has_no_test_and_says_so(tmp_path: Path) -> None:
    for method in ("local", "comigs"):
        measured(tmp_path / method, NATS if method == "local" else moved(-0.5), method=method)
    compared = compare_runs([tmp_path])
    assert main_table(compared.comparison, only(compared)).rows[0][3:7] == (
        "-0.5000",
        "-39.3 %",
        "\N{EN DASH}",
        "2 of 2",
    )
    assert any("one common seed" in note for note in compared.notes)


def test_few_seeds_and_many_comparisons_are_said(tmp_path: Path) -> None:
    said = " ".join(compare_runs([three_methods(tmp_path)]).notes)
    assert "3 common seeds give a paired test little power" in said
    assert "not corrected for 2 comparisons" in said


def test_bits_per_byte_are_compared_in_bits_per_byte(tmp_path: Path) -> None:
    compared = compare_runs([three_methods(tmp_path)], metric="bits_per_byte")
    found = row(compared, "comigs").difference
    assert found is not None
    assert found.difference.mean == pytest.approx(-0.115 / math.log(2) / BYTES_A_TOKEN)
    assert "perplexity change" not in main_table(compared.comparison, only(compared)).headers


def test_a_figure_that_is_not_finite_drops_its_run_and_says_so(tmp_path: Path) -> None:
    three_methods(tmp_path)
    summary = tmp_path / "comigs" / "seed-43" / "summary.json"
    content = json.loads(summary.read_text())
    content["clients"]["bob"]["test"] |= {
        "perplexity": None,
        "nats_per_token": None,
        "bits_per_byte": None,
    }
    summary.write_text(json.dumps(content))
    compared = compare_runs([tmp_path])
    found = row(compared, "comigs")
    assert found.scores["perplexity"].n == 2
    assert found.difference is not None and found.difference.difference.n == 2
    assert any("comigs on" in note and "seed 43" in note for note in compared.notes)


def test_curves_are_means_over_clients_at_rounds_that_all_seeds_have(tmp_path: Path) -> None:
    for seed, every in ((1, 1), (2, 2)):
        folder = measured(tmp_path / str(seed), NATS, seed, rounds=4)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["kind"] == "evaluation":
                line["nats_per_token"] = line["round"] + seed + (line["client"] == "bob")
        kept = [
            line for line in lines if line["kind"] != "evaluation" or line["round"] % every == 0
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    curve = mean_by_round(row(compare_runs([tmp_path]), "comigs").setting, "nats_per_token")
    assert list(curve) == [2, 4]
    assert (curve[4].mean, curve[4].sd) == pytest.approx((6.0, math.sqrt(0.5)))


# Several datasets


def several_datasets(root: Path) -> Path:
    levels = {
        "comigs": (1.0, 2.0, 3.0),
        "fedavg": (2.0, 1.0, 3.0),
        "local": (3.0, 3.0, 3.0),
        "extra": (0.0, None, 0.0),
    }
    for method, of_dataset in levels.items():
        for number, level in enumerate(of_dataset):
            if level is not None:
                tree: dict[str, Any] = {"rounds": 3} if method == "extra" else {"method": method}
                folder = measured(
                    root / f"{number}" / method, {"ann": level}, name=f"text-{number}", **tree
                )
                change(folder, "env.json", base_fingerprint=str(number))
    return root


def test_ranks_are_among_settings_that_all_datasets_have_and_ties_share(tmp_path: Path) -> None:
    compared = compare_runs([several_datasets(tmp_path)])
    assert names(compared) == ["comigs, rounds=2", "comigs, rounds=3", "fedavg", "local"]
    assert ranks(compared.comparison) == {
        "comigs, rounds=2": pytest.approx((1 + 2 + 2) / 3),
        "fedavg": pytest.approx((2 + 1 + 2) / 3),
        "local": pytest.approx((3 + 3 + 2) / 3),
    }
    assert headline(compared.comparison) == (
        "Best mean rank over 3 datasets: comigs, rounds=2 and fedavg (1.7), then local (2.7); "
        "of the 3 settings that all of them have."
    )
    assert mean_difference(compared.comparison, "fedavg") == pytest.approx((-1 - 2 + 0) / 3)
    assert mean_difference(compared.comparison, "comigs, rounds=3") is None


def test_the_best_two_of_a_column_are_marked(tmp_path: Path) -> None:
    compared = compare_runs([several_datasets(tmp_path)])
    table = combined_table(compared.comparison)
    column = {header: number for number, header in enumerate(table.headers)}
    first, second, third = (column[f"text-{n}"] for n in range(3))
    assert {(r, c) for r, c in table.best if c == first} == {(1, first)}
    assert {(r, c) for r, c in table.second if c == first} == {(0, first)}
    assert {(r, c) for r, c in table.best if c == second} == {(2, second)}
    assert {(r, c) for r, c in table.second if c == third} == {(0, third), (2, third), (3, third)}
    assert table.rows[1][second] == "\N{EN DASH}"
    clients = client_scores(compared.comparison, compared.comparison.datasets[0])
    assert clients.best == {(1, 1)}


# Costs


def test_budgets_that_are_not_equal_say_by_how_much(tmp_path: Path) -> None:
    for method, parameters in (("local", 1000), ("comigs", 1500), ("fedavg", 1000)):
        change(
            measured(tmp_path / method, NATS, method=method),
            "clients",
            trained_parameters=parameters,
        )
    compared = compare_runs([tmp_path])
    cells = {row[0]: row[1] for row in cost_table(only(compared)).rows}
    assert cells == {
        "local": "1,000",
        "comigs": "1,500 (1.50\N{MULTIPLICATION SIGN})",
        "fedavg": "1,000",
    }


def test_what_routers_learn_from_is_counted_beside_what_experts_do(tmp_path: Path) -> None:
    for method in ("local", "comigs"):
        folder = measured(tmp_path / method, NATS, method=method)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            if line["kind"] == "train":
                line |= {
                    "local_steps": 4,
                    "router_steps": 3 if method == "comigs" else 0,
                    "trained_tokens": 80,
                }
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compared = compare_runs([tmp_path])
    table, rounds = (
        cost_table(only(compared)),
        compared.comparison.datasets[0].rows[0].setting.runs[42].config.rounds,
    )
    shown = {
        r[0]: [r[table.headers.index(h)] for h in ("trained tokens", "and in router steps")]
        for r in table.rows
    }
    assert shown == {
        "local": [f"{80 * rounds}", "0"],
        "comigs": [f"{80 * rounds}", f"{60 * rounds}"],
    }


def test_one_pooled_model_counts_the_client_that_trains(tmp_path: Path) -> None:
    folder = measured(tmp_path / "one", NATS, method="centralized")
    summary = json.loads((folder / "summary.json").read_text())
    summary["clients"]["bob"]["trained_parameters"] = 0
    (folder / "summary.json").write_text(json.dumps(summary))
    costs = row(compare_runs([tmp_path]), "centralized").costs
    shown = (costs["trained_parameters"], costs["training_clients"], costs["clients"])
    assert shown == (590_592, 1, 2)
    assert "590,592, 1 of 2 clients" in cost_table(only(compare_runs([tmp_path]))).rows[0]


def test_a_client_that_was_never_asked_with_one_seed_counts_with_the_others(tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = measured(tmp_path / str(seed), NATS, seed)
        summary = json.loads((folder / "summary.json").read_text())
        if seed == 2:
            summary["clients"]["bob"]["trained_parameters"] = 0
        (folder / "summary.json").write_text(json.dumps(summary))
    compared = compare_runs([tmp_path])
    assert row(compared, "comigs").costs["training_clients"] == 1.5
    assert "590,592, 1.5 of 2 clients" in cost_table(only(compared)).rows[0]


def test_clients_that_differ_in_cost_show_mean_least_and_most(tmp_path: Path) -> None:
    folder = measured(tmp_path / "one", NATS)
    summary = json.loads((folder / "summary.json").read_text())
    for name, parameters, sent in (("ann", 1000, 4000), ("bob", 3000, 8000)):
        summary["clients"][name] |= {"trained_parameters": parameters, "uploaded_bytes": sent}
    (folder / "summary.json").write_text(json.dumps(summary | {"weights": "norm of the update"}))
    shown = cost_table(only(compare_runs([tmp_path])))
    assert shown.rows[0][1:3] == ("2,000 [1,000 to 3,000]", "3.0 kB [2.0 kB to 4.0 kB]")
    assert shown.rows[0][shown.headers.index("weights in the merge")] == "norm of the update"


def test_speed_is_left_out_where_it_was_not_recorded(tmp_path: Path) -> None:
    folder = measured(tmp_path / "one", NATS)
    assert "tokens per second" in cost_table(only(compare_runs([tmp_path]))).headers
    (folder / "timings.jsonl").unlink()
    assert "tokens per second" not in cost_table(only(compare_runs([tmp_path]))).headers


# What cannot be compared


def test_unfinished_runs_are_left_out_and_named(tmp_path: Path) -> None:
    three_methods(tmp_path)
    half = measured(tmp_path / "local" / "seed-45", NATS, 45, method="local", rounds=3, done=1)
    compared = compare_runs([tmp_path])
    assert list(row(compared, "local").setting.runs) == [42, 43, 44]
    assert any(
        f"{half} (round 1 of 3); go on with: comigs resume" in note for note in compared.notes
    )
    with pytest.raises(UserError, match="no run here is finished; go on with: comigs resume"):
        compare_runs([half])


def test_two_runs_of_one_setting_and_seed_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        measured(tmp_path / name, NATS, 7)
    with pytest.raises(
        UserError,
        match=r"a and .*b: the same setting \(comigs\) with the same seed, 7; leave one out",
    ):
        compare_runs([tmp_path])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "fedagv",
            r'no setting "fedagv" here\. Did you mean "fedavg"\? There are: comigs; fedavg; local',
        ),
        ("zzz", r'no setting "zzz" here\. There are: comigs; fedavg; local'),
        ("", r'no setting "" here\.'),
    ],
)
def test_an_unknown_baseline_names_the_nearest(tmp_path: Path, given: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compare_runs([three_methods(tmp_path)], baseline=given)


def test_a_baseline_that_one_dataset_lacks_is_said(tmp_path: Path) -> None:
    for number, methods in enumerate((("local", "comigs"), ("fedavg", "comigs"))):
        for method in methods:
            folder = measured(
                tmp_path / f"{number}-{method}", NATS, method=method, name=f"text-{number}"
            )
            change(folder, "env.json", base_fingerprint=str(number))
    compared = compare_runs([tmp_path])
    assert [d.has_baseline for d in compared.comparison.datasets] == [True, False]
    assert (
        "no finished run of the baseline (local) on text-1: no differences there" in compared.notes
    )


def test_no_baseline_is_said(tmp_path: Path) -> None:
    for method in ("comigs", "fedavg"):
        measured(tmp_path / method, NATS, method=method)
    compared = compare_runs([tmp_path])
    assert compared.comparison.baseline is None
    assert any("--baseline" in note for note in compared.notes)


def test_a_summary_of_other_clients_is_refused(tmp_path: Path) -> None:
    folder = measured(tmp_path / "one", NATS)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["clients"]["bob"]
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(
        UserError, match=r"summary\.json: clients: ann; the run's config has ann, bob"
    ):
        compare_runs([tmp_path])
