"""Which members of a group keep it from working, when all that can be asked is whether a subset works."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["find_misfits"]


def find_misfits(count: int, works: Callable[[Sequence[int]], bool]) -> list[int]:
    """The members, by position, to leave out so that the rest work together.

    A collate that fails on tensors of two sizes fails on no sample alone, so members are judged against the company of
    those already accepted. That makes the first one count: if it is the odd one out, all others look wrong. So when
    more than half are found wanting, another start is tried, and the shortest list wins.

    Asks about ``k log n`` times for ``k`` misfits among ``n``. The list is empty where the whole group works after all,
    and holds everyone where nobody works even alone.
    """
    best = list(range(count))
    for start in dict.fromkeys((0, count - 1, count // 2)):
        misfits = _misfits_beside(start, count, works)
        if len(misfits) < len(best):
            best = misfits
        if 2 * len(best) <= count:
            break
    return best


def _misfits_beside(start: int, count: int, works: Callable[[Sequence[int]], bool]) -> list[int]:
    accepted: list[int] = []

    def judge(members: list[int]) -> list[int]:
        if works(sorted(accepted + members)):
            accepted.extend(members)
            return []
        if len(members) == 1:
            return members
        middle = len(members) // 2
        return judge(members[:middle]) + judge(members[middle:])

    misfits = judge([start])
    others = [member for member in range(count) if member != start]
    return sorted(misfits + (judge(others) if others else []))
