"""What the results must show, in one table, and the judging of a result by it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["NOT_SLOWER", "RECOVERY", "STUDY", "THRESHOLDS", "Threshold", "Verdict", "judge", "judge_study"]

Kind = Literal["ratio", "near limit", "not slower", "within", "at most", "soon"]

NOT_SLOWER = 0.97
"""The lower bound of a ratio's interval that counts as not slower: below it lies what runs cannot tell from chance."""


@dataclass(frozen=True)
class Threshold:
    """One line of what must be shown of ``measurement``, ours against ``against``.

    Kinds:
        ratio: the median ratio is at least ``value``.
        near limit: at least ``value`` of the limit is reached, or 1.15 × torch.
        not slower: the lower bound of the ratio's interval is at least ``value``.
        within: the whole interval lies within 1 ± ``value``.
        at most: ours is at most ``value`` times the other's (memory: less is better).
        soon: the 95th percentile is at most ``value`` ms, and one task's load time on top (``p95_ms``, ``load_ms``).
    """

    measurement: str
    kind: Kind
    value: float
    against: str = "torch"


THRESHOLDS = (
    Threshold("tiny", "ratio", 6.0),
    Threshold("image-u8", "ratio", 5.0),
    Threshold("image-f32", "ratio", 4.0),
    Threshold("tokens", "ratio", 4.0),
    Threshold("many", "ratio", 8.0),
    Threshold("numpy", "ratio", 3.0),
    Threshold("text", "ratio", 1.5),
    Threshold("cpu", "near limit", 0.90),
    Threshold("jpeg", "near limit", 0.90),
    Threshold("io", "not slower", NOT_SLOWER),
    Threshold("skewed", "not slower", NOT_SLOWER),
    Threshold("first-batch", "not slower", NOT_SLOWER),
    Threshold("short-epoch", "not slower", NOT_SLOWER),
    Threshold("memory", "at most", 1.05),
    Threshold("policies", "within", 0.03, "all off"),
    Threshold("policies-tiny", "within", 0.03, "all off"),
    Threshold("telemetry", "within", 0.02, "telemetry off"),
    *(
        Threshold(measurement, "not slower", NOT_SLOWER, peer)
        for measurement in (
            *("tiny", "image-u8", "image-f32", "tokens", "many", "numpy", "text", "cpu", "jpeg", "io", "skewed"),
            *("first-batch", "short-epoch"),
        )
        for peer in ("torchdata", "spdl")
    ),
)
"""Against torch each line names its own figure; of the peers, nothing may be faster."""

RECOVERY = (
    Threshold("kill to next batch, fork", "soon", 100.0, "a plain wait"),
    Threshold("kill to next batch, fork, 1000 MB added", "soon", 100.0, "a plain wait"),
    Threshold("1 % bad", "ratio", 0.95, "fault-free"),
    Threshold("a kill every second", "ratio", 0.80, "fault-free"),
)
"""What failures may cost; the throughputs are those of the realistic load."""


@dataclass(frozen=True)
class Verdict:
    """What became of a threshold. ``passed`` is None where the other could not do the work."""

    measurement: str
    against: str
    wanted: str
    shown: str
    passed: bool | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def __str__(self) -> str:
        word = {True: "pass", False: "falls short", None: "not compared"}[self.passed]
        return f"{word:13} {self.measurement:14} : {self.against:14} {self.wanted:38} {self.shown}"


def judge(measurements: Mapping[str, Any], thresholds: Sequence[Threshold] = THRESHOLDS) -> Iterator[Verdict]:
    """A verdict for each threshold whose measurement was made."""
    for threshold in thresholds:
        if threshold.measurement in measurements:
            yield _judge(threshold, measurements[threshold.measurement])


