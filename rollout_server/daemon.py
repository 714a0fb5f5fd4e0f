"""A rollout server: connects the engine, the reward workers, the weight receiver and the buffer client.

    STARTING -> SERVING -> (engine lost) -> STARTING -> QUARANTINED -> (next push) -> SERVING
                    \\-> DRAINING (SIGTERM, an operator, the end of the run) -> exit 0

This file wires the parts together and decides which state the server announces to the buffer:
`ShardedBufferClient` (leases in, samples out), `LeaseRunner` (leases to samples), `RewardPool` and
`EnvironmentPool` (their worker processes), `EngineSupervisor` (starts and restarts the engine) and
`WeightReceiver` (weight pushes). A server needs no durable state: when it is lost, the buffer leases its
samples to another server.

If the engine starts from a checkpoint, the server announces the checkpoint's version, and the buffer grants
leases as that version's staleness allows. A restarted engine without a checkpoint holds the run's first
weights, and with `model.lora.path` an engine starts with the base alone: then the server announces
QUARANTINED and takes no leases until trainer rank 0, which reads the servers' states from the buffer, has
pushed the newest version.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from typing import Any

from areal_like.automatic_settings import compute_dtype, start_limit_s
from areal_like.errors import EngineError
from areal_like.paths import model_path
from areal_like.runtime.daemon import Runtime, cancelled_on_exit
from areal_like.runtime.imports import torch_hidden, uncollected
from areal_like.security.binding import require_loopback_or_keys
from areal_like.security.keys import KeyRole
from areal_like.weights.checkpoint_files import base_of
from areal_like.wire.addresses import buffer_addresses, wait_for_addresses
from areal_like.wire.channel import tcp_address
from areal_like.wire.curve import CurveServer
from areal_like.wire.fingerprint import (
    dataset_fingerprint,
    model_fingerprint,
    shared_settings,
    tokenizer_fingerprint,
)
from areal_like.wire.messages.hello import Hello, Role
from areal_like.wire.messages.producer import ServerState, SessionPlace
from rollout_server.leases.client import ShardedBufferClient
from rollout_server.metrics import ServerStats
from rollout_server.policy.client import EngineClient
from rollout_server.policy.concurrency import ConcurrencyController, EngineLoad
from rollout_server.policy.engines.supervisor import (
    INITIAL_VERSION,
    Engine,
    EngineSupervisor,
    make_engine,
    make_update_strategy,
)
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.rewards.library.model.scorers import tell_workers, wait_for_scorers
from rollout_server.sample.lease_runner import LeaseRunner
from rollout_server.sandbox.reaping import own_sandboxes
from rollout_server.sessions.book import JOB_OVER, SERVER_ENDS, SessionBook
from rollout_server.sessions.http.plane import SessionPlane, served_sessions
from rollout_server.sources import (
    SampleSources,
    content_of,
    make_tasks,
    running_sources,
    sequence_lengths,
    without_long_prompts,
)
from rollout_server.starvation import Starvation
from rollout_server.teachers.pool import TeacherPool
from rollout_server.weights.receiver import WeightReceiver

log = logging.getLogger(__name__)

_FROZEN_S = 10.0
"""A server whose engine has sent no token or response for longer than this is not ready."""


async def main(runtime: Runtime) -> None:
    """Serves until `runtime.stopping`. Raises ConfigError for settings that contradict each other."""
    config = runtime.config
    tell_workers(config)
    with runtime.waits("sandboxes: those of an earlier process"):
        await own_sandboxes(config, server=runtime.name, paths=runtime.paths)
    tasks = make_tasks(config)
    require_loopback_or_keys(config.security, config.rollout.host, setting="rollout.host")
    if config.buffer.discovery == "address":
        buffer_addresses(config)  # raises before the slow imports if the buffer's port is not set
    model = model_path(config)
    with torch_hidden(), uncollected():
        renderer = PromptRenderer(model, settings=config.model)
    contexts = sequence_lengths(config, tasks, max_positions=renderer.max_positions)
    renderer.max_prompt_tokens = min(
        tasks[""].max_prompt_tokens, contexts[""] - config.sampling.max_new_tokens
    )
    tasks = without_long_prompts(config, tasks, renderer, contexts=contexts)
    log.info("task %s, examples %s, %s", config.task, tasks[""].fingerprint(), compute_dtype(config))
    context_tokens = max(contexts.values())
    engine = make_engine(
        config,
        name=runtime.name,
        model=model,
        context_tokens=context_tokens,
        max_positions=renderer.max_positions,
        vocab_size=renderer.vocab_size,
    )
    book = SessionBook()
    book.keys.num_expected = config.buffer.num_shards
    servers: list[RolloutServer] = []  # that of this process, once it knows the buffers

    async def find_session(id: str) -> SessionPlace | None:
        return await servers[0].buffers.find_session(id) if servers else None

    teachers = TeacherPool.of(config, renderer=renderer, model=model, longest=contexts[""])
    async with (
        contextlib.nullcontext() if teachers is None else teachers,
        running_sources(config, tasks, renderer, contexts=contexts, waits=runtime.waits) as sources,
        served_sessions(
            runtime,
            book,
            tasks=list(tasks.values()),
            model=model,
            context_tokens=context_tokens,
            find=find_session,
        ) as plane,
    ):
        with runtime.waits("buffer: address"):
            await wait_for_addresses(config, gives_up=runtime.stopping.is_set)
        with runtime.waits("score server: ready"):
            await wait_for_scorers(config, gives_up=runtime.stopping.is_set)
        if runtime.stopping.is_set():
            return
        server = RolloutServer(
            runtime,
            sources,
            renderer=renderer,
            model=model,
            engine=engine,
            book=book,
            plane=plane,
            teachers=teachers,
        )
        servers.append(server)
        try:
            await server.run()
        finally:
            await server.close()


class RolloutServer:
    """One server. `run` until it returns or raises, then `close`."""

    def __init__(
        self,
        runtime: Runtime,
        sources: SampleSources,
        *,
        renderer: PromptRenderer,
        model: str,
        engine: Engine,
        book: SessionBook,
        plane: SessionPlane | None,
        teachers: TeacherPool | None,
    ) -> None:
        """`engine`: not started yet. `plane`: the HTTP servers of sessions; None if no task has sessions.
        `teachers`: those at servers; None: there are none."""
        config = runtime.config
        self._runtime = runtime
        self._tasks = {name: source.task for name, source in sources.items()}
        self._renderer = renderer
        self._fingerprints = (model_fingerprint(model), tokenizer_fingerprint(model))
        self._engine = engine
        self._rewards = list(dict.fromkeys(source.rewards for source in sources.values()))
        pools = dict.fromkeys(source.environments for source in sources.values())
        self._environments = [pool for pool in pools if pool is not None]
        self._plane = plane
        self._book = book
        self._gate = gate = GenerationGate()
        self._concurrency = ConcurrencyController(most=config.rollout.max_running)
        if config.rollout.adapts_concurrency:
            gate.set_limit(self._concurrency.limit)
        strategy = make_update_strategy(
            config,
            name=runtime.name,
            model=model,
            gate=gate,
            on_quarantine=self._on_quarantine,
            on_untrusted=self._replace_engine,
        )
        self._supervisor = EngineSupervisor(
            engine=engine,
            strategy=strategy,
            model=model,
            checkpoints=runtime.paths.checkpoints,
            load_timeout_s=start_limit_s(config),
            stall_timeout_s=config.rollout.generate_timeout_s,
            starting=lambda: runtime.waits("engine: ready"),
            on_ready=self._on_engine_ready,
            on_lost=self._on_engine_lost,
        )
        curve = None
        if runtime.keyring is not None:
            curve = CurveServer(runtime.keyring, roles=[KeyRole.TRAINER], on_failure=runtime.fail)
        self._receiver = WeightReceiver(
            host=config.rollout.host,
            max_message_bytes=config.buffer.max_message_bytes,
            strategy=strategy,
            on_version=self._on_version,
            on_untrusted=self._replace_engine,
            integrity=config.weights.integrity,
            base=base_of(model) if config.num_adapters else "",
            curve=curve,
        )
        self._buffers = ShardedBufferClient(
            config,
            engine_samples=config.rollout.max_running + config.rollout.queue_samples,
            max_episodes=config.rollout.most_episodes,
            hello=self._hello,
            waits=runtime.waits,
            on_leases=lambda leases: self._runner.start(leases),
            on_abort=lambda lease_ids: self._runner.cancel(lease_ids),
            on_drain=runtime.drain,
            on_finished=runtime.finish,
            keyring=runtime.keyring,
            session_keys=book.keys,
        )
        self._runner: LeaseRunner = LeaseRunner(
            config,
            sources,
            gate=gate,
            book=book,
            buffers=self._buffers,
            teachers=teachers,
        )
        self._stats = ServerStats(
            runtime.metrics,
            buffers=self._buffers,
            runner=self._runner,
            rewards=self._rewards,
            teachers=teachers,
            environments=self._environments,
            receiver=self._receiver,
            engine=engine,
            gate=gate,
            supervisor=self._supervisor,
            starvation=Starvation.of(config),
            book=book,
            concurrency_limit=config.rollout.max_running,
        )
        self._weights_address = tcp_address(
            config.rollout.advertise_host or config.rollout.host, self._receiver.port
        )
        runtime.status = self._status
        runtime.trouble = self._trouble
        runtime.waits.sources.append(self._supervisor.waits)
        if teachers is not None:
            runtime.waits.sources.append(teachers.waits)
        runtime.metrics_pages["engine"] = self._engine_metrics
        runtime.advertise(weights=self._weights_address)

    @property
    def buffers(self) -> ShardedBufferClient:
        return self._buffers

    async def run(self) -> None:
        """Serves until SIGTERM, then drains. If a part fails before that, raises its exception."""
        tasks = [
            asyncio.create_task(self._buffers.run(), name="buffers"),
            asyncio.create_task(self._supervisor.run(), name="engine"),
            asyncio.create_task(self._observe(), name="stats"),
        ]
        stopping = asyncio.create_task(self._runtime.stopping.wait(), name="stopping")
        watched: list[asyncio.Future[Any]] = [
            *tasks,
            stopping,
            self._receiver.serving,
            self._runner.failed,
            *(task for pool in self._rewards for task in pool.serving),
            *(task for pool in self._environments for task in pool.serving),
            *([] if self._plane is None else [self._plane.serving]),
        ]
        async with cancelled_on_exit(*tasks, stopping):
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
            await self._drain(supervision=tasks[1])

    async def close(self) -> None:
        """Stops everything that is still running; safe after any failure."""
        await self._runner.close()
        await self._receiver.close()
        await self._supervisor.close()
        self._buffers.close()

    async def _drain(self, *, supervision: asyncio.Task[None]) -> None:
        """Announces DRAINING, aborts generations and returns the leases. `close` stops the engine."""
        self._buffers.announce(state=ServerState.DRAINING)
        supervision.cancel()
        is_over = self._runtime.is_finished
        self._book.close(is_job_over=is_over)
        await self._runner.close(reason=JOB_OVER if is_over else SERVER_ENDS)
        with self._runtime.waits("buffer: goodbye"):
            await self._buffers.leave()

    async def _observe(self) -> None:
        """Updates the statistics from the engine's load, and the server's readiness, once per heartbeat."""
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + self._runtime.config.daemon.heartbeat_s
            await asyncio.sleep(self._runtime.config.daemon.heartbeat_s)
            self._stats.woke(late_s=loop.time() - due_s)
            load = await self._supervisor.load()
            if self._runtime.config.rollout.adapts_concurrency and load:
                self._limit_concurrency(EngineLoad.of(load), now_s=loop.time())
            self._buffers.set_stats(self._stats.update(load, now_s=loop.time()))
            state = self._buffers.state
            problem = self._buffers.problem or ("" if state is ServerState.SERVING else state.value)
            if problem:
                self._runtime.unready(problem)
            else:
                self._runtime.ready()

    def _limit_concurrency(self, load: EngineLoad, *, now_s: float) -> None:
        """Limits the samples at the engine, and those that are leased, to the capacity of the KV memory."""
        before = self._concurrency.limit
        limit = self._concurrency.observe(load, now_s=now_s)
        if limit == before:
            return
        level = logging.INFO if limit < before else logging.DEBUG
        log.log(level, "at most %d samples at the engine (KV memory %.0f %%)", limit, 100 * load.kv_usage)
        self._gate.set_limit(limit)
        self._buffers.set_engine_samples(limit + self._runtime.config.rollout.queue_samples)
        self._stats.concurrency_limit = limit

    def _on_engine_ready(self, client: EngineClient, version: int) -> None:
        # Engines load the base without the adapter that the run starts from.
        is_base_alone = bool(self._runtime.config.model.lora.path)
        is_outdated = self._engine.num_starts > 1 and self._buffers.newest_version > INITIAL_VERSION
        needs_push = version == INITIAL_VERSION and (is_base_alone or is_outdated)
        log.info(
            "engine ready, pid %d%s",
            self._engine.pid,
            ": it takes leases after the next push" if needs_push else "",
        )
        client.stop_texts.tokenizer = self._renderer
        self._runner.engine = client
        self._receiver.set_engine(client, version=version)
        state = ServerState.QUARANTINED if needs_push else ServerState.SERVING
        self._buffers.announce(state=state, weights_version=version)

    def _on_engine_lost(self) -> None:
        self._runner.engine = None
        self._receiver.set_engine(None)
        self._cancel_all(reason="engine lost")
        self._buffers.announce(state=ServerState.STARTING)
        self._stats.engine_lost()

    def _cancel_all(self, *, reason: str) -> None:
        """Gives all leases back: other servers, or this one later, make the samples from scratch."""
        self._runner.cancel(
            self._buffers.give_back(reason=reason), reason=f"its sample was given up: {reason}"
        )

    def _on_version(self, version: int) -> None:
        if self._buffers.state is not ServerState.DRAINING:
            self._buffers.announce(state=ServerState.SERVING, weights_version=version)

    def _on_quarantine(self, reason: str, version: int) -> None:
        """Quarantines an engine that holds part of an update: it is reloaded, and its tokens are not
        delivered."""
        log.error("engine is quarantined: %s", reason)
        self._cancel_all(reason="engine quarantined")
        self._receiver.version = version
        if self._buffers.state is not ServerState.DRAINING:
            self._buffers.announce(state=ServerState.QUARANTINED, weights_version=version)

    def _replace_engine(self, reason: str) -> None:
        self._supervisor.replace(reason)

    def _hello(self) -> Hello:
        runtime, config, task = self._runtime, self._runtime.config, self._tasks[""]
        model, tokenizer = self._fingerprints
        eval_tasks = {name: task for name, task in self._tasks.items() if name}
        return Hello(
            role=Role.ROLLOUT,
            name=runtime.name,
            process=runtime.process,
            job=config.name,
            model=model,
            tokenizer=tokenizer,
            dataset=dataset_fingerprint(config),
            content=task.fingerprint(),
            eval_content=content_of(eval_tasks),
            settings=shared_settings(config, Role.ROLLOUT),
            http_address=runtime.http_address,
            weights_address=self._weights_address,
            sessions_url="" if self._plane is None else self._plane.external_url,
            weights_version=self._receiver.version,
            dtype=compute_dtype(config),
            device=config.rollout.engine_device,
            num_train_prompts=task.num_train,
            source_sizes=[source.size for source in task.sources],
            source_weights=[source.weight for source in task.sources],
            eval_sets={name: task.num_eval for name, task in eval_tasks.items()},
        )

    async def _engine_metrics(self) -> bytes:
        """Returns the engine's metrics page, for clients that do not have the engine's key."""
        client = self._supervisor.client
        if client is None:
            raise EngineError("no engine is running")
        return await client.metrics()

    def _trouble(self) -> str:
        """Returns why a server that is otherwise ready makes no samples."""
        wait, seconds = max(self._supervisor.waits().items(), key=lambda each: each[1], default=("", 0.0))
        return f"{wait} for {seconds:.0f} s" if seconds > _FROZEN_S else ""

    def _status(self) -> dict[str, Any]:
        client = self._supervisor.client
        return {
            "state": self._buffers.state.value,
            "engine_pid": self._engine.pid,
            "engine_url": client.base_url if client is not None else "",
            "leases": self._buffers.lease_ids,
            "refused_samples": self._buffers.num_refused,
            "journals": dataclasses.asdict(self._book.journals),
            "stats": self._stats.values,
        }
