#!/usr/bin/env bash
# Flower: FedAvg weighs and adds float16 uploads in float16; the mean of 400 equal, small updates is
# zero.
#
# Expected: a mean is formed in float32 or better, and the mean of equal uploads is that upload.
# Happens:  each upload is multiplied by its weight (1/400, say) in its own dtype and added into an
#           array of the first reply's dtype. 400 clients that all upload 0.00001 in float16 give
#           exactly 0, since every share is rounded away; 100 give a fifth too much. A float32 reply
#           that comes first makes the result float32 but does not save the others' shares.
# Matters:  float16 halves the upload and is the obvious wire format for LoRA deltas. Small updates
#           and many clients are just where it fails, without a word: the model stops learning. Cast
#           replies to float32 before FedAvg sees them, or write aggregate_train yourself.
#
# Seen 2026-11 with flwr 1.41.0, numpy 2.4.6; every upload is 1e-05 (1.00136e-05 in float16), the
# mean of
#   400 float32                  float32  1e-05
#   100 float16                  float16  1.19209e-05
#   400 float16                  float16  0
#   float32, then 399 float16    float32  2.5e-08
#   399 float16, then float32    float16  0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check flwr==1.41.0 numpy==2.4.6
cd "$folder"
export FLWR_HOME="$folder/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
venv/bin/python - <<'PY'
import logging
import sys
from importlib.metadata import version

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def reply(value, dtype):
    """Return a client's answer: one array, and the weight 1."""
    task = Message(RecordDict({"config": ConfigRecord({})}), 2, "train")
    arrays = ArrayRecord({"delta": Array(np.full(1, value, dtype))})
    return Message(
        RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=task
    )


def mean(replies):
    """Return FedAvg's mean of the replies: its dtype and its value."""
    arrays, _ = FedAvg().aggregate_train(1, replies)
    result = arrays["delta"].numpy()
    return result.dtype.name, float(result[0])


print("flwr", version("flwr"), "numpy", np.__version__)
value = 1e-5
half = float(np.float16(value))
cases = {
    "400 float32": [reply(value, np.float32)] * 400,
    "100 float16": [reply(value, np.float16)] * 100,
    "400 float16": [reply(value, np.float16)] * 400,
    "float32, then 399 float16": [reply(value, np.float32)] + [reply(value, np.float16)] * 399,
    "399 float16, then float32": [reply(value, np.float16)] * 399 + [reply(value, np.float32)],
}
seen = {name: mean(replies) for name, replies in cases.items()}
print(f"every upload is {value:g} ({half:.6g} in float16); the mean of")
for name, (dtype, result) in seen.items():
    print(f"  {name:28} {dtype:8} {result:.6g}")

as_expected = (
    abs(seen["400 float32"][1] / value - 1) < 1e-3
    and seen["100 float16"][0] == "float16"
    and 0.1 < abs(seen["100 float16"][1] / half - 1)
    and seen["400 float16"] == ("float16", 0.0)
    and seen["float32, then 399 float16"][0] == "float32"
    and abs(seen["float32, then 399 float16"][1] / value - 1) > 0.9
    and seen["399 float16, then float32"] == ("float16", 0.0)
)
sys.exit(0 if as_expected else "Flower behaves otherwise now")
PY
