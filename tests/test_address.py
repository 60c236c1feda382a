"""An address in a config means the client that is called so, whatever it is called."""

from __future__ import annotations

import itertools
import tomllib

import pytest

from comigs.config import load_config, to_toml
from comigs.config.clients import ClientEntry
from comigs.config.toml import MAX_DEPTH
from comigs.errors import UserError
from comigs.experiments.sweep.spec import flat, literal

NAMES = ("2", "0", "1", "fr", "fr.text", "a.b", "a", "text", "rank", "a.b.rank", "007", "clients")
VALUES = {
    "rank": 4,
    "specialists": 2,
    "specialist_rank": 3,
    "router_data": "train",
    "weight": 2.5,
    "text": "other",
}


def written(tmp_path, names):
    path = tmp_path / "x.toml"
    entries = [f'[[clients]]\nname = "{name}"\ntext = "t"\nweight = 1.0\n' for name in names]
    path.write_text("".join(entries))
    return path


def changed(config, before):
    """Return name, field and value of all that differs between two configs."""
    found = []
    for now, then in zip(config.clients, before.clients, strict=True):
        for field in ClientEntry.model_fields:
            if getattr(now, field) != getattr(then, field):
                found.append((then.name, field, getattr(now, field)))
    return found


@pytest.mark.parametrize("quoted", [False, True], ids=["bare", "quoted"])
@pytest.mark.parametrize("name", NAMES)
def test_the_client_of_that_name_is_changed_and_no_other(tmp_path, name, quoted):
    """In every order of the file, as --set and as a sweep writes it."""
    assert set(VALUES) == set(ClientEntry.model_fields) - {"name"}
    key = f'"{name}"' if quoted else name
    for names in (NAMES, NAMES[::-1]):
        path = written(tmp_path, names)
        before = load_config(path)
        for field, value in VALUES.items():
            wanted = [(name, field, value)]
            override = f"clients.{key}.{field}={literal(value)}"
            assert changed(load_config(path, [override]), before) == wanted
            sweep = flat(tomllib.loads(f"clients.{key}.{field} = {literal(value)}"))
            overrides = [f"{k}={literal(v)}" for k, v in sweep.items()]
            assert changed(load_config(path, overrides), before) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_split_of_a_client_is_changed_and_no_other(tmp_path, name):
    path = written(tmp_path, NAMES)
    whole = f'clients.{name}.text={{train = "a", valid = "b", test = "c"}}'
    config = load_config(path, [whole, f"clients.{name}.text.valid=d"])
    entry = config.client_named(name)
    assert (entry.text.train, entry.text.valid, entry.text.test) == ("a", "d", "c")
    assert [name for name, *_ in changed(config, load_config(path))] == [name]


@pytest.mark.parametrize("order", [*itertools.permutations(("2", "0", "1"))])
def test_a_number_is_a_name_where_a_client_is_called_by_one(tmp_path, order):
    path = written(tmp_path, order)
    assert load_config(path, ["clients.0.rank=4"]).client_named("0").rank == 4
    with pytest.raises(UserError, match='no client "3"; there are: '):
        load_config(path, ["clients.3.rank=4"])
    path = written(tmp_path, ("2", "1", "ann"))
    with pytest.raises(UserError, match='no client "0"; there are: 2, 1, ann'):
        load_config(path, ["clients.0.rank=4"])


@pytest.mark.parametrize(
    "key, line",
    [
        ("clients.a.b", "say which field of the client, for example clients.a.b.rank=4"),
        ("clients.a", "say which field of the client, for example clients.a.rank=4"),
        ("clients.c.b.rank", 'no client "c"; there are: '),
        ("clients.a.b.rnak", r'clients\.a\.b\.rnak: unknown key\. Did you mean "rank"'),
        ("clients.ann.text.tran", 'no client "ann"'),
        ("clients.99999999999999999999.rank", 'no client "9999'),
        ("x\ny", "x\ny: unknown key"),
        ("[a]\nb=3\n[c]\nd", "unknown key"),
        ("'a", "unknown key"),
        ("", "expected KEY=VALUE"),
    ],
)
def test_an_address_of_nothing_is_refused(tmp_path, key, line):
    path = written(tmp_path, NAMES)
    with pytest.raises(UserError, match=line):
        load_config(path, [f"{key}=1"])


def test_a_value_is_one_value(tmp_path):
    path = written(tmp_path, ("ann",))
    with pytest.raises(UserError, match=r"rounds: given '3.*seed=4'; must be a whole number"):
        load_config(path, ["rounds=3\nseed=4"])


@pytest.mark.parametrize("text", ["{}", "{}rounds = 3\n", "{}[client]\nsteps = 2\n"])
def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path, text):
    path = written(tmp_path, ("ann", "bob"))
    plain = text.format("") + path.read_text()
    path.write_text(plain, encoding="utf-8")
    config = load_config(path)
    path.write_text(plain, encoding="utf-8-sig")
    assert load_config(path) == config
    assert to_toml(load_config(path)) == to_toml(config)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 200, 5000])
@pytest.mark.parametrize(
    "write",
    [
        lambda n: f"x = {'[' * n}{']' * n}",
        lambda n: f"x = {'{a=' * n}1{'}' * n}",
        lambda n: "x" + ".a" * n + " = 1",
        lambda n: "[x" + ".a" * n + "]",
    ],
    ids=["lists", "tables", "keys", "sections"],
)
def test_what_is_nested_too_deeply_is_one_line(tmp_path, write, depth):
    """In the file of a config, and in --set."""
    path = tmp_path / "deep.toml"
    path.write_text(write(depth))
    with pytest.raises(UserError) as refused:
        load_config(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and len(message) < 300 + len(str(path))
    key, _, value = write(depth).partition(" = ")
    with pytest.raises(UserError) as refused:
        load_config(written(tmp_path, ("ann",)), [f"{key}={value or 1}"])
    assert "\n" not in str(refused.value)


def test_a_number_too_long_to_read_is_one_line(tmp_path):
    path = tmp_path / "long.toml"
    path.write_text(f"rounds = {'9' * 10_000}")
    with pytest.raises(UserError, match=r"long\.toml: cannot be read as TOML: "):
        load_config(path)
