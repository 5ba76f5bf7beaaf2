"""Metrics for Prometheus: its own parser reads them, and a real server scrapes them and answers queries."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from robustloader import (
    EpochProgressed,
    OptionError,
    PoolHealed,
    PrometheusSink,
    RobustLoaderWarning,
    Statistics,
    TelemetryPolicy,
)
from robustloader.telemetry import Recorder
from tests.support.telemetry import BATCH_SIZE, BATCHES, run_epoch
from tests.support.watch import until


@pytest.fixture
def registry() -> prometheus_client.CollectorRegistry:
    """A registry of this test's own."""
    return prometheus_client.CollectorRegistry()


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read().decode()


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Name and label values (in the order of their names) → value, as Prometheus's own parser reads them."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_run_over_http(registry: Any) -> None:
    """Totals are the epoch's, failures are counted by kind, and units are seconds and bytes."""
    sink = PrometheusSink(port=0, address="127.0.0.1", registry=registry, labels={"loader": "train"})
    try:
        summary = run_epoch(sink)
        read = samples(fetch(f"http://127.0.0.1:{sink.port}/metrics"))
    finally:
        sink.close()
    assert read["robustloader_batches_total", "train"] == BATCHES
    assert read["robustloader_samples_total", "train"] == BATCHES * BATCH_SIZE
    assert read["robustloader_delivered_bytes_total", "train"] == summary.bytes
    assert read["robustloader_wait_seconds_total", "train"] == pytest.approx(summary.wait_s)
    assert read["robustloader_step_seconds_total", "train"] == pytest.approx(summary.step_s)
    assert read["robustloader_faults_total", "replaced", "exception", "train"] == 1
    assert read["robustloader_worker_crashes_total", "killed", "train"] == 1
    assert read["robustloader_worker_restarts_total", "train"] == 1
    assert read["robustloader_epochs_total", "true", "train"] == 1
    assert read["robustloader_active_workers", "train"] == summary.workers_at_end
    assert read["robustloader_last_epoch_wait_seconds", "train", "0.95"] == summary.wait_p95_s
    for worker in summary.workers:
        assert read["robustloader_worker_tasks_total", "train", str(worker.worker_id)] == worker.tasks
        assert read["robustloader_worker_busy_seconds_total", "train", str(worker.worker_id)] == pytest.approx(
            worker.busy_s
        )


def test_names_follow_the_conventions(registry: Any) -> None:
    """https://prometheus.io/docs/practices/naming/: one prefix, counters end in _total, base units, a help text."""
    PrometheusSink(registry=registry)
    for family in text_string_to_metric_families(prometheus_client.generate_latest(registry).decode()):
        assert family.name.startswith("robustloader_") and family.documentation
        assert not any(unit in family.name for unit in ("milli", "micro", "_ms", "_mb", "percent"))
        assert family.type in ("counter", "gauge")
        if family.type == "counter":
            assert all(sample.name.endswith(("_total", "_created")) for sample in family.samples)


