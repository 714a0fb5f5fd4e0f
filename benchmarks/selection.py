"""Selects the default method: candidates compared on four jobs, by a rule that was written before the runs.

    python -m benchmarks.selection --stage 1 [--jobs 2]      at most 64 trials
    python -m benchmarks.selection --stage 2 [--jobs 2]      up to 150 in all, with seeds 101 to 103
    python -m benchmarks.selection --report                  tables and the verdict; runs nothing
    python -m benchmarks.selection --stage final --seeds 201 202 203

A trial is (job, method, lag, learning rate, seed); `benchmarks.selection_trial` runs one and says how ages
are made, `benchmarks.selection_rule` lists the trials and applies the rule. Finished trials are appended to
benchmarks/results/selection.jsonl and are not run again, so the benchmark may be stopped and restarted.
Trials with fixed ages run `--jobs` at a time with one thread each; real jobs run one after the other, and
need a quiet machine, because their seconds are wall time.

The candidates are VCPO with proxy norms, the same with each sample left out of its own baseline, VESPO, GSPO,
decoupled PPO, token TIS with a geometric band, and `tis`, the default until then. VCPO with exact or ghost
norms is not one: it needs the gradient of every sequence, which large models on GPUs cannot afford.

The rule
========

*Score.* Greedy reward is near its end after few steps, so neither its final value nor the time to a threshold
separates methods. A trial's score is the mean of its greedy held-out reward over the first T seconds of
training, where T is the shortest training of the trials on the same job with the same lag that did not
collapse. It is high for a method that learns fast and stays good. Reward at temperature 1 rises with
sharpening alone; it and the entropy are reported and do not decide.

*Collapse.* A trial has collapsed if its reward at temperature 1 over the last tenth is less than half of its
best over any tenth, or if its greedy reward ends below where it began, by more than noise (twice the standard
error; without it .64 -> .61 on 256 prompts would count, see docs/decisions/0019-default-method.md).

*Stage 1*, the jobs `default` and `long`, seed 100. Every method runs at 1, 2 and 6 times the job's learning
rate with samples of age 4. A method has one multiple for all jobs, 1 or 2: the one with the better score, if
the method does not collapse on either job at three times that rate (where 6 times the job's rate does not
show it, a trial at exactly three times does). A method without such a multiple is out. The three best and
`tis` also run with fresh samples (age 0). The two best by their mean score over both ages are the finalists.

*Stage 2*, seeds 101 to 103, which chose nothing before: the finalists and `tis` on all four jobs with lags 0,
4 and 16; `agents` with 4 only, because its samples are less than one step old on average. A finalist can be
chosen if

1. its score, in paired differences over jobs, lags and seeds, is behind the best one by no more than noise
   (twice the standard error of the differences),
2. it survives three times its rate (stage 1), and no trial of stage 2 collapsed,
3. it needs no gradients of single sequences, and
4. on no job its final greedy reward is below that of `tis` by more than noise.

`tis` stays if it can be chosen, because a default does not change without evidence; otherwise the best one
that can be chosen becomes the default; if there is none, `tis` stays.

*Final figures* come from seeds that chose nothing: `--stage final --seeds ...` runs the chosen method and
`tis` at lag 4, and the job benchmarks run the new default.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import RESULTS, table
from benchmarks.selection_rule import (
    MAX_RUNS,
    METHODS,
    Done,
    chosen,
    final,
    finalists,
    scores,
    stage_1,
    stage_2,
    verdicts,
)
from benchmarks.selection_trial import JOBS, Trial, TrialResult, run_at_fixed_age, run_real, write_model
from benchmarks.staleness import Results, in_workers


def main() -> None:
    """Runs the missing trials of a stage, then prints all tables and the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("1", "2", "final"))
    parser.add_argument("--jobs", type=int, default=2, help="trials with fixed ages at a time")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="trials whose name matches one of these"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="of --stage final")
    parser.add_argument("--steps", type=int, help="optimizer steps of a trial run; needs --results")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS / "selection.jsonl")
    args = parser.parse_args()
    if args.steps and args.results == RESULTS / "selection.jsonl":
        parser.exit(
            2, "benchmarks.selection: --steps is for trials of this program: name another --results\n"
        )
    if (args.stage == "final") != bool(args.seeds):
        parser.exit(2, "benchmarks.selection: give --seeds with --stage final, and only there\n")
    if args.stage is None and not args.report:
        parser.exit(2, "benchmarks.selection: give --stage 1, --stage 2, --stage final or --report\n")
    campaign = Campaign(args.results, num_steps=args.steps, only=args.only)
    if not args.report:
        campaign.run(args.stage, num_jobs=args.jobs, seeds=args.seeds or ())
    print(campaign.report())


