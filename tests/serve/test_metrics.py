"""Prometheus' text, read back by the official client."""

from __future__ import annotations

import math
import threading

import pytest

from mnemoscope.serve.metrics import FAMILIES, SCORES, Metrics

parser = pytest.importorskip("prometheus_client.parser")


def read(metrics):
    return {f.name: f for f in parser.text_string_to_metric_families(metrics.text())}


def values(family):
    return {(s.name, *sorted(s.labels.items())): s.value for s in family.samples}


def filled(name="images", threshold=2.0):
    metrics = Metrics()
    metrics.attached(name, threshold)
    metrics.decided(name, "mitigated", {"passed": 2, "mitigated": 1}, [0.5, 2.0, 2.1], threshold, 0.02)
    metrics.decided(name, "passed", {"passed": 1}, [0.4], threshold, 0.001)
    metrics.failed(name, "CannotAudit")
    metrics.drifted(name, 0.25, False)
    return metrics


def test_every_family_is_read_back():
    metrics = filled()
    found = read(metrics)
    assert {name.removesuffix("_total") for name in FAMILIES} == set(found)
    for name, (kind, about) in FAMILIES.items():
        assert (found[name.removesuffix("_total")].type, found[name.removesuffix("_total")].documentation) == (
            kind,
            about,
        )
    generations = values(found["mnemoscope_guard_generations"])
    name = "mnemoscope_guard_generations_total"
    assert generations[name, ("action", "mitigated"), ("guard", "images")] == 1
    assert generations[name, ("action", "passed"), ("guard", "images")] == 1
    rows = values(found["mnemoscope_guard_rows"])
    assert rows["mnemoscope_guard_rows_total", ("action", "passed"), ("guard", "images")] == 3
    assert metrics.value("mnemoscope_guard_rows_total", guard="images", action="passed") == 3
    assert values(found["mnemoscope_guard_threshold"]) == {("mnemoscope_guard_threshold", ("guard", "images")): 2}
    assert values(found["mnemoscope_guard_drift_p"]) == {("mnemoscope_guard_drift_p", ("guard", "images")): 0.25}


def test_histograms_are_cumulative_and_lie_around_the_threshold():
    score = read(filled())["mnemoscope_guard_score"]
    buckets = {float(s.labels["le"]): s.value for s in score.samples if s.name.endswith("_bucket")}
    assert sorted(buckets) == [2 * x for x in SCORES] + [math.inf]
    assert buckets[0.5] == 2
    assert buckets[2.0] == 3, "an upper bound belongs to its bucket, as a score at the threshold passes"
    assert buckets[2.2] == buckets[math.inf] == 4
    assert list(buckets.values()) == sorted(buckets.values())
    plain = {s.name: s.value for s in score.samples if not s.name.endswith("_bucket")}
    assert plain == {"mnemoscope_guard_score_count": 4, "mnemoscope_guard_score_sum": pytest.approx(5.0)}


@pytest.mark.parametrize("name", ["", 'say "no"', "two\nlines", "back\\slash\\n", "Ünïcode ε"])
def test_names_are_escaped(name):
    families = read(filled(name))
    assert {s.labels["guard"] for f in families.values() for s in f.samples} == {name}


@pytest.mark.parametrize("threshold", [0.0, -1.5, 1e9, 1e-9])
def test_odd_thresholds(threshold):
    score = read(filled(threshold=threshold))["mnemoscope_guard_score"]
    bounds = [float(s.labels["le"]) for s in score.samples if s.name.endswith("_bucket")]
    assert bounds == sorted(set(bounds))


def test_nothing_was_counted():
    assert Metrics().text() == ""
    metrics = Metrics()
    metrics.attached("a", 1.0)
    assert metrics.value("mnemoscope_guard_rows_total", guard="a", action="passed") == 0
    assert "mnemoscope_guard_score" not in read(metrics)


def test_threads_and_guards_share_one():
    metrics = Metrics()

    def count(name):
        for _ in range(100):
            metrics.decided(name, "passed", {"passed": 2}, [1.0, 2.0], 3.0, 0.001)
            metrics.text()

    threads = [threading.Thread(target=count, args=(name,)) for name in ("a", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.value("mnemoscope_guard_rows_total", guard="a", action="passed") == 400
    assert metrics.value("mnemoscope_guard_generations_total", guard="b", action="passed") == 100
    score = read(metrics)["mnemoscope_guard_score"]
    assert {s.value for s in score.samples if s.name.endswith("_count")} == {200, 400}