def _judge(threshold: Threshold, measurement: Mapping[str, Any]) -> Verdict:
    wanted, value = _wanted(threshold), threshold.value

    def verdict(shown: str, passed: bool | None) -> Verdict:
        return Verdict(threshold.measurement, threshold.against, wanted, shown, passed)

    if threshold.kind == "soon":
        p95_ms, load_ms = measurement["p95_ms"], measurement["load_ms"]
        return verdict(f"p95 {p95_ms:.1f} ms, load time {load_ms:.1f} ms", p95_ms <= value + load_ms)
    ratio = measurement["ratios"].get(threshold.against)
    of_limit = measurement.get("of_limit")
    if threshold.kind == "near limit" and of_limit is not None and of_limit >= value:
        return verdict(f"{of_limit:.2f} of the limit", True)
    if ratio is None:
        own = measurement["loaders"].get(measurement["subject"], {}).get("cannot")
        other = measurement["loaders"].get(threshold.against, {}).get("cannot")
        return verdict(own or other or "not measured", False if own else None)
    interval = f"{ratio['median']:.2f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
    if threshold.kind == "ratio":
        return verdict(interval, ratio["median"] >= value)
    if threshold.kind == "not slower":
        return verdict(interval, ratio["low"] >= value)
    if threshold.kind == "within":
        return verdict(interval, 1 - value <= ratio["low"] and ratio["high"] <= 1 + value)
    if threshold.kind == "at most":
        return verdict(f"{1 / ratio['median']:.3f}", 1 / ratio["median"] <= value)
    shown = f"{of_limit:.2f} of the limit, " if of_limit is not None else ""
    return verdict(f"{shown}{ratio['median']:.2f} × torch", ratio["median"] >= 1.15)


def _wanted(threshold: Threshold) -> str:
    value = threshold.value
    return {
        "ratio": f"at least {value:g} × as fast",
        "near limit": f"{value:.0%} of the limit, or 1.15 × torch",
        "not slower": f"interval's lower bound at least {value:g}",
        "within": f"interval within {value:.0%}",
        "at most": f"at most {value:g} × the memory",
        "soon": f"p95 at most {value:g} ms and a task's load time",
    }[threshold.kind]


# --- the study of num_workers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Study:
    """What the study of ``num_workers.py`` must show of each kind of dataset.

    Attributes:
        tuned: share of the best fixed setting's throughput that the choice of ``tune()`` reaches.
        tune_time: share of the exhaustive sweep's time that ``tune()`` may take.
        auto: share of the best fixed setting's throughput that ``num_workers="auto"`` reaches within one epoch.
        idle: share of the processors that nobody used before ``"auto"`` had more workers than processors.
        simulator: how far, at most, the simulator's throughput is from the measured one.
    """

    tuned: float = 0.95
    tune_time: float = 0.20
    auto: float = 0.90
    idle: float = 0.10
    simulator: float = 0.15


STUDY = _Study()


def judge_study(kinds: Mapping[str, Any]) -> Iterator[Verdict]:
    """Verdicts for each kind that was studied."""
    for kind, made in kinds.items():
        tuned, auto = made["tuned"], made["auto"]
        ratio = tuned["of_the_best"]
        shown = f"{tuned['workers']} workers, {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        wanted = f"at least {STUDY.tuned:g} of the best ({made['best']} workers)"
        yield Verdict(kind, "tune()", wanted, shown, ratio["median"] >= STUDY.tuned)
        share = tuned["took_s"] / tuned["sweep_s"]
        shown = f"{tuned['took_s']:.1f} s of {tuned['sweep_s']:.1f} s, {share:.2f}"
        wanted = f"at most {STUDY.tune_time:g} of the sweep's time"
        yield Verdict(kind, "tune() time", wanted, shown, share <= STUDY.tune_time)
        ratio = auto["of_the_best"]
        shown = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        wanted = f"at least {STUDY.auto:g} of the best in an epoch"
        yield Verdict(kind, "auto", wanted, shown, ratio["median"] >= STUDY.auto)
        within = auto["most_workers"] <= auto["allowed"] and auto["least_free"] >= auto["headroom"]
        shown = f"{auto['most_workers']} of {auto['allowed']} workers, {auto['least_free']:.0%} of memory free"
        wanted = f"never above {auto['allowed']} workers, {auto['headroom']:.0%} free"
        yield Verdict(kind, "auto limits", wanted, shown, within)
        idle = auto["least_idle"]
        shown = "no more were added" if idle is None else f"{idle:.0%} idle before {auto['most_workers']} workers"
        wanted = f"{STUDY.idle:.0%} of the processors idle before there are more workers than processors"
        yield Verdict(kind, "auto and processors", wanted, shown, idle is None or idle >= STUDY.idle)
        errors = sorted(made["simulator_error"].values())
        shown = f"{errors[-1]:.1%} at most, {errors[len(errors) // 2]:.1%} in the middle"
        wanted = f"within {STUDY.simulator:.0%} everywhere"
        yield Verdict(kind, "simulator", wanted, shown, errors[-1] <= STUDY.simulator)