class Campaign:
    """The results so far, and the trials that they call for."""

    def __init__(self, path: Path, *, num_steps: int | None = None, only: list[str] | None = None) -> None:
        """`num_steps`: length of all trials instead of the jobs' own. `only`: patterns of trials to run."""
        self._results = Results[Trial, TrialResult](path, TrialResult.read)
        self._num_steps, self._only = num_steps, only or ["*"]

    @property
    def done(self) -> Done:
        """All finished trials."""
        return [(Trial(**cell | {"settings": tuple(cell["settings"])}), r) for cell, r in self._results.all()]

    def planned(self, stage: str, *, seeds: Sequence[int] = ()) -> list[Trial]:
        """The trials of a stage that are known so far. Raises SystemExit if the stage before is not done."""
        done = self.done
        if stage == "1":
            return stage_1(done, num_steps=self._num_steps)
        second = stage_2(done, num_steps=self._num_steps)
        if not second:
            raise SystemExit("stage 1 is not finished: run --stage 1")
        if stage == "2":
            return second
        if not {trial for trial, _ in done}.issuperset(second):
            raise SystemExit("stage 2 is not finished: run --stage 2")
        method = chosen(verdicts(done, second))
        return final(done, method=method, seeds=seeds, num_steps=self._num_steps)

    def run(self, stage: str, *, num_jobs: int, seeds: Sequence[int] = ()) -> None:
        """Runs the missing trials of a stage. What stage 1 calls for grows with its results."""
        while missing := self._missing(stage, seeds=seeds):
            print(f"stage {stage}: {len(missing)} trials to run", flush=True)
            at_fixed_age = [trial for trial in missing if not JOBS[trial.job].is_real]
            finished = in_workers(
                at_fixed_age,
                num_jobs=num_jobs,
                model_of=lambda trial: (trial.job, trial.seed),
                build=write_model,
                run_one=run_at_fixed_age,
            )
            real = ((trial, run_real(trial)) for trial in missing if JOBS[trial.job].is_real)
            for trial, result in itertools.chain(finished, real):
                self._results.add(trial, result)
                print(
                    f"{time.strftime('%H:%M:%S')} {trial.name}: reward {result.reward:.3f} "
                    f"greedy {result.greedy:.3f} entropy {result.entropy:.2f} {result.seconds:.0f} s "
                    f"({result.wall_s:.0f} s)",
                    flush=True,
                )

    def _missing(self, stage: str, *, seeds: Sequence[int]) -> list[Trial]:
        return [
            trial
            for trial in self.planned(stage, seeds=seeds)
            if self._results.get(trial) is None
            and any(fnmatch.fnmatchcase(trial.name, pattern) for pattern in self._only)
        ]

    def report(self) -> str:
        """The tables of all stages, and the verdict as far as there is one."""
        done = self.done
        if not done:
            return "no results"
        first = stage_1(done, num_steps=self._num_steps)
        parts = [f"Stage 1 ({self._progress(first)})\n\n{as_table(done, first)}"]
        second = stage_2(done, num_steps=self._num_steps)
        if second:
            names = ", ".join(f"{s.method} at {s.factor:g} times the rate" for s in finalists(done))
            parts.append(f"Finalists: {names}")
            parts.append(f"Stage 2 ({self._progress(second)})\n\n{as_table(done, second)}")
            parts.append(f"{len(first) + len(second)} trials of at most {MAX_RUNS}")
            found = verdicts(done, second)
            if found:
                rows = [
                    [
                        v.method,
                        f"{v.factor:g}",
                        *(f"{number:.3f}" for number in (v.score, v.behind, v.noise)),
                        "; ".join(v.reasons) or "can be chosen",
                    ]
                    for v in found
                ]
                header = ["method", "rate", "score", "behind the best", "noise", "rule"]
                parts.append(f"{table(header, rows)}\n\nChosen: {chosen(found)}")
        known = {*first, *second}
        others = [trial for trial, _ in done if trial not in known]
        if others:
            parts.append(f"Other trials\n\n{as_table(done, others)}")
        return "\n\n".join(parts)

    def _progress(self, trials: Sequence[Trial]) -> str:
        return f"{sum(self._results.get(trial) is not None for trial in trials)} of {len(trials)} trials"


def as_table(done: Done, trials: Sequence[Trial]) -> str:
    """A row for each job, lag, method and rate: means over the seeds, and the smallest score of them."""
    wanted = set(trials)
    pairs = [(trial, result) for trial, result in done if trial in wanted]
    score = scores(pairs)
    rows_of: dict[tuple[str, int, str, float], list[tuple[Trial, TrialResult]]] = defaultdict(list)
    for trial, result in pairs:
        rows_of[trial.job, trial.lag, trial.method, trial.factor].append((trial, result))
    order = {name: number for number, name in enumerate((*JOBS, *METHODS))}
    rows = []
    for job, lag, method, factor in sorted(rows_of, key=lambda k: (order[k[0]], k[1], order[k[2]], k[3])):
        own = rows_of[job, lag, method, factor]
        results = [result for _, result in own]
        own_scores = [score[trial] for trial, _ in own]
        rows.append(
            [job, lag, method, f"{factor:g}"]
            + [f"{statistics.fmean(own_scores):.3f} ({min(own_scores):.3f})"]
            + [f"{statistics.fmean(getattr(r, name) for r in results):.3f}" for name in ("reward", "greedy")]
            + [f"{statistics.fmean(r.entropy for r in results):.2f}"]
            + [f"{statistics.fmean(getattr(r, name) for r in results):.0f}" for name in TIMES]
            + [f"{statistics.fmean(r.lag for r in results):.1f}"]
            + [f"{sum(r.has_collapsed for r in results)} of {len(results)}"]
        )
    header = ["job", "lag", "method", "rate", "score (worst seed)", "reward at temperature 1", "greedy"]
    header += ["entropy", "seconds", "CPU s of the trial", "wall s", "samples", "mean age", "collapsed"]
    return table(header, rows)


TIMES = ("seconds", "cpu_s", "wall_s", "samples")
"""Fields of a result that a table shows without digits after the point."""


if __name__ == "__main__":
    main()
