"""This module tells a leak from everyday speech, where a text is in two places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from comigs.config import SPLITS, DataSection, Split
from comigs.data.document import content_digest
from comigs.data.partition import ELSEWHERE, REPEATED, Partition, split_by_hash
from comigs.errors import UserError


def without_short_repeats(partitions: Sequence[Partition], data: DataSection) -> list[Partition]:
    """Leave out what everybody says ("ok") wherever it comes a second time.

    A text of up to `data.short_repeat` bytes that is in another split, or at another client, stays
    where it comes first, in the order of clients. Raises UserError where a split has nothing else.
    """
    kept, seen = [], set[bytes]()
    for part in partitions:
        # A digest is looked up only where the text is short: most are not.
        listings = []
        for listing in part.listings:
            splits, is_short = listing.splits.copy(), listing.scan.sizes <= data.short_repeat
            for number in np.flatnonzero(is_short & (splits < REPEATED)):
                digest = bytes(listing.scan.contents[number])
                if digest in seen:
                    splits[number] = ELSEWHERE
                seen.add(digest)
            # A hash fills a split that would be left empty, as if the text had never been there.
            left = splits < REPEATED
            if (
                len(part.listings) == 1
                and (splits == ELSEWHERE).any()
                and left.sum() >= len(SPLITS)
            ):
                shares = listing.scan.shares[left]
                splits[left] = split_by_hash(shares, data.valid_fraction, data.test_fraction)
            listings.append(replace(listing, splits=splits))
        kept.append(replace(part, listings=tuple(listings)))
        for split in SPLITS:
            if not kept[-1].num_documents(split):
                raise UserError(
                    f'client "{part.client}": {split} has nothing but short texts that another '
                    f"split or client has, too; give it more text, or set data.short_repeat, which "
                    f"is {data.short_repeat}, lower"
                )
    return kept


def check_disjoint(partitions: Sequence[Partition]) -> None:
    """Refuse a text in two splits or at two clients. Raises UserError, naming both places."""
    places = [(part, split) for part in partitions for split in SPLITS]
    digests = [part.contents(split) for part, split in places]
    everything = np.concatenate(digests)
    # Sorted, equal digests are neighbours.
    order = np.argsort(everything, kind="stable")
    same = np.flatnonzero(everything[order][1:] == everything[order][:-1])
    if len(same):
        owners = np.repeat(np.arange(len(places)), [len(d) for d in digests])
        pair = order[same[0] : same[0] + 2]
        where = " and ".join(_where(places[owners[i]], bytes(everything[i])) for i in pair)
        more = f" (and {len(same) - 1} more such pairs)" if len(same) > 1 else ""
        raise UserError(
            f"the same text is in {where}{more}; "
            "a document may be in one split of one client: remove one"
        )


def _where(place: tuple[Partition, Split], digest: bytes) -> str:
    """Return a text's place in words. The source is read again to find the document's name.

    numpy hands out the digest without zero bytes at its end.
    """
    (part, split), name = place, "?"
    for _, document in part.read([split]):
        if content_digest(document.text).rstrip(b"\0") == digest:
            name = document.name
            break
    return f'client "{part.client}" {split} ("{name}")'
