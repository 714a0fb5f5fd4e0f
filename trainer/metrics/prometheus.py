"""The trainer's Prometheus metrics: `TrainerSeries` of rank 0, `GpuMemory` of every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from prometheus_client import Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from areal_like.config import EvalSetConfig
from areal_like.runtime.metrics import PREFIX, SECONDS, Metrics
from areal_like.trajectory import FinishReason
from trainer.metrics.named_means import MAX_NAMES
from trainer.metrics.speed import PHASES
from trainer.metrics.step_totals import PERCENTILES
from trainer.weights.checks import CheckReport
from trainer.weights.publisher import PushReport

_GAUGES = {
    "loss": "Loss of the last step",
    "grad_norm": "Gradient norm before clipping",
    "lr": "Learning rate of the last step, as applied",
    "lr_scale": "The objective's factor on the scheduled learning rate",
    "reward": "Mean reward of the last step",
    "ess_ratio": "Effective sample size over the samples, by the products of their tokens' ratios",
    "ess_ratio_geometric": "The same by the geometric means of their tokens' ratios",
    "ess_ratio_token": "Effective sample size over the number of tokens, by the ratios of single tokens",
    "ess_weights": "That of the three at the level of the objective's weights: max_staleness=auto follows it",
    "log_w_mean": "Mean of the samples' summed log-ratio of policy and behavior",
    "log_w_std": "Standard deviation of the samples' summed log-ratio",
    "kl_k3": "KL(mu || pi), k3 estimator",
    "entropy": "Mean entropy of sampled tokens in nats",
    "mismatch_abs": "Mean |log pi/mu| of tokens sampled by the current weights, the last time there were "
    "any: numerical mismatch",
    "mismatch_abs_p99": "99th percentile of the same",
    "mismatch_abs_max": "Largest of the same",
    "mismatch_k3": "KL(mu || pi) of the same tokens, k3 estimator",
    "router_disagreement": "Share of the engine's choices of experts that the trainer's routers would not "
    "have made (model.router_replay)",
    "unrouted_share": "Share of the sampled tokens in samples left out because of their routes "
    "(model.router_replay)",
    "routes_missing": "Samples of the last step whose routes are missing (model.router_replay)",
    "routes_malformed": "Samples of the last step whose routes do not fit (model.router_replay)",
    "clipped_fraction": "Share of tokens whose weight or loss the objective has cut",
    "kept_fraction": "Share of tokens that masks have left to learn from",
    "response_tokens": "Mean sampled tokens of a sample",
    "prompt_tokens": "Mean tokens of a sample that were not sampled",
    "truncated_fraction": "Share of samples that a limit ended",
    "turns": "Mean turns of a sample",
    "segments": "Mean segments of a sample",
    "sample_generation_s": "Mean seconds from a sample's first request to its last token",
    "sample_reward_s": "Mean seconds spent computing a sample's reward",
    "balance": "Share of the ranks' time in the last step's micro-batches that is work, by the planned costs",
    "shared_share": "Share of the last step's tokens that were not computed: prefixes shared with others",
    "zero_advantage_groups": "Groups of the last step without any advantage",
    "kl_ref": "Mean KL of policy to reference model over the last step's sampled tokens (kl.coef)",
    "kl_coef": "Weight of the KL penalty in the last step (kl.coef, kl.budget)",
    "reward_baseline": "Running mean of the rewards of earlier steps (advantage=running)",
    "steps_per_sample": "Mean number of rewarded steps of a sample (advantage=grpo_process)",
    "step_reward_mean": "Mean reward of those steps",
    "rho_ref": "Measured ESS ratio at which the step size is not reduced (objective.rho_ref=measured)",
    "reverse_kl": "Mean of log(pi / teacher) over sampled tokens with a teacher (distill.teachers)",
    "teacher_share": "Share of sampled tokens that have a teacher (distill.teachers)",
    "greedy_reward": "Mean reward of the last step's greedy samples (advantage=remax)",
    "value_loss": "Half the critic's mean squared error in the last step, before its update (advantage=gae)",
    "explained_variance": "Share of the variance of its targets that the critic explains; 0 is a constant",
    "critic_grad_norm": "Gradient norm of the critic before clipping",
    "prm_loss": "Cross-entropy of the reward model in the last step, before its update (advantage=prime)",
    "prm_accuracy": "Share of the last step's samples whose outcome the reward model predicts",
    "prm_reward_mean": "Mean over samples of the sum of their tokens' rewards (advantage=prime)",
    "prm_outcomes_clipped": "Share of samples whose reward was outside 0..1, the range of outcomes",
    "prm_grad_norm": "Gradient norm of the reward model before clipping",
    "lora_lost_updates": "Share of the merged weights' numbers that changed in float32 from one push to the "
    "next and not in the dtype of the push (model.lora)",
    "lag_mean": "Mean lag of the last step's samples in optimizer steps",
    "max_staleness": "Bound on lag that tickets were admitted under in the last step",
    "lag_max": "Largest lag of the last step's samples in optimizer steps",
    "prompt_tokens_max": "Most tokens of a sample that were not sampled",
    "mfu": "Model FLOPs of the last step over its time and the peak of the ranks' devices",
    "mfu_compute": "The same over the time of forward and backward",
    "tokens_per_s": "Tokens that all ranks ran in the last step, prompts included, over its time",
    "tokens_per_s_per_gpu": "The same of one rank",
    "compute_tokens_per_s_per_gpu": "The same of one rank over the time of forward and backward",
}

_SCALED_GAUGES = {
    "model_tflops_per_s": (
        "trainer_model_flops_per_second",
        1e12,
        "Model FLOPs of the last step over its time",
    ),
    "memory_peak_gb": (
        "trainer_memory_peak_bytes",
        1e9,
        "Largest memory of a rank: on a GPU in the last step, on a CPU since its start",
    ),
    "memory_reserved_peak_gb": (
        "trainer_memory_reserved_peak_bytes",
        1e9,
        "The same with what a GPU's allocator keeps free",
    ),
}
"""Column -> series in base units, number of base units in one unit of the column, and help text."""
_LENGTHS = (*(f"p{percent}" for percent in PERCENTILES), "max")

_NAMED_GAUGES = {
    "reward_parts": ("trainer_reward_part", "part", "Mean of a named part of the reward in the last step"),
    "sample_metrics": ("trainer_sample_metric", "metric", "Mean of a metric of the task in the last step"),
    "by_label": ("trainer_label_reward", "label", "Mean reward of a label's samples in the last step"),
}
"""Series by names that tasks choose: the only series that do not exist from the start."""
_PHASE_COLUMNS = {phase.removesuffix("_s"): "wait_data_s" if phase == "wait_s" else phase for phase in PHASES}
"""Phase -> column of its seconds."""
_FINISH_REASONS = tuple(reason.value for reason in FinishReason if reason is not FinishReason.ABORT)

_EVAL_GAUGES = {
    "avg": ("avg", "Mean held-out reward over prompts and their completions, by set"),
    "ci_low": ("ci_low", "Lower end of its 95 % confidence interval"),
    "ci_high": ("ci_high", "Upper end of its 95 % confidence interval"),
    "truncated_fraction": ("truncated_fraction", "Share of the set's samples that a limit ended"),
    "mean_tokens": ("tokens", "Mean sampled tokens of the set's samples"),
    "num_failed": ("failed_samples", "Samples of the set's last evaluation that failed and count 0"),
}
"""Key of a row -> series and its text."""
_PUSH_HISTOGRAMS = {
    "seconds": "Seconds from a granted version to its activation",
    "staging_seconds": "Seconds in which all buckets of a push were made ready, before engines were asked to "
    "receive",
    "broadcast_seconds": "Seconds of a push from the request to the engines to the end of the last broadcast",
    "stall_seconds": "Longest time that one engine decoded nothing because of a push",
}
"""Field of a `PushReport` -> help text of its series."""
_PUSH_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
TRACKER_OUTCOMES = ("logged", "failed", "left_out")
"""Outcome of a row: the tracker wrote it, it raised, or it did not get the row (too slow, or off)."""


class TrainerSeries:
    """Registers all series when it is created, so that each exists, at zero, from the start."""

    def __init__(self, metrics: Metrics, *, eval_sets: Mapping[str, EvalSetConfig] | None = None) -> None:
        """`eval_sets`: by name, from the configuration, so that their number is bounded."""
        self._gauges = {name: metrics.gauge(f"trainer_{name}", doc) for name, doc in _GAUGES.items()}
        self._scaled = {column: metrics.gauge(name, doc) for column, (name, _, doc) in _SCALED_GAUGES.items()}
        self._lengths = metrics.gauge(
            "trainer_response_length",
            "Percentiles and maximum of the sampled tokens of the last step's samples",
            label="of",
            values=_LENGTHS,
        )
        phases = [phase.removesuffix("_s") for phase in PHASES]
        self._phases = {
            end: metrics.gauge(
                f"trainer_phase_{end}_seconds",
                f"Seconds of a phase of the last step at the rank with the {which}",
                label="phase",
                values=phases,
            )
            for end, which in (("min", "fewest"), ("max", "most"))
        }
        self._step_seconds = metrics.histogram(
            "trainer_step_seconds", "Seconds of an optimizer step", buckets=SECONDS
        )
        self._phase_seconds = metrics.histogram(
            "trainer_phase_seconds",
            "Seconds of a step by phase, at rank 0",
            buckets=SECONDS,
            label="phase",
            values=list(_PHASE_COLUMNS),
        )
        self._finished = metrics.gauge(
            "trainer_finished_fraction",
            "Share of the last step's samples that ended for this reason",
            label="reason",
            values=_FINISH_REASONS,
        )
        self._named = {
            kind: metrics.gauge(name, doc, label=label) for kind, (name, label, doc) in _NAMED_GAUGES.items()
        }
        self._known: dict[str, set[str]] = {kind: set() for kind in _NAMED_GAUGES}
        self._step = metrics.gauge("trainer_step", "Completed optimizer steps")
        self._tokens = metrics.counter("trainer_tokens", "Sampled tokens trained on")
        self._seconds = metrics.counter(
            "trainer_seconds", "Seconds of the step loop by phase", label="phase", values=("wait", "work")
        )
        self._pushes = metrics.counter(
            "trainer_pushes", "Weight pushes by outcome", label="outcome", values=("ok", "failed")
        )
        self._push_bytes = metrics.counter("trainer_push_bytes", "Bytes of the weights of all pushes")
        self._push_sent = metrics.counter(
            "trainer_push_sent_bytes",
            "Bytes that pushes have broadcast: buckets that were sent whole, and what was sent of the others "
            "(weights.delta), over all weight groups",
            label="form",
            values=("whole", "delta"),
        )
        self._push_changed = metrics.gauge(
            "trainer_push_changed_fraction",
            "Fraction of the numbers that differ from those of the push before, in the last push that was "
            "compared with one (weights.delta)",
        )
        self._push_senders = metrics.gauge("trainer_push_senders", "Trainer ranks that sent the last push")
        self._push_histograms = {
            name: metrics.histogram(f"trainer_push_{name}", doc, buckets=_PUSH_BUCKETS)
            for name, doc in _PUSH_HISTOGRAMS.items()
        }
        self._recovery_seconds = metrics.histogram(
            "trainer_push_recovery_seconds",
            "Longest time that a survivor of a broken broadcast needed to leave its group",
            buckets=_PUSH_BUCKETS[:7],
        )
        self._freeze_seconds = metrics.counter(
            "trainer_freeze_seconds", "Seconds that training waited for snapshots of the weights"
        )
        self._checks = metrics.counter(
            "trainer_weight_checks",
            "Comparisons of an engine's log-probs with the trainer's after a push",
            label="outcome",
            values=("ok", "jump"),
        )
        self._check_difference = metrics.gauge(
            "trainer_weight_check_difference", "Mean |difference| of log-probs in the last of them, in nats"
        )
        self._version = metrics.gauge("trainer_weights_version", "Newest version active at an engine")
        self._eval = metrics.gauge("trainer_eval_reward", "Mean held-out reward of the first set")
        sets = eval_sets or {}
        self._of_sets = {
            key: metrics.gauge(f"trainer_eval_{name}", doc, label="set", values=list(sets))
            for key, (name, doc) in _EVAL_GAUGES.items()
        }
        self._pass_at_k = metrics.gauge_of(
            "trainer_eval_pass_at_k",
            "Probability that one of k completions of a held-out prompt is solved, by set",
            ("set", "k"),
            [(name, str(k)) for name, one in sets.items() for k in one.ks],
        )
        self._entropy_fallen = metrics.gauge(
            "trainer_entropy_fallen", "1 once the entropy has fallen without a gain in reward, else 0"
        )
        self._tracked = metrics.counter(
            "trainer_tracker_rows", "Rows for trackers by outcome", label="outcome", values=TRACKER_OUTCOMES
        )

    def tracked(self, outcome: str) -> None:
        """Counts a row for a tracker by its outcome. From any thread."""
        self._tracked.labels(outcome).inc()

    def entropy_fell(self) -> None:
        """Notes the warning of `EntropyWatch`."""
        self._entropy_fallen.set(1)

    def checked(self, report: CheckReport) -> None:
        self._checks.labels("jump" if report.is_jump else "ok").inc()
        self._check_difference.set(report.difference)

    def stepped(self, step: int, row: dict[str, Any]) -> None:
        """Updates the series after optimizer step `step`. `row`: its metrics."""
        self._step.set(step + 1)
        for name, gauge in self._gauges.items():
            _set(gauge, row.get(name))
        for name, gauge in self._scaled.items():
            _set(gauge, row.get(name), unit=_SCALED_GAUGES[name][1])
        for of in _LENGTHS:
            _set(self._lengths.labels(of), row.get(f"response_length_{of}"))
        for end, gauge in self._phases.items():
            for phase in PHASES:
                _set(gauge.labels(phase.removesuffix("_s")), row.get(f"{phase}_{end}"))
        for reason, share in row.get("finish_reasons", {}).items():
            self._finished.labels(reason).set(share)
        self._step_seconds.observe(row["step_s"])
        for phase, column in _PHASE_COLUMNS.items():
            if (seconds := row.get(column)) is not None:
                self._phase_seconds.labels(phase).observe(seconds)
        self._set_named(row)
        self._tokens.inc(row["tokens_trained"])
        self._freeze_seconds.inc(row["freeze_s"])
        self._seconds.labels("wait").inc(row["wait_data_s"])
        self._seconds.labels("work").inc(max(0.0, row["step_s"] - row["wait_data_s"]))

    def _set_named(self, row: dict[str, Any]) -> None:
        for kind, gauge in self._named.items():
            known = self._known[kind]
            for name, value in row.get(kind, {}).items():
                mean = value["reward_mean"] if kind == "by_label" else value
                if mean is not None and (name in known or len(known) < MAX_NAMES):
                    known.add(name)
                    gauge.labels(name).set(mean)

    def pushed(self, report: PushReport) -> None:
        self._pushes.labels("ok" if report.num_activated else "failed").inc()
        self._push_bytes.inc(report.num_bytes)
        self._push_sent.labels("whole").inc(report.whole_bytes)
        self._push_sent.labels("delta").inc(report.delta_bytes)
        if report.changed_fraction is not None:
            self._push_changed.set(report.changed_fraction)
        self._push_senders.set(report.num_senders)
        for name, histogram in self._push_histograms.items():
            histogram.observe(getattr(report, name))
        if report.recovery_seconds:
            self._recovery_seconds.observe(report.recovery_seconds)
        if report.num_activated:
            self._version.set(report.version)

    def evaluated(self, row: Mapping[str, Any], *, is_first: bool) -> None:
        """Updates the series of a set after its evaluation. `row`: as in evaluations.jsonl."""
        for key, gauge in self._of_sets.items():
            if row[key] is not None:
                gauge.labels(row["set"]).set(row[key])
        for k, share in row["pass_at_k"].items():
            self._pass_at_k.labels(row["set"], k).set(share)
        if is_first and row["avg"] is not None:
            self._eval.set(row["avg"])


def _set(gauge: Gauge, value: object, *, unit: float = 1.0) -> None:
    """Sets a gauge to a number of a row; a value that is absent or not finite leaves it as it is."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        gauge.set(value * unit)


class GpuMemory(Collector):
    """`areal_trainer_gpu_memory_bytes{of}`; without values on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            f"{PREFIX}_trainer_gpu_memory_bytes",
            "Memory of the rank's GPU: in tensors, held by the rank's allocator, free, and all of it",
            labels=["of"],
        )
        for of, num_bytes in self._read().items():
            family.add_metric([of], num_bytes)
        yield family

    def _read(self) -> dict[str, int]:
        if self._device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        return {
            "allocated": torch.cuda.memory_allocated(self._device),
            "reserved": torch.cuda.memory_reserved(self._device),
            "free": free,
            "total": total,
        }
