"""Statistics as Prometheus metrics, in multiprocess mode: written by one process, read by another one, as at /metrics.

The mode is chosen as prometheus_client is imported, so the exporter runs in a process of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from prometheus_client.parser import text_string_to_metric_families

from sglang_mosaic.torchvision_compat import declare_missing_operators

declare_missing_operators()

import exposition  # noqa: E402
from metrics_child import LABELS  # noqa: E402
from sglang_mosaic.adapter import metrics, observe  # noqa: E402
from sglang_mosaic.adapter.metric_table import METRICS, PREFIX, Kind  # noqa: E402
from sglang_mosaic.adapter.metrics import Increase  # noqa: E402
from sglang_mosaic.cache.encoding_errors import EncodingErrors  # noqa: E402
from sglang_mosaic.manager.metrics import BOUNDS_S, Histogram, ManagerMetrics  # noqa: E402
from test_host_traffic import pool  # noqa: E402

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
SERIES = {name: str(value) for name, value in LABELS.items()}
"""Labels as they are exposed."""


@pytest.fixture(scope="module")
def stats() -> dict[str, Any]:
    """Of a pool on this machine's device with a manager, after it has compressed some pages; with a process id, which
    managers in process do not have."""
    memory = pool()
    memory.allocate([*range(1, 9)], [1])
    memory.will_write(torch.arange(64, 9 * 64))
    memory.begin_forward()
    memory.host.tier.poll()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # statistics do not wait for it
    found = memory.stats()
    memory.host.tier.close()
    assert found["pages_encoded"] == 5
    found["host"] |= {"pid": 1}
    return json.loads(json.dumps(found))


def with_manager(stats: dict[str, Any], pid: int | None, **figures: Any) -> dict[str, Any]:
    """The statistics with another manager's figures; none without a process id, as while the next one is awaited."""
    changed = copy.deepcopy(stats)
    manager = {} if pid is None else ManagerMetrics().as_dict() | figures
    changed["host"] |= {"pid": pid, "connected": pid is not None, "manager": manager}
    return changed


def export(directory: Path, *stats: dict[str, Any]) -> str:
    """What /metrics shows after these statistics were exported one after the other."""
    done = subprocess.run(
        [sys.executable, str(HERE / "metrics_child.py")],
        input="\n".join(json.dumps(each) for each in stats),
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(directory))
    return generate_latest(registry).decode()


def shown_after(directory: Path, *stats: dict[str, Any]) -> dict[str, float]:
    """Values at /metrics after these statistics."""
    return exposition.values(export(directory, *stats), SERIES)


def test_names_and_help_follow_the_rules_and_places_exist(stats: dict[str, Any]) -> None:
    assert [name for name, count in Counter(metric.name for metric in METRICS).items() if count > 1] == []
    for metric in METRICS:
        assert re.fullmatch(PREFIX + "[a-z]+(_[a-z]+)*", metric.name), metric.name
        assert (metric.kind is Kind.COUNTER) == metric.name.endswith("_total"), metric.name
        assert metric.help[0].isalnum() and metric.help.endswith("."), metric.help
        assert all(value for value in metric.places) == (metric.label is not None), metric.name
        assert metric.label not in (*LABELS, "le", "pid", "quantile"), metric.name
        for place in metric.places.values():
            ends = ("_counts", "_seconds") if metric.kind is Kind.HISTOGRAM else ("",)
            for end in ends:
                value: Any = stats
                for name in (place + end).split("."):
                    assert name in value, f"{metric.name}: the statistics have no {place + end}"
                    value = value[name]


def test_the_documentation_has_every_metric_and_label_and_no_others() -> None:
    documented: dict[str, set[str]] = {}
    labels: dict[str, list[str]] = {}
    for row in re.findall(r"^\| (`.+)$", (DOCS / "metrics.md").read_text(), re.MULTILINE):
        names, label = row.split("|")[:2]
        for name in re.findall(r"`(\w+)`", names):
            assert name not in documented, f"{name} twice"
            documented[name] = set(re.findall(r"`(\w+)`", label))
            labels[name] = re.findall(r"\w+", label.partition(":")[2])
    assert documented == {
        metric.name.removeprefix(PREFIX): {metric.label} if metric.label else set() for metric in METRICS
    }
    for metric in METRICS:
        assert labels[metric.name.removeprefix(PREFIX)] in ([], [value for value in metric.places if value])


