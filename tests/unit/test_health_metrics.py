"""The exposition, read back by Prometheus' own parser."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from kube_router.ipc.messages import Heartbeat, Session, SourceState
from kube_router.workers.health.exposition import BUCKETS, Families, Histograms, render_metrics
from kube_router.workers.health.processes import ProcessState, ProcessTable

TABLE = ProcessTable(
    programs={"router": ProcessState(state="RUNNING", restarts=3), "gobgpd": ProcessState(state="FATAL", restarts=7)}
)


def beat(**fields: Any) -> Heartbeat:
    return Heartbeat(**{"worker": "router", "pid": 1, "started": 0.0, "sent": 1.0, **fields})


def read(text: str) -> dict[str, Metric]:
    """Metric families by name; the parser takes ``_total`` off a counter's name."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def exposition(*beats: Heartbeat, healthy: bool = True) -> dict[str, Metric]:
    histograms = Histograms()
    for each in beats:
        histograms.take(each)
    return read(render_metrics(beats, TABLE, histograms, healthy=healthy, version="1.2", runtime="python3.13"))


def samples(metric: Metric) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for sample in metric.samples
    }


def test_names_types_and_values() -> None:
    found = exposition(
        beat(
            last_sync=123.5,
            sync_seconds=0.25,
            syncs=4,
            writes=9,
            pending=2,
            rss=1 << 20,
            errors={"bgp-peers": 3},
            counts={"host_routes_synced": 12.0},
            counters={"host_routes_added": 5.0, 'controller_bgp_advertisements_sent{type="pod-route"}': 2.0},
            sessions=(Session(address="fd00::1", asn=64512, type="internal", state="established"),),
        ),
        healthy=False,
    )
    prefix = "kube_router_"
    assert found[prefix + "build_info"].samples[0].labels == {"version": "1.2", "goversion": "python3.13"}
    assert found[prefix + "healthy"].samples[0].value == 0
    assert found[prefix + "host_routes_synced"].type == "gauge"
    assert found[prefix + "host_routes_added"].type == "counter"
    sent = found[prefix + "controller_bgp_advertisements_sent"]
    assert sent.samples[0].labels == {"type": "pod-route"}
    peer = found[prefix + "bgp_peer_info"].samples[0]
    assert peer.labels == {"address": "fd00::1", "asn": "64512", "type": "internal", "state": "established"}
    assert samples(found[prefix + "worker_restarts"])[(prefix + "worker_restarts_total", "worker=gobgpd")] == 7
    assert samples(found[prefix + "worker_up"]) == {
        (prefix + "worker_up", "worker=router"): 1,
        (prefix + "worker_up", "worker=gobgpd"): 0,
    }
    errors = found[prefix + "worker_errors"].samples[0]
    assert (errors.labels, errors.value) == ({"worker": "router", "phase": "bgp-peers"}, 3)
    for name, value in {
        "worker_last_sync_timestamp_seconds": 123.5,
        "worker_sync_seconds": 0.25,
        "worker_pending": 2,
        "worker_rss_bytes": 1 << 20,
    }.items():
        assert [(sample.labels, sample.value) for sample in found[prefix + name].samples] == [
            ({"worker": "router"}, value)
        ]
    assert found[prefix + "worker_writes"].samples[0].value == 9
    assert found[prefix + "worker_syncs"].samples[0].value == 4


def test_a_session_in_numbers() -> None:
    up = Session(
        address="10.0.0.2",
        asn=1,
        type="external",
        state="established",
        received=5,
        accepted=4,
        advertised=3,
        since=40.5,
    )
    down = Session(address="10.0.0.3", asn=1, type="external", state="active", since=90.0, flaps=2)
    found = exposition(beat(sent=100.0, sessions=(up, down)))
    values = {
        name: [(sample.labels["address"], sample.value) for sample in found[f"kube_router_bgp_peer_{name}"].samples]
        for name in ("prefixes_received", "prefixes_accepted", "prefixes_advertised", "uptime_seconds", "flaps")
    }
    assert values == {
        "prefixes_received": [("10.0.0.2", 5), ("10.0.0.3", 0)],
        "prefixes_accepted": [("10.0.0.2", 4), ("10.0.0.3", 0)],
        "prefixes_advertised": [("10.0.0.2", 3)],
        "uptime_seconds": [("10.0.0.2", 59.5), ("10.0.0.3", 0)],
        "flaps": [("10.0.0.2", 0), ("10.0.0.3", 2)],
    }


