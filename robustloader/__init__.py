"""robustloader: a drop-in DataLoader for training jobs that run for days.

from robustloader import RobustDataLoader as DataLoader
"""

from robustloader.errors import (
    FaultBudgetError,
    OptionError,
    ResourceError,
    RestartBudgetError,
    RobustLoaderError,
    RobustLoaderWarning,
    SampleError,
    StateError,
    WorkerCrashError,
    WorkerError,
    WorkerHangError,
    WorkerStartError,
)
from robustloader.events import (
    BatchInfo,
    EpochFinished,
    Event,
    FaultRecord,
    MemoryLow,
    PoolHealed,
    PoolShrunk,
    SampleFaulted,
    SampleReplaced,
    ShardEnded,
    Sink,
    TaskReplayed,
    WorkerCrashed,
    WorkerHung,
    WorkerRecycled,
    WorkerRestarted,
)
from robustloader.loader import RobustDataLoader
from robustloader.policies import FaultPolicy, MemoryPolicy, RecoveryPolicy, Retry, TelemetryPolicy
from robustloader.sampling import ElasticDistributedBatchSampler, ElasticDistributedSampler
from robustloader.telemetry import EpochSummary, FaultLog, Statistics

__version__ = "0.1.0"

__all__ = [
    "BatchInfo",
    "ElasticDistributedBatchSampler",
    "ElasticDistributedSampler",
    "EpochFinished",
    "EpochSummary",
    "Event",
    "FaultBudgetError",
    "FaultLog",
    "FaultPolicy",
    "FaultRecord",
    "MemoryLow",
    "MemoryPolicy",
    "OptionError",
    "PoolHealed",
    "PoolShrunk",
    "RecoveryPolicy",
    "ResourceError",
    "RestartBudgetError",
    "Retry",
    "RobustDataLoader",
    "RobustLoaderError",
    "RobustLoaderWarning",
    "SampleError",
    "SampleFaulted",
    "SampleReplaced",
    "ShardEnded",
    "Sink",
    "StateError",
    "Statistics",
    "TaskReplayed",
    "TelemetryPolicy",
    "WorkerCrashError",
    "WorkerCrashed",
    "WorkerError",
    "WorkerHangError",
    "WorkerHung",
    "WorkerRecycled",
    "WorkerRestarted",
    "WorkerStartError",
]
