"""A federation's folder, bundles and certificates: private, whole, and what is wrong with them said
in one line.

No server of Flower runs here; tests/test_deployment.py has one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import ssl
import stat
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from comigs.bases.load import load_base
from comigs.config import BaseSection, Text, load_config
from comigs.errors import UserError
from comigs.federation.bundle import read_bundle, write_bundle
from comigs.federation.device.connectivity import _check_clock, check_server
from comigs.federation.device.join import Owner, join, text_of
from comigs.federation.operator import admin, flwr_cli
from comigs.federation.operator.folder import Federation
from comigs.federation.operator.run import check, resume, run
from comigs.federation.operator.server import free_port, require_free_port
from comigs.federation.security import pki
from comigs.federation.supervisor import Supervisor, keep, wait_until
from comigs.processes import is_locked, locked
from comigs.runs.folder import RunFolder
from comigs.text import CONTROL
from tests.exports import base_of
from tests.runs import TINY, copied_run, finished, refused, write_text

APP = "0" * 64


@pytest.fixture
def federation(tmp_path):
    return Federation.create(tmp_path / "fed", ("fed.example", "10.0.0.7"), 8443, APP)


@pytest.fixture
def bundle(federation, tmp_path):
    return read_bundle(admin.invite(federation.path, "ann", tmp_path / "ann.toml"))


def problem(call, *arguments):
    """The one line that a call refuses with."""
    with pytest.raises(UserError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def certificate(text):
    return x509.load_pem_x509_certificate(text.encode())


def test_what_init_makes_is_for_its_owner_only(federation):
    assert stat.S_IMODE(federation.path.stat().st_mode) == 0o700
    assert modes(federation.path) == {0o600}
    assert not [path for path in federation.path.parent.iterdir() if path.name.startswith(".")]


def test_the_server_certificate_names_its_hosts_and_comes_from_the_authority(federation):
    server, authority = (
        certificate(federation.read("server.pem")),
        certificate(federation.read("ca.pem")),
    )
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example", "localhost"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "127.0.0.1"]
    assert isinstance(server.public_key().curve, ec.SECP256R1)
    days = (server.not_valid_after_utc - datetime.now(UTC)).days
    assert pki.SERVER_DAYS - 1 <= days <= pki.SERVER_DAYS
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert (
        authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    )


def test_without_hosts_a_federation_is_open_to_its_own_machine_only(tmp_path, federation):
    assert Federation.create(tmp_path / "alone", (), 8443, APP).settings.listen == "127.0.0.1"
    assert federation.settings.listen == "0.0.0.0"


def test_an_existing_folder_is_never_founded_in(tmp_path, federation):
    before = {path: path.read_bytes() for path in federation.path.rglob("*") if path.is_file()}
    assert "exists already; nothing was changed" in problem(admin.found, federation.path, (), 8443)
    assert before == {
        path: path.read_bytes() for path in federation.path.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("host", ["https://a.b", "a b", "", "a.b:8443", "ü.example", "user@a"])
def test_a_host_that_no_certificate_can_hold_is_refused(tmp_path, host):
    assert "hosts" in problem(Federation.create, tmp_path / "fed", (host,), 8443, APP)
    assert not list(tmp_path.iterdir())


def test_the_server_certificate_is_renewed_when_hosts_change_and_before_it_ends(federation):
    first = federation.read("server.pem")
    assert not federation.certify() and federation.read("server.pem") == first
    settings = federation.path / "federation.toml"
    settings.write_text(settings.read_text().replace("10.0.0.7", "10.0.0.8"))
    changed = Federation.open(federation.path)
    assert changed.certify() and not changed.certify()
    (federation.path / "server.pem").write_text(
        made_certificate(changed, timedelta(days=pki.RENEW_DAYS - 1))
    )
    assert changed.certify() and not changed.certify()


def test_a_certificate_names_this_machine_whatever_hosts_are_given_later(federation):
    """The server's own parts speak with it over the loopback."""
    settings = federation.path / "federation.toml"
    tree = tomllib.loads(settings.read_text()) | {"hosts": ["fed.example"]}
    settings.write_text(tomli_w.dumps(tree))
    changed = Federation.open(federation.path)
    assert changed.certify()
    names = certificate(changed.read("server.pem")).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["fed.example", "localhost"]
    assert [str(a) for a in names.value.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


def test_what_is_no_federation_says_so(tmp_path, federation):
    assert "no such folder" in problem(Federation.open, tmp_path / "nothing")
    assert "not a federation" in problem(Federation.open, tmp_path)
    federation.path.chmod(0o755)
    assert "chmod 700" in problem(Federation.open, federation.path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("port = 8443", "port = 0"),
        ("port = 8443", "port = 'x'"),
        ('id = "', 'idd = "'),
        ("port = 8443", "port ="),
    ],
)
def test_damaged_settings_are_named(federation, line, said):
    file = federation.path / "federation.toml"
    file.write_text(file.read_text().replace(line, said))
    assert str(file) in problem(Federation.open, federation.path)


