#!/usr/bin/env bash
# Flower: the clipping norm of its adaptive differential privacy runs away from the updates' norm,
# in both directions.
#
# Expected: DifferentialPrivacyServerSideAdaptiveClipping follows Andrew et al. (2021): where more
#           than the target share of the updates is clipped, the norm grows; where fewer are, it
#           shrinks; it settles at the quantile.
# Happens:  the rule is applied to the share of updates that *were* clipped, where the paper's
#           counts those that were not, and the sign stayed. Updates larger than the norm make it
#           smaller, without end, and updates smaller than it make it larger: it never settles,
#           whatever the learning rate.
# Matters:  too small a norm, and clients' updates are scaled away to nothing; too large a norm, and
#           the noise, which is proportional to it, buries them, round by round. No error, no
#           warning; accuracy just fades. Use a fixed norm, or a rule of your own.
#
# Seen 2026-11 with flwr 1.41.0, numpy 2.4.6; the clipping norm starts at 1:
#   updates of norm 10  : clipping norm 0.889 after 1, 0.383 after 10, 0.141 after 20, 0.0489 after 30
#   updates of norm 0.01: clipping norm 1.09 after 1, 2.83 after 10, 7.72 after 20, 19.7 after 30
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
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAvg
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
ROUNDS = (1, 10, 20, 30)


class FourNodes:
    """A grid as far as the strategy looks at it."""

    def get_node_ids(self):
        return [11, 12, 13, 14]


def norms(update_norm):
    """Return the clipping norm after some rounds; every client's update has this l2 norm."""
    np.random.seed(0)
    strategy = DifferentialPrivacyServerSideAdaptiveClipping(
        FedAvg(fraction_evaluate=0),
        noise_multiplier=0.1,
        num_sampled_clients=4,
        initial_clipping_norm=1.0,
    )
    model = ArrayRecord({"w": Array(np.zeros(4, np.float32))})
    update = np.full(4, update_norm / 2, np.float32)
    seen = []
    for number in range(1, max(ROUNDS) + 1):
        tasks = list(strategy.configure_train(number, model, ConfigRecord({}), FourNodes()))
        replies = []
        for task in tasks:
            arrays, metrics = ArrayRecord({"w": Array(update)}), MetricRecord({"num-examples": 1})
            replies.append(
                Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=task)
            )
        strategy.aggregate_train(number, replies)
        if number in ROUNDS:
            seen.append(strategy.clipping_norm)
    return seen


print("flwr", version("flwr"), "numpy", np.__version__)
large, small = norms(10.0), norms(0.01)
for name, seen in (("10", large), ("0.01", small)):
    rounds = ", ".join(f"{norm:.3g} after {number}" for number, norm in zip(ROUNDS, seen))
    print(f"updates of norm {name:4}: clipping norm {rounds}")
away = large == sorted(large, reverse=True) and large[-1] < 0.1
away &= small == sorted(small) and small[-1] > 10
sys.exit(0 if away else "Flower behaves otherwise now")
PY
