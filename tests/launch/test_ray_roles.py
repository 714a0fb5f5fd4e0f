"""Which roles of a run on Ray begin again, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from areal_like.config import from_mapping
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.restarts import RestartState
from launch.cli import main
from launch.ray.cluster import Cluster, RayOptions, Resources
from launch.ray.driver import (
    Driver,
    Started,
    as_driver,
    directory_of,
    has_driver,
    want_servers,
    wanted_servers,
)
from launch.ray.roles import HEALTHY_S, RoleState, Supervision


def supervision(*, max_failures: int = 2) -> Supervision:
    found = Supervision(max_failures=max_failures)
    for role in ("buffer", "trainer", "scorer", "router", "rollout", "rollout"):
        found.add(role, now_s=0.0).begin(now_s=0.0)
    return found


def role_of(one: Supervision, role: str) -> RoleState:
    return next(each for each in one.roles if each.role == role)


@pytest.mark.parametrize("code", [None, 1, 137])
def test_a_lost_or_failed_role_begins_again(code: int | None) -> None:
    one = supervision()
    trainer = role_of(one, "trainer")
    assert "is restarted" in one.ended(trainer, code, now_s=100.0)
    assert trainer.restarts.state is RestartState.WAITING and 100 < trainer.restarts.due_s <= 102
    assert not trainer.is_over and not one.is_stopping


@pytest.mark.parametrize(
    ("role", "ends_run"), [("trainer", True), ("buffer", True), ("scorer", True), ("rollout", False)]
)
def test_failures_in_a_row_are_bounded(role: str, ends_run: bool) -> None:
    one = supervision()
    failing = role_of(one, role)
    for _ in range(2):
        one.ended(failing, 1, now_s=10.0)
        assert not failing.is_over
        failing.begin(now_s=11.0)
    one.ended(failing, 1, now_s=10.0)
    assert failing.is_over and one.is_stopping == ends_run and one.exit_code == (1 if ends_run else 0)


def test_long_starts_and_lost_nodes_are_no_failures_in_a_row() -> None:
    one = supervision(max_failures=1)
    server = role_of(one, "rollout")
    for start_s in range(1000, 6000, 1000):
        one.ended(server, 1, now_s=start_s + HEALTHY_S + 1)
        server.begin(now_s=start_s + HEALTHY_S + 2)
        one.ended(server, None, now_s=start_s + HEALTHY_S + 3)
        server.begin(now_s=start_s + 1000.0)
    assert not server.is_over and server.restarts.num_failures == 1


def test_a_wrong_setting_ends_the_run() -> None:
    one = supervision()
    assert "the run ends" in one.ended(role_of(one, "rollout"), 2, now_s=1.0)
    assert one.is_stopping and one.exit_code == 2
    for role in one.roles:
        one.ended(role, None, now_s=2.0)
    assert one.is_over


@pytest.mark.parametrize(("role", "drains_all"), [("trainer", True), ("rollout", False), ("scorer", True)])
def test_a_drained_trainer_drains_the_run(role: str, drains_all: bool) -> None:
    one = supervision()
    one.ended(role_of(one, role), 75, now_s=1.0)
    assert one.is_stopping == drains_all and one.exit_code == 0


def test_a_drained_score_server_leaves_the_others() -> None:
    one = supervision()
    second = one.add("scorer", now_s=0.0)
    one.ended(role_of(one, "scorer"), 75, now_s=1.0)
    assert not one.is_stopping
    one.ended(second, 75, now_s=2.0)
    assert one.is_stopping


def test_nothing_begins_again_when_the_run_is_finished() -> None:
    one = supervision()
    one.ended(role_of(one, "rollout"), 0, now_s=1.0)
    assert one.is_finished and not one.is_stopping
    for role in one.roles:
        one.ended(role, 1, now_s=2.0)
    assert one.is_over and one.exit_code == 0


def test_who_drains_stays_away_and_numbers_are_not_used_twice() -> None:
    one = supervision()
    first, second = one.servers()
    one.ended(second, 75, now_s=1.0)
    assert one.servers() == [first] and not one.is_stopping
    assert one.add("rollout", now_s=2.0).number == 2


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([0, 75], 75), ([75, None], None), ([None, 1], 1), ([1, 2], 2), ([137, 0], 137)],
)
def test_nodes_of_a_trainer_end_as_one(codes: list[int | None], code: int | None) -> None:
    started = Started([], [])
    started.codes = dict(enumerate(codes))
    assert started.code == code


def test_scale_tells_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = RunPaths(tmp_path / "runs" / "x")
    directory_of(paths).mkdir(parents=True)
    assert wanted_servers(paths) is None and not has_driver(paths)
    with as_driver(paths):
        assert has_driver(paths)
        want_servers(paths, 3)
        assert wanted_servers(paths) == 3
        with pytest.raises(ConfigError, match="another `areal-like submit --ray` runs"), as_driver(paths):
            pass
    with pytest.raises(ConfigError, match="no driver runs"):
        want_servers(paths, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slurm"], "give --slurm or --ray"),
        (["--partition", "gpu"], "--partition is an option of Slurm"),
        (["--cpus=-1"], "--cpus of at least 0"),
        (["--max-failures=-1"], "--max-failures -1: use at least 0"),
    ],
)
def test_a_mistake_is_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--ray", "name=x", "security.insecure=true", *words]) == 2
    assert message in capsys.readouterr().err


class _FullCluster:
    """Has the resources of the first reservation only."""

    def __init__(self) -> None:
        self.num_requests = 0

    def reserve(self, bundles: Sequence[Resources]) -> list[tuple[Any, int]]:
        self.num_requests += 1
        if self.num_requests > 1:
            raise ArealError("Ray does not have the resources")
        return [(None, index) for index in range(len(bundles))]


def test_a_full_cluster_is_asked_once(tmp_path: Path) -> None:
    config = from_mapping({"name": "x", "runs_dir": str(tmp_path)})
    paths, cluster = RunPaths.of(config), _FullCluster()
    directory_of(paths).mkdir(parents=True)
    driver = Driver(config, RayOptions(), cast(Cluster, cluster), num_servers=1)
    with as_driver(paths):
        want_servers(paths, 4)
        for now_s in (0.0, 1.0):
            driver._scale(now_s)
    assert cluster.num_requests == 2 and len(driver._supervision.servers()) == 1


def test_score_servers_and_routers_are_placed_and_end_last(tmp_path: Path) -> None:
    settings = {"scorer": {"path": "rm", "num_servers": 2, "device": "cuda"}, "sessions": {"num_routers": 1}}
    config = from_mapping({"name": "x", "runs_dir": str(tmp_path)} | settings)
    bundles: list[Resources] = []

    class Reserving(_FullCluster):
        def reserve(self, wanted: Sequence[Resources]) -> list[tuple[Any, int]]:
            bundles.extend(wanted)
            return super().reserve(wanted)

    driver = Driver(config, RayOptions(), cast(Cluster, Reserving()), num_servers=1)
    roles = driver._supervision.roles
    assert [role.name for role in roles] == [
        "the buffer", "the trainer", "score server 0", "score server 1", "router 0", "rollout server 0",
    ]  # fmt: skip
    assert [each.get("GPU", 0) for each in bundles] == [0, 0, 1, 1, 0, 0]
    stopped: list[RoleState] = []
    driver._started = {role: cast(Started, role) for role in roles}
    driver._stop = lambda started: stopped.append(cast(RoleState, started))  # type: ignore[method-assign]
    for role in (roles[0], roles[1], roles[-1]):
        driver._stop_side_roles()
        assert not stopped, "servers still use them"
        driver._supervision.ended(role, 0, now_s=1.0)
        del driver._started[role]
    driver._stop_side_roles()
    assert stopped == roles[2:5]
