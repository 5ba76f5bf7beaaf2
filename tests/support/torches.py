"""What the torch under test has of what came after torch 2.6. ``docs/compatibility.md`` lists the differences."""

from __future__ import annotations

import inspect

from torch.utils.data import dataloader

_SOURCE = inspect.getsource(dataloader)

WARNS_OF_PICKLING = "Got pickle error" in _SOURCE
"""Torch says what a worker's arguments that cannot be pickled mean."""

WARNS_OF_NO_ACCELERATOR = "no accelerator is found" in _SOURCE
"""``pin_memory=True`` without an accelerator is a warning, whatever ``pin_memory_device`` names."""

ORDERS_BY_CAPACITY = "_workers_num_tasks" in _SOURCE
"""With ``in_order=False`` a worker that is slow gets fewer tasks."""
