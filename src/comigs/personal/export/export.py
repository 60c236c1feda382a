"""Write a personal model down in one of the formats, check what was written, and say what it is.

The order: measure the base and the run's own model on windows of valid, write into a hidden folder
beside the wanted one, read that back and compare, add the model card, and move it into place.
Whatever goes wrong on the way leaves nothing behind.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from comigs.errors import UserError
from comigs.files import flush, require_parent, write_whole, writing
from comigs.personal.export.card import model_card, names_of
from comigs.personal.export.form import LOGITS, PERPLEXITY, Format, Written
from comigs.personal.export.outputs import Outputs, num_learnt, outputs
from comigs.personal.export.source import Source
from comigs.runs.checkpoint import as_os_error
from comigs.runs.json_lines import parse_json

MANIFEST = "comigs.json"
NEEDED = {"format", "client", "base_fingerprint"}  # of it, to measure the export again
ADVICE = "choose another place with --out"


@dataclass(frozen=True)
class Exported:
    """This record says what an export turned out to be.

    path is where it lies. bytes is the size of the model's files. base, personal and export are
    perplexities on the same windows of valid, and tokens is how many tokens those have.
    difference is the largest one between a logit of the run's own model and of the export, as it
    is read back, on the first window. exact says whether it is meant to answer as the run does.
    """

    path: Path
    format: str
    type: str
    bytes: int
    base: float
    personal: float
    export: float
    tokens: int
    difference: float
    exact: bool
    private_parts: tuple[str, ...]
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Say what a person needs to know of it."""
        nearness = "approximate"
        if self.exact:
            nearness = "exact" if self.type == "float32" else f"exact but for {self.type}"
        cost = self.export / self.personal - 1
        said = [
            f"perplexity on {self.tokens:,} tokens of valid: base {self.base:.4g}, run's own model "
            f"{self.personal:.4g}, export {self.export:.4g} ({cost:+.3%}, {nearness})",
            *self.notes,
        ]
        if self.private_parts:
            parts = ", ".join(names_of(list(self.private_parts)))
            said.append(f"in it, and never seen by anybody else before: {parts}")
        return [*said, f"{self.path}: {self.format}, {self.type}, {self.bytes / 1e6:,.1f} MB"]


def write_export(source: Source, to: tuple[str, Format, str], out: Path) -> Exported:
    """Write a personal model in a format, given as its name, record and number type.

    out is a folder that does not exist yet, or, for a single GGUF, a file that does not. Raises
    UserError where the format does not fit the model, where something is there already, where the
    disk refuses, and where what was written does not answer as it must. Then nothing is left.
    """
    # What cannot be written is refused before anything is measured.
    name, form, type = to
    logging.disable_progress_bar()
    single = out.suffix == ".gguf"
    if single and not name.startswith("gguf"):
        raise UserError(f"--out: {out}: {name} is a folder, and .gguf ends the name of a file")
    require_free(out)
    # The run's own model is what the export is compared with, the base what it came from.
    personal = outputs(source.base.model, source.windows)
    with source.model.without_experts():
        base = outputs(source.base.model, source.windows)
    # All of it is made beside its place and moved there last, so that it is whole or not there.
    with writing(out, ADVICE), disk_errors():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
            folder = Path(scratch) / "export"
            folder.mkdir()
            written = form.write(source, folder, type)
            with form.read(source, folder) as model:
                found = outputs(model, source.windows)
            require_as_promised(written, found, type, personal)
            exported = Exported(
                out, name, type, size_of(folder), base.perplexity, personal.perplexity,
                found.perplexity, sum(num_learnt(y) for _, y in source.windows),
                found.furthest(personal), written.exact, private_parts(source, form),
                tuple(written.notes),
            )  # fmt: skip
            manifest = json.dumps(manifest_of(source, exported), indent=1) + "\n"
            (folder / MANIFEST).write_text(manifest, encoding="utf-8")
            card = model_card(source, exported, form)
            (folder / "README.md").write_text(card, encoding="utf-8")
            if single:
                move_single(folder, out)
            else:
                move(folder, out)
    return exported


