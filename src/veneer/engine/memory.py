"""How much host memory is left: of the machine, and of the container that the process is in."""

from __future__ import annotations

from pathlib import Path

import psutil  # type: ignore[import-untyped]

_CGROUPS = {  # by version: folder, limit, usage, and in memory.stat what of it is given back when asked for
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken without swapping and within the container's limit."""
    found = [int(psutil.virtual_memory().available)]
    for folder, limit, usage, reclaimable in _CGROUPS.values():
        try:
            most, used = ((cgroup / folder / name).read_text().strip() for name in (limit, usage))
            stat = dict(line.split() for line in (cgroup / folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if most != "max":
            found.append(int(most) - int(used) + int(stat[reclaimable]))
    return min(found)
