"""Policies check themselves, compare, print and pickle."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from tenacity import stop_after_attempt, stop_after_delay, stop_never, wait_fixed

from robustloader import FaultPolicy, MemoryPolicy, OptionError, RecoveryPolicy, Retry, TelemetryPolicy

POLICIES = (FaultPolicy, RecoveryPolicy, MemoryPolicy, TelemetryPolicy, Retry)

WRONG = [
    (FaultPolicy, "action", "ignore"),
    (FaultPolicy, "action", None),
    (FaultPolicy, "retry", 3),
    (FaultPolicy, "fatal", ValueError),
    (FaultPolicy, "fatal", (ValueError, 3)),
    (FaultPolicy, "burst", -1),
    (FaultPolicy, "burst", 1.5),
    (FaultPolicy, "burst", True),
    (FaultPolicy, "burst", math.inf),
    (FaultPolicy, "max_fraction", -0.1),
    (FaultPolicy, "max_fraction", 1.1),
    (FaultPolicy, "max_fraction", math.nan),
    (FaultPolicy, "max_fraction", "5%"),
    (FaultPolicy, "quarantine", 3),
    (FaultPolicy, "quarantine", True),
    (RecoveryPolicy, "max_restarts", -1),
    (RecoveryPolicy, "max_restarts", None),
    (RecoveryPolicy, "backoff_s", -0.1),
    (RecoveryPolicy, "backoff_s", math.nan),
    (RecoveryPolicy, "max_backoff_s", 0.01),
    (RecoveryPolicy, "max_backoff_s", math.inf),
    (RecoveryPolicy, "poison_after", 0),
    (RecoveryPolicy, "hang_after_s", 0),
    (RecoveryPolicy, "hang_after_s", -1),
    (RecoveryPolicy, "stall_report_s", 0),
    (RecoveryPolicy, "start_timeout_s", 0),
    (RecoveryPolicy, "min_workers", 0),
    (RecoveryPolicy, "in_process", 1),
    (MemoryPolicy, "on_low", "panic"),
    (MemoryPolicy, "headroom_fraction", 2),
    (MemoryPolicy, "max_worker_bytes", 0),
    (MemoryPolicy, "max_worker_bytes", "2GB"),
    (MemoryPolicy, "max_arena_bytes", -1),
    (MemoryPolicy, "max_arena_bytes", 1e9),
    (TelemetryPolicy, "sinks", [print]),
    (TelemetryPolicy, "sinks", (print,)),
    (TelemetryPolicy, "sinks", print),
    (TelemetryPolicy, "log_epochs", None),
    (TelemetryPolicy, "history", 0),
    (Retry, "stop", 3),
    (Retry, "stop", stop_never),
    (Retry, "wait", 3),
    (Retry, "on", ConnectionError),
]

RIGHT = [
    (FaultPolicy, {"action": "skip", "retry": None, "fatal": (), "burst": 0, "max_fraction": 0}),
    (
        FaultPolicy,
        {"action": "raise", "max_fraction": 1.0, "quarantine": Path("bad.jsonl"), "fatal": (KeyboardInterrupt,)},
    ),
    (RecoveryPolicy, {"max_restarts": 0, "backoff_s": 0, "max_backoff_s": 0, "hang_after_s": 0.5, "in_process": False}),
    (RecoveryPolicy, {"stall_report_s": None, "start_timeout_s": None, "poison_after": 1, "min_workers": 64}),
    (MemoryPolicy, {"on_low": "raise", "headroom_fraction": 0}),
    (MemoryPolicy, {"max_worker_bytes": 1 << 30, "max_arena_bytes": 0}),
    (TelemetryPolicy, {"log_epochs": False, "history": 1}),
    (Retry, {"stop": stop_after_attempt(1), "wait": wait_fixed(0), "on": ()}),
    (Retry, {"stop": stop_after_attempt(3) | stop_after_delay(5)}),
]


@pytest.mark.parametrize(("policy", "field", "value"), WRONG)
def test_a_wrong_value_is_refused(policy: Any, field: str, value: Any) -> None:
    """At once, naming the field, the value and what is allowed; as a ``ValueError`` too."""
    with pytest.raises(OptionError) as caught:
        policy(**{field: value})
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.field == field
    assert error.value is value or error.value == value
    assert str(error).startswith(f"{field} must be ")
    assert repr(value) in str(error)


@pytest.mark.parametrize(("policy", "settings"), RIGHT)
def test_a_right_value_is_kept(policy: Any, settings: dict[str, Any]) -> None:
    """As it was given."""
    made = policy(**settings)
    assert {name: getattr(made, name) for name in settings} == settings


@pytest.mark.parametrize(("policy", "settings"), [*((policy, {}) for policy in POLICIES), *RIGHT])
def test_policies_compare_print_pickle_and_copy(policy: Any, settings: dict[str, Any]) -> None:
    """They cross process boundaries and show up in logs."""
    made = policy(**settings)
    for other in (policy(**settings), pickle.loads(pickle.dumps(made)), copy.deepcopy(made), dataclasses.replace(made)):
        if "stop" not in settings or not isinstance(
            settings["stop"], type(stop_after_attempt(3) | stop_after_delay(5))
        ):
            assert other == made
            assert hash(other) == hash(made)
        assert repr(other) == repr(made) or "object at" in repr(made)
    assert repr(made).startswith(policy.__name__ + "(")


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_are_frozen_and_take_keywords_only(policy: Any) -> None:
    """They are shared by processes and threads."""
    made = policy()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(made)[0].name, None)
    with pytest.raises(TypeError):
        policy(1)


def test_different_policies_differ() -> None:
    """tenacity's own strategies do not compare; ours do by what they are set to."""
    assert Retry(stop=stop_after_attempt(3)) == Retry()
    assert Retry(stop=stop_after_attempt(4)) != Retry()
    assert Retry(on=(OSError,)) != Retry()
    assert FaultPolicy(retry=None) != FaultPolicy()
    assert FaultPolicy() != RecoveryPolicy()


def test_an_option_error_crosses_processes() -> None:
    """With its facts."""
    error = pickle.loads(pickle.dumps(OptionError("burst", -1, "positive")))
    assert (error.field, error.value, error.allowed) == ("burst", -1, "positive")


@pytest.mark.parametrize("policy", POLICIES)
def test_every_field_is_documented(policy: Any) -> None:
    """Meaning, unit and range of each stand in the docstring."""
    for field in dataclasses.fields(policy):
        assert f"{field.name}:" in (policy.__doc__ or ""), field.name
