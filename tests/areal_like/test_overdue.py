"""`buffer.overdue`: what `auto` resolves to, and the settings that contradict `close`."""

from pathlib import Path

import pytest

from areal_like.errors import ConfigError
from areal_like.runtime.command_line import CONFIGS, load_config, save_config
from buffer.settings import LedgerSettings
from tests.support.launching import ROOT

AUTO, CLOSE = "buffer.overdue=auto", "buffer.overdue=close"
CONTRADICTIONS = [
    (["max_staleness=0"], "max_staleness=0 waits .*: set max_staleness to at least 1"),
    (["max_staleness=auto"], "max_staleness=auto moves the bound .*: give max_staleness a number"),
    (
        ["buffer.group_filter=single_version"],
        r"buffer\.group_filter=single_version needs whole groups: set buffer\.group_filter to none or spread",
    ),
    (
        ["weights.update_mode=drain", "weights.sync_interval=2"],
        r"weights\.update_mode=drain with weights\.sync_interval=2 .*: set weights\.update_mode=recompute",
    ),
    (["advantage=remax"], r"sampling\.greedy_baseline=true .*: set sampling\.greedy_baseline=false"),
    (["objective=oapl"], r"single_version needs whole groups"),
    (["objective=rebel"], r"objective\.name=rebel needs whole groups: choose another objective"),
    (["advantage=prime"], r"advantage\.name=prime needs .* whole groups: choose another advantage"),
    (["objective=online_dpo"], r"objective\.name=online_dpo needs whole groups"),
    (["objective=vcpo"], r"objective\.name=vcpo computes .*: set objective\.leave_one_out=true"),
    (
        ["advantage.shaping=[{name: overlong}, {name: grpo_lambda}]"],
        r"advantage\.shaping=grpo_lambda needs whole groups: leave it out",
    ),
    (
        ["advantage.turn_discount=0.9"],
        r"advantage\.turn_discount=0\.9 needs .*: set advantage.turn_discount=1",
    ),
    (["kl.coef=0.1", "kl.place=reward"], r"kl\.place=reward needs .*: set kl\.place=loss"),
    (
        ["max_staleness=8", "weights.sync_interval=6", "staleness.close_after=5"],
        r"staleness\.close_after=5 is less than weights\.sync_interval=6, .*close_after and max_staleness to "
        "at least 6",
    ),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS, ids=lambda one: " ".join(one)[:40])
def test_contradiction_is_refused_and_means_wait_with_auto(settings: list[str], message: str) -> None:
    with pytest.raises(
        ConfigError, match=f"buffer.overdue=close: .*{message}.*, or buffer.overdue=wait"
    ) as e:
        load_config([CLOSE, *settings])
    assert "\n" not in str(e.value)
    assert load_config([AUTO, *settings]).overdue == "wait"
    for rule in ("wait", "drop"):
        assert load_config([f"buffer.overdue={rule}", *settings]).overdue == rule


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["max_staleness=2"],
        ["max_staleness=16", "staleness.close_after=4", "staleness.beyond=ratio"],
        ["weights.sync_interval=3"],
        ["weights.update_mode=drain"],
        ["buffer.group_filter=spread", "buffer.num_shards=2"],
        ["advantage=gae"],
        ["objective=vcpo", "objective.leave_one_out=true"],
        ["objective=vcpo", "objective.baseline=none"],
        ["advantage=gae", "advantage.turn_discount=0.9", "kl.coef=0.1", "kl.place=reward"],
        ["advantage.shaping=[{name: overlong}]", "kl.coef=0.1"],
    ],
    ids=" ".join,
)
def test_auto_means_close_where_nothing_contradicts_it(settings: list[str]) -> None:
    config = load_config([AUTO, *settings])
    assert config.overdue == load_config([CLOSE, *settings]).overdue == "close"
    assert LedgerSettings.from_config(config).overdue == "close", "the buffer gets the resolved rule"


