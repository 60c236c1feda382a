"""Messages between server and device as bytes, and the formats that numbers travel in.

A message is one safetensors payload: tensors with their layout, and a head, JSON, in its metadata.
Whoever reads one trusts nothing in it: its size is checked first, then its header, then head and
tensors against what was expected, and everything wrong is a WireError whose text holds nothing of
the message.

Uploads travel in one of three formats:

- float32: numbers stay as they are, in downloads too.
- bfloat16: numbers are rounded, in downloads too.
- int8: what travels is the step from the download of the same request, a row of it as whole numbers
  times one float32 scale: q = round(step / scale), scale = max |step| / 127. What rounding left
  over stays on the client and is added to its next step (error feedback, 1809.07599), so that the
  sum of what was sent follows the sum of the steps. A slot that was not in the download goes as
  bfloat16, and so do downloads.

All of it is computed in float64 and rounded half to even: both ends get the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from comigs.methods.method import Download, Tensors, Upload
from comigs.slots import Slot

Format = Literal["float32", "bfloat16", "int8"]
Encoded = Mapping[str, Tensor]  # by name in the payload
HEAD = "comigs"  # the one key of the metadata: safetensors writes several in any order
MOST_HEADER = 1 << 20  # bytes of a head, and of the list of its tensors, where little is said
LEVELS = 127  # of an int8 on either side of zero


class WireError(ValueError):
    """A message is not what it should be, in a few words that hold nothing of it."""


class Head(BaseModel):
    """A head goes with the tensors: plain values of exactly the types given."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


AnyHead = TypeVar("AnyHead", bound=Head)


def pack(head: Head, tensors: Encoded | None = None) -> bytes:
    """Return a message. Equal content gives equal bytes. No two tensors may share memory."""
    given = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}
    raw: bytes = save(given, metadata={HEAD: head.model_dump_json()})
    return raw


def unpack(
    raw: bytes, heads: TypeAdapter[AnyHead], most: int, most_header: int = MOST_HEADER
) -> tuple[AnyHead, dict[str, Tensor]]:
    """Return head and tensors of a message of at most `most` bytes.

    Raises WireError for anything but a whole message.
    """
    # Sizes are looked at before anything is read: a message may lie about what it holds.
    if not 8 < len(raw) <= most:
        raise WireError(f"a message of {len(raw):,} bytes, where at most {most:,} were expected")
    size = int.from_bytes(raw[:8], "little")
    if size > min(len(raw) - 8, most_header):
        raise WireError("a message whose header is longer than allowed")
    try:
        head = heads.validate_json(json.loads(raw[8 : 8 + size])["__metadata__"][HEAD])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise WireError("a message that is none of comigs, or of another version") from None
    try:
        return head, load(raw)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError):
        raise WireError("a damaged message") from None


def encode(
    upload: Upload, reference: Download, wire_format: Format, residual: Tensors
) -> tuple[dict[str, Tensor], dict[Slot, Tensor]]:
    """Return an upload as it travels, and what rounding left over, for the client's next upload.

    reference: the download of the same request, as received. residual: what `encode` gave for the
    upload before; empty at first. Raises WireError where a number is NaN or infinite.
    """
    encoded: dict[str, Tensor] = {}
    left = dict(residual)
    for slot, tensor in upload.items():
        if not bool(tensor.isfinite().all()):
            raise WireError(f"{slot} of the upload is not finite")
        if wire_format == "float32":
            encoded[str(slot)] = tensor
        elif not _as_step(slot, tensor.shape, reference, wire_format):
            encoded[str(slot)] = tensor.to(torch.bfloat16)
            left.pop(slot, None)  # it was of steps, and this is the whole
        else:
            # What rounding left over of earlier steps travels with this one.
            step = tensor.to(torch.float64) - reference[slot].to(torch.float64)
            if slot in left:
                step += left[slot]
            scale = (step.abs().amax(dim=1, keepdim=True) / LEVELS).to(torch.float32)
            sized = torch.where(scale > 0, scale, 1.0).to(torch.float64)
            whole = (step / sized).round().clamp(-LEVELS, LEVELS)
            encoded |= {str(slot): whole.to(torch.int8), _scale_of(slot): scale}
            left[slot] = (step - whole * scale).to(torch.float32)
    return encoded, left


