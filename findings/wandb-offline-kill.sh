#!/usr/bin/env bash
# wandb: of a run that is killed, an offline folder holds whole blocks of 32 KB only; of a short run,
# nothing.
#
# Expected: what `run.log` was given seconds ago is on disk. wandb's own process receives each row as
#           it is logged and outlives the program; `wandb sync` after a crash is what the offline
#           mode is recommended for.
# Happens:  that process keeps rows in memory until a block is full, and ends with the program that
#           started it without writing what it still holds, however long it had waited. Killed ten
#           seconds after the fifth row, a run leaves a file of 7 bytes, the header; of 5,000
#           rows the last 59 are gone. A program that ends by itself loses none.
# Matters:  the runs one wants to look at are those that the memory killer or the scheduler ended. A
#           federated run of some tens of rounds logs a few rows a round and never fills a block.
#           Who must not lose rows keeps a log of his own and writes it to wandb afterwards.
#
# Seen 2026-11 with wandb 0.29.0:
#       ended-5: 5 rows in 2,079 bytes
#    ended-5000: 5,000 rows in 1,525,084 bytes
#      killed-5: 0 rows in 7 bytes
#   killed-5000: 4,941 rows in 1,507,328 bytes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check wandb==0.29.0
cd "$folder"
export HOME="$folder" WANDB_MODE=offline WANDB_SILENT=true WANDB_ERROR_REPORTING=false
cat >log.py <<'PY'
import os
import signal
import sys
import time

import wandb

folder, rows, ending = sys.argv[1], int(sys.argv[2]), sys.argv[3]
os.mkdir(folder)
run = wandb.init(project="p", dir=folder)
for step in range(rows):
    run.log({"loss": 1 / (step + 1)}, step=step)
if ending == "killed":
    time.sleep(10)
    os.kill(os.getpid(), signal.SIGKILL)
PY
cat >read.py <<'PY'
import sys
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore


def rows(folder):
    """Return the size of a run's file and how many rows wandb's own reader finds in it."""
    (file,) = Path(folder).glob("wandb/offline-run-*/*.wandb")
    store, found = DataStore(), 0
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        found += record.WhichOneof("record_type") == "history"
    return file.stat().st_size, found


print("wandb", wandb.__version__)
seen = {}
for name in sys.argv[1:]:
    size, seen[name] = rows(name)
    print(f"{name:>11}: {seen[name]:,} rows in {size:,} bytes")
lost = seen["killed-5"] == 0 and 0 < seen["killed-5000"] < 5000
whole = seen["ended-5"] == 5 and seen["ended-5000"] == 5000
sys.exit(0 if lost and whole else "wandb behaves otherwise now")
PY
for ending in ended killed; do
  for rows in 5 5000; do
    venv/bin/python log.py "$ending-$rows" "$rows" "$ending" || true
  done
done 2>/dev/null
sleep 5
venv/bin/python read.py ended-5 ended-5000 killed-5 killed-5000
