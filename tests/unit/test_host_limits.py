"""What the machine allows, read from a folder that stands for the root of a file system, and from this machine."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from robustloader.decisions.limits import Memory, low_memory
from robustloader.system import cgroups, limits

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 64 GiB, 60 of them available, and no control groups."""
    write(tmp_path, {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 5 kB\nMemAvailable: {60 << 20} kB"})
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.fixture(autouse=True)
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


# --- control groups, version 2 ----------------------------------------------------------------------------------------


def test_version_2(root: Path) -> None:
    """The tightest group on the way up decides; page cache that can be dropped is free; kills are summed."""
    group = "sys/fs/cgroup/job"
    write(
        root,
        {
            "proc/self/cgroup": "0::/job/step",
            f"{group}/step/cpu.max": "max 100000",
            f"{group}/cpu.max": "1250000 100000",
            f"{group}/step/memory.max": "max",
            f"{group}/step/memory.current": str(600 * MIB),
            f"{group}/memory.max": str(1024 * MIB),
            f"{group}/memory.current": str(600 * MIB),
            f"{group}/memory.stat": f"anon 5\ninactive_file {100 * MIB}",
            f"{group}/memory.events": "low 0\noom_kill 4",
            f"{group}/memory.oom.group": "1",
            f"{group}/step/memory.events": "oom_kill 3",
            f"{group}/pids.max": "100",
            f"{group}/pids.current": "88",
            f"{group}/step/pids.max": "max",
            f"{group}/step/pids.current": "5",
        },
    )
    top = str(root)
    assert limits.usable_cpus(top) == 13
    memory = limits.read_memory(top)
    assert (memory.limit_bytes, memory.free_bytes) == (1024 * MIB, 524 * MIB)
    assert memory.source == str(root / group)
    assert limits.free_memory_bytes(top) == (524 * MIB, 1024 * MIB)
    assert limits.memory_kills(top) == 7
    assert limits.memory_kills_group(top)
    processes = limits.read_processes(top)
    assert processes.free == 12
    assert "pids.max" in processes.limit


@pytest.mark.parametrize("version", [1, 2])
def test_files_in_the_page_cache_are_free_however_often_they_were_read(root: Path, version: int) -> None:
    """From its second epoch on a dataset's files are in active use. Of files in memory the kernel can drop nothing."""
    used, cache, shared = 62 << 30, 44 << 30, 5 << 30
    lists = {"inactive_file": 4 << 30, "active_file": cache - (4 << 30), "inactive_anon": shared + (8 << 30)}
    stat = {"anon": 8 << 30, "file": cache + shared, "shmem": shared, "file_dirty": 1 << 30, **lists}
    if version == 2:
        stat["slab_reclaimable"] = 2 << 30
        folder, top, current, groups = "sys/fs/cgroup", "max", "current", "0::/"
    else:
        stat = {f"total_{name}": value for name, value in stat.items()} | {"active_file": 1}
        folder, top, current, groups = "sys/fs/cgroup/memory", "limit_in_bytes", "usage_in_bytes", "4:memory:/"
    write(
        root,
        {
            "proc/meminfo": f"MemTotal: {512 << 20} kB\nMemAvailable: {400 << 20} kB",
            "proc/self/cgroup": groups,
            f"{folder}/memory.{top}": str(64 << 30),
            f"{folder}/memory.{current}": str(used),
            f"{folder}/memory.stat": "\n".join(f"{name} {value}" for name, value in stat.items()),
        },
    )
    memory = limits.read_memory(str(root))
    assert memory.free_bytes == (64 << 30) - used + cache + stat.get("slab_reclaimable", 0)
    assert low_memory(memory, 0.1) is None


def test_half_a_processor_is_one(root: Path) -> None:
    """There is always one."""
    write(root, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert limits.usable_cpus(str(root)) == 1


def test_a_group_that_may_not_be_seen(root: Path) -> None:
    """In a container the path is the host's: what is mounted there counts."""
    write(
        root,
        {
            "proc/self/cgroup": "0::/kubepods/pod1/abc",
            "sys/fs/cgroup/memory.max": str(256 * MIB),
            "sys/fs/cgroup/memory.current": str(56 * MIB),
        },
    )
    assert limits.read_memory(str(root)).free_bytes == 200 * MIB


# --- version 1, and both ----------------------------------------------------------------------------------------------


def test_version_1(root: Path) -> None:
    """Controllers may be mounted together; "no limit" is a very large number; both versions may be there at once."""
    write(
        root,
        {
            "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n2:pids:/job\n1:name=systemd:/job\n0::/job",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "350000",
            "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(512 * MIB),
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": str(300 * MIB),
            "sys/fs/cgroup/memory/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {50 * MIB}",
            "sys/fs/cgroup/memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(900 * MIB),
            "sys/fs/cgroup/pids/job/pids.max": "40",
            "sys/fs/cgroup/pids/job/pids.current": "50",
            "sys/fs/cgroup/unified/job/memory.events": "oom_kill 5",
        },
    )
    top = str(root)
    assert limits.usable_cpus(top) == 4
    memory = limits.read_memory(top)
    assert (memory.limit_bytes, memory.free_bytes) == (512 * MIB, 262 * MIB)
    assert limits.memory_kills(top) == 7
    assert limits.read_processes(top).free == 0
    assert not limits.memory_kills_group(top)


def test_no_groups(root: Path) -> None:
    """Then it is the host's memory, its own count of kills, and no bound on processes."""
    write(root, {"proc/vmstat": "nr_free_pages 3\noom_kill 9"})
    top = str(root)
    assert limits.read_memory(top) == Memory(limit_bytes=64 << 30, free_bytes=60 << 30)
    assert limits.memory_kills(top) == 9
    assert limits.usable_cpus(top) == 64
    assert list(cgroups.process_limits(top)) == []


def test_a_group_larger_than_the_host_is_no_limit(root: Path) -> None:
    """The host's memory runs out first."""
    write(
        root,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": str(128 << 30),
            "sys/fs/cgroup/memory.current": str(127 << 30),
        },
    )
    assert limits.read_memory(str(root)).source == "host"


def test_kills_that_cannot_be_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor left there is no count: neither that of fewer groups, nor the host's."""
    group = "sys/fs/cgroup/job"
    write(root, {"proc/self/cgroup": "0::/job", f"{group}/memory.events": "oom_kill 3", "proc/vmstat": "oom_kill 9"})
    top = str(root)
    assert limits.memory_kills(top) == 3

    unreadable = []

    def run_out(path: str, **options: Any) -> Any:
        if path.endswith(tuple(unreadable)):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)
        return open(path, **options)

    monkeypatch.setattr(cgroups, "open", run_out, raising=False)
    for name in ("proc/self/cgroup", "memory.events"):
        unreadable[:] = [name]
        assert limits.memory_kills(top) is None
    (root / group / "memory.events").unlink()
    unreadable[:] = ["vmstat"]
    assert limits.memory_kills(top) is None
    unreadable.clear()
    assert limits.memory_kills(top) == 9


# --- /dev/shm ---------------------------------------------------------------------------------------------------------


def test_what_dead_processes_left_behind(root: Path) -> None:
    """torch's entries whose process is gone, and semaphores, unless somebody maps them; nobody else's files."""
    write(
        root,
        {
            "dev/shm/torch_17_1_0": "x" * 5_000,
            "dev/shm/torch_18_2_0": "of a process that lives",
            "dev/shm/torch_19_3_0": "mapped by another",
            "dev/shm/sem.mp-dead": "x",
            "dev/shm/sem.mp-used": "x",
            "dev/shm/my_cache": "none of our business",
            "dev/shm/torch_17_;reboot": "not torch's, and no argument for rm",
            "dev/shm/sem.\x1b[2J": "not multiprocessing's",
            "proc/18/maps": "7f00-7f01 rw-s 00000000 00:1a 5 /dev/shm/sem.mp-used",
            "proc/20/maps": "7f00-7f01 rw-s 00000000 00:1a 5 /dev/shm/torch_19_3_0",
        },
    )
    shared = limits.read_shared_memory(str(root))
    assert shared is not None
    assert shared.stale == ("sem.mp-dead", "torch_17_1_0")
    assert shared.stale_bytes >= 5_001
    assert 0 < shared.free_bytes <= shared.size_bytes
    quick = limits.read_shared_memory(str(root), look_for_stale=False)
    assert quick is not None
    assert quick.stale == ()
    assert limits.maps_shared_memory(20, str(root))
    assert not limits.maps_shared_memory(19, str(root))


def test_a_semaphore_is_no_shared_memory_to_speak_of(tmp_path: Path) -> None:
    """Locks of ``multiprocessing``, as tqdm makes one, are pages in ``/dev/shm`` that fill nothing."""
    maps = tmp_path / "proc" / "20" / "maps"
    maps.parent.mkdir(parents=True)
    line = "7f0000000000-7f0000001000 rw-s 00000000 00:1a 5    /dev/shm/{} (deleted)\n"
    maps.write_text(line.format("sem.mp-x1y2z3"))
    assert not limits.maps_shared_memory(20, str(tmp_path))
    maps.write_text(line.format("sem.mp-x1y2z3") + line.format("torch_1_2"))
    assert limits.maps_shared_memory(20, str(tmp_path))


def test_names_of_mapped_files_need_not_be_text(root: Path) -> None:
    """A process may map files that were named in another encoding; what it maps in ``/dev/shm`` is found anyway."""
    write(root, {"dev/shm/torch_17_1_0": "of a dead process", "dev/shm/torch_19_3_0": "mapped", "proc/20/maps": ""})
    line = b"7f00-7f01 rw-s 00000000 00:1a 5 %b\n"
    maps = root / "proc/20/maps"
    maps.write_bytes(line % b"/data/caf\xe9.bin")
    assert not limits.maps_shared_memory(20, str(root))
    maps.write_bytes(line % b"/data/caf\xe9.bin" + line % b"/dev/shm/torch_19_3_0")
    assert limits.maps_shared_memory(20, str(root))
    shared = limits.read_shared_memory(str(root))
    assert shared is not None
    assert shared.stale == ("torch_17_1_0",)


def test_no_shared_memory(root: Path) -> None:
    """None, not an error."""
    assert limits.read_shared_memory(str(root)) is None


def test_what_a_killed_process_really_leaves() -> None:
    """An entry of a process that ended is found; it is not while the process lives."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm here")
    make = (
        "import os, sys\nopen(f'/dev/shm/torch_{os.getpid()}_1_1', 'w').close()\n"
        "print(os.getpid(), flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", make], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = f"torch_{process.stdout.readline().strip()}_1_1"
        living = limits.read_shared_memory()
    try:
        dead = limits.read_shared_memory()
        assert living is not None
        assert dead is not None
        assert name not in living.stale
        assert name in dead.stale
    finally:
        os.unlink(f"/dev/shm/{name}")


# --- descriptors, processes, and the rest -----------------------------------------------------------------------------


def test_descriptors() -> None:
    """Those open now and those allowed; the soft limit can be raised to what the hard one allows."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = limits.open_descriptors()
    pipe = os.pipe()
    assert limits.open_descriptors().used == first.used + 2
    for fd in pipe:
        os.close(fd)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (first.used + 50, before[1]))
        limits.raise_descriptor_limit(first.used + 60)
        now = limits.open_descriptors()
        assert (now.soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]) == (first.used + 60, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("told", "ranks"), [("8", 8), ("0", 1), ("", 1), ("many", 1), ("²", 1), (None, 1)])