def require_free(out: Path) -> None:
    """Raise UserError where there is something at `out`, or where its card would go."""
    places = [out]
    if out.suffix == ".gguf":
        places.append(card_of(out))
    for path in places:
        if os.path.lexists(path):
            raise UserError(f"{path}: exists already; nothing was changed. {ADVICE.capitalize()}")
    require_parent(out, ADVICE)


def private_parts(source: Source, form: Format) -> tuple[str, ...]:
    """Return what is in an export and never left its client before."""
    held = source.private_parts if "experts" in form.holds else []
    return tuple(part for part in held if part != "router" or "router" in form.holds)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what libraries make of a full disk into the OSError that it was."""
    try:
        yield
    except SafetensorError as error:
        raise as_os_error(error) from None
    except OSError as error:
        # numpy says "40960 requested and 2544 written", and no number.
        if error.errno is None and "requested and" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise


def require_as_promised(written: Written, found: Outputs, type: str, personal: Outputs) -> None:
    """Compare what was read back with what was meant, and that with the run's own model.

    Raises UserError where they differ.
    """
    expected = written.expected
    # An exact export computes what the run's own model does, before its numbers are stored.
    if written.exact and not (far := expected.furthest(personal)) <= LOGITS:
        raise UserError(
            f"this format does not compute what the run's own model does: its logits are off by "
            f"{far:.2g}, where {LOGITS:g} is allowed; nothing is left of it. Please report this"
        )
    # Nothing is rounded in float32, so every logit must be there; other types round, and may cost.
    if type == "float32":
        far = found.furthest(expected)
        if not far <= LOGITS:
            raise UserError(
                f"what was written does not answer as it must: its logits are off by {far:.2g}, "
                f"where {LOGITS:g} is allowed; nothing is left of it. Please report this"
            )
    elif type in PERPLEXITY:
        cost = found.cost(expected)
        if not abs(cost) <= PERPLEXITY[type]:
            raise UserError(
                "what was written does not answer as it must: its perplexity is off by "
                f"{cost:+.2%}, where {PERPLEXITY[type]:.1%} is allowed in {type}; nothing is left "
                'of it. Choose a wider --type, such as "float32"'
            )


def manifest_of(source: Source, exported: Exported) -> dict[str, Any]:
    """Return what `comigs evaluate --model` and other programs need to know of an export."""
    # No path is in it: an export is passed on.
    return {
        "comigs_export": 1,
        "format": exported.format,
        "type": exported.type,
        "client": source.client,
        "run": source.folder.config().name,
        "base": source.base.title,
        "base_fingerprint": source.folder.environment()["base_fingerprint"],
        "exact": exported.exact,
        "private_parts": list(exported.private_parts),
        "valid": {
            "tokens": exported.tokens,
            "base_perplexity": exported.base,
            "personal_perplexity": exported.personal,
            "export_perplexity": exported.export,
            "largest_logit_difference": exported.difference,
        },
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an export. Raises UserError where it is none."""
    try:
        content = parse_json((folder / MANIFEST).read_bytes())
        if isinstance(content, dict) and content.keys() >= NEEDED:
            return content
    except (OSError, ValueError):
        pass
    if folder.is_file():
        raise UserError(
            f"{folder}: is a single file; evaluate measures an export's folder, which --out makes "
            "where its name does not end in .gguf"
        )
    raise UserError(
        f"{folder}: no export of comigs (it has no {MANIFEST}); make one with: comigs export RUN "
        "--client NAME --to FORMAT"
    )


def size_of(folder: Path) -> int:
    """Return bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Put a file on the disk."""
    with path.open("rb+") as file:
        flush(file.fileno())


def move(folder: Path, out: Path) -> None:
    """Move a finished folder to where nothing is, in one step, after its files are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
    folder.rename(out)


def move_single(folder: Path, out: Path) -> None:
    """Move the only GGUF of a finished folder to `out`, after its card, so that none is without."""
    (file,) = folder.glob("*.gguf")
    sync(file)
    require_free(out)
    card = (folder / "README.md").read_text(encoding="utf-8").replace(file.name, out.name)
    write_whole(card_of(out), lambda path: path.write_text(card, encoding="utf-8"))
    try:
        file.rename(out)
    except BaseException:
        card_of(out).unlink()
        raise


def card_of(out: Path) -> Path:
    """Return where the model card of a single file goes."""
    return out.with_name(f"{out.name}.md")
