"""No two extents ever overlap, and every page is accounted for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from robustloader.decisions.extents import PAGE, ExtentMap, whole_pages

SIZE = 64 * PAGE


class ExtentMachine(RuleBasedStateMachine):
    """Beside the map, a plain list of pages: who has each, and whether it is warm."""

    def __init__(self) -> None:
        super().__init__()
        self.map = ExtentMap(SIZE + 100)  # what is not a whole page is not used
        self.owner: list[int | None] = [None] * 64
        self.warm = [False] * 64
        self.extents: dict[int, int] = {}

    def enter(self, offset: int, nbytes: int) -> range:
        assert offset % PAGE == 0
        pages = range(offset // PAGE, (offset + whole_pages(nbytes)) // PAGE)
        for page in pages:
            assert self.owner[page] is None, "an extent was handed out twice"
            self.owner[page] = offset
        self.extents[offset] = len(pages)
        return pages

    @rule(nbytes=st.integers(1, 12 * PAGE))
    def allocate_warm(self, nbytes: int) -> None:
        before = self.map.resident
        offset = self.map.allocate_warm(nbytes)
        if offset is None:
            run = longest_run([self.warm[page] and self.owner[page] is None for page in range(64)])
            assert run * PAGE < whole_pages(nbytes), "there was a warm span that would have done"
        else:
            assert all(self.warm[page] for page in self.enter(offset, nbytes))
            assert self.map.resident == before

    @rule(nbytes=st.integers(1, 12 * PAGE))
    def allocate_cold(self, nbytes: int) -> None:
        before = self.map.resident
        offset = self.map.allocate_cold(nbytes)
        if offset is not None:
            for page in self.enter(offset, nbytes):
                assert not self.warm[page]
                self.warm[page] = True
            assert self.map.resident == before + whole_pages(nbytes)

    @precondition(lambda self: self.extents)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.extents)))
        self.map.free(offset)
        for page in range(64):
            if self.owner[page] == offset:
                self.owner[page] = None
        del self.extents[offset]

    @rule(nbytes=st.integers(0, 20 * PAGE))
    def cool(self, nbytes: int) -> None:
        warm = self.map.warm
        spans = self.map.cool(nbytes)
        for span in spans:
            assert span.offset % PAGE == span.size % PAGE == 0
            for page in range(span.offset // PAGE, (span.offset + span.size) // PAGE):
                assert self.owner[page] is None and self.warm[page], "memory in use was given back"
                self.warm[page] = False
        assert sum(span.size for span in spans) == min(warm, nbytes - nbytes % PAGE)

    @invariant()
    def sums_agree(self) -> None:
        assert self.map.in_use == PAGE * sum(owner is not None for owner in self.owner)
        assert self.map.warm == PAGE * sum(w and o is None for w, o in zip(self.warm, self.owner, strict=True))
        assert self.map.resident == self.map.in_use + self.map.warm


def longest_run(flags: list[bool]) -> int:
    longest = run = 0
    for flag in flags:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest


ExtentMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None, derandomize=True)
TestExtents = ExtentMachine.TestCase


def test_steady_use_takes_no_more_memory() -> None:
    """Batches of one size, a few of them alive at a time, use the same pages over and over."""
    extents = ExtentMap(1 << 30)
    alive: list[int] = []
    for _ in range(1_000):
        offset = extents.allocate_warm(1_000_000)
        if offset is None:
            offset = extents.allocate_cold(1_000_000)
        assert offset is not None
        alive.append(offset)
        if len(alive) == 4:
            extents.free(alive.pop(0))
    assert extents.resident == 4 * whole_pages(1_000_000)


@pytest.mark.parametrize("nbytes", [1, PAGE - 1, PAGE, PAGE + 1])
def test_whole_pages(nbytes: int) -> None:
    """Every extent has pages of its own."""
    assert whole_pages(nbytes) == (PAGE if nbytes <= PAGE else 2 * PAGE)
