"""The trials of the selection and its rule, as functions of the results so far. `benchmarks.selection` states
the rule in words.

    stage 1   rates at lag 4 -> rates at three times the leaders' -> leaders at lag 0 -> two finalists
    stage 2   the finalists and the present default, all jobs and lags, fresh seeds -> one method
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from areal_like.runtime.command_line import load_config
from benchmarks.selection_trial import JOBS, Point, Trial, TrialResult
from trainer.step.recipe import StepRecipe

METHODS: dict[str, tuple[str, ...]] = {
    "tis": ("objective=tis",),
    "VCPO": ("objective=vcpo", "objective.norms=proxy"),
    "VCPO, leave one out": ("objective=vcpo", "objective.norms=proxy", "objective.leave_one_out=true"),
    "VESPO": ("objective=vespo",),
    "GSPO": ("objective=gspo", "trainer.normalizer=seq_mean_token_mean"),
    "decoupled PPO": ("objective=decoupled_ppo",),
    "token TIS, band": (
        "objective=tis",
        "objective.level=token",
        "objective.masks=[{name: band, level: geometric, low: 0.5, high: 2.0}]",
    ),
}
"""Label -> the settings of a job with the method."""
PRESENT = "tis"
"""The default when the trials were run, which stays unless another method is chosen."""
MAX_RUNS = 150
"""Trials of both stages together."""
STAGE_1_JOBS = ("default", "long")
FACTORS = (1.0, 2.0, 6.0)
"""Multiples of a job's learning rate that are tried. The last one shows whether the second holds."""
CHOICES = (1.0, 2.0)
"""Multiples that can be chosen: a method has one for all jobs."""
SAFETY = 3.0
"""A chosen rate must not collapse at this multiple of it."""
NUM_LEADERS, NUM_FINALISTS = 3, 2
LAGS = {"default": (0, 4, 16), "long": (0, 4, 16), "tool": (0, 4, 16), "agents": (4,)}
"""Lags of stage 2. The agents' samples are less than one step old on average, whatever the bound."""
SEED = 100
"""Of stage 1."""
STAGE_2_SEEDS = (101, 102, 103)

Done = Sequence[tuple[Trial, TrialResult]]


def trial_of(
    job: str, method: str, *, lag: int, factor: float, seed: int, num_steps: int | None = None
) -> Trial:
    """A trial of the job's length, or of `num_steps`."""
    return Trial(
        job=job,
        method=method,
        settings=METHODS[method],
        lag=lag,
        factor=factor,
        seed=seed,
        num_steps=num_steps or JOBS[job].num_steps,
    )


def mean_greedy(points: Sequence[Point], until_s: float) -> float:
    """Mean of the greedy reward over the first `until_s` seconds of training, linear between the points.

    After the last point it stays as it is there.
    """
    total = 0.0
    for first, second in itertools.pairwise(points):
        if first.seconds >= until_s:
            break
        span = second.seconds - first.seconds
        end = min(second.seconds, until_s)
        reached = first.greedy + (second.greedy - first.greedy) * (
            (end - first.seconds) / span if span else 1.0
        )
        total += (end - first.seconds) * (first.greedy + reached) / 2
    last = points[-1]
    return (total + max(0.0, until_s - last.seconds) * last.greedy) / until_s


def scores(done: Done) -> dict[Trial, float]:
    """Trial -> its greedy reward per second: `mean_greedy` until the shortest training of those with the same
    job and lag that did not collapse has ended."""
    ended: dict[tuple[str, int], list[TrialResult]] = defaultdict(list)
    for trial, result in done:
        ended[trial.job, trial.lag].append(result)
    shortest = {
        place: min(r.seconds for r in ([r for r in results if not r.has_collapsed] or results))
        for place, results in ended.items()
    }
    return {trial: mean_greedy(result.points, shortest[trial.job, trial.lag]) for trial, result in done}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A method at one rate, after stage 1."""

    method: str
    factor: float
    score: float
    """Mean over the jobs at lag 4."""
    holds: bool | None
    """It does not collapse at SAFETY times the rate; None: not yet known."""


def standings(done: Done) -> list[Standing]:
    """Each method's best rate that holds or may hold, best method first; methods without one are left out."""
    stage = [(trial, result) for trial, result in done if trial.seed == SEED]
    at = {(t.job, t.method, t.factor): (t, r) for t, r in stage if t.lag == 4}
    score = scores([pair for pair in at.values() if pair[0].factor in FACTORS])
    found = []
    for method in METHODS:
        options = []
        for factor in CHOICES:
            pairs = [at[job, method, factor] for job in STAGE_1_JOBS if (job, method, factor) in at]
            if len(pairs) < len(STAGE_1_JOBS) or any(result.has_collapsed for _, result in pairs):
                continue
            verdicts = [_holds(at, job, method, factor) for job in STAGE_1_JOBS]
            holds = False if False in verdicts else None if None in verdicts else True
            mean = statistics.fmean(score[trial] for trial, _ in pairs)
            options.append(Standing(method=method, factor=factor, score=mean, holds=holds))
        possible = [option for option in options if option.holds is not False]
        if possible:
            found.append(max(possible, key=lambda option: option.score))
    return sorted(found, key=lambda standing: -standing.score)


