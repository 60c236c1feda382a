"""A bundle is the one file that an operator gives to a device's owner. It holds all that the device
needs to join.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import Field, ValidationError

from comigs.config import Section, read_toml
from comigs.config.clients import FILE_NAME
from comigs.errors import UserError
from comigs.federation.operator.folder import Settings
from comigs.federation.pinned_base import PinnedBase
from comigs.federation.security import pki
from comigs.federation.security.private_files import write_private
from comigs.files import writing

ABOUT = """
This file lets one device take part in a federation of CoMiGS as client {client}.
It holds the device's private key: keep it as you would keep a password, and give it to nobody.

Join with:  comigs federation client THIS_FILE --text FOLDER

The server at {address} will then ask the device, once a round, to
- take in the experts that all devices share,
- train them, and experts of its own, on the text in FOLDER,
- measure the result,
- send back the shared experts as numbers, how many tokens there are, the losses it measured, how
  its router weighed experts on the whole, and the time and memory that took.
The text, the device's own experts, its router and the state of its optimisers stay in the \
device's folder. What is
sent is not encrypted against the server, and shared experts may remember text: see docs/privacy.md.

The device runs only the comigs that is installed on it. Leave by stopping the command; \
nothing else is installed.
"""


# The device's folder is called by these two, wherever the bundle is from.
Name = Annotated[str, Field(pattern=f"^{FILE_NAME}$")]


class Bundle(Section):
    """A bundle is what the file says.

    about: for people. authority: the certificate of the federation's own authority. key: the
    device's private key. app: sha256 of the only Flower app that the device will run. base: the
    only base that the device will load; None in bundles from before there were pins. check: sha256
    of everything else.
    """

    about: str = ""
    federation: Name
    client: Name
    address: str = Field(pattern=r"^[^\s/@[:cntrl:]]+:[0-9]{1,5}$")
    app: str = Field(pattern="^[0-9a-f]{64}$")
    authority: str
    key: str
    base: PinnedBase | None = None
    check: str = ""

    def digest(self) -> str:
        """Return what `check` has to be."""
        checked = self.model_dump(exclude={"check"}, exclude_none=True)
        return hashlib.sha256(json.dumps(checked, sort_keys=True).encode()).hexdigest()


def new_bundle(settings: Settings, authority: str, client: str, key: str) -> Bundle:
    """Return the bundle of one client. authority: its certificate. key: the private one."""
    return Bundle(
        about=ABOUT.lstrip().format(client=client, address=settings.address),
        federation=settings.id,
        client=client,
        address=settings.address,
        app=settings.app,
        authority=authority,
        key=key,
        base=settings.base,
    )


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write a bundle that only its owner can read. Raises UserError where there is a file
    already.
    """
    whole = bundle.model_copy(update={"check": bundle.digest()}).model_dump(exclude_none=True)
    text = tomli_w.dumps(whole, multiline_strings=True)
    with writing(path.parent, "choose another file with --out"):
        if path.exists():
            raise UserError(
                f"{path}: exists already; nothing was changed. Choose another file with --out"
            )
        write_private(path, text)


def read_bundle(path: Path) -> Bundle:
    """Return the bundle of a file. Raises UserError where it is none, or not what was written,
    character for character.
    """
    tree = read_toml(path, "bundle")
    # A damaged file is told here and not by Flower, to which a damaged key is a page of advice.
    try:
        bundle = Bundle.model_validate(tree)
        if bundle.check != bundle.digest():
            raise ValueError
        pki.valid_until(bundle.authority)
        pki.check_device_key(bundle.key)
    except (ValidationError, ValueError):
        raise UserError(
            f"{path}: a damaged bundle, or none; ask the federation's operator for a new one"
        ) from None
    return bundle