def test_auto_waits_for_classes_that_only_the_trainer_knows() -> None:
    for own in (
        "objective._target_=my.Objective",
        "advantage._target_=my.Advantage",
        "advantage.shaping=[{_target_: my.Shaping}]",
    ):
        assert load_config([AUTO, own]).overdue == "wait"
        assert load_config([CLOSE, own]).overdue == "close", "the trainer checks it"


def test_auto_waits_where_groups_would_be_closed_as_they_begin() -> None:
    assert load_config([AUTO, "max_staleness=1"]).overdue == "wait"
    assert load_config([AUTO, "max_staleness=1", "staleness.close_after=1"]).overdue == "close"
    assert load_config([CLOSE, "max_staleness=1"]).close_after == 1


def test_close_after_has_a_default_within_the_bound() -> None:
    for settings, steps in (
        (["max_staleness=16"], 4),
        (["max_staleness=3"], 3),
        (["max_staleness=16", "weights.sync_interval=4"], 7),
        (["max_staleness=5", "weights.sync_interval=4"], 5),
        (["max_staleness=16", "staleness.close_after=9"], 9),
    ):
        assert load_config([CLOSE, *settings]).close_after == steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([CLOSE, "staleness.close_after=5"], r"close_after=5 is beyond max_staleness=4: set .* at most 4"),
        ([AUTO, "staleness.close_after=5"], r"close_after=5 is beyond max_staleness=4: set .* at most 4"),
        (
            ["buffer.overdue=wait", "staleness.beyond=cap"],
            r"staleness\.beyond=cap is for buffer\.overdue=close: with wait no .*: set .*beyond=mask",
        ),
        (["buffer.overdue=drop", "staleness.beyond=ratio"], "with drop no token"),
        (
            [AUTO, "staleness.beyond=cap", "objective=rebel"],
            r"with wait, as auto resolves here \(objective\.name=rebel needs whole groups\), no token",
        ),
        (
            [AUTO, "staleness.beyond=cap", "objective._target_=my.Objective"],
            r"auto resolves here \(objective\._target_ may need whole groups\)",
        ),
        (["buffer.overdue=late"], r"buffer\.overdue=late: use one of auto, wait, drop, close"),
        (["staleness.beyond=drop"], r"staleness\.beyond=drop: use one of mask, cap, ratio"),
        (["staleness.close_after=-1"], r"staleness\.close_after must be at least 0"),
    ],
)
def test_mistake_names_the_settings_and_what_to_change(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(settings)
    assert "\n" not in str(caught.value)


def test_close_after_is_no_mistake_while_groups_are_not_closed() -> None:
    assert load_config(["staleness.close_after=5", "buffer.overdue=drop"]).overdue == "drop"


def test_a_run_keeps_its_rule(tmp_path: Path) -> None:
    own = ROOT / "tests" / "buffer" / "release_before" / "config.yaml"
    before = load_config(["--config", str(own)])
    assert "staleness" not in own.read_text().split() and before.overdue == "wait"
    save_config(before, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == before
    save_config(load_config([AUTO]), tmp_path / "auto.yaml")
    resumed = load_config(["--config", str(tmp_path / "auto.yaml"), "max_staleness=0"])
    assert (resumed.buffer.overdue, resumed.overdue) == ("auto", "wait")


PRESETS = [f"{file.parent.name}={file.stem}" for file in sorted(CONFIGS.glob("*/*.yaml"))]
WAITING = {f"objective={name}" for name in ("oapl", "rebel", "online_dpo", "sppo", "vcpo")} | {
    "advantage=remax",
    "advantage=prime",
}
JOBS = sorted([*CONFIGS.glob("jobs/*.yaml"), *CONFIGS.glob("scale/*.yaml")])


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith(("jobs=", "scale="))])
def test_every_preset_accepts_auto(preset: str) -> None:
    assert load_config([AUTO, preset]).overdue == ("wait" if preset in WAITING else "close")


@pytest.mark.parametrize("file", JOBS, ids=lambda file: str(file.stem))
def test_every_job_accepts_auto(file: Path) -> None:
    assert load_config(["--config", str(file), AUTO]).overdue == "close"
