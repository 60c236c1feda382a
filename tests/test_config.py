"""The config: what is written comes back, what is wrong is named with what is nearest, its page is
up to date.
"""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from comigs.config import SECTIONS, Config, load_config, parse_config, to_toml
from comigs.errors import UserError
from comigs.methods.loading import list_methods, load_method

ROOT = Path(__file__).parents[1]
ANN = {"name": "ann", "text": "x"}
OTHERS = "comigs-others"
APART = {"specialists": "apart", "attention": "mean"}  # what comigs did before version 5
MIXTURE = {"finish": "mixture", **APART}  # what comigs ended with before version 4
EIGHT = {"rank": 8, "specialist_rank": 8, "attention_rank": 8}
FULL = {
    "version": 5,
    "name": "full",
    "seed": 7,
    "method": "fedavg",
    "rounds": 3,
    "base": {"name": "tiny-llama", "dtype": "float64", "device": "cpu", "threads": 2},
    "data": {
        "root": "/a b",
        "cache": "c",
        "sequence_length": 9,
        "distribution": "out",
        "valid_fraction": 0.2,
    },
    "experts": {
        "generalists": 2,
        "specialists": 3,
        "rank": 4,
        "specialist_rank": 5,
        "attention_rank": 6,
        "share_attention": False,
        "alpha": 8.5,
        "scaling": "lora",
        "top_k": 1,
    },
    "client": {
        "steps": 1,
        "batch_size": 2,
        "micro_batch_size": 1,
        "lr": 1e-3,
        "router_lr": 0.5,
        "betas": [0.1, 0.2],
    },
    "evaluation": {"every": 0, "splits": ["train", "valid"], "keep": "last", "batch_size": 1},
    "participation": {
        "clients_per_round": 2,
        "min_clients": 2,
        "deadline": 60.5,
        "late": "discount",
        "late_discount": 0.25,
        "max_failures": 1,
    },
    "upload": {
        "format": "int8",
        "merge": "trimmed",
        "trim": 0.1,
        "max_norm": 5,
        "max_norm_ratio": 2.5,
    },
    "clients": [
        {
            "name": "ann",
            "text": 'folder:"quoted"\\é',
            "specialists": 1,
            "rank": 2,
            "specialist_rank": 1,
            "weight": 1,
        },
        {"name": "b-o.b_2", "text": {"train": "a", "valid": "b", "test": "c"}, "weight": 2.5},
        {"name": "away", "weight": 0.5},
    ],
}


@pytest.mark.parametrize("tree", [{"clients": [ANN]}, FULL], ids=["defaults", "everything"])
def test_what_is_written_comes_back(tmp_path, tree):
    config = parse_config(tree)
    assert parse_config(tomllib.loads(to_toml(config))) == config
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    again = load_config(path)
    assert again.model_copy(update={"data": config.data}) == config
    assert again.data.root == (tmp_path / config.data.root).resolve()