@contextmanager
def prometheus(targets: list[str], folder: Path) -> Iterator[str]:
    """A real server that scrapes ``targets`` every 100 ms; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scrape = {"job_name": "training", "static_configs": [{"targets": targets}]}
    config = {"global": {"scrape_interval": "100ms", "scrape_timeout": "100ms"}, "scrape_configs": [scrape]}
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [
        "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def query(server: str, expression: str) -> list[tuple[dict[str, str], float]]:
    """What a server answers: label sets and values; nothing while it does not answer."""
    try:
        answer = json.loads(fetch(f"{server}/api/v1/query?query={urllib.parse.quote(expression)}"))
    except OSError:
        return []
    return [(result["metric"], float(result["value"][1])) for result in answer["data"]["result"]]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus here (Debian's package)")
def test_a_real_server_scrapes_it(tmp_path: Path, registry: Any) -> None:
    """From training loop to PromQL, and without a complaint about the format."""
    sink = PrometheusSink(port=0, address="127.0.0.1", registry=registry, labels={"loader": "train", "rank": "2"})
    try:
        sink.start()
        with prometheus([f"127.0.0.1:{sink.port}"], tmp_path) as server:
            until(lambda: query(server, "up == 1"), what="the first scrape")
            run_epoch(sink)
            (found,) = until(
                lambda: query(server, f'robustloader_samples_total{{loader="train"}} == {BATCHES * BATCH_SIZE}'),
                what="the scrape after the epoch",
            )
            assert found[0].items() >= {"rank": "2", "job": "training"}.items()
            ((_, wait_share),) = query(
                server,
                "robustloader_wait_seconds_total / (robustloader_wait_seconds_total + robustloader_step_seconds_total)",
            )
            assert 0 < wait_share < 1
            assert query(server, 'sum(robustloader_worker_crashes_total{cause="killed"})') == [({}, 1.0)]
            kinds = json.loads(fetch(f"{server}/api/v1/targets/metadata"))["data"]
            assert {kind["type"] for kind in kinds if kind["metric"].startswith("robustloader_")} == {
                "counter",
                "gauge",
            }
    finally:
        sink.close()


def test_a_textfile_for_the_node_exporter(tmp_path: Path, registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced as a whole, one per rank, nothing left beside it."""
    monkeypatch.setenv("RANK", "1")
    sink = PrometheusSink(textfile=tmp_path / "robustloader-{rank}.prom", registry=registry)
    run_epoch(sink, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["robustloader-1.prom"]
    read = samples((tmp_path / "robustloader-1.prom").read_text())
    assert read["robustloader_batches_total", "1"] == BATCHES
    assert read["robustloader_worker_tasks_total", "1", "main"] == BATCHES


def test_ranks_that_are_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink made before the fork serves each of them, under its own rank."""
    monkeypatch.setattr("robustloader.telemetry.prometheus._registries", {})
    sink = PrometheusSink(textfile=tmp_path / "{rank}.prom", labels={"loader": "train"})

    def train(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        totals = Statistics(batches=rank).to_dict()
        sink.receive(EpochProgressed(statistics=totals, ready=0, workers=[]))

    ranks = [multiprocessing.get_context("fork").Process(target=train, args=(rank,)) for rank in (1, 2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
        rank.close()
    for number in (1, 2):
        read = samples((tmp_path / f"{number}.prom").read_text())
        assert read["robustloader_batches_total", "train", str(number)] == number


def test_counters_only_go_up(registry: Any) -> None:
    """Progress and summaries tell totals of an epoch; two loaders' epochs of the same number are told apart."""
    sink = PrometheusSink(registry=registry)

    def progress(loader: int, epoch: int, batches: int) -> float:
        totals = Statistics(epoch=epoch, batches=batches).to_dict()
        sink.receive(EpochProgressed(epoch=epoch, loader=loader, statistics=totals, ready=0, workers=[]))
        return samples(prometheus_client.generate_latest(registry).decode())["robustloader_batches_total",]

    steps = [(0, 0, 5, 5), (1, 0, 3, 8), (0, 0, 6, 9), (0, 1, 2, 11), (1, 0, 3, 11), (0, 1, 2, 11)]
    for loader, epoch, batches, total in steps:
        assert progress(loader, epoch, batches) == total


def test_labels_may_hold_anything(tmp_path: Path, registry: Any) -> None:
    """Quotes, line ends, braces and backslashes come out of the page and the file as they went in."""
    hostile = 'tr"a\nin\\ }{,="é'
    path = tmp_path / "run.prom"
    sink = PrometheusSink(port=0, address="127.0.0.1", textfile=path, registry=registry, labels={"loader": hostile})
    try:
        run_epoch(sink, workers=0)
        page = fetch(f"http://127.0.0.1:{sink.port}/metrics")
    finally:
        sink.close()
    for text in (page, path.read_text("utf-8")):
        assert samples(text)["robustloader_samples_total", hostile] == BATCHES * BATCH_SIZE


def test_loaders_share_a_port_but_not_their_labels(registry: Any) -> None:
    """One server for a process, until the last sink goes."""
    train = PrometheusSink(port=0, address="127.0.0.1", registry=registry, labels={"loader": "train"})
    train.start()
    port = train.port
    val = PrometheusSink(port=port, address="127.0.0.1", registry=registry, labels={"loader": "val"})
    try:
        val.receive(PoolHealed(workers=3))
        train.receive(PoolHealed(workers=2))
        train.close()
        read = samples(fetch(f"http://127.0.0.1:{port}/metrics"))
        assert read["robustloader_active_workers", "train"] == 2
        assert read["robustloader_active_workers", "val"] == 3
    finally:
        train.close()
        val.close()
        val.close()
    with pytest.raises(OSError, match="refused"):
        fetch(f"http://127.0.0.1:{port}/metrics")
    with pytest.raises(OptionError, match="label names"):
        PrometheusSink(registry=registry, labels={"job": "x"})


def test_a_port_that_is_taken_costs_a_warning(registry: Any) -> None:
    """The sink is dropped, training goes on; ``start`` tells at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        sink = PrometheusSink(port=taken.getsockname()[1], address="127.0.0.1", registry=registry)
        with pytest.raises(OSError, match="in use"):
            sink.start()
        recording = Recorder(TelemetryPolicy(sinks=(sink,))).begin_epoch(epoch=0, workers=1, usable_cpus=1, now_ns=0)
        with pytest.warns(RobustLoaderWarning, match=r"PrometheusSink\(port=.*in use"):
            recording.emit(PoolHealed(workers=1))
        recording.emit(PoolHealed(workers=1))


@pytest.mark.parametrize("options", [{"port": -1}, {"port": True}, {"textfile": "/nowhere/a.prom"}])
def test_a_mistake_is_seen_at_once(options: dict[str, Any], registry: Any) -> None:
    with pytest.raises(OptionError):
        PrometheusSink(registry=registry, **options)


def test_it_travels_with_its_loader(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry stays where it is."""
    monkeypatch.setattr("robustloader.telemetry.prometheus._registries", {})
    sink = PrometheusSink(registry=registry, labels={"a": "b"})
    assert copy.deepcopy(sink) is sink
    twin = pickle.loads(pickle.dumps(sink))
    assert twin.labels == {"a": "b"} and twin.port is None
    twin.receive(PoolHealed(workers=2))
    assert "robustloader_active_workers{" not in prometheus_client.generate_latest(registry).decode()
