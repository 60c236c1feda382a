"""What the README says is run: its Python, its TOML, its commands, its links."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from comigs.app.inventory import inventory
from comigs.config import parse_config
from comigs.methods.loading import list_methods

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_first_screen_shows_the_demo_by_line_20():
    first_screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in first_screen and "docs/report.png" in first_screen


@pytest.mark.slow
def test_python_example_runs_as_written(tmp_path):
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 10
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if " -> " in line]) == 4
    for line in lines[:4]:
        before, after = map(float, line.split()[1::2])
        assert after < before, f"{line}: the personal model is no better than the base"


def test_config_example_is_a_valid_config():
    (example,) = blocks("toml")
    assert [client.name for client in parse_config(tomllib.loads(example)).clients] == [
        "clinic",
        "laboratory",
    ]


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`comigs ([a-z]+)", README))))
def test_every_command_named_is_there(command):
    comigs = Path(sys.executable).with_name("comigs")
    done = subprocess.run([comigs, command, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_make_targets_named_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z-]+)`", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_link_into_the_repository_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_bytes_of_each_method_are_what_comigs_list_says():
    row = r"^\| `([a-z-]+)` \|.* (\d\S*)(?: (kB|MB))? / (\d\S*) (kB|MB) \|"
    said = {name: words for name, *words in re.findall(row, README, flags=re.MULTILINE)}
    assert len(said) == len(list_methods()) - 2  # local sends nothing, centralized the text
    for name, *_, up, down in inventory()["methods"].rows:
        if name in said:
            sent, unit, received, other = said[name]
            for number, of, counted in ((sent, unit or other, up), (received, other, down)):
                exact, found = counted.split()
                assert (found, float(number)) == (of, pytest.approx(float(exact), rel=2e-3)), name


def test_method_table_lists_every_method_once():
    assert sorted(re.findall(r"^\| `([a-z][a-z-]+)` \|", README, flags=re.MULTILINE)) == sorted(
        list_methods()
    )
