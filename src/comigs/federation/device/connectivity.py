"""This module finds out whether a device can talk to its federation's server, and what is wrong
where it cannot, before anything is started.

Flower's SuperNode would try for ever, or give a page of advice.
"""

from __future__ import annotations

import ssl
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection

from comigs.errors import UserError
from comigs.federation.bundle import Bundle
from comigs.text import brief

SECONDS = 15  # for the server to answer
# Seconds of a device's clock: Flower refuses signatures 5 s from the future or 305 s old.
AHEAD, BEHIND = 4, 290
OTHER_HOST = (
    "the server's certificate is for other hosts; ask the operator to add this one to `hosts` in "
    "federation.toml"
)
PROBLEMS = {  # OpenSSL's X509_V_ERR_... -> what it means here
    9: "the server's certificate is not valid yet, as this device's clock has it ({now} UTC); "
    "set the clock",
    10: "the server's certificate has expired, as this device's clock has it ({now} UTC); if the "
    "clock is right, ask the operator to restart the server, which renews it",
    62: OTHER_HOST,
    64: OTHER_HOST,
}


def check_server(bundle: Bundle) -> None:
    """Raise UserError where there is no server of this federation at the bundle's address, or
    clocks differ.
    """
    host, _, port = bundle.address.rpartition(":")
    context = ssl.create_default_context(cadata=bundle.authority)
    connection = HTTPSConnection(host.strip("[]"), int(port), timeout=SECONDS, context=context)
    # Any answer will do: what counts is whose certificate it comes with, and the server's clock.
    try:
        with closing(connection):
            connection.request("GET", "/")
            date = connection.getresponse().getheader("date")
    except ssl.SSLCertVerificationError as error:
        foreign = (
            f"not the server of federation {bundle.federation} (foreign certificate); "
            "ask its operator for a new bundle"
        )
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
        problem = PROBLEMS.get(error.verify_code, foreign).format(now=now)
        raise UserError(f"{bundle.address}: {problem}") from None
    except (OSError, HTTPException) as error:
        reason = brief(getattr(error, "strerror", None) or str(error) or "no answer")
        raise UserError(
            f"{bundle.address}: the server does not answer ({reason.lower()}); is it running, and "
            f"does a firewall let port {port} through?"
        ) from None
    _check_clock(bundle, date)


def _check_clock(bundle: Bundle, date: str | None) -> None:
    # A server need not give a date that is one; the SuperNode will find out.
    try:
        there = parsedate_to_datetime(date or "")
        ahead = (datetime.now(UTC) - there).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return
    if not -BEHIND < ahead < AHEAD + 1:  # the header has whole seconds
        way = "ahead of" if ahead > 0 else "behind"
        raise UserError(
            f"{bundle.address}: this device's clock is {abs(ahead):.0f} s {way} the server's, "
            "which would refuse it; set the clock (by NTP) and start again"
        )