def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    labels = {metric.name: {*LABELS, *([metric.label] if metric.label else ())} for metric in METRICS}
    for metric in METRICS:
        if metric.kind is Kind.HISTOGRAM:
            labels |= {f"{metric.name}_{end}": labels[metric.name] for end in ("bucket", "sum", "count")}
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({str(panel["gridPos"]) for panel in panels}) == len(panels)
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    for query in queries:
        asked = re.findall(rf"({PREFIX}\w+)(?:{{([^}}]*)}})?", query)
        assert asked, query
        for name, selector in asked:
            assert name in labels, query
            assert set(re.findall(r"(\w+)=", selector)) <= labels[name], query
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}"), query


def test_everything_is_exposed_with_help_type_and_labels(stats: dict[str, Any], tmp_path: Path) -> None:
    text = export(tmp_path, stats)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for metric in METRICS:
        family = families.pop(metric.name.removesuffix("_total"))
        assert (family.documentation, family.type) == (metric.help, metric.kind.value)
    assert families == {}
    shown = exposition.values(text, SERIES)
    expected = exposition.expected(stats)
    assert {name: shown[name] for name in expected} == expected
    assert shown["encoded_pages_total"] == stats["pages_encoded"] == 5
    assert shown["used_pages{dense}"] == stats["dense_frames_used"] == 3
    assert shown["used_pages{mosaic}"] == stats["mosaic_frames_used"] == 5
    assert shown["compression_ratio"] == stats["ratio"] > 3
    assert shown["manager_up"] == 1
    assert 0 < shown["encoding_error_ratio{all}"] <= shown["encoding_error_ratio{worst}"] < 1
    mean_square = shown["encoding_squared_error_total"] / shown["encoding_error_pages_total"]
    assert mean_square == pytest.approx(shown["encoding_error_ratio{all}"] ** 2)
    # What has not happened is told as well: a rate needs a first value.
    assert shown["host_restored_pages_total"] == shown["manager_restarts_total"] == 0


def test_counters_go_on_when_a_manager_is_replaced(stats: dict[str, Any], tmp_path: Path) -> None:
    shown = shown_after(
        tmp_path,
        with_manager(stats, 1, stored=10, hits_memory=7, hits_disk=1, memory_bytes=500),
        with_manager(stats, 1, stored=15, hits_memory=7, hits_disk=1, memory_bytes=700),
        # Nobody there, then one that has counted less.
        with_manager(stats, None),
        with_manager(stats, 2, stored=4, hits_memory=0, hits_disk=1, memory_bytes=40),
        # Replaced between two updates, by one that has counted more.
        with_manager(stats, 3, stored=6, hits_memory=2, hits_disk=1, memory_bytes=60),
        with_manager(stats, 3, stored=8, hits_memory=2, hits_disk=1, memory_bytes=80),
    )
    assert shown["manager_stored_records_total"] == 15 + 4 + 8
    assert shown["manager_hits_total{memory}"] == 7 + 0 + 2
    assert shown["manager_hits_total{disk}"] == 1 + 1 + 1
    # Gauges tell of the present only.
    assert shown["host_bytes{memory}"] == 80


def test_without_a_manager_nothing_is_kept_and_it_is_down(stats: dict[str, Any], tmp_path: Path) -> None:
    shown = shown_after(tmp_path, with_manager(stats, 1, stored=3, memory_bytes=500), with_manager(stats, None))
    assert shown["manager_up"] == shown["host_bytes{memory}"] == 0
    assert shown["manager_stored_records_total"] == 3


def test_restore_latencies_are_a_histogram_that_survives_managers(stats: dict[str, Any], tmp_path: Path) -> None:
    def restores(pid: int, *seconds: float) -> dict[str, Any]:
        histogram = Histogram()
        for each in seconds:
            histogram.add(each)
        return with_manager(stats, pid, restore_counts=histogram.counts, restore_seconds=histogram.seconds)

    first = (0.0001, 0.003, 0.005)  # a bound belongs to its bucket
    second = (0.003, 7.0)
    text = export(tmp_path, restores(1, *first[:2]), restores(1, *first), restores(2, *second))
    shown = exposition.values(text, SERIES)
    name = "manager_restore_seconds"
    for bound in (*BOUNDS_S, math.inf):
        exposed = "+Inf" if bound == math.inf else repr(bound)
        expected = sum(seconds <= bound for seconds in (*first, *second))
        assert shown[f"{name}_bucket{{{exposed}}}"] == expected, bound
    assert shown[f"{name}_count"] == 5
    assert shown[f"{name}_sum"] == pytest.approx(sum(first) + sum(second))
    assert f"# TYPE {PREFIX}{name} histogram" in text