def test_ranks(told: str | None, ranks: int) -> None:
    """As torchrun tells them."""
    assert limits.local_world_size({} if told is None else {"LOCAL_WORLD_SIZE": told}) == ranks


@pytest.mark.parametrize(
    ("files", "environment", "kind"),
    [
        ({}, {}, "none"),
        ({".dockerenv": ""}, {}, "docker"),
        ({"proc/1/cgroup": "0::/docker/abc"}, {}, "docker"),
        ({"run/.containerenv": ""}, {}, "podman"),
        ({}, {"container": "podman"}, "podman"),
        ({".dockerenv": "", "proc/1/cgroup": "0::/kubepods/burstable/pod1"}, {}, "kubernetes"),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubernetes"),
    ],
)
def test_containers(root: Path, files: dict[str, str], environment: dict[str, str], kind: str) -> None:
    """Told by the marks that each leaves."""
    write(root, files)
    assert limits.container_kind(str(root), environment) == kind


def test_this_machine() -> None:
    """Everything can be read here."""
    assert limits.start_methods()[0] == mp.get_start_method()
    assert set(limits.start_methods()) == set(mp.get_all_start_methods())
    assert limits.sharing_strategy() in ("file_descriptor", "file_system")
    assert limits.container_kind() in ("docker", "podman", "kubernetes", "none")
    memory = limits.read_memory()
    assert 0 < memory.free_bytes <= memory.limit_bytes
    processes = limits.read_processes(count_all=True)
    assert processes.free is None or processes.limit
