#!/usr/bin/env bash
# datasets: loading a local JSON file by the builder's name calls a host outside; loading its folder
# does not.
#
# Expected: load_dataset("json", data_files="mine.jsonl") reads a file of this machine and talks to
#           nobody; at most it does so like load_dataset("folder"), which reads the same file.
# Happens:  a name of a packaged builder (json, csv, text, parquet) is counted: each load asks for
#           s3.amazonaws.com to add one to that builder's downloads, streamed or not, from the cache
#           or not. Failures are silent. The folder's path, which finds the same builder, is not
#           counted. HF_HUB_OFFLINE=1 ends it.
# Matters:  on devices with private text the way that most tutorials show tells somebody outside, at
#           each start, when and from which address this machine trains, and fails an audit that says
#           nothing leaves. Without a network it waits for the name. Give the folder, or go offline.
#
# Seen 2026-11 with datasets 5.2.0, huggingface-hub 2.4.0; hosts that were looked up:
#   json, data_files             ['s3.amazonaws.com']
#   the same, streamed           ['s3.amazonaws.com']
#   the same, cached             ['s3.amazonaws.com']
#   folder                       []
#   folder, streamed             []
#   json, HF_HUB_OFFLINE=1       []
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6 huggingface-hub==2.4.0
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_DISABLE_PROGRESS_BARS=1
unset HF_HUB_OFFLINE HF_DATASETS_OFFLINE
cat >look.py <<'PY'
"""Print the hosts that are looked up while a local file is loaded; none is reached."""
import json
import socket
import sys
from pathlib import Path

asked = set()


def nobody(host, *_, **__):
    """Note the host, and find none."""
    asked.add(host)
    raise socket.gaierror(f"no {host} here")


socket.getaddrinfo = nobody
import datasets  # noqa: E402

datasets.disable_progress_bars()
Path("mine").mkdir(exist_ok=True)
file = Path("mine/train.jsonl")
file.write_text(json.dumps({"text": "a private note"}) + "\n")
by_name = {"path": "json", "data_files": str(file)}
ways = {
    "json, data_files": by_name,
    "the same, streamed": by_name | {"streaming": True},
    "the same, cached": by_name,
    "folder": {"path": "mine"},
    "folder, streamed": {"path": "mine", "streaming": True},
}
if len(sys.argv) > 1:
    ways = {sys.argv[1]: by_name}
seen = {}
for name, way in ways.items():
    asked.clear()
    rows = list(datasets.load_dataset(split="train", **way))
    assert rows == [{"text": "a private note"}], rows
    seen[name] = sorted(asked)
    print(f"{name:28} {seen[name]}")

called = ["s3.amazonaws.com"]
expected = dict.fromkeys(ways, called)
for name in ways:
    if name.startswith("folder") or "OFFLINE" in name:
        expected[name] = []
sys.exit("datasets behaves otherwise now" if seen != expected else 0)
PY
venv/bin/python -c 'import datasets, huggingface_hub as h; print("datasets", datasets.__version__, "huggingface-hub", h.__version__)'
venv/bin/python look.py
HF_HUB_OFFLINE=1 venv/bin/python look.py "json, HF_HUB_OFFLINE=1"
