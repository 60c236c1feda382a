"""This module is one round whose uploads are summed unseen, as the server carries it to devices.

It takes two small exchanges beside the round's own, before it and after it, and a third before them
where the key of a device is not known, or which sum it has opened: after each start of the server,
while one is away, and in another try after an opening. A device that is gone in one of them is
absent from the round. Where too few are left for the sum, the round has none, and the round loop
goes on as where too few uploads were usable: it asks again, for another sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from comigs.federation.messages import Answered, Kind
from comigs.federation.sum_messages import (
    SUM,
    Announced,
    OpenedRound,
    SealedRound,
    SumRequest,
    read_rows,
    request_of,
    rows,
)
from comigs.methods.method import Download, Upload
from comigs.server import wire
from comigs.server.dispatch import Dispatcher, Question
from comigs.server.protocol import Answers, Reply, Task
from comigs.server.secure_sum.opening import unmasked
from comigs.server.secure_sum.primitives import BOX, SumError
from comigs.server.secure_sum.session import Opened, Session, note_key
from comigs.server.secure_sum.uploads import mean_of, origins_of
from comigs.server.sums import FEWEST, with_mean, without_sum
from comigs.server.validation import expected_upload
from comigs.server.wire import WireError, check_layout

if TYPE_CHECKING:
    from comigs.federation.flower.engine import FederatedRun, Flower

Accept = Callable[[str, bytes, int], "Said"]


@dataclass(frozen=True)
class Said:
    """A device said this in the session of that id; "" before there is one."""

    round: int
    session: str
    content: Any


class RoundSum:
    """A round sum is one try at a round. It has the sum of masked uploads, and none of them."""

    def __init__(
        self,
        run: FederatedRun,
        engine: Flower,
        dispatcher: Dispatcher[Any],
        keys: dict[str, str],
    ) -> None:
        """Begin with nothing.

        keys: of devices, by client, as far as they are known; what is learnt is added.
        """
        self._run, self._config, self._engine = run, run.config, engine
        self._dispatcher, self._keys = dispatcher, keys
        self._tasks: Mapping[str, Task] = {}
        self._absent: dict[str, str] = {}
        self._late: dict[str, Reply] = {}
        # Keys of a sum of this round whose opening was begun: who helped with it opens no other.
        self._opened: set[str] = set()
        self._total: np.ndarray | None = None

    def exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        """Carry the round; return replies whose upload is the mean of all that came."""
        self._tasks = tasks
        try:
            return self._exchange(tasks, downloads)
        except SumError as error:
            answers = Answers({}, self._absent, self._late)
            return without_sum(answers, tasks, str(error))
        finally:
            if self._opened:
                self._engine.opening = next(iter(tasks.values())).round

    def _exchange(self, tasks: Mapping[str, Task], downloads: Mapping[str, Download]) -> Answers:
        # Who takes part is known by its key, and a session is of all who can be asked.
        self._announce(tasks)
        members = {name: self._keys[name] for name in tasks if name in self._keys}
        members = {name: key for name, key in members.items() if name not in self._absent}
        if self._opened:
            for name in [name for name, key in members.items() if key not in self._opened]:
                self._absent[name] = "not in the sum whose opening was begun before"
                del members[name]
        share = self._config.privacy.threshold
        round = next(iter(tasks.values())).round
        session = Session.new(self._run.id, round, list(members.values()), share)

        # Seal, and then train: devices that did not seal are not asked to.
        sealed = self._seal(session, members)
        if len(sealed) < session.threshold:
            raise SumError(f"{len(sealed)} of the {session.threshold} clients sealed it")
        keys = {members[name]: said.key for name, (said, _) in sealed.items()}
        replies = self._train(session, members, sealed, downloads)
        # What is opened is opened once: a round must be whole by it.
        enough = max(session.threshold, self._config.participation.min_clients)
        if len(replies) < enough:
            raise SumError(f"{len(replies)} of the {enough} masked uploads came")

        # Open: what comes while others help to open it is not taken in.
        came, total = [members[name] for name in replies], self._total
        assert total is not None
        if self._opened and self._opened != set(came):
            raise SumError("not all came that are in the sum whose opening was begun before")
        self._opened = set(came)
        helped = self._open(session, members, list(replies), came)
        plain = unmasked(session, keys, came, total, helped)
        mean = self._mean(plain, session, {name: downloads.get(name, {}) for name in replies})
        return with_mean(Answers(replies, self._absent, self._late), replies, mean)

    def _announce(self, tasks: Mapping[str, Task]) -> None:
        known = dict(self._keys)

        def accept(name: str, raw: bytes, size: int) -> Said:
            head, _ = self._engine.opened(raw, name)
            if not isinstance(head, Announced):
                raise WireError("answered something else")
            note_key(known, name, head.key)
            self._engine.note_answered(name, head.answered)
            self._opened |= set(head.opened)
            return Said(head.round, "", head.key)

        # Whose sum they have helped to open in this round, devices say with their keys.
        if self._engine.opening == next(iter(tasks.values())).round:
            self._keys.clear()
        unknown = [name for name in tasks if name not in self._keys]
        self._keys |= self._ask("announce", unknown, lambda name: (None, {}), accept)
        # All who are in it are needed then, however long one of them is away.
        if not self._opened <= set(self._keys.values()):
            self._absent.clear()
            missing = [name for name in tasks if name not in self._keys]
            self._keys |= self._ask("announce", missing, lambda name: (None, {}), accept)

    def _seal(
        self, session: Session, members: Mapping[str, str]
    ) -> dict[str, tuple[SealedRound, dict[str, bytes]]]:
        """Return what each client said that takes part, and its box for each member."""
        known: dict[str, str] = {}

        def accept(name: str, raw: bytes, size: int) -> Said:
            head, tensors = self._engine.opened(raw, name)
            if not isinstance(head, SealedRound) or head.session != session.id:
                raise WireError("answered something else")
            note_key(known, name, head.key)
            boxes = read_rows(tensors, session.members, BOX)
            self._engine.note_answered(name, head.answered)
            return Said(head.round, session.id, (head, boxes))

        said = request_of(session)
        sealed = self._ask("seal", members, lambda name: (said, {}), accept, session.id)
        # A device that has lost its folder has another key, and is asked for it the next time.
        for name in members.keys() - sealed.keys():
            del self._keys[name]
        return sealed

    def _train(
        self,
        session: Session,
        members: Mapping[str, str],
        sealed: Mapping[str, tuple[SealedRound, dict[str, bytes]]],
        downloads: Mapping[str, Download],
    ) -> dict[str, Reply]:
        """Ask for masked uploads and add them up. Return the replies, without any upload."""
        # Each is told whose masks its own are to cancel, and gets what others sealed for it.
        of_member = {members[name]: said.key for name, (said, _) in sealed.items()}
        keys = tuple(of_member.get(member, "") for member in session.members)
        said = request_of(session, keys=keys)

        def write(name: str) -> tuple[SumRequest, dict[str, Tensor]]:
            boxes = {}
            for other, (_, theirs) in sealed.items():
                if other != name:
                    boxes[members[other]] = theirs[members[name]]
            format = self._config.upload.format
            download = wire.encode_download(downloads.get(name, {}), format)
            return said, download | rows(boxes, session.members)

        def accept(name: str, raw: bytes, size: int) -> Said:
            head, tensors = self._engine.opened(raw, name)
            reply = self._engine.reply(name, session.round, head, (size, len(raw)))
            assert isinstance(head, Answered)
            if reply.round != session.round:
                return Said(reply.round, "", reply)
            if head.session != session.id:
                raise WireError("answered for another sum of this round")
            self._add(name, tensors)
            return Said(reply.round, session.id, reply)

        return self._ask("exchange", sealed, write, accept, session.id)

    def _open(
        self, session: Session, members: Mapping[str, str], names: list[str], came: list[str]
    ) -> dict[str, Opened]:
        """Return what opens the sum, by member, of as many as help."""

        def accept(name: str, raw: bytes, size: int) -> Said:
            head, tensors = self._engine.opened(raw, name)
            if not isinstance(head, OpenedRound) or head.session != session.id:
                raise WireError("answered something else")
            shares = read_rows(tensors, session.members)
            return Said(head.round, session.id, Opened(bytes.fromhex(head.own_seed), shares))

        said = request_of(session, came=tuple(came))
        before = dict(self._absent)
        enough = session.threshold
        helped = self._ask("open", names, lambda name: (said, {}), accept, session.id, enough)
        self._absent = before  # who has sent its upload is in the sum, whether it helps or not
        return {members[name]: opened for name, opened in helped.items()}

    def _ask(
        self,
        kind: Kind,
        names: Iterable[str],
        write: Callable[[str], tuple[SumRequest | None, dict[str, Tensor]]],
        accept: Accept,
        session: str = "",
        enough: int | None = None,
    ) -> dict[str, Any]:
        """Ask clients in one exchange; return what those said that answered in this session."""

        def question(name: str) -> Question[Said]:
            def written() -> bytes:
                of_sum, tensors = write(name)
                task = self._tasks[name]
                return wire.pack(self._engine.request(kind, name, task, 0, of_sum), tensors)

            def accepted(raw: bytes, size: int) -> Said:
                return accept(name, raw, size)

            return Question(name, self._tasks[name].round, written, accepted)

        questions = {name: question(name) for name in names}
        if not questions:
            return {}
        # Others can be asked, or those whose keys are known are enough for a sum; not so where a
        # sum's opening was begun.
        known, fewest = len(self._tasks) - len(questions), self._config.participation.min_clients
        is_enough = kind == "announce" and known >= max(FEWEST, fewest)
        replaceable = not self._opened and (is_enough or not self._config.asks_all)
        came = self._dispatcher.gather(questions, enough=enough, replaceable=replaceable)
        self._absent |= came.absent

        # What was masked for an earlier round, or comes when this one's sum is closed, is dropped;
        # of this round's own the server says that it was absent.
        for name, late in came.late.items():
            reply = late.content if isinstance(late, Said) else None
            if isinstance(reply, Reply) and reply.round < next(iter(self._tasks.values())).round:
                self._late[name] = reply
        given = {}
        for name in questions:
            answer = came.answers.get(name)
            if isinstance(answer, Said) and answer.session == session:
                given[name] = answer.content
            elif answer is not None:
                self._absent[name] = "busy with an earlier sum of this round"
        return given

    def _add(self, name: str, tensors: wire.Encoded) -> None:
        """Add a masked upload to the sum. Raises WireError where it is none."""
        expected = self._expected(name)
        count = sum(int(np.prod(dims)) for dims in expected.values())
        check_layout(tensors, {SUM: (torch.int32, (count,))}, "its upload")
        masked = tensors[SUM].numpy().view(np.uint32)
        self._total = masked.copy() if self._total is None else self._total + masked

    def _mean(
        self, plain: np.ndarray, session: Session, downloads: Mapping[str, Download]
    ) -> Upload:
        """Return the mean of the uploads that are in the sum, from what each was sent."""
        # What is summed has the same slots and shapes of everybody, or it was no sum.
        expected = self._expected(next(iter(downloads)))
        origins = origins_of(self._config, downloads, expected).values()
        return mean_of(plain, origins, self._config.upload, len(session.members))

    def _expected(self, name: str) -> Mapping[Any, tuple[int, ...]]:
        round = self._tasks[name].round
        return expected_upload(self._run.method, self._run.shapes[name], round)
