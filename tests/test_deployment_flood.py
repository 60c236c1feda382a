"""A true federation under a load that it must bear: 200 connections from the address of the honest
devices, with and without a key that the server knows, with bodies that are too large, have no end
or take their time. The server's programs stay small, and the honest clients finish their run.
"""

from __future__ import annotations

import pytest

from comigs.federation.bundle import read_bundle
from tests.deployment import Deployment, equal, in_process
from tests.flood import Flood, Memory

CLIENTS = ("ann", "bob")
MIB = 2**20
MOST = 1e9  # bytes of memory that the SuperLink may take; what it took without bounds: 1.65e9


# The load is cut off in the middle of its handshakes, and asyncio says so of each.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow  # about two minutes: a federation, and a run under load
def test_the_server_stays_small_under_load_and_honest_clients_finish(tmp_path):
    deployment = Deployment(tmp_path, CLIENTS)
    floods = []
    try:
        deployment.begin()
        deployment.comigs("federation", "invite", "fed", "eve", "--out", "eve.toml")
        eve = {"key": read_bundle(tmp_path / "eve.toml").key}
        loads = (
            (20, {"size": 0}),
            (40, {"size": 16 * MIB}),
            (30, {"size": 512 * MIB, "chunked": True}),
            (20, {"size": 16 * MIB, "pause": 0.5}),
            (20, {"size": 16 * MIB, **eve}),
            (40, {"size": 5 * MIB, **eve}),
            (20, {"size": 512 * MIB, "chunked": True, **eve}),
            (10, {"size": 5 * MIB, "pause": 0.5, **eve}),
        )
        authority = deployment.federation / "ca.pem"
        floods += [Flood(deployment.port, authority, count, **how) for count, how in loads]
        memory = Memory(
            superlink=deployment.pid("flower-superlink", "fed"),
            gateway=deployment.pid("gateway:main", "fed"),
        )
        for thread in (memory, *floods):
            thread.start()
        run = deployment.run(deployment.config("load", CLIENTS), "under-load")
        assert run.code() == 0, run.said
        answers = [flood.statuses for flood in floods]
        for thread in (*floods, memory):
            thread.end()
        sent = sum(flood.sent for flood in floods)
        print(f"peaks {memory.peak}, {sent / 1e6:.0f} MB sent, answers {answers}")
        assert max(memory.peak.values()) < MOST
        assert all(answers) and not set().union(*answers) & {200, 500}
        equal(deployment, "under-load", in_process(deployment, "load", CLIENTS), CLIENTS)
        assert "absent" not in run.said
    finally:
        for flood in floods:
            flood.over.set()
        deployment.end()