CONFIGS = sorted([*ROOT.glob("configs/*.toml"), *ROOT.glob("configs/instruct/*.toml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_the_configs_we_ship_are_valid(path):
    config = load_config(path)
    assert parse_config(tomllib.loads(to_toml(config))) == config


def test_name_and_root_come_from_the_file(tmp_path):
    path = tmp_path / "my run.toml"
    path.write_text('[data]\nroot = "texts"\n[[clients]]\nname = "ann"\ntext = "x"\n')
    config = load_config(path)
    assert (config.name, config.data.root) == ("my run", tmp_path / "texts")


def test_a_base_in_a_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    """Beside the config, or where the command is given; a hub name, which looks alike, stays
    one.
    """
    (tmp_path / "configs/models/mine").mkdir(parents=True)
    (tmp_path / "here/models/other").mkdir(parents=True)
    path = tmp_path / "configs" / "a.toml"
    path.write_text('[[clients]]\nname = "ann"\ntext = "x"\n')
    monkeypatch.chdir(tmp_path / "here")
    names = {
        given: load_config(path, [f'base.name="{given}"']).base.name
        for given in ("models/mine", "models/other", "models/none", "mini")
    }
    assert names == {
        "models/mine": str(tmp_path / "configs/models/mine"),
        "models/other": str(tmp_path / "here/models/other"),
        "models/none": "models/none",
        "mini": "mini",
    }


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_config({"clients": [ANN]}).rounds = 3


@pytest.mark.parametrize("section", SECTIONS.values(), ids=lambda s: s.__name__)
def test_every_field_says_what_it_is(section):
    for name, field in section.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description and "|" not in field.description


def test_every_section_is_known():
    named = {
        "base",
        "data",
        "experts",
        "client",
        "evaluation",
        "participation",
        "upload",
        "privacy",
        "conditions",
        "track",
        "clients",
    }
    assert set(Config.model_fields) & set(SECTIONS) == named


@pytest.mark.parametrize("name", SECTIONS)
def test_the_nearest_name_is_given_in_every_section(name):
    for key in SECTIONS[name].model_fields:
        wrong = key[:-1] + "q" + key[-1]
        tree = {"clients": [dict(ANN)]}
        if name == "":
            tree[wrong] = 1
        elif name == "clients":
            tree["clients"][0][wrong] = 1
        elif name == "clients.text":
            tree["clients"][0]["text"] = {"train": "a", "valid": "b", "test": "c", wrong: "d"}
        elif name.startswith("conditions."):
            tree["conditions"] = {name.removeprefix("conditions."): {"ann": {wrong: 1}}}
        else:
            tree[name] = {wrong: 1}
        inside = f"{name}.ann." if "." in name else f"{name}."
        by_name = {"": "", "clients": "clients.ann.", "clients.text": "clients.ann.text."}
        where = by_name.get(name, inside)
        with pytest.raises(
            UserError, match=rf'^config: {where}{wrong}: unknown key\. Did you mean "{key}"\?'
        ):
            parse_config(tree)


def overridden(tmp_path, *overrides):
    path = tmp_path / "x.toml"
    path.write_text(
        '[client]\nsteps = 3\n[[clients]]\nname = "ann"\ntext = "x"\n[[clients]]\nname = '
        '"bob"\ntext = "y"\n'
    )
    return load_config(path, overrides)


@pytest.mark.parametrize(
    "override, place, value",
    [
        ("rounds=9", "rounds", 9),
        (" rounds = 9 ", "rounds", 9),
        ("client.steps=4", "client.steps", 4),
        ("client.lr=3e-4", "client.lr", 3e-4),
        ("experts.alpha=2", "experts.alpha", 2.0),
        ("method=fedavg", "method", "fedavg"),
        ('method="fedavg"', "method", "fedavg"),
        ("experts.share_attention=false", "experts.share_attention", False),
        ('evaluation.splits=["train","valid"]', "evaluation.splits", ("train", "valid")),
        ("clients.bob.rank=4", "clients.1.rank", 4),
        ("clients.0.rank=4", "clients.0.rank", 4),
        ("clients.ann.text=a folder/x", "clients.0.text", "a folder/x"),
        ("name=my=name", "name", "my=name"),
    ],
)
def test_overrides(tmp_path, override, place, value):
    found = overridden(tmp_path, override)
    for part in place.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == value and type(found) is type(value)


def test_later_overrides_win(tmp_path):
    assert overridden(tmp_path, "rounds=2", "rounds=3").rounds == 3


def test_shapes_of_clients_that_differ():
    config = parse_config(FULL | {"experts": {"rank": 4, "specialists": 3, "top_k": 1}})
    ann, bob, _ = (config.shape_of(c) for c in config.clients)
    assert (ann.specialists, ann.rank, ann.specialist_rank, ann.attention_rank) == (1, 2, 1, 8)
    assert (bob.specialists, bob.rank, bob.specialist_rank, bob.num_experts) == (3, 4, 4, 4)


def test_one_expert_needs_no_top_k():
    parse_config({"clients": [ANN], "experts": {"generalists": 1, "specialists": 0, "top_k": 2}})


def test_how_many_problems_there_are():
    with pytest.raises(UserError, match=r"\(and 2 other problems\)$"):
        parse_config({"clients": [ANN], "client": {"steps": 0, "batch_size": 0, "lr": -1}})


def test_long_input_is_cut():
    with pytest.raises(UserError) as error:
        parse_config({"clients": [ANN], "rounds": "x" * 10_000})
    assert len(str(error.value)) < 200


def test_messages_are_one_line():
    with pytest.raises(UserError) as error:
        parse_config({"clients": [ANN], "method": ["a\nb"]})
    assert "\n" not in str(error.value)


def test_what_older_versions_wrote_and_is_no_more_is_read(tmp_path):
    """A run of an older version goes on; one that used what is no more becomes no other run."""
    tree = {"clients": [ANN], "client": {"steps": 3, "leaky_gradients": False}}
    assert parse_config(tree) == parse_config({"clients": [ANN], "client": {"steps": 3}})
    assert "leaky_gradients" in tree["client"]  # what was given is left as it is
    path = tmp_path / "old.toml"
    text = '[client]\nleaky_gradients = VALUE\n[[clients]]\nname = "ann"\ntext = "x"\n'
    path.write_text(text.replace("VALUE", "false"))
    assert "leaky" not in to_toml(load_config(path))
    path.write_text(text.replace("VALUE", "true"))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == (
        f"{path}: client.leaky_gradients: given true; this field is retired and can only be false; "
        "leave it out"
    )


@pytest.mark.parametrize(
    ("given", "method", "options"),
    [
        ({}, OTHERS, {}),
        ({"options": {"adopt": "valid", "probe_windows": 8}}, OTHERS, {"probe_windows": 8}),
        ({"options": {"adopt": "all"}}, OTHERS, {"adopt": "all"}),  # refused, as ever
        ({"experts": {"rank": 4, "attention_rank": 2}}, OTHERS, {}),
        ({"experts": {"generalists": 1}}, "comigs", MIXTURE),
        (
            {"experts": {"specialists": 0}, "options": {"adopt": "all"}},
            "comigs",
            {"adopt": "all", **MIXTURE},
        ),
        ({"experts": {"specialist_rank": 8}}, "comigs", MIXTURE),
        ({"clients": [ANN, {"name": "bob", "text": "y", "specialists": 1}]}, "comigs", MIXTURE),
        ({"method": "fedavg"}, "fedavg", {}),
    ],
)
def test_comigs_without_numbers_of_experts_was_another_method_in_version_1(given, method, options):
    tree = {"clients": [ANN], **given}
    old = parse_config({"version": 1, **tree})
    assert (old.method, dict(old.options), old.version) == (method, options, 5)
    today = {"method": method, "options": options, "evaluation": {"keep": "last"}}
    experts = given.get("experts", {})
    rank = experts.get("rank", 8)
    ranks = {"rank": rank, "specialist_rank": rank, "attention_rank": rank, **experts}
    assert old == parse_config({**tree, **today, "experts": ranks})
    assert parse_config(tomllib.loads(to_toml(old))) == old
    assert parse_config(tree).method == given.get("method", "comigs")  # without a version: today's


@pytest.mark.parametrize("version", [1, 2])
def test_before_version_3_the_last_round_was_kept(version):
    tree = {"clients": [ANN], "method": "fedavg", "evaluation": {"every": 0}}
    old = parse_config({**tree, "version": version})
    assert (old.evaluation.keep, old.evaluation.every, old.version) == ("last", 0, 5)
    assert parse_config({"clients": [ANN]}).evaluation.keep == "best"


@pytest.mark.parametrize(("given", "read"), [({}, MIXTURE), ({"finish": "valid"}, None)])
def test_before_version_4_comigs_ended_with_its_mixture(given, read):
    tree = {"clients": [ANN], "options": given}
    old = parse_config({**tree, "version": 3})
    assert (dict(old.options), old.version) == ({**APART, **given} if read is None else read, 5)
    assert old == parse_config({**tree, "options": {**MIXTURE, **given}, "experts": EIGHT})
    assert dict(parse_config({**tree, "method": "fedavg", "version": 3}).options) == given


@pytest.mark.parametrize(
    ("experts", "clients", "ranks"),
    [
        ({}, {}, [(8, 8, 8)]),
        ({"rank": 4}, {}, [(4, 4, 4)]),
        ({"rank": 4}, {"rank": 6}, [(6, 6, 4)]),
        ({"rank": 4, "attention_rank": 3}, {"rank": 6, "specialist_rank": 2}, [(6, 2, 3)]),
        ({"specialist_rank": 2}, {"rank": 6}, [(6, 2, 8)]),
    ],
)
def test_before_version_5_what_was_not_said_had_one_rank(experts, clients, ranks):
    tree = {"version": 4, "experts": experts, "clients": [{**ANN, **clients}]}
    old = parse_config(tree)
    shape = old.shape_of(old.clients[0])
    assert [(shape.rank, shape.specialist_rank, shape.attention_rank)] == ranks
    assert (dict(old.options), old.version) == (APART, 5)
    assert parse_config(tomllib.loads(to_toml(old))) == old
    given = {"specialists": "on-top", "attention": "mean"}
    assert dict(parse_config({**tree, "options": given}).options) == given
    today = parse_config({"clients": [ANN]})
    shape = today.shape_of(today.clients[0])
    assert (shape.rank, shape.specialist_rank, shape.attention_rank) == (12, 4, 8)


@pytest.mark.parametrize("evaluation", [{"every": 0}, {"splits": ["test"]}])
@pytest.mark.parametrize("given", [{}, {"keep": "best"}])
def test_a_best_round_that_nobody_measures_is_refused(evaluation, given):
    with pytest.raises(UserError, match=r'^config: evaluation\.keep: given "best", but .*"last"'):
        parse_config({"clients": [ANN], "evaluation": evaluation | given})
    parse_config({"clients": [ANN], "evaluation": evaluation | {"keep": "last"}})


def test_a_default_that_is_given_is_a_default_that_is_not():
    given = {key: {} for key in ("base", "data", "experts", "client", "evaluation", "upload")}
    for key in given:
        for name, field in SECTIONS[key].model_fields.items():
            if field.default is not None:
                given[key][name] = field.default
    left_out, written = parse_config({"clients": [ANN]}), parse_config({"clients": [ANN], **given})
    assert left_out == written and to_toml(left_out) == to_toml(written)
    for name in list_methods():
        shapes = []
        for config in (left_out, written):
            method = load_method(config.model_copy(update={"method": name}))
            shapes.append(method.shape(config.shape_of(config.clients[0])))
        assert shapes[0] == shapes[1], name


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location(
        "config_docs", ROOT / "scripts" / "config_docs.py"
    )
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(), "run: make docs"
    sections, _, _ = docs.page().partition("## [options], by method")
    rows = re.findall(r"^\| `(\w+)` \|", sections, re.MULTILINE)
    # The sections themselves have no row; a group's only row is that of its share.
    own = [s for name, s in SECTIONS.items() if "." not in name or name == "clients.text"]
    assert len(rows) == sum(len(section.model_fields) for section in own) - 11 + 1
