"""The selection of a default method: which trials it runs, how many, resumption, and its rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from areal_like.runtime.command_line import load_config
from benchmarks.selection import Campaign, as_table
from benchmarks.selection_rule import (
    FACTORS,
    LAGS,
    MAX_RUNS,
    METHODS,
    PRESENT,
    Done,
    chosen,
    final,
    finalists,
    has_gradients_of_sequences,
    leaders,
    mean_greedy,
    scores,
    stage_1,
    stage_2,
    standings,
    trial_of,
    verdicts,
)
from benchmarks.selection_trial import (
    JOBS,
    Point,
    Trial,
    TrialResult,
    points_of,
    run_at_fixed_age,
    write_model,
)
from benchmarks.staleness import Results
from tests.support.quick import only_in_chaos


def result(*, greedy: float = 0.9, seconds: float = 10.0, collapsed: bool = False) -> TrialResult:
    """A run whose greedy reward jumps from .2 to `greedy` at once."""
    points = (
        Point(step=0, seconds=0.0, greedy=0.2),
        Point(step=1, seconds=0.0, greedy=greedy),
        Point(step=9, seconds=seconds, greedy=greedy),
    )
    return TrialResult(
        points=points, reward=0.0 if collapsed else 0.7, best=0.7, greedy=greedy, entropy=0.3, ess_ratio=0.8,
        lag=4.0, samples=1000, seconds=seconds, wall_s=12.0, cpu_s=11.0,
    )  # fmt: skip


def complete(stage: Callable[[Done], list[Trial]], run: Callable[[Trial], TrialResult], done: Done) -> Done:
    """Runs what a stage calls for, until it calls for nothing new."""
    found = dict(done)
    while missing := [trial for trial in stage(list(found.items())) if trial not in found]:
        found |= {trial: run(trial) for trial in missing}
    return list(found.items())


def rank_of(trial: Trial) -> float:
    """Methods in the order of METHODS, the later the better; twice the rate is a little better."""
    return 0.5 + 0.05 * list(METHODS).index(trial.method) + 0.01 * (trial.factor == 2)


def test_mean_of_greedy_reward_over_seconds() -> None:
    points = [Point(step=i, seconds=10.0 * i, greedy=g) for i, g in enumerate((0.0, 1.0, 0.5))]
    assert mean_greedy(points, 10) == pytest.approx(0.5)
    assert mean_greedy(points, 5) == pytest.approx(0.25), "linear between the points"
    assert mean_greedy(points, 40) == pytest.approx((5 + 7.5 + 10) / 40), "the last value stays"


def test_score_counts_the_seconds_that_all_have() -> None:
    """A slower trial is compared over the time of the faster one; a collapsed one does not set the time."""
    slow, fast, short = (
        trial_of("long", method, lag=4, factor=1, seed=0) for method in ("VCPO", "tis", "GSPO")
    )
    rising = tuple(Point(step=i, seconds=10.0 * i, greedy=0.2 * i) for i in range(3))
    done = [
        (slow, replace(result(seconds=20.0), points=rising)),
        (fast, result(greedy=0.8, seconds=10.0)),
        (short, result(greedy=0.1, seconds=1.0, collapsed=True)),
    ]
    assert scores(done) == pytest.approx({slow: 0.1, fast: 0.8, short: 0.1})


def test_a_collapse_is_seen_in_either_reward() -> None:
    assert not result().has_collapsed
    assert replace(result(), reward=0.24, best=0.7).has_collapsed
    assert not replace(result(), reward=0.34, best=0.7).has_collapsed, "within noise of 256 rewards"
    assert result(greedy=0.13).has_collapsed
    assert not result(greedy=0.14).has_collapsed, "within noise of 256 prompts"


def test_stage_1_checks_three_times_the_rate_and_fresh_samples() -> None:
    """Everything collapses at 6 times the rate and nothing at 3: so twice the rate cannot be chosen."""

    def run(trial: Trial) -> TrialResult:
        return result(greedy=rank_of(trial), collapsed=trial.factor == 6)

    first = stage_1([])
    assert len(first) == len(METHODS) * 2 * len(FACTORS) == 42
    done = complete(stage_1, run, [])
    extra = [trial for trial, _ in done if trial not in first]
    best = ["token TIS, band", "decoupled PPO", "GSPO"]
    assert {(t.method, t.lag, t.factor) for t in extra} == {
        (method, lag, factor) for method in [*best, PRESENT] for lag, factor in ((4, 3.0), (0, 1.0))
    }
    assert [s.method for s in leaders(done)] == [*best, PRESENT]
    assert all(s.holds and s.factor == 1 for s in leaders(done))
    assert [s.method for s in finalists(done)] == [*best[:2], PRESENT]


def test_a_method_that_collapses_is_replaced_by_the_next() -> None:
    """The best method collapses at three times its rate: the fourth is checked in its place."""

    def run(trial: Trial) -> TrialResult:
        is_best = trial.method == "token TIS, band"
        return result(greedy=rank_of(trial), collapsed=trial.factor == 6 or (is_best and trial.factor == 3))

    done = complete(stage_1, run, [])
    assert [s.method for s in leaders(done)] == ["decoupled PPO", "GSPO", "VESPO", PRESENT]
    assert all(s.holds for s in leaders(done))


def test_the_better_rate_is_chosen_where_it_holds() -> None:
    done = complete(stage_1, lambda trial: result(greedy=rank_of(trial)), [])
    assert {s.factor for s in standings(done)} == {2.0}
    assert len(done) == 42 + 8, "six times the rate held: nothing else to check"


@pytest.mark.parametrize("survivors", [0, 1, 7])
def test_no_more_runs_than_allowed(survivors: int) -> None:
    """Whatever collapses: at most 150 trials, and the agents' are the ones that are left out."""
    holding = list(METHODS)[::-1][:survivors]

    def run(trial: Trial) -> TrialResult:
        return result(
            greedy=rank_of(trial),
            collapsed=trial.factor == 6 or (trial.factor == 3 and trial.method not in holding),
        )

    first = complete(stage_1, run, [])
    done = complete(stage_2, run, first)
    assert len(done) <= MAX_RUNS == 150
    second = stage_2(done)
    if survivors == 7:
        expected = {(job, lag) for job, lags in LAGS.items() for lag in lags}
        assert {(t.job, t.lag) for t in second} == expected
        assert len(second) == 3 * 3 * len(expected) == 90
    assert {trial.method for trial in second} >= {PRESENT}
    assert not {t.seed for t in second} & {t.seed for t, _ in first}