@pytest.mark.parametrize("damage", ["[]", "{", '{"ann": 1}', '{"ann": {"node_id": "x"}}'])
def test_damaged_clients_are_named(federation, damage):
    (federation.path / "clients.json").write_text(damage)
    assert "clients.json: damaged" in problem(Federation.open(federation.path).clients)


def test_a_bundle_holds_what_a_device_needs_and_only_it_holds_the_key(federation, bundle, tmp_path):
    assert stat.S_IMODE((tmp_path / "ann.toml").stat().st_mode) == 0o600
    assert (bundle.client, bundle.federation, bundle.app) == ("ann", federation.settings.id, APP)
    assert bundle.address == "fed.example:8443"
    assert bundle.authority == federation.read("ca.pem")
    key = serialization.load_ssh_private_key(bundle.key.encode(), None)
    assert isinstance(key.curve, ec.SECP384R1)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    entry = federation.clients()["ann"]
    assert entry.public_key == public.decode() and entry.node_id is None
    middle = bundle.key.splitlines()[3]
    assert not [
        path for path in federation.path.rglob("*") if path.is_file() and middle in path.read_text()
    ]


def test_a_bundle_tells_its_owner_what_will_be_asked(bundle, tmp_path):
    said = tomllib.loads((tmp_path / "ann.toml").read_text())["about"]
    for word in (
        "ann",
        "fed.example:8443",
        "private key",
        "send back",
        "stay in the device's folder",
        "privacy.md",
    ):
        assert word in said


def test_an_ipv6_server_has_an_address_that_can_be_parsed(tmp_path):
    federation = Federation.create(tmp_path / "six", ("::1",), 8443, APP)
    assert federation.settings.address == "[::1]:8443"


@pytest.mark.parametrize("name", ["ann", "ANN"])
def test_a_name_is_invited_once(federation, bundle, name, tmp_path):
    before = federation.read("clients.json")
    assert "invited already" in problem(
        admin.invite, federation.path, name, tmp_path / "other.toml"
    )
    assert federation.read("clients.json") == before and not (tmp_path / "other.toml").exists()


@pytest.mark.parametrize("name", ["", "a b", "../a", "x" * 65, ".a"])
def test_a_name_that_configs_refuse_is_refused(federation, name, tmp_path):
    assert "cannot be a client's" in problem(
        admin.invite, federation.path, name, tmp_path / "other.toml"
    )


def test_a_bundle_is_never_overwritten(federation, tmp_path):
    (tmp_path / "ann.toml").write_text("mine")
    assert "exists already" in problem(admin.invite, federation.path, "ann", tmp_path / "ann.toml")
    assert (tmp_path / "ann.toml").read_text() == "mine" and not federation.clients()


@pytest.mark.parametrize(
    "field", ["federation", "client", "address", "app", "authority", "key", "check"]
)
def test_a_bundle_with_a_changed_character_is_damaged(bundle, field, tmp_path):
    text, value = (tmp_path / "ann.toml").read_text(), getattr(bundle, field)
    at = len(value) // 2
    other = value[:at] + ("x" if value[at] != "x" else "y") + value[at + 1 :]
    (tmp_path / "ann.toml").write_text(text.replace(value, other))
    assert "damaged bundle" in problem(read_bundle, tmp_path / "ann.toml")


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": "../private", "client": "."},
        {"federation": "/home/ann/private", "client": ""},
        {"client": "../../../private"},
        {"federation": "a\x1b[2Jb"},
        {"address": "nowhere"},
        {"address": "host:port"},
        {"address": "ho\0st:80"},
        {"app": "x"},
    ],
)
def test_a_bundle_leads_no_device_out_of_its_folder(bundle, changes, tmp_path, monkeypatch):
    """Its name is made of what the bundle says; an operator who lies wrote over the owner's files.

    Nor does a bundle end in a traceback.
    """
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "private").mkdir(parents=True, mode=0o700)
    lying = bundle.model_copy(update=changes)
    write_bundle(tmp_path / "lying.toml", lying)
    with pytest.raises(UserError, match="a damaged bundle, or none"):
        join(tmp_path / "lying.toml", Owner(text=("anything",)), print)
    assert [path.name for path in (tmp_path / "home").rglob("*")] == ["private"]