def test_a_session_that_is_gone_or_in_another_state_leaves_no_series() -> None:
    session = Session(address="fd00::1", asn=64512, type="internal", state="established")
    assert len(exposition(beat(sessions=(session,)))["kube_router_bgp_peer_info"].samples) == 1
    assert "kube_router_bgp_peer_info" not in exposition(beat())


def test_counters_keep_upstream_s_names_which_have_no_total() -> None:
    text = render_metrics(
        [beat(counters={"host_routes_added": 5.0})], TABLE, Histograms(), healthy=True, version="1", runtime="p"
    )
    assert "\nkube_router_host_routes_added 5\n" in text


def test_what_a_worker_has_not_done_is_not_there() -> None:
    found = exposition(beat())
    assert "kube_router_worker_last_sync_timestamp_seconds" not in found
    assert "kube_router_source_in_sync" not in found


def test_the_source_is_that_of_the_watcher() -> None:
    source = SourceState(source="x", stale=True, degraded=("a", "b"))
    watcher = Heartbeat(worker="watcher", pid=1, started=0.0, sent=1.0, source=source)
    found = exposition(beat(source=SourceState(source="y", in_sync=True)), watcher)
    values = {name: found[f"kube_router_source_{name}"].samples[0].value for name in ("in_sync", "stale", "degraded")}
    assert values == {"in_sync": 0, "stale": 1, "degraded": 2}


def test_histograms_add_up_over_heartbeats() -> None:
    found = exposition(
        beat(observations={"host_routes_sync_time": (0.004, 0.3)}),
        beat(observations={"host_routes_sync_time": (20.0,)}),
    )
    metric = found["kube_router_host_routes_sync_time"]
    assert metric.type == "histogram"
    values = samples(metric)
    name = "kube_router_host_routes_sync_time"
    assert values[(name + "_bucket", "le=0.005")] == 1
    assert values[(name + "_bucket", "le=0.5")] == 2
    assert values[(name + "_bucket", "le=10")] == 2
    assert values[(name + "_bucket", "le=+Inf")] == values[(name + "_count",)] == 3
    assert math.isclose(values[(name + "_sum",)], 20.304)


def test_the_number_of_histograms_is_bounded() -> None:
    histograms = Histograms()
    histograms.take(beat(observations={f"h{number}": (1.0,) for number in range(2000)}))
    assert len(histograms.by_series) == 500


@pytest.mark.parametrize("series", ["", "1x", "a b", "x{", "x{y=z}", 'x{y="z}', "x\ny 1", 'x{y="a\nb"}', "é"])
def test_a_name_that_is_none_is_left_out(series: str) -> None:
    families = Families()
    families.add("gauge", series, 1)
    families.add("gauge", "good", 1)
    assert list(read(families.text())) == ["kube_router_good"]


def test_one_metric_has_one_type() -> None:
    families = Families()
    families.add("gauge", 'x{a="1"}', 1)
    families.add("counter", 'x{a="2"}', 1)
    assert families.text().count("# TYPE") == 1
    assert 'a="2"' not in families.text()


@given(st.text(max_size=40), st.floats(allow_nan=False))
def test_any_label_and_value_survive(label: str, value: float) -> None:
    """But for CR and the like, at which the parser (not Prometheus) splits lines."""
    label = "".join(label.split("\r")).translate({ord(c): None for c in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"})
    families = Families()
    families.add("gauge", 'x{first="1"}', value, second=label)
    sample = read(families.text())["kube_router_x"].samples[0]
    assert sample.labels == {"first": "1", "second": label}
    assert sample.value == value


def test_buckets_are_the_default_ones_of_upstream_s_library() -> None:
    assert BUCKETS == (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