def _holds(
    at: dict[tuple[str, str, float], tuple[Trial, TrialResult]], job: str, method: str, factor: float
) -> bool | None:
    """Whether a method survives SAFETY times a rate on a job, from trials at this rate or beyond it."""
    rates = sorted((f, r.has_collapsed) for (j, m, f), (_, r) in at.items() if (j, m) == (job, method))
    if any(collapsed for rate, collapsed in rates if rate <= SAFETY * factor):
        return False
    if any(rate >= SAFETY * factor and not collapsed for rate, collapsed in rates):
        return True
    return None


def leaders(done: Done) -> list[Standing]:
    """The best methods after the trials at lag 4, and the present default."""
    ranked = standings(done)
    others = [standing for standing in ranked if standing.method != PRESENT][:NUM_LEADERS]
    as_it_is = Standing(method=PRESENT, factor=1.0, score=0.0, holds=False)
    return [*others, next((standing for standing in ranked if standing.method == PRESENT), as_it_is)]


def finalists(done: Done) -> list[Standing]:
    """The two best of the leaders by their mean over the lags 0 and 4, and the present default."""
    stage = [(trial, result) for trial, result in done if trial.seed == SEED]
    score = scores([pair for pair in stage if pair[0].factor in CHOICES])

    def mean(standing: Standing) -> float:
        own = [
            value
            for trial, value in score.items()
            if (trial.method, trial.factor) == (standing.method, standing.factor)
        ]
        return statistics.fmean(own)

    found = leaders(done)
    others = sorted((s for s in found if s.method != PRESENT), key=lambda s: -mean(s))[:NUM_FINALISTS]
    return [*others, *(s for s in found if s.method == PRESENT)]


def stage_1(done: Done, *, num_steps: int | None = None) -> list[Trial]:
    """The trials of stage 1 that the results so far call for, finished ones included."""
    trials = [
        trial_of(job, method, lag=4, factor=factor, seed=SEED, num_steps=num_steps)
        for factor in FACTORS
        for job in STAGE_1_JOBS
        for method in METHODS
    ]
    finished = {trial for trial, _ in done}
    if not finished.issuperset(trials):
        return trials
    # Every trial at three times a rate that was called for stays part of the stage, whatever its result.
    checks = [t for t in finished if t.seed == SEED and t.lag == 4 and t.factor not in FACTORS]
    pending = [
        trial_of(job, standing.method, lag=4, factor=SAFETY * standing.factor, seed=SEED, num_steps=num_steps)
        for standing in leaders(done)
        if standing.holds is None
        for job in STAGE_1_JOBS
        if not _is_known(done, job, standing)
    ]
    trials += sorted(checks, key=lambda trial: trial.name)
    if pending:
        return trials + pending
    return trials + [
        trial_of(job, standing.method, lag=0, factor=standing.factor, seed=SEED, num_steps=num_steps)
        for standing in leaders(done)
        for job in STAGE_1_JOBS
    ]


def _is_known(done: Done, job: str, standing: Standing) -> bool:
    at = {(t.job, t.method, t.factor): (t, r) for t, r in done if t.seed == SEED and t.lag == 4}
    return _holds(at, job, standing.method, standing.factor) is not None