def test_figures_of_a_manager_cannot_end_the_server(stats: dict[str, Any], tmp_path: Path) -> None:
    nonsense = {"stored": -3, "memory_bytes": math.nan, "evicted": [1, 2], "hits_memory": math.inf}
    lies = with_manager(stats, 1, **nonsense, restore_counts=[1], restore_seconds=[2.0])
    shown = shown_after(tmp_path, with_manager(stats, 1, stored=2), lies, with_manager(stats, 1, stored=1 << 63))
    assert shown["manager_hits_total{memory}"] == shown["host_bytes{memory}"] == 0
    assert shown["manager_restore_seconds_count"] == 0
    assert all(math.isfinite(value) and value >= 0 for value in shown.values())


def test_servers_without_a_host_tier_have_no_metrics_of_it(stats: dict[str, Any], tmp_path: Path) -> None:
    shown = shown_after(tmp_path, stats | {"host": None})
    assert "used_pages{dense}" in shown
    assert [name for name in shown if name.startswith(("host_", "manager_"))] == []


def test_an_increase_is_never_negative_and_a_decrease_is_a_new_beginning() -> None:
    increase = Increase()
    assert [increase(total) for total in (3, 3, 5, 2, -1, 4)] == [3, 0, 2, 2, 0, 4]
    increase.restart()
    assert increase(6) == 6


@pytest.mark.parametrize("wanted", [False, True])
def test_a_scheduler_updates_once_a_second_if_metrics_are_wanted(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = pool()
    memory.host.tier.close()
    memory.config = dataclasses.replace(memory.config, host_gb=0.0)
    scheduler = SimpleNamespace(
        server_args=SimpleNamespace(attention_backend="mosaic"),
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: SimpleNamespace(memory=memory)),
        max_req_input_len=512,
        max_total_num_tokens=1024,
        metrics_collector_context=SimpleNamespace(current_scheduler_metrics_enabled=wanted),
        metrics_collector=SimpleNamespace(labels=LABELS) if wanted else None,
    )
    now, read = [100.0], []
    monkeypatch.setattr(metrics, "METRICS", ())
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(memory, "stats", lambda: read.append(now[0]) or {"host": None})
    observe.after_scheduler_init(None, scheduler)
    assert hasattr(scheduler, "mosaic_exporter") == wanted == bool(read)
    read.clear()
    for now[0] in (100.5, 100.9, 101.0, 101.1, 104.0, 104.5):
        observe.before_next_batch(scheduler)
    assert read == ([101.0, 104.0] if wanted else [])


def test_prometheus_client_is_not_imported_before_it_is_wanted() -> None:
    # SGLang loads plugins before it sets PROMETHEUS_MULTIPROC_DIR, and imports after that.
    code = "import sys; from sglang_mosaic.adapter import hooks; print('prometheus_client' in sys.modules)"
    plain = "import sys; import sglang_mosaic.torchvision_compat as t; t.declare_missing_operators(); "
    environment = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", plain + code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split()[-1:] == ["False"], done.stderr


def test_errors_of_encoding_are_those_of_the_pages() -> None:
    errors = EncodingErrors(2, torch.device("cpu"))
    assert errors.stats()["error"] == errors.stats()["error_worst_layer"] == 0
    for batch in ([[0.1, 0.3]], [[0.2, 0.2], [0.4, 0.0]]):
        errors.add(torch.stack([torch.tensor(batch), torch.zeros(len(batch), 2)]))
    stats = errors.stats()
    squares = [(0.01 + 0.09) / 2, 0.04, 0.08]
    assert stats["error_by_layer"] == pytest.approx([math.sqrt(sum(squares) / 3), 0])
    assert stats["error_worst_layer"] == pytest.approx(math.sqrt(sum(squares) / 3))
    assert stats["error"] == pytest.approx(math.sqrt(sum(squares) / 6))
    assert stats["squared_error_sum"] == pytest.approx(sum(squares) / 2) and stats["squared_error_pages"] == 3
