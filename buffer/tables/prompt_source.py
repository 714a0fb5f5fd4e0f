"""The stream of training prompts, with its rows in the store: cursor, returned prompts, curriculum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from areal_like.errors import RefusedError
from buffer.prompts.curriculum import Curriculum, curriculum_scalars, state_from_scalars
from buffer.prompts.order import Prompt, PromptOrder, PromptSet
from buffer.settings import LedgerSettings
from buffer.storage.base import Store
from buffer.tickets import Ticket


class PromptSource:
    """Issues prompts from a `PromptOrder` and writes every change to the store."""

    def __init__(self, settings: LedgerSettings, store: Store) -> None:
        self._store = store
        self._settings = settings
        self.curriculum = None if settings.buffer.curriculum == "none" else Curriculum(settings.buffer)
        self.order = PromptOrder(seed=settings.seed, curriculum=self.curriculum, shard=settings.shard)

    def set_num_train_prompts(self, num_prompts: int, sources: Sequence[PromptSet] = ()) -> None:
        """Sets the size of the task's training set. `sources`: the parts of a mixture.

        Raises RefusedError if servers disagree on it.
        """
        known = self.order.num_prompts
        fewest = self._settings.shard.count
        if num_prompts < fewest or known not in (0, num_prompts):
            expected = known or f"at least {fewest}"
            raise RefusedError(
                "num_train_prompts",
                f"want {expected}, got {num_prompts}: servers need the same task settings",
            )
        if sources and (
            sum(source.size for source in sources) != num_prompts
            or min(source.size for source in sources) < fewest
            or not all(0 < source.weight < math.inf for source in sources)
        ):
            raise RefusedError(
                "source_sizes",
                f"each task of a mixture needs a weight and at least {fewest} training prompts",
            )
        if known and tuple(sources) != self.order.sources:
            raise RefusedError("source_sizes", "servers need the same tasks with the same weights")
        self.order.num_prompts = num_prompts
        self.order.sources = tuple(sources)

    def next(self) -> Prompt:
        if self.order.returned:
            self._store.pop_returned()
        prompt = self.order.next()
        self._store.put_scalar("cursor", self.order.cursor)
        return prompt

    def give_back(self, prompt: Prompt) -> None:
        """Queues the prompt of a dropped ticket to be issued again."""
        self.order.give_back(prompt)
        self._store.push_returned(prompt)

    def observe(self, ticket: Ticket) -> None:
        """Passes the rewards of a complete group to the curriculum, if there is one."""
        if self.curriculum is None:
            return
        rewards = [sample.reward for sample in ticket.training_samples]
        self._put_scalars(self.curriculum.observe(ticket.prompt_index, rewards))

    def state(self, pending: list[int]) -> dict[str, int | list[int]]:
        """Position in the stream, for a checkpoint; `pending`: prompts issued and not trained on by then."""
        state: dict[str, int | list[int]] = {
            "cursor": self.order.cursor,
            "pending": pending + self.order.returned,
        }
        if self.curriculum is not None:
            state["curriculum"] = self.curriculum.state()
        return state

    def restart(self, *, cursor: int, pending: list[int]) -> None:
        """Continues from another position, from a checkpoint or at the beginning."""
        for _ in self.order.returned:
            self._store.pop_returned()
        self.order.restore(cursor=cursor, returned=[Prompt(index=index) for index in pending])
        for index in pending:
            self._store.push_returned(Prompt(index=index))
        self._store.put_scalar("cursor", cursor)

    def forget_outcomes(self) -> None:
        """Restarts the curriculum, because indices refer to other prompts."""
        if self.curriculum is None:
            return
        before = self.curriculum.scalars()
        self.curriculum = self.order.curriculum = Curriculum(self.curriculum.settings)
        self._put_scalars(dict.fromkeys(before, 0) | self.curriculum.scalars())

    def restart_curriculum(self, state: int | list[int]) -> None:
        """Continues with the curriculum's state from a checkpoint.

        Does nothing if the curriculum is off now, or was off when the checkpoint was written. Raises
        RefusedError for a malformed state.
        """
        if self.curriculum is None or not isinstance(state, list) or not state:
            return
        try:
            self.curriculum.restore(state)
        except ValueError as error:
            raise RefusedError(
                "stream", f"{error}: was the checkpoint made by a different version of this program?"
            ) from None
        self._put_scalars(self.curriculum.scalars())

    def restore(
        self, scalars: Mapping[str, int], returned: Iterable[Prompt], *, are_other_prompts: bool
    ) -> None:
        """Continues from the rows of an earlier buffer.

        `are_other_prompts`: the data set has changed since.
        """
        self.order.restore(cursor=scalars.get("cursor", 0), returned=returned)
        stored = curriculum_scalars(scalars)
        if self.curriculum is None or not stored:
            return
        if not are_other_prompts:
            self.curriculum.restore(state_from_scalars(stored))
        # `restore` renumbers the slots, so all scalars are written again; those of unused slots are cleared.
        self._put_scalars(dict.fromkeys(stored, 0) | self.curriculum.scalars())

    def _put_scalars(self, scalars: Mapping[str, int]) -> None:
        for name, value in scalars.items():
            self._store.put_scalar(name, value)