def stage_2(done: Done, *, seeds: Sequence[int] = STAGE_2_SEEDS, num_steps: int | None = None) -> list[Trial]:
    """The trials of stage 2, seed by seed; empty while stage 1 is not finished.

    Those beyond MAX_RUNS are left out; the last ones are those of the agents.
    """
    first = stage_1(done, num_steps=num_steps)
    finished = {trial for trial, _ in done}
    if not finished.issuperset(first):
        return []
    trials = [
        trial_of(job, standing.method, lag=lag, factor=standing.factor, seed=seed, num_steps=num_steps)
        for job in JOBS
        for seed in seeds
        for lag in LAGS[job]
        for standing in finalists(done)
    ]
    return trials[: MAX_RUNS - len(first)]


def final(done: Done, *, method: str, seeds: Sequence[int], num_steps: int | None = None) -> list[Trial]:
    """The trials behind the published figures: the chosen method and the present default at lag 4, with seeds
    that chose nothing. They do not count in MAX_RUNS."""
    rates = {standing.method: standing.factor for standing in finalists(done)}
    return [
        trial_of(job, name, lag=4, factor=rates[name], seed=seed, num_steps=num_steps)
        for job in JOBS
        for seed in seeds
        for name in dict.fromkeys((method, PRESENT))
    ]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the rule says of one method after stage 2."""

    method: str
    factor: float
    score: float
    """Mean greedy reward per second over jobs, lags and seeds."""
    behind: float
    """Mean of the paired differences from the best method."""
    noise: float
    """Twice their standard error."""
    reasons: tuple[str, ...]
    """Why it cannot be chosen; empty: it can."""


def verdicts(done: Done, stage: Iterable[Trial]) -> list[Verdict]:
    """The finalists' verdicts, best first, from the finished trials of stage 2."""
    wanted = set(stage)
    pairs = [(trial, result) for trial, result in done if trial in wanted]
    score, result_of = scores(pairs), dict(pairs)
    by_method: dict[str, dict[tuple[str, int, int], Trial]] = defaultdict(dict)
    for trial in score:
        by_method[trial.method][trial.job, trial.lag, trial.seed] = trial
    # Only places where every method has a result.
    common = set.intersection(*(set(own) for own in by_method.values())) if by_method else set()
    if not common:
        return []
    means = {
        method: statistics.fmean(score[own[place]] for place in common) for method, own in by_method.items()
    }
    best = max(means, key=means.__getitem__)
    holds = {standing.method: standing.holds for standing in finalists(done)}
    found = []
    for method, own in by_method.items():
        behind, noise = _difference([score[by_method[best][p]] - score[own[p]] for p in common])
        reasons = []
        if behind > noise:
            reasons.append(f"{behind:.3f} behind {best}, noise {noise:.3f}")
        if not holds.get(method):
            reasons.append(f"not shown to survive {SAFETY:g} times its rate")
        collapsed = sorted(own[p].name for p in common if result_of[own[p]].has_collapsed)
        if collapsed:
            reasons.append(f"collapsed: {', '.join(collapsed)}")
        if has_gradients_of_sequences(method):
            reasons.append("gradients of single sequences")
        for job in sorted({p[0] for p in common}) if PRESENT in by_method else []:
            lower, own_noise = _difference(
                [
                    result_of[by_method[PRESENT][p]].greedy - result_of[own[p]].greedy
                    for p in common
                    if p[0] == job
                ]
            )
            if lower > own_noise:
                reasons.append(f"greedy reward on {job} {lower:.3f} below {PRESENT}'s, noise {own_noise:.3f}")
        factor = next(iter(own.values())).factor
        found.append(
            Verdict(
                method=method,
                factor=factor,
                score=means[method],
                behind=behind,
                noise=noise,
                reasons=tuple(reasons),
            )
        )
    return sorted(found, key=lambda verdict: -verdict.score)


def chosen(found: Sequence[Verdict]) -> str:
    """The present default if it can be chosen or nothing else can, else the best method that can."""
    possible = [verdict.method for verdict in found if not verdict.reasons]
    return PRESENT if PRESENT in possible or not possible else possible[0]


def has_gradients_of_sequences(method: str) -> bool:
    """True if the method needs the gradient of every single sequence."""
    recipe = StepRecipe.of(load_config([*METHODS[method], "buffer.overdue=wait"]))
    return recipe.objective.late_coefficients


def _difference(values: Sequence[float]) -> tuple[float, float]:
    """(mean, twice its standard error) of paired differences; with a single one the error is 0."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), 2 * spread / len(values) ** 0.5
