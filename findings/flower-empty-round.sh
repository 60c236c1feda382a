#!/usr/bin/env bash
# Flower: in a deployment each message is answered by a process of its own, which imports Flower for
# more than a second of CPU time; a round in which nobody does anything takes many seconds.
#
# Expected: four nodes on the loopback answer an empty message in a fraction of a second, for an app
#           is loaded once and stays, as the Ray simulation keeps its actors.
# Happens:  a SuperNode asks for messages every 3 s, its SuperExec for tasks every 1 s, and every
#           message is answered by a new `flwr-clientapp` process, whose import of Flower takes more
#           than a second of CPU time before the app is loaded; HttpGrid looks for replies every 3 s.
#           Of these only the SuperExec's second can be set (FLWR_SUPEREXEC_TASK_POLL_INTERVAL).
# Matters:  whatever the app itself imports (torch: seconds) comes on top, per message and node, and
#           an exchange more in a round is a round more. Time of a deployment's rounds says nothing
#           about the training in them unless a round takes minutes.
#
# Seen 2026-11 with flwr 1.41.0 on two busy cores (load 14):
#   seconds of an empty round of four nodes: 77.3, 28.3, 26.7, 32.2
#   16 messages, 16 processes
#   CPU seconds of each until the app is called: 1.08 or more
set -euo pipefail
folder=$(mktemp -d)
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true; sleep 2; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --disable-pip-version-check flwr==1.41.0
cd "$folder"
export PATH="$folder/venv/bin:$PATH" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 NO_PROXY=127.0.0.1 no_proxy=127.0.0.1
mkdir -p app/nothing home
cat > home/config.toml <<'TOML'
[superlink]
default = "here"
[superlink.here]
address = "127.0.0.1:18080"
insecure = true
TOML
cat > app/pyproject.toml <<'TOML'
[project]
name = "nothing"
version = "1.0.0"
description = "Does nothing."
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "nothing.apps:server"
clientapp = "nothing.apps:client"
[tool.flwr.app.config]
TOML
touch app/nothing/__init__.py
cat > app/nothing/apps.py <<'PY'
import json
import os
import time

from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    """Answer with the process and the CPU seconds that it has used so far."""
    used = MetricRecord({"process": os.getpid(), "cpu": time.process_time()})
    return Message(RecordDict({"used": used}), reply_to=message)


@server.main()
def main(grid, context):
    """Note what four empty rounds take."""
    while len(nodes := list(grid.get_node_ids())) < 4:
        time.sleep(0.2)
    rounds = []
    for _ in range(4):
        began = time.time()
        asked = [Message(RecordDict(), node, "train") for node in nodes]
        used = [dict(reply.content["used"]) for reply in grid.send_and_receive(asked, timeout=300)]
        rounds.append({"seconds": time.time() - began, "used": used})
    with open("rounds.unfinished", "w") as file:
        json.dump(rounds, file)
    os.rename("rounds.unfinished", "rounds.json")
PY
FLWR_HOME="$folder/home" flower-superlink --insecure --host 127.0.0.1 --port 18080 > link.log 2>&1 &
pids+=($!)
for node in 0 1 2 3; do
    mkdir "node$node"
    FLWR_HOME="$folder/node$node" flower-supernode --insecure --superlink 127.0.0.1:18080 \
        --host 127.0.0.1 --port "1810$node" > "node$node.log" 2>&1 &
    pids+=($!)
done
for _ in $(seq 60); do
    FLWR_HOME="$folder/home" flwr run app here > run.log 2>&1 && break
    sleep 1
done
for _ in $(seq 600); do [ -e rounds.json ] && break; sleep 1; done
venv/bin/python - <<'PY'
import json
import os
import sys
from importlib.metadata import version

rounds = json.load(open("rounds.json"))
used = [one for round in rounds for one in round["used"]]
seconds = ", ".join(f"{round['seconds']:.1f}" for round in rounds)
print("flwr", version("flwr"), "cores", os.cpu_count(), f"load {os.getloadavg()[0]:.1f}")
print(f"seconds of an empty round of four nodes: {seconds}")
print(f"{len(used)} messages, {len({one['process'] for one in used})} processes")
print(f"CPU seconds of each until the app is called: {min(one['cpu'] for one in used):.2f} or more")
as_expected = (
    len({one["process"] for one in used}) == len(used) == 16
    and min(one["cpu"] for one in used) > 0.3
    and min(round["seconds"] for round in rounds) > 3
)
sys.exit(0 if as_expected else "Flower behaves otherwise now")
PY
