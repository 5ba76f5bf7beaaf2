"""Metrics for Prometheus, over HTTP or in a file for the node exporter's textfile collector."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

from robustloader.errors import OptionError
from robustloader.events import EpochFinished, EpochProgressed, Event
from robustloader.telemetry.changes import changes
from robustloader.telemetry.deferral import tell_the_rest
from robustloader.telemetry.growth import Growth
from robustloader.telemetry.labels import ConfiguredSink, fill_in, require, resolve_labels

__all__ = ["PrometheusSink"]

_lock = threading.Lock()
# By process id: a forked process begins with metrics of its own.
_registries: dict[int, Any] = {}
_metrics: weakref.WeakKeyDictionary[Any, _Metrics] = weakref.WeakKeyDictionary()
_servers: dict[tuple[str, int], _Server] = {}

_COUNTERS = {
    "batches": ("batches", "Batches delivered.", ()),
    "samples": ("samples", "Samples delivered.", ()),
    "bytes": ("delivered_bytes", "Bytes delivered.", ()),
    "wait_s": ("wait_seconds", "Time that the loop waited for data.", ()),
    "step_s": ("step_seconds", "Time that the loop spent between two waits.", ()),
    "tasks": ("worker_tasks", "Batches loaded.", ("worker",)),
    "busy_s": ("worker_busy_seconds", "Time spent loading.", ("worker",)),
    "epochs": ("epochs", "Epochs that ended.", ("complete",)),
    "faults": ("faults", "Samples that failed, by kind and by what was done.", ("kind", "action")),
    "crashes": ("worker_crashes", "Workers that died, by cause.", ("cause",)),
    "hangs": ("worker_hangs", "Workers killed because they stayed silent.", ()),
    "restarts": ("worker_restarts", "Processes started in a dead worker's place.", ()),
    "recycled": ("worker_recycles", "Workers replaced because they held too much memory.", ()),
    "replayed": ("replayed_tasks", "Batches given out again after a death.", ()),
    "shards": ("shards_ended", "Shares of an iterable dataset that ended before their time.", ()),
    "degraded": ("transport_degraded", "Workers and epochs whose batches went round the arena.", ()),
    "memory_low": ("memory_low", "Times that less memory was free than should be.", ()),
}
_GAUGES = {
    "epoch": ("epoch", "Number of the epoch told of last, from 0.", ()),
    "workers": ("active_workers", "Worker processes that load now; 0 is the training process.", ()),
    "ready": ("ready_batches", "Batches that lay ready when the loop last asked.", ()),
    "memory": ("worker_peak_memory_bytes", "Most resident memory of a worker in this epoch.", ("worker",)),
    "duration": ("last_epoch_duration_seconds", "How long the last epoch took.", ()),
    "waits": ("last_epoch_wait_seconds", "Quantiles of the waits of the last epoch.", ("quantile",)),
    "loads": ("last_epoch_load_seconds", "Quantiles of the loading times of the last epoch.", ("quantile",)),
}
_QUANTILES = (("0.5", "p50"), ("0.95", "p95"), ("0.99", "p99"))


class PrometheusSink(ConfiguredSink):
    """Counts into ``prometheus_client`` metrics named ``robustloader_…``, in seconds and bytes; counters end in
    ``_total``.

    Totals of batches, waits and workers move with each :class:`~robustloader.EpochProgressed`
    (``TelemetryPolicy.progress_s``) and at the end of an epoch; failures are counted as they happen.

    Runs in: the training process. The HTTP server is started at the first event, in a thread of its own, so that worker
    processes that import the user's script start none; :meth:`start` starts it at once. Loaders may share a sink; give
    each a sink of its own, with a label such as ``{"loader": "train"}``, to tell them apart. Sinks with the same port
    share one server. Two sinks of one loader count everything twice where they share registry and labels: for a port
    and a file, give one sink both.

    Args:
        port: TCP port to serve ``/metrics`` on; 0 takes a free one (see ``port`` after the start). Each process of a
            machine needs its own, for instance ``9400 + int(os.environ.get("LOCAL_RANK", 0))``. None serves nothing.
        address: address to listen on; the default, all interfaces, is prometheus_client's own.
        textfile: path of a ``.prom`` file, replaced at once whenever progress is told, with fields as in
            :class:`~robustloader.JsonlSink`. None writes none.
        registry: the ``CollectorRegistry`` to register with; None is one that all sinks of this process share.
            With a registry of yours, and neither port nor textfile, expose it as you do.
        labels: put on every metric; ``rank`` comes by itself where torchrun's RANK is set. Sinks that share a registry
            have the same label names.

    Raises:
        ImportError: prometheus_client is not installed (``robustloader[prometheus]``).
        OptionError: an option is out of range, or the registry has our metrics under other label names.
        OSError: from :meth:`start`, the port is taken. Without that call it is a warning, and the sink is dropped.
    """

    LIVE: ClassVar[tuple[str, ...]] = ("registry",)

    def __init__(
        self,
        *,
        port: int | None = None,
        address: str = "0.0.0.0",
        textfile: str | os.PathLike[str] | None = None,
        registry: Any = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(port=port, address=address, textfile=textfile, registry=registry, labels=labels)
        require("prometheus_client", "PrometheusSink", "prometheus")
        if port is not None and (not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 1 << 16):
            raise OptionError("port", port, "a TCP port from 0 to 65535, or None")
        self.labels: dict[str, str] = resolve_labels(labels)
        self.textfile: str | None = (
            None if textfile is None else os.path.abspath(fill_in("textfile", textfile, self.labels))
        )
        if self.textfile is not None and not os.path.isdir(os.path.dirname(self.textfile)):
            raise OptionError("textfile", self.textfile, "a file in a folder that exists; make the folder first")
        self._port = port
        self._address = address
        self._registry = _shared_registry() if registry is None else registry
        self._names = tuple(sorted(self.labels))
        self._values = tuple(self.labels[name] for name in self._names)
        self._metrics = _metrics_of(self._registry, self._names)
        self._growth = Growth()
        self._server: _Server | None = None
        self._pid = os.getpid()
        self._closed = False

    @property
    def port(self) -> int | None:
        """The port that is served; None where none is (yet)."""
        return self._server.port if self._server is not None else None

    def start(self) -> None:
        """Start to serve, where a port was given. Idempotent."""
        if self._server is None and self._port is not None:
            self._server = _serve(self._address, self._port, self._registry)

    def close(self) -> None:
        """Stop to serve, unless another sink shares the server. The metrics stay in the registry. Idempotent."""
        tell_the_rest()
        self._closed = True
        server, self._server = self._server, None
        if server is not None and os.getpid() == self._pid:
            _release(server)

    def receive(self, event: Event) -> None:
        """Count one event."""
        if self._closed:
            return
        if os.getpid() != self._pid:
            self.renew()
        self.start()
        self._count(event)
        if self.textfile is not None and isinstance(event, (EpochProgressed, EpochFinished)):
            import prometheus_client

            prometheus_client.write_to_textfile(self.textfile, self._registry)

    def _count(self, event: Event) -> None:
        for name, value, adds, attributes in changes(event, self._growth):
            child = self._child(name, *map(_as_label, attributes.values()))
            if adds:
                child.inc(value)
            else:
                child.set(value)
        if isinstance(event, EpochFinished):
            self._child("duration").set(event.summary.duration_s)
            for quantile, field in _QUANTILES:
                self._child("waits", quantile).set(getattr(event.summary, f"wait_{field}_s"))
                self._child("loads", quantile).set(getattr(event.summary, f"load_{field}_s"))

    def _child(self, name: str, *values: str) -> Any:
        return self._metrics.child(name, (*self._values, *values))


class _Metrics:
    """Our metrics in one registry."""

    def __init__(self, registry: Any, names: tuple[str, ...]) -> None:
        from prometheus_client import Counter, Gauge

        self.names = names
        self._by_name: dict[str, Any] = {
            key: kind(f"robustloader_{name}", text, (*names, *extra), registry=registry)
            for kind, table in ((Counter, _COUNTERS), (Gauge, _GAUGES))
            for key, (name, text, extra) in table.items()
        }

    def child(self, name: str, values: tuple[str, ...]) -> Any:
        """The metric with its label values."""
        metric = self._by_name[name]
        return metric.labels(*values) if values else metric


class _Server:
    """One HTTP server of this process, and how many sinks use it."""

    def __init__(self, address: str, port: int, registry: Any) -> None:
        import prometheus_client

        self.registry = registry
        self._server, self._thread = prometheus_client.start_http_server(port, address, registry)
        self.port: int = self._server.server_port
        self.key = (address, self.port)
        self.pid = os.getpid()
        self.users = 0

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _as_label(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _shared_registry() -> Any:
    import prometheus_client

    with _lock:
        return _registries.setdefault(os.getpid(), prometheus_client.CollectorRegistry())


def _metrics_of(registry: Any, names: tuple[str, ...]) -> _Metrics:
    with _lock:
        metrics = _metrics.get(registry)
        if metrics is None:
            metrics = _metrics[registry] = _Metrics(registry, names)
    if metrics.names != names:
        raise OptionError(
            "labels", dict.fromkeys(names, "…"), f"the label names {metrics.names}, as in the same registry"
        )
    return metrics


def _serve(address: str, port: int, registry: Any) -> _Server:
    """The server on a port: one that this process has already, or a new one."""
    with _lock:
        server = _servers.get((address, port))
        if server is None or server.pid != os.getpid():
            server = _Server(address, port, registry)
            _servers[server.key] = server
        elif server.registry is not registry:
            raise OptionError("port", port, "a port of its own: another sink serves another registry there")
        server.users += 1
        return server


def _release(server: _Server) -> None:
    with _lock:
        server.users -= 1
        if server.users:
            return
        _servers.pop(server.key, None)
    server.stop()