def test_a_bundle_pins_the_base_of_its_federation(tmp_path):
    base = admin.pin(BaseSection(name="tiny-llama", dtype="bfloat16", device="cpu"))
    loaded = load_base(BaseSection(name="tiny-llama", dtype="bfloat16", device="cpu"))
    assert (base.name, base.dtype, base.fingerprint) == (
        "tiny-llama",
        "bfloat16",
        loaded.fingerprint,
    )
    federation = Federation.create(tmp_path / "fed", (), 8443, APP, base)
    assert Federation.open(federation.path).settings.base == base
    made = read_bundle(admin.invite(federation.path, "ann", tmp_path / "ann.toml"))
    assert made.base == base
    text = (tmp_path / "ann.toml").read_text()
    (tmp_path / "ann.toml").write_text(text.replace("tiny-llama", "tiny-gpt2"))
    assert "damaged bundle" in problem(read_bundle, tmp_path / "ann.toml")


def test_a_bundle_pins_how_weights_are_held(tmp_path):
    """And says nothing of it where they are whole, as bundles did before that was a choice."""
    section = BaseSection(name=str(base_of("llama")), dtype="float32", device="cpu")
    for weights in ("whole", "int4"):
        asked = section.model_copy(update={"weights": weights})
        federation = Federation.create(tmp_path / weights, (), 8443, APP, admin.pin(asked))
        file = admin.invite(federation.path, "ann", tmp_path / f"{weights}.toml")
        made = read_bundle(file).base
        assert made == Federation.open(federation.path).settings.base
        assert (made.weights, made.fingerprint) == (weights, load_base(asked).fingerprint)
        assert ("weights =" in file.read_text()) == (weights != "whole")
    config = load_config(config_file(tmp_path)).model_copy(update={"base": section})
    said = problem(run, config, load_base(section), tmp_path / "run", federation, print, print)
    assert said.startswith('base.weights: given "whole", but pinned is "int4"')
    assert "--weights" in said and not (tmp_path / "run").exists()


def test_a_bundle_from_before_there_were_pins_is_read(bundle, tmp_path):
    """Its check is of what it holds, in the order of its names."""
    fields = ("about", "federation", "client", "address", "app", "authority", "key")
    old = {field: getattr(bundle, field) for field in fields}
    check = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    (tmp_path / "old.toml").write_text(tomli_w.dumps({**old, "check": check}), encoding="utf-8")
    read = read_bundle(tmp_path / "old.toml")
    assert read.base is None and read.key == bundle.key


def test_a_base_that_is_a_folder_at_the_operators_has_to_be_given(tmp_path):
    write_text(tmp_path, "text")
    base = admin.pin(BaseSection(name="tiny-gpt2")).model_copy(update={"name": "mine"})
    federation = Federation.create(tmp_path / "fed", (), 8443, APP, base)
    file = admin.invite(federation.path, "ann", tmp_path / "ann.toml")
    said = problem(join, file, Owner((str(tmp_path / "text"),), tmp_path / "home"), print)
    assert said.startswith("--base: missing") and "give the folder of your copy" in said
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [({"name": "tiny-llama"}, "base.name"), ({"dtype": "bfloat16"}, "base.dtype")],
)
def test_a_run_with_another_base_than_devices_were_told_is_refused(tmp_path, change, word):
    base = admin.pin(BaseSection(name="tiny-gpt2", dtype="float32", device="cpu"))
    federation = Federation.create(tmp_path / "fed", (), 8443, APP, base)
    config = load_config(config_file(tmp_path))
    config = config.model_copy(update={"base": config.base.model_copy(update=change)})
    loaded = load_base(config.base)
    out = tmp_path / "run"
    said = problem(run, config, loaded, out, federation, print, print)
    assert said.startswith(word) and "federation init DIR --base" in said and not out.exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"key = 1", b"half ="])