def decode(
    encoded: Encoded,
    expected: Mapping[Slot, tuple[int, ...]],
    reference: Download,
    wire_format: Format,
) -> dict[Slot, Tensor]:
    """Return the upload that `encode` was given, but for rounding, in the order of `expected`.

    expected: shape of every slot of the upload. Raises WireError for other slots, shapes or dtypes,
    and for NaN.
    """
    check_layout(encoded, _layout(expected, reference, wire_format), "its upload")
    upload: dict[Slot, Tensor] = {}
    for slot, shape in expected.items():
        tensor = encoded[str(slot)]
        if _as_step(slot, shape, reference, wire_format):
            scale = encoded[_scale_of(slot)].to(torch.float64)
            tensor = reference[slot].to(torch.float64) + tensor.to(torch.float64) * scale
        upload[slot] = tensor.to(torch.float32, copy=True)
        if not bool(upload[slot].isfinite().all()):
            raise WireError(f"its upload is not finite in {slot}")
    return upload


def encode_download(download: Download, wire_format: Format) -> dict[str, Tensor]:
    """Return a download as it travels: copies, as a method may hand out views of one tensor."""
    dtype = torch.float32 if wire_format == "float32" else torch.bfloat16
    return {str(slot): tensor.to(dtype, copy=True) for slot, tensor in download.items()}


def decode_download(encoded: Encoded) -> dict[Slot, Tensor]:
    """Return what a client receives.

    Raises WireError where a name is no slot or a number is NaN or infinite.
    """
    download: dict[Slot, Tensor] = {}
    for name, tensor in encoded.items():
        try:
            slot = Slot.parse(name)
        except ValueError:
            raise WireError("a download with a tensor that is no slot") from None
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise WireError(f"{slot} of the download is not finite")
        # A copy is aligned as torch aligns memory, and so gives the same bits everywhere.
        download[slot] = tensor.to(torch.float32, copy=True)
    return download


def as_received(download: Download, wire_format: Format) -> dict[Slot, Tensor]:
    """Return a download as the client has it: what the step of its upload is taken from."""
    return decode_download(encode_download(download, wire_format))


def upload_bytes(upload: Upload, reference: Download, wire_format: Format) -> dict[Slot, int]:
    """Return the bytes of each tensor's numbers as they travel."""
    sizes = {}
    for slot, tensor in upload.items():
        layout = _layout({slot: tuple(tensor.shape)}, reference, wire_format).values()
        sizes[slot] = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout)
    return sizes


def download_bytes(download: Download, wire_format: Format) -> int:
    """Return the bytes of a download's numbers as they travel."""
    return sum(tensor.numel() for tensor in download.values()) * (
        4 if wire_format == "float32" else 2
    )


def check_layout(
    encoded: Encoded, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], whose: str
) -> None:
    """Raise WireError where names, dtypes or shapes of tensors are not exactly those of `layout`.

    whose: who is named as the owner of the tensors, such as "its upload".
    """
    if unknown := len(encoded.keys() - layout.keys()):
        raise WireError(f"{whose} has {unknown} tensors that were not asked for")
    for name, (dtype, shape) in layout.items():
        if name not in encoded:
            raise WireError(f"{whose} has no {name}")
        tensor = encoded[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            given = f"{tuple(tensor.shape)} {_short(tensor.dtype)}"
            wanted = f"{tuple(shape)} {_short(dtype)}"
            raise WireError(f"{whose} has {name} as {given}, where {wanted} was asked for")


def _layout(
    expected: Mapping[Slot, tuple[int, ...]], reference: Download, wire_format: Format
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for slot, shape in expected.items():
        if _as_step(slot, shape, reference, wire_format):
            layout |= {
                str(slot): (torch.int8, shape),
                _scale_of(slot): (torch.float32, (shape[0], 1)),
            }
        else:
            layout[str(slot)] = (
                torch.float32 if wire_format == "float32" else torch.bfloat16,
                shape,
            )
    return layout


def _as_step(slot: Slot, shape: tuple[int, ...], reference: Download, wire_format: Format) -> bool:
    """Return whether a slot travels as a step away from the download.

    The download must have had it in this shape.
    """
    return wire_format == "int8" and slot in reference and reference[slot].shape == shape


def _scale_of(slot: Slot) -> str:
    return f"{slot}/scale"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(values: Tensors) -> dict[str, Tensor]:
    """Return tensors by the text of their slot, as files name them."""
    return {str(slot): tensor for slot, tensor in values.items()}
