"""The C library is made once, where there is a compiler; and what happens where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from comigs import csrc

pytestmark = pytest.mark.skipif(csrc.library() is None, reason="no C compiler")


def says(code, **environment):
    """What a process of its own prints; its cache folder is not ours."""
    done = subprocess.run(
        [sys.executable, "-c", f"from comigs import csrc as compiled; {code}"],
        capture_output=True, text=True, check=True, env={**os.environ, **environment},
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.slow  # three processes
def test_without_a_compiler_or_switched_off_there_is_no_library(tmp_path):
    code = "print(compiled.library(), compiled.attempt())"
    none = "None no C compiler here (no-such-compiler)"
    assert says(code, COMIGS_CACHE=str(tmp_path), CC="no-such-compiler -x") == none
    assert says(code, COMIGS_CACHE=str(tmp_path), CC="false").startswith(
        "None nothing can be compiled here (Command"
    )
    assert (
        says(code, COMIGS_CACHE=str(tmp_path), COMIGS_COMPILED="0") == "None COMIGS_COMPILED is 0"
    )
    assert not list(tmp_path.rglob("*.so"))
    assert "CDLL" in says(code, COMIGS_CACHE=str(tmp_path), CC="")  # which names none: cc it is


@pytest.mark.slow  # compiles, and two processes
def test_it_is_compiled_once(tmp_path):
    code = "print(compiled.library()._name)"
    first = says(code, COMIGS_CACHE=str(tmp_path))
    made = os.stat(first).st_mtime_ns
    assert says(code, COMIGS_CACHE=str(tmp_path)) == first
    assert os.stat(first).st_mtime_ns == made
    assert os.listdir(tmp_path / "compiled") == [os.path.basename(first)]


def test_a_cache_folder_that_cannot_be_written_is_no_library(tmp_path):
    (tmp_path / "compiled").write_text("a file is in the way", encoding="utf-8")
    said = says("print(compiled.library(), compiled.attempt())", COMIGS_CACHE=str(tmp_path))
    assert said.startswith("None nothing can be compiled here ([Errno")


def test_a_compiler_without_openmp_makes_one_thread_and_that_is_said(tmp_path):
    """As Apple's is; one of before 2023 does not know its own processor, either."""
    wanting = tmp_path / "wanting"
    wanting.write_text(
        '#!/bin/sh\ncase "$*" in *-fopenmp*|*-march=native*) exit 1;; esac\nexec cc "$@"\n'
    )
    wanting.chmod(0o755)
    code = (
        "import torch; from comigs.app import setup; from comigs.config import parse_config;"
        "torch.set_num_threads(2); print(compiled.is_parallel());"
        "config = parse_config({'base': {'name': 'tiny-gpt2', 'device': 'cpu', 'threads': 2},"
        "'data': {'sequence_length': 9}, 'clients': [{'name': 'ada', 'text': 'ada'}]});"
        "setup.load(config, print)"
    )
    said = says(code, COMIGS_CACHE=str(tmp_path), CC=str(wanting))
    assert said.splitlines()[0] == "False" and "experts run on 1 of 2 CPU threads" in said
    assert "OpenMP" not in says(code, COMIGS_CACHE=str(tmp_path))


def test_what_a_compiler_says_is_told(tmp_path):
    angry = tmp_path / "angry"
    angry.write_text("#!/bin/sh\necho 'angry: error: no licence' >&2\nexit 1\n")
    angry.chmod(0o755)
    said = says("print(compiled.attempt())", COMIGS_CACHE=str(tmp_path), CC=str(angry))
    assert said == "nothing can be compiled here (angry: error: no licence)"