def test_what_is_no_bundle_says_so(tmp_path, content):
    (tmp_path / "it").write_bytes(content)
    assert str(tmp_path / "it") in problem(read_bundle, tmp_path / "it")
    assert "no such bundle" in problem(read_bundle, tmp_path / "nothing")


def test_revoking_frees_the_name(federation, bundle, tmp_path):
    assert "was not invited" in problem(admin.revoke, federation.path, "bob")
    admin.revoke(federation.path, "ann")
    assert not federation.clients()
    admin.invite(federation.path, "ann", tmp_path / "again.toml")


def test_status_lists_clients_without_a_server_too(federation, bundle, tmp_path):
    federation.note_run(tmp_path / "run", ["ann"])
    (row,) = admin.status(federation.path).rows
    assert row[0] == "ann" and row[2:] == ("at the next start", "?", "-", "1")


def test_runs_that_begin_together_are_all_kept_note_of(federation, monkeypatch):
    runs = Federation.runs

    def slowly(self):
        found = runs(self)
        time.sleep(0.2)
        return found

    monkeypatch.setattr(Federation, "runs", slowly)
    names = [Path(f"/runs/{number}") for number in range(3)]
    threads = [threading.Thread(target=federation.note_run, args=(n, ["ann"])) for n in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs(federation).keys() == {str(name) for name in names}


def test_commands_end_with_one_line_and_code_2(tmp_path, capsys):
    assert "no such folder" in refused(capsys, "federation", "status", tmp_path / "x")
    assert "no such bundle" in refused(
        capsys, "federation", "client", tmp_path / "x", "--text", tmp_path
    )
    assert "--engine" in refused(capsys, "run", tmp_path / "x.toml", "--engine", "flowr")
    assert "--federation" in refused(capsys, "run", tmp_path / "x.toml", "--engine", "flower")
    assert "--engine flower" in refused(
        capsys, "run", tmp_path / "x.toml", "--federation", tmp_path
    )


def test_the_app_is_the_same_bundle_wherever_it_is_built():
    assert flwr_cli.app_hash() == flwr_cli.app_hash()


def test_the_app_is_what_devices_have_pinned():
    """Whatever changes it keeps out every device that was ever invited."""
    text = json.dumps(flwr_cli.APP, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "90cb7a1f1819e5e5f42bf45ffa3ab11ce6c59c420f0afa2bd7396b3a6da09522"
    )


def test_flower_runs_quietly_with_its_own_home_only(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_OIDC_ENABLED", "1")
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("NO_PROXY", "a.example")
    environment = flwr_cli.environment(tmp_path)
    ours = {key for key in environment if key.startswith("FLWR_")}
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    assert quiet.items() <= environment.items()
    assert ours == {key for key in quiet if key.startswith("FLWR_")} | {"FLWR_HOME"}
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["NO_PROXY"] == "a.example,127.0.0.1,localhost"


def test_a_lock_has_one_holder(tmp_path):
    with locked(tmp_path / "lock", "taken"):
        assert is_locked(tmp_path / "lock")
        with pytest.raises(UserError, match="taken"), locked(tmp_path / "lock", "taken"):
            pass
    assert not is_locked(tmp_path / "lock")


def test_a_taken_port_is_named():
    with serving(None) as port:
        assert f"port {port}" in problem(require_free_port, "127.0.0.1", port)


def test_an_address_that_can_be_no_name_is_one_line():
    assert "port 8443 of a..b" in problem(require_free_port, "a..b", 8443)


def test_a_free_port_is_none_that_a_connection_may_be_given():
    """A client that knocks at one of those may get that very port, and hold it (seen once)."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(given.read_text().split()[0]) if given.exists() else 32768
    for _ in range(20):
        port = free_port()
        require_free_port("127.0.0.1", port)
        assert 1024 < port < first


# Who is registered


class SuperLink:
    """Flower's, as far as its command line is asked: a key is taken once, and never given back."""

    def __init__(self, federation, monkeypatch):
        self.keys, self.before = {}, {}
        monkeypatch.setattr(flwr_cli, "ask", self.ask)

    def ask(self, federation, *lines):
        answers = []
        for line in lines:
            key, name = Path(line[2]).read_text(), line[-1]
            self.before.pop(name, lambda: None)()
            if key in self.keys:
                raise UserError(f"{federation.path}: the server refused: {flwr_cli.IN_USE}.")
            self.keys[key] = len(self.keys) + 1
            answers.append({"node-id": self.keys[key]})
        return answers


@pytest.fixture
def three(federation, tmp_path):
    for name in ("ann", "bob", "cyd"):
        admin.invite(federation.path, name, tmp_path / f"{name}.toml")
    return federation


def node_ids(federation):
    return {name: entry.node_id for name, entry in federation.clients().items()}


def test_whoever_was_registered_when_it_is_interrupted_is_noted(three, monkeypatch):
    """Flower takes no key twice: what was not noted kept the server from ever starting again."""
    link = SuperLink(three, monkeypatch)

    def interrupt():
        raise KeyboardInterrupt

    link.before["cyd"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        flwr_cli.register(three, ["ann", "bob", "cyd"])
    assert node_ids(three) == {"ann": 1, "bob": 2, "cyd": None}
    flwr_cli.register(three, ["cyd"])
    assert node_ids(three) == {"ann": 1, "bob": 2, "cyd": 3}


def test_a_key_that_flower_has_and_nobody_noted_is_a_line_that_says_what_to_do(three, monkeypatch):
    link = SuperLink(three, monkeypatch)
    link.keys[three.client_named("bob").public_key] = 7
    said = problem(flwr_cli.register, three, ["ann", "bob"])
    assert "state.db: has the key of bob already" in said and "remove state.db" in said
    assert node_ids(three)["ann"] == 2


def test_a_client_that_is_revoked_while_others_are_registered_is_left_out(
    three, tmp_path, monkeypatch
):
    link = SuperLink(three, monkeypatch)

    def change():
        for name in ("ann", "bob", "cyd"):
            admin.revoke(three.path, name)
        admin.invite(three.path, "bob", tmp_path / "new.toml")

    link.before["bob"] = change
    flwr_cli.register(three, ["ann", "bob", "cyd"])
    assert node_ids(three) == {"bob": None}  # the key that was registered is not bob's any more


# What a config has to be


def config_file(folder, text=TINY):
    path = folder / "config.toml"
    lines = [line for line in text.format(rounds=2).splitlines() if not line.startswith("text")]
    path.write_text("\n".join(lines))
    return path


def test_a_run_needs_a_running_server(federation, tmp_path):
    assert "not running" in problem(check, load_config(config_file(tmp_path)), federation.path)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (['clients.ann.text="ann"'], "clients.ann.text"),
        (['data.distribution="out"'], "data.distribution"),
        (['method="centralized"'], "method"),
        (['method="my.own"'], "method"),
    ],
)
def test_what_devices_cannot_do_is_refused_before_anything_runs(
    federation, tmp_path, overrides, word
):
    with locked(federation.lock, ""):
        assert problem(
            check, load_config(config_file(tmp_path), overrides), federation.path
        ).startswith(word)


def test_every_client_must_be_invited_and_registered(federation, bundle, tmp_path):
    config = load_config(config_file(tmp_path))
    with locked(federation.lock, ""):
        assert '"ann" is not registered yet' in problem(check, config, federation.path)
        federation.change_clients(
            lambda c: c.update(ann=c["ann"].model_copy(update={"node_id": 1}))
        )
        assert '"bob" was not invited' in problem(check, config, federation.path)


def test_devices_that_pinned_another_app_are_not_sent_this_one(federation, bundle, tmp_path):
    entry = federation.clients()["ann"].model_copy(update={"node_id": 1})
    federation.change_clients(lambda clients: clients.update(ann=entry, bob=entry))
    with locked(federation.lock, ""):
        assert "another app bundle" in problem(
            check, load_config(config_file(tmp_path)), federation.path
        )


def test_a_run_of_another_federation_is_not_resumed(federation, tmp_path):
    done = RunFolder(finished() / "run")
    where = {"federation": {"folder": str(federation.path), "id": "another"}}
    run = RunFolder.create(tmp_path / "run", done.config(), done.environment() | where)
    assert "began in federation another" in problem(resume, run, print, print)


def test_a_finished_run_is_not_resumed(tmp_path):
    said = []
    resume(RunFolder(copied_run(tmp_path)), print, said.append)
    assert "finished already" in said[0]


# What a device checks before it starts anything


def made_certificate(
    federation, until, since=timedelta(hours=-1), hosts=("127.0.0.1",), authority=None
):
    """A server certificate with these dates (from now); its key is server.key's."""
    key = serialization.load_pem_private_key(federation.read("server.key").encode(), None)
    signer = serialization.load_pem_private_key(
        (authority or federation).read("ca.key").encode(), None
    )
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([pki._host(host) for host in hosts])
    built = (
        x509.CertificateBuilder(
            issuer_name=certificate((authority or federation).read("ca.pem")).subject,
            subject_name=x509.Name([]),
            public_key=key.public_key(),
            serial_number=1,
            not_valid_before=now + since,
            not_valid_after=now + until,
        )
        .add_extension(names, critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    return built.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@contextmanager
def serving(federation, offset=0):
    """A web server of a federation, whose clock is off by `offset` seconds; without TLS where it is
    None.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.end_headers()

        def date_time_string(self, timestamp=None):
            return format_datetime(datetime.now(UTC) + timedelta(seconds=offset), usegmt=True)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if federation is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(federation.path / "server.pem", federation.path / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def at(bundle, port, host="127.0.0.1"):
    return bundle.model_copy(update={"address": f"{host}:{port}"})


def test_a_good_server_is_accepted(federation, bundle):
    with serving(federation) as port:
        check_server(at(bundle, port))
        check_server(at(bundle, port, "localhost"))


def test_a_server_that_does_not_answer_is_named(bundle):
    with serving(None) as port:
        assert "does not answer" in problem(check_server, at(bundle, port))  # it speaks no TLS
    said = problem(check_server, at(bundle, port))
    assert f"127.0.0.1:{port}" in said and "connection refused" in said


@pytest.mark.parametrize(
    ("dates", "word"),
    [
        ({"until": timedelta(days=-1), "since": timedelta(days=-2)}, "has expired"),
        ({"until": timedelta(days=9), "since": timedelta(days=1)}, "not valid yet"),
        ({"until": timedelta(days=9), "hosts": ("10.0.0.1", "other.example")}, "other hosts"),
    ],
)
def test_a_certificate_that_does_not_fit_is_named(federation, bundle, dates, word):
    (federation.path / "server.pem").write_text(made_certificate(federation, **dates))
    with serving(federation) as port:
        assert word in problem(check_server, at(bundle, port))


def test_the_server_of_another_federation_is_refused(federation, bundle, tmp_path):
    other = Federation.create(tmp_path / "other", (), 8443, APP)
    with serving(other) as port:
        said = problem(check_server, at(bundle, port))
    assert bundle.federation in said and "foreign certificate" in said


@pytest.mark.parametrize(("offset", "word"), [(-60, "ahead of"), (3600, "behind")])
def test_a_clock_that_flower_would_refuse_is_named(federation, bundle, offset, word):
    with serving(federation, offset) as port:
        assert word in problem(check_server, at(bundle, port))


@pytest.mark.parametrize("date", ["never", "Mon, 99 Foo 20999 99:99:99 +9999", "\x00", ""])
def test_a_date_that_is_none_is_no_reason_to_end(bundle, date):
    _check_clock(bundle, date)


@pytest.mark.parametrize("offset", [-2, 200])
def test_a_clock_that_is_a_little_off_will_do(federation, bundle, offset):
    with serving(federation, offset) as port:
        check_server(at(bundle, port))


def test_a_device_says_at_once_what_is_wrong(federation, bundle, tmp_path):
    write_text(tmp_path, "text")
    file, home = tmp_path / "ann.toml", tmp_path / "home"
    text = (str(tmp_path / "text"),)
    assert "no such file" in problem(join, file, Owner((str(tmp_path / "none"),), home), print)
    assert "does not answer" in problem(join, file, Owner(text, home), print)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700 and modes(home) <= {0o600, 0o644}
    bob = admin.invite(federation.path, "bob", tmp_path / "bob.toml")
    assert 'belongs to "ann"' in problem(join, bob, Owner(text, home), print)
    with locked(home / ".lock", ""):
        assert "runs already" in problem(join, file, Owner(text, home), print)
    home.chmod(0o750)
    assert "chmod 700" in problem(join, file, Owner(text, home), print)


def test_a_new_bundle_of_the_same_client_replaces_the_old(federation, bundle, tmp_path):
    write_text(tmp_path, "text")
    home, text = tmp_path / "home", (str(tmp_path / "text"),)
    problem(join, tmp_path / "ann.toml", Owner(text, home), print)
    write_bundle(tmp_path / "moved.toml", at(bundle, 1))
    assert "127.0.0.1:1:" in problem(join, tmp_path / "moved.toml", Owner(text, home), print)
    assert read_bundle(home / "bundle.toml").address == "127.0.0.1:1"


def test_text_is_one_place_or_three_splits(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        write_text(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    assert text_of(["a"]) == "a"
    assert text_of(["test=c", "train=a", "valid=b"]) == Text(train="a", valid="b", test="c")
    for wrong in (
        ["a", "b"],
        ["train=a"],
        ["train=a", "valid=b", "test=c", "c"],
        ["train=a", "train=b", "test=c"],
        [],
    ):
        assert "--text" in problem(text_of, wrong)
    (tmp_path / "empty").mkdir()
    assert "no .txt or .md file" in problem(text_of, ["empty"])


# Programs that live as long as we do


def test_what_a_program_prints_is_shown_as_text_and_has_an_end(tmp_path):
    """A server's words may be in it: what a terminal would obey, or a line without an end."""
    (tmp_path / "loud.py").write_text(
        "def main():\n"
        "    print('\\x1b]0;owned\\x07\\x1b[2Jevil \\u202e', 'x' * 3_000_000)\n"
        "    import time; time.sleep(60)\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = []
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    with Supervisor(tmp_path / "log", environment, tmp_path) as children:
        children.start("loud", ["loud:main"], said.append)
        wait_until(lambda: len(said) > 1, "loud", children)
    log = (tmp_path / "log" / "loud.log").read_text()
    assert all(len(line) <= 2000 and not CONTROL.search(line) for line in said)
    assert "evil" in said[0] and not CONTROL.search(log) and len(log) < 10_000


def test_a_program_that_ends_is_told_and_ends_all(tmp_path):
    with Supervisor(tmp_path / "log", os.environ, tmp_path) as children:
        rest = children.start("rest", ["signal:pause"])
        children.start("short", ["os:abort"])
        assert "short ended with code -6" in problem(keep, children)
    assert rest.process.poll() is not None


def test_a_program_says_itself_what_people_should_know(tmp_path):
    (tmp_path / "told.py").write_text(
        f"def main():\n    print('one line')\n    raise SystemExit({os.EX_NOPERM})\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    with Supervisor(tmp_path / "log", environment, tmp_path) as children:
        children.start("told", ["told:main"])
        assert problem(wait_until, lambda: False, "told", children) == "one line"
    assert (tmp_path / "log" / "told.log").read_text() == "one line\n"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_program_outlives_us(tmp_path, end):
    """Also where nobody could tell it to end."""
    script = (
        "import os, sys; from pathlib import Path; from comigs.federation.supervisor import "
        "Supervisor\n"
        "with Supervisor(Path('log'), os.environ, Path()) as children:\n"
        "    for name in 'ab': print(children.start(name, ['signal:pause']).process.pid, "
        "flush=True)\n"
        "    sys.stdin.read()\n"
    )
    us = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(us.stdout.readline()) for _ in range(2)]
    time.sleep(0.5)
    us.send_signal(end)
    us.wait(10)
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    us.stdin.close()
    us.stdout.close()
    assert not any(map(alive, pids))


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_clients_json_is_what_the_server_side_reads(federation, bundle):
    federation.change_clients(
        lambda c: c.update(ann=c["ann"].model_copy(update={"node_id": 2**64 - 1}))
    )
    tree = json.loads(federation.read("clients.json"))
    assert tree["ann"]["node_id"] == 2**64 - 1 and tree["ann"]["public_key"].startswith(
        "ecdsa-sha2-nistp384 "
    )
