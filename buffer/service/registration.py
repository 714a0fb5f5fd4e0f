"""Registration of peers: checks of a hello, the process that holds a name, the replies.

    hello -> refused (its configuration differs, it was replaced, its name is taken)
          -> welcome (the process that has the name; a new one under a free name)
          -> asked: another process has the name -> refused (that one replies) | welcome (it does not)
          -> the run is finished (rollout servers)

A welcome to a new process is sent when its incarnation is durable: a restarted buffer must know it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from areal_like.errors import RefusedError, StaleIncarnationError
from areal_like.security.keys import AllowedKey
from areal_like.security.session_keys import secret_text
from areal_like.wire.fingerprint import as_number
from areal_like.wire.messages.hello import AreYouAlive, Hello, JobFinished, Refused, Role, Welcome
from buffer.ledger.ledger import Ledger
from buffer.prompts.order import PromptSet
from buffer.service.outbox import Outbox
from buffer.service.peers import ConnectedPeers, PeerKeys, claimed_name
from buffer.tables.incarnations import TRAINER

log = logging.getLogger(__name__)


ANSWER_S = 2.0
"""Seconds for the holder to respond. It sends heartbeats more often than that while it works."""
MAX_WAITING = 64
"""Maximum number of newcomers that wait for one name; further ones are refused at once."""


@dataclass(frozen=True, kw_only=True)
class Newcomer:
    """A process that waits for the decision."""

    route: bytes
    rid: int
    hello: Hello
    key: AllowedKey | None = None
    """The key with which it connected; None without keys."""


@dataclass(kw_only=True)
class _Question:
    holders: frozenset[bytes]
    """Routes that were queried."""
    until_s: float
    newcomers: dict[bytes, Newcomer] = field(default_factory=dict)


class NameClaims:
    """Pending queries to the holders of names. Pure: times are seconds on any one clock.

        (name taken by another process) --begin--> asked --heard from the holder--> refused
                                                     `--ANSWER_S over-----------> admitted, and the holder is
                                                                                  replaced

    A newcomer under the name of a connected process is either its successor (the holder hangs, or its machine
    is cut off), a mistake or an intruder. Neither clocks nor numbers that a peer sends can distinguish these
    cases, so a holder that responds keeps the name. A holder whose connection is gone is not queried.
    """

    def __init__(self) -> None:
        self._questions: dict[str, _Question] = {}

    def is_asked(self, name: str) -> bool:
        """True while the holder of this name has time to respond."""
        return name in self._questions

    def begin(self, name: str, holders: Collection[bytes], *, now_s: float) -> None:
        """Records that the holders of the name were queried."""
        self._questions[name] = _Question(holders=frozenset(holders), until_s=now_s + ANSWER_S)

    def wait(self, name: str, newcomer: Newcomer) -> bool:
        """Adds a newcomer to the query about its name; a repeated hello replaces the previous one.

        Returns False if too many wait.
        """
        newcomers = self._questions[name].newcomers
        if len(newcomers) >= MAX_WAITING and newcomer.route not in newcomers:
            return False
        newcomers[newcomer.route] = newcomer
        return True

    def heard(self, route: bytes) -> list[Newcomer]:
        """Records a message on this route; returns the newcomers to refuse."""
        if not self._questions:  # every message passes here
            return []
        names = [name for name, question in self._questions.items() if route in question.holders]
        return [newcomer for name in names for newcomer in self._questions.pop(name).newcomers.values()]

    def cancel(self, name: str) -> list[Newcomer]:
        """Ends the query about a name; returns its newcomers."""
        question = self._questions.pop(name, None)
        return list(question.newcomers.values()) if question else []

    def expired(self, *, now_s: float) -> Iterator[tuple[str, list[Newcomer]]]:
        """The names whose holders have not responded in time, with their newcomers in order of arrival."""
        for name in [name for name, question in self._questions.items() if question.until_s <= now_s]:
            yield name, list(self._questions.pop(name).newcomers.values())


class Registration:
    """Handles every `Hello`. It sends the replies itself, because some come later."""

    def __init__(
        self,
        ledger: Ledger,
        peers: ConnectedPeers,
        outbox: Outbox,
        keys: PeerKeys,
        *,
        job: str,
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._peers = peers
        self._outbox = outbox
        self._keys = keys
        self._job = job
        self._clock = clock
        self._claims = NameClaims()
        self.eval_sets: dict[str, int] = {}
        """Held-out prompts by evaluation set, as servers report them; empty: no server has registered."""

    def hello(self, newcomer: Newcomer) -> None:
        """Registers a peer, or queries the process that holds its name. Replies now or later."""
        try:
            self._hello(newcomer)
        except (RefusedError, StaleIncarnationError) as error:
            self._outbox.send(newcomer.route, refusal_of(error), rid=newcomer.rid)

    def heard(self, route: bytes) -> None:
        """Notes a message of a registered peer: the peer holds its name."""
        for newcomer in self._claims.heard(route):
            name = newcomer.hello.name
            log.warning("a second process says hello as %s, and the first one responds", name)
            reason = (
                f"another process has the name {name} and responds under it: end that one first, choose "
                f"another name, or run `areal-like unfence {self._job} {name}`"
            )
            self._outbox.send(newcomer.route, Refused(field="name", reason=reason), rid=newcomer.rid)

    def tick(self) -> None:
        """Admits the newcomers whose predecessors have not replied in time. Call it a few times a second."""
        for name, newcomers in self._claims.expired(now_s=self._clock()):
            log.warning("the process that had the name %s did not respond: it is replaced", name)
            self._peers.take_name(name, kept=newcomers[0].hello.process)
            self._again(newcomers)

    def unfence(self, name: str, *, unix_s: float) -> str:
        """Takes a name (`claimed_name`) from its process for an operator; returns what has changed."""
        change = self._ledger.operator.unfence(name, unix_s=unix_s)
        self._peers.take_name(name)
        self._outbox.servers_changed()
        self._again(self._claims.cancel(name))
        return change

    def remove(self, name: str) -> None:
        """Removes a peer, whose next message gets HelloRequired. Samples of a server are leased again.

        A connected rollout server is always in the ledger's table too, because its messages change its entry
        there.
        """
        self._ledger.dispatcher.remove_server(name)
        self._peers.remove(name)
        self._outbox.servers_changed()

    def welcome(self, incarnation: int, *, role: Role = Role.TRAINER) -> Welcome:
        """The reply to a process with this incarnation."""
        ledger = self._ledger
        return Welcome(
            job=self._job,
            incarnation=incarnation,
            step=ledger.state.steps.current,
            newest_version=ledger.state.versions.newest,
            session_secret=secret_text(ledger.state.session_secret) if role is Role.ROLLOUT else "",
        )

    def _again(self, newcomers: Iterable[Newcomer]) -> None:
        """Repeats their hellos. The first process now finds a free name, and further ones find the name taken
        by it."""
        for newcomer in newcomers:
            self.hello(newcomer)

    def _hello(self, newcomer: Newcomer) -> None:
        hello = newcomer.hello
        # Checked again: another key may have got the name while this newcomer waited for it.
        self._keys.check_hello(hello, newcomer.key)
        self._peers.check(hello)
        name = claimed_name(hello)
        incarnation = self._ledger.state.incarnations.find(name, hello.process, hello.incarnation)
        if self._ledger.state.is_finished and hello.role is Role.ROLLOUT:
            self._outbox.send(newcomer.route, JobFinished(), rid=newcomer.rid)
        elif incarnation:
            self._admit(newcomer, incarnation)
        elif self._is_free(name, hello.process):
            self._admit_new(newcomer, name)
        elif not self._claims.wait(name, newcomer):
            raise RefusedError("name", f"many processes wait for the name {name}: try again later")

    def _is_free(self, name: str, process: str) -> bool:
        """True if no connected process holds the name; otherwise its holders are queried, unless they already
        were."""
        if self._claims.is_asked(name):
            return False
        holders = self._peers.holders(name, process)
        if name == TRAINER:  # a fenced trainer (`areal-like drop`) has lost the name
            current = self._ledger.state.trainer_incarnation
            holders = [peer for peer in holders if peer.hello.incarnation >= current]
        asked = [peer.route for peer in holders if self._outbox.send(peer.route, AreYouAlive())]
        if asked:
            self._claims.begin(name, asked, now_s=self._clock())
        return not asked

    def _admit_new(self, newcomer: Newcomer, name: str) -> None:
        hello = newcomer.hello
        if hello.role is Role.ROLLOUT:  # before its predecessor is replaced
            self._ledger.state.prompts.set_num_train_prompts(hello.num_train_prompts, prompt_sets(hello))
        incarnation = self._ledger.admit_process(name, hello.process)
        self._peers.take_name(name, kept=hello.process)
        self._admit(newcomer, incarnation, is_new=True)

    def _admit(self, newcomer: Newcomer, incarnation: int, *, is_new: bool = False) -> None:
        """Registers a process that has its name. Raises RefusedError or StaleIncarnationError."""
        hello = dataclasses.replace(newcomer.hello, incarnation=incarnation)
        if hello.role is Role.ROLLOUT:
            self._ledger.state.prompts.set_num_train_prompts(hello.num_train_prompts, prompt_sets(hello))
            self._ledger.dispatcher.set_content(as_number(hello.content) if hello.content else 0)
            self._ledger.dispatcher.register_server(
                hello.name,
                incarnation=incarnation,
                weights_version=hello.weights_version,
                now_s=self._clock(),
            )
            if self._ledger.servers[hello.name].health.is_refused:
                self.remove(hello.name)  # it may still be connected
                raise RefusedError("conduct", "this process was refused for good; the buffer's log says why")
            self.eval_sets = hello.eval_sets
        else:
            self._ledger.trainer.refuse_older_trainer(incarnation)
        peer = self._peers.add(newcomer.route, hello, now_s=self._clock(), key=newcomer.key, is_new=is_new)
        self._keys.registered(hello.name, newcomer.key)
        self._peers.expect_model_of(hello)
        self._outbox.servers_changed()
        if hello.role is Role.TRAINER:
            self._outbox.send_directory_to(peer)
        log.info("%s registered, incarnation %d", hello.name, incarnation)
        send = self._outbox.send_when_durable if is_new else self._outbox.send
        send(newcomer.route, self.welcome(incarnation, role=hello.role), rid=newcomer.rid)


def prompt_sets(hello: Hello) -> list[PromptSet]:
    """The tasks of a server's mixture; empty without one."""
    pairs = zip(hello.source_sizes, hello.source_weights, strict=True)
    return [PromptSet(size=size, weight=weight) for size, weight in pairs]


def refusal_of(error: RefusedError | StaleIncarnationError) -> Refused:
    """The reply to a request that raised this error."""
    if isinstance(error, StaleIncarnationError):
        return Refused(field="incarnation", reason=str(error))
    field, reason = error.args
    return Refused(field=field, reason=reason)
