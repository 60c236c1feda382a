"""This module tells a leak from everyday speech, where a text is in two places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from comigs.config import SPLITS, DataSection, Split
from comigs.data.partition import ELSEWHERE, REPEATED, Partition, split_by_hash
from comigs.data.scan import Said
from comigs.errors import UserError


def without_short_repeats(partitions: Sequence[Partition], data: DataSection) -> list[Partition]:
    """Leave out what everybody says ("ok") wherever it comes a second time.

    A text of up to `data.short_repeat` bytes that is in another split, or at another client, stays
    where it comes first, in the order of clients. So does a chat of which all answers to questions
    are such texts; one that says more stays, and these are no leak. Raises UserError where a split
    has nothing else.
    """
    kept, seen = [], dict[bytes, tuple[str, int]]()
    for part in partitions:
        # A digest is looked up only where what is said is short: most is not.
        listings = []
        for listing in part.listings:
            splits, said = listing.splits.copy(), listing.scan.said
            again = np.zeros(len(said.owners), dtype=bool)
            is_short = said.sizes <= data.short_repeat
            for number in np.flatnonzero(is_short & (splits[said.owners] < REPEATED)):
                place = part.client, int(splits[said.owners[number]])
                digest = bytes(said.digests[number])
                again[number] = seen.setdefault(digest, place) != place
            times = np.bincount(said.owners, again, minlength=len(splits))
            nothing_else = times == np.bincount(said.owners, minlength=len(splits))
            splits[nothing_else & (times > 0)] = ELSEWHERE
            new = Said(said.digests[~again], said.owners[~again], said.sizes[~again])
            # A hash fills a split that would be left empty, as if the text had never been there.
            left = splits < REPEATED
            shares = listing.scan.shares[left]
            is_fewer = len(part.listings) == 1 and (splits == ELSEWHERE).any()
            if is_fewer and len(np.unique(shares)) >= len(SPLITS):
                splits[left] = split_by_hash(shares, data.valid_fraction, data.test_fraction)
            scan = listing.scan._replace(said=new)
            listings.append(replace(listing, scan=scan, splits=splits))
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
    """Refuse a text in two splits or at two clients. Raises UserError, naming both places.

    Of chats, that is a question with its answer, whatever stands before and behind it.
    """
    places = [(part, split) for part in partitions for split in SPLITS]
    digests = [part.said(split) for part, split in places]
    everything = np.concatenate(digests)
    # Sorted, equal digests are neighbours, in the order of places; one split may say a thing twice.
    order = np.argsort(everything, kind="stable")
    owners = np.repeat(np.arange(len(places)), [len(d) for d in digests])[order]
    is_same = everything[order][1:] == everything[order][:-1]
    same = np.flatnonzero(is_same & (owners[1:] != owners[:-1]))
    if len(same):
        first = same[0]
        both = [places[owners[first]], places[owners[first + 1]]]
        where = " and ".join(_where(place, bytes(everything[order[first]])) for place in both)
        more = f" (and {len(same) - 1} more such pairs)" if len(same) > 1 else ""
        what = "answer to the same question" if both[0][0].is_chat else "text"
        raise UserError(
            f"the same {what} is in {where}{more}; "
            "a document may be in one split of one client: remove one"
        )


def _where(place: tuple[Partition, Split], digest: bytes) -> str:
    """Return a text's place in words. The source is read again to find the document's name.

    numpy hands out the digest without zero bytes at its end.
    """
    (part, split), name = place, "?"
    for _, document in part.read([split]):
        if digest in [found.rstrip(b"\0") for found, _ in document.said]:
            name = document.name
            break
    return f'client "{part.client}" {split} ("{name}")'
