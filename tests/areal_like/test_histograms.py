"""Counts of values by size, and the histograms that Prometheus reads from them."""

import math

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from areal_like.histograms.buckets import Buckets
from areal_like.runtime.metrics import Metrics

LIMITS = (0.0, 0.5, 2.0)


@given(st.lists(st.floats(-1, 5)))
def test_each_value_is_in_the_first_bucket_that_holds_it(values: list[float]) -> None:
    buckets = Buckets(LIMITS)
    buckets.observe_all(values)
    clipped = [max(value, 0.0) for value in values]
    want = [float(sum(value <= limit for value in clipped)) for limit in (*LIMITS, math.inf)]
    assert [count for _, count in buckets.cumulative()] == want
    assert math.isclose(buckets.total, sum(clipped), abs_tol=1e-9)


def test_the_page_has_the_counts_of_the_moment() -> None:
    metrics, by_end = Metrics(), {"good": Buckets(LIMITS), "bad": Buckets(LIMITS)}
    metrics.buckets("wait_seconds", "Seconds.", lambda: by_end, label="end")
    for _ in range(2):
        by_end["good"].observe(1.0, times=3)
        families = {
            family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())
        }
        values = {
            (sample.name.removeprefix("areal_wait_seconds"), sample.labels["end"], sample.labels.get("le")): (
                sample.value
            )
            for sample in families["areal_wait_seconds"].samples
        }
    assert values["_count", "good", None] == 6 and values["_sum", "good", None] == 6.0
    assert values["_bucket", "good", "0.5"] == 0 and values["_bucket", "good", "2.0"] == 6
    assert values["_count", "bad", None] == 0, "it exists before the first value"
