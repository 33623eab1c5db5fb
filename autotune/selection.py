"""Which operators the patterns of --operator name."""

import fnmatch
from collections.abc import Sequence

from autotune.workloads import Workload


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that any of --operator's patterns fits, in any letter case: the whole name or its first word, a shell
    pattern for the name, or a part of it. ValueError where a pattern fits none."""
    chosen: set[str] = set()
    for given in patterns:
        whole = given.lower()
        pattern = whole if any(character in given for character in "*?[") else f"*{whole}*"
        hits = [name for name in names if whole in (name.lower(), name.lower().split()[0])]
        hits = hits or [name for name in names if fnmatch.fnmatchcase(name.lower(), pattern)]
        if not hits:
            known = ", ".join(dict.fromkeys(name.split()[0] for name in names))
            raise ValueError(f"--operator must match a name, {given!r} does not; names begin with {known}")
        chosen.update(hits)
    return [name for name in names if name in chosen]


def named(found: Sequence[Workload], patterns: Sequence[str]) -> list[Workload]:
    """Those of which --operator's patterns fit the name."""
    wanted = matching([workload.name for workload in found], patterns)
    return [workload for workload in found if workload.name in wanted]
