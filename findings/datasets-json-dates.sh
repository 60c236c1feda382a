#!/usr/bin/env bash
# datasets: a JSON column of text whose values all look like dates is rewritten, even where features
# say "string".
#
# Expected: a quoted JSON value is text; or at least features={"text": Value("string")} keeps it as
#           it was written.
# Happens:  the type is guessed from each file's values. Where all of them look like ISO 8601, the
#           column becomes timestamp[s] and rows hold datetime objects, moved to UTC. Features that
#           say string change the type back *after* the guess: it is text again, but another text,
#           with another hour. to_json writes numbers. One value of another form, and the whole file
#           is read as it stands.
# Matters:  in a federation every client loads its own file: one of them trains on answers that
#           nobody wrote, or fails in its tokenizer, while all the others are fine. Parse the lines
#           yourself and use from_list.
#
# Seen 2026-11 with datasets 5.2.0, pyarrow 26.0.1; the first row was written as
# '2026-11-28T10:00:00+02:00':
#   all dates           timestamp[s]  first row datetime.datetime(2026, 11, 28, 8, 0)
#   the same, to_json   1795852800000
#   features: string    string        first row '2026-11-28 08:00:00'
#   one is a word       string        first row '2026-11-28T10:00:00+02:00'
#   from_list           string        first row '2026-11-28T10:00:00+02:00'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check \
  datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$folder"
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
venv/bin/python - <<'PY'
import datetime
import json
import sys
from pathlib import Path

import datasets
import pyarrow

datasets.disable_progress_bars()


def load(name, values, **settings):
    """Return the dataset that a client's file of these texts becomes."""
    path = Path(f"{name}.jsonl")
    path.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return datasets.load_dataset("json", data_files=str(path), split="train", **settings)


print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
written = "2026-11-28T10:00:00+02:00"
dates = [written, "2026-11-29T10:00:00+02:00"]
text = datasets.Features({"text": datasets.Value("string")})
cases = {
    "all dates": load("dates", dates),
    "features: string": load("dates", dates, features=text),
    "one is a word": load("mixed", [written, "tomorrow"]),
    "from_list": datasets.Dataset.from_list([{"text": value} for value in dates]),
}
seen = {}
for name, data in cases.items():
    seen[name] = (data.features["text"].dtype, data[0]["text"])
    print(f"{name:18} {seen[name][0]:13} first row {seen[name][1]!r}")
cases["all dates"].to_json("again.jsonl")
again = json.loads(Path("again.jsonl").read_text().splitlines()[0])["text"]
print(f"all dates, to_json {again!r}")

expected = {
    "all dates": ("timestamp[s]", datetime.datetime(2026, 11, 28, 8)),
    "features: string": ("string", "2026-11-28 08:00:00"),
    "one is a word": ("string", written),
    "from_list": ("string", written),
}
sys.exit("datasets behaves otherwise now" if seen != expected or again != 1795852800000 else 0)
PY