def second_stage(run: Callable[[Trial], TrialResult]) -> tuple[Done, list[Trial]]:
    done = complete(stage_1, lambda trial: result(greedy=rank_of(trial)), [])
    done = complete(stage_2, run, done)
    return done, stage_2(done)


def test_the_default_stays_within_noise() -> None:
    noise = {101: 0.0, 102: 0.02, 103: -0.02}

    def run(trial: Trial) -> TrialResult:
        return result(greedy=0.9 if trial.method == PRESENT else 0.901 + noise[trial.seed])

    found = verdicts(*second_stage(run))
    assert {v.method for v in found} == {"token TIS, band", "decoupled PPO", PRESENT}
    assert found[-1].method == PRESENT and not found[-1].reasons
    assert chosen(found) == PRESENT


def test_the_best_method_is_chosen_if_it_is_beyond_noise() -> None:
    def run(trial: Trial) -> TrialResult:
        better = {"token TIS, band": 0.05, "decoupled PPO": 0.02}.get(trial.method, 0.0)
        return result(greedy=0.9 + better + 0.001 * (trial.seed % 2))

    done, second = second_stage(run)
    found = verdicts(done, second)
    assert chosen(found) == "token TIS, band"
    assert "0.050 behind" in found[-1].reasons[0]
    last = final(done, method="token TIS, band", seeds=(7, 8, 9))
    assert len(last) == 2 * 4 * 3 and {t.method for t in last} == {"token TIS, band", PRESENT}
    assert not {t.seed for t in last} & {t.seed for t, _ in done}


def test_a_method_that_is_worse_on_one_job_is_not_chosen() -> None:
    """It learns fastest, but ends with a lower greedy reward on the tool job: the second is chosen, which is
    within noise of it."""
    noise = {101: 0.004, 102: -0.004, 103: 0.0}

    def run(trial: Trial) -> TrialResult:
        better = {"token TIS, band": 0.05, "decoupled PPO": 0.0495 + noise[trial.seed]}
        one = result(greedy=0.9 + better.get(trial.method, 0.0))
        is_worse = (trial.method, trial.job) == ("token TIS, band", "tool")
        return replace(one, greedy=0.8) if is_worse else one

    found = verdicts(*second_stage(run))
    assert [v.method for v in found] == ["token TIS, band", "decoupled PPO", PRESENT]
    assert found[0].reasons == ("greedy reward on tool 0.100 below tis's, noise 0.000",)
    assert found[1].reasons == ()
    assert chosen(found) == "decoupled PPO"


