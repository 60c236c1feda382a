"""Taking a personal model elsewhere, and measuring what was taken."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from comigs.app.api import open_run, require_same_text
from comigs.app.setup import ignore, load
from comigs.bases.load import Base, set_dtype
from comigs.bases.packed import unpack
from comigs.config import Config, Split
from comigs.data.prepare import Texts
from comigs.data.prepare import prepare as prepare_data
from comigs.errors import UserError
from comigs.files import command
from comigs.personal.export.export import Exported, read_manifest, require_free, write_export
from comigs.personal.export.form import load_format, type_of
from comigs.personal.export.outputs import measure_text
from comigs.personal.export.source import Source, windows_of
from comigs.personal.model import PersonalModel
from comigs.runs.environment import require_no_federation
from comigs.runs.folder import RunFolder
from comigs.runs.reader import ANYBODY, Reader
from comigs.text import Say


def export(
    run: Path | str | RunFolder, client: str, to: str, out: Path | str | None = None,
    type: str | None = None, say: Say = ignore,
) -> Exported:  # fmt: skip
    """Write a client's own model in a format that other programs load, and check what was written.

    run may have been opened with `open_run`, where its reader has something to say. to is the name
    of a file of personal/export/formats. out is a new folder, or, for a GGUF, a new
    file that ends in .gguf; None is exports/RUN-CLIENT-FORMAT. type is the number type to store
    in; None is the format's first. Raises UserError.
    """
    # Whatever is wrong with the words is said before the base is loaded.
    form = load_format(to)
    chosen = type_of(to, form, type)
    folder = open_run(run)
    folder.config().client_named(client)
    name = f"{folder.path.resolve().name}-{client}-{to}"
    place = Path(out) if out is not None else Path("exports") / name
    require_free(place)
    # The text is needed, as every export is measured on it.
    base, config, texts = opened_for_export(folder, client)
    windows = windows_of(texts.load(client).valid, config.data.sequence_length)
    say(f"{client}: measuring on valid, writing {to} in {chosen}, reading it back")
    with closing(PersonalModel(folder, client, base)) as model:
        source = Source(folder, client, base, model, windows)
        return write_export(source, (to, form, chosen), place)


def evaluate_export(
    run: Path | str,
    exported: Path | str,
    split: Split = "test",
    client: str | None = None,
    reader: Reader = ANYBODY,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure an export on the text of the run it is from, as `evaluate` does the run's own model.

    client is whose text it is measured on; None is the export's own client. Returns client ->
    "base" and "personal" -> figures, where "personal" is the export, in float32 on the CPU. Raises
    UserError.
    """
    # The files say whose model it is and in which format.
    manifest = read_manifest(Path(exported))
    form, folder = load_format(manifest["format"]), open_run(run, reader)
    owner, name = manifest["client"], client or manifest["client"]
    if manifest["base_fingerprint"] != folder.environment()["base_fingerprint"]:
        raise UserError(f"{exported}: was made on another base than the run {run}")
    folder.config().client_named(name)
    base, config, texts = opened_for_export(folder, owner)
    stores, length = getattr(texts.load(name), split), config.data.sequence_length
    # The base is measured as in the run, the export as it is read back from its files.
    with closing(PersonalModel(folder, owner, base)) as model:
        figures = {"base": model.evaluate(stores, untouched_base=True).figures()}
        source = Source(folder, owner, base, model, windows_of(texts.load(owner).valid, length))
        with form.read(source, Path(exported)) as other:
            figures["personal"] = measure_text(other, stores, length).figures()
    return {name: figures}


def opened_for_export(folder: RunFolder, client: str) -> tuple[Base, Config, Texts]:
    """Return the base in float32 on the CPU, the config and the texts. Raises UserError."""
    config = folder.config()
    config.client_named(client)
    folder.require_a_round()
    own = "each exports its own, from its own run folder"
    measured = f"what it measured: {command('report', folder.path)}"
    require_no_federation(folder, f"{own} ({measured})")
    here = config.base.model_copy(update={"device": "cpu"})
    base, config = load(config.model_copy(update={"base": here}))
    data = prepare_data(config, base.encoder)
    require_same_text(folder, data)
    # The base is the run's, rounded or packed as it was there. What is computed with it is not.
    unpack(base.model)
    set_dtype(base.model, torch.float32)
    return replace(base, dtype=torch.float32), config, data