def test_a_collapse_in_stage_2_rules_a_method_out() -> None:
    def run(trial: Trial) -> TrialResult:
        is_best = trial.method == "token TIS, band"
        collapsed = is_best and (trial.job, trial.lag, trial.seed) == ("long", 16, 102)
        return result(greedy=0.95 if is_best else 0.9, collapsed=collapsed)

    found = verdicts(*second_stage(run))
    assert "collapsed: long/token TIS, band/lag-16/x2/seed-102" in found[0].reasons
    assert chosen(found) == PRESENT


def test_no_candidate_needs_gradients_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(map(has_gradients_of_sequences, METHODS))
    monkeypatch.setitem(METHODS, "ghost", ("objective=vcpo", "objective.norms=ghost"))
    assert has_gradients_of_sequences("ghost")


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("lag", [0, *only_in_chaos(4, 16)])
def test_settings_of_every_trial_are_a_job(job: str, lag: int) -> None:
    for method in METHODS:
        config = load_config(trial_of(job, method, lag=lag, factor=2, seed=1).arguments)
        assert config.trainer.lr == pytest.approx(2 * JOBS[job].lr)
        assert (config.max_staleness, config.overdue, config.seed) == (lag, "wait", 1)


def test_present_rates_are_those_of_the_jobs() -> None:
    for name in ("default", "tool", "agents"):
        assert JOBS[name].lr == load_config(JOBS[name].settings).trainer.lr


def test_finished_trials_are_read_back_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "selection.jsonl"
    results = Results[Trial, TrialResult](path, TrialResult.read)
    done = complete(stage_1, lambda trial: result(greedy=rank_of(trial)), [])
    for trial, one in done[:-1]:
        results.add(trial, one)
    with path.open("a") as file:
        file.write('{"cell": {"job": "def')  # killed while writing

    campaign = Campaign(path)
    assert campaign.done == list(done[:-1])
    assert asdict(campaign.done[0][0])["settings"] == METHODS[done[0][0].method]
    planned = set(campaign.planned("1"))
    assert planned - {trial for trial, _ in campaign.done} == {done[-1][0]}
    with pytest.raises(SystemExit, match="stage 1 is not finished"):
        campaign.planned("2")
    results.add(*done[-1])
    assert len(Campaign(path).planned("2")) == 90
    with pytest.raises(SystemExit, match="stage 2 is not finished"):
        Campaign(path).planned("final", seeds=[1])
    report = Campaign(path).report()
    assert "Stage 1 (50 of 50 trials)" in report and "Stage 2 (0 of 90 trials)" in report


def test_points_of_a_job_are_at_the_steps_of_their_weights() -> None:
    """The second evaluation was asked for after step 3, and the engine had the weights of step 2."""
    rows = [{"time_unix_s": 100.0 + 2 * i, "step_s": 2.0} for i in range(4)]
    evaluations = [
        {"oldest_step": 0, "avg": 0.1},
        {"oldest_step": 2, "avg": 0.5},
        {"oldest_step": 4, "avg": 0.6},
    ]
    assert points_of(evaluations, rows) == (
        Point(step=0, seconds=0.0, greedy=0.1),
        Point(step=2, seconds=4.0, greedy=0.5),
        Point(step=4, seconds=8.0, greedy=0.6),
    )


def test_table_has_means_over_seeds() -> None:
    trials = [trial_of("long", "VCPO", lag=4, factor=1, seed=seed) for seed in (1, 2)]
    done = [(trials[0], result(greedy=0.8)), (trials[1], result(greedy=0.9, collapsed=True))]
    cells = [cell.strip() for cell in as_table(done, trials).splitlines()[2].strip("| ").split("|")]
    assert cells == [
        *("long", "4", "VCPO", "1", "0.850 (0.800)", "0.350", "0.850", "0.30", "10", "11", "12", "1000"),
        *("4.0", "1 of 2"),
    ]


@pytest.mark.slow
@pytest.mark.long
def test_a_trial_at_fixed_age(tmp_path: Path) -> None:
    trial = replace(
        trial_of("default", "token TIS, band", lag=2, factor=1, seed=3),
        settings=(*METHODS["token TIS, band"], "model.warm_start_steps=150"),
        num_steps=4,
    )
    write_model(str(tmp_path / "model"), trial)
    found = run_at_fixed_age(trial, str(tmp_path / "model"))
    assert [point.step for point in found.points] == [0, 1, 2, 3, 4]
    seconds = [point.seconds for point in found.points]
    assert seconds == sorted(seconds) and 0 < found.seconds == seconds[-1] <= found.cpu_s
    assert (found.lag, found.samples) == (1.25, 4 * 128)
    assert found.entropy > 0 and 0 < found.greedy <= 1 and found.ess_ratio < 1
