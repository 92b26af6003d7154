"""What this machine is, where a cgroup leaves a process less than all of it."""

from pathlib import Path

import pytest

from powerinfer_tools.detect import available_ram_bytes, ram_bytes

MIB = 1 << 20


def machine(root: Path, groups: str, files: dict[str, int | str]) -> Path:
    """The files of a machine of 8 GiB, of which 6 are free, with a process in ``groups``."""
    texts = {
        "proc/meminfo": f"MemTotal: {8 << 20} kB\nMemAvailable: {6 << 20} kB\n",
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": f"{value}\n" for name, value in files.items()},
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "9:name=systemd:/\n4:memory:/a/b\n"
V2 = "0::/a/b\n"


@pytest.mark.parametrize(
    ("groups", "files", "total", "free"),
    [
        ("", {}, 8192, 6144),
        (V1, {"memory/memory.limit_in_bytes": 9223372036854771712}, 8192, 6144),
        (
            V1,
            {"memory/a/b/memory.limit_in_bytes": 320 * MIB, "memory/a/b/memory.usage_in_bytes": 20 * MIB},
            320,
            300,
        ),
        (
            V1,
            {"memory/a/memory.limit_in_bytes": 200 * MIB, "memory/a/b/memory.limit_in_bytes": 300 * MIB},
            200,
            200,
        ),
        (V1, {"memory/memory.limit_in_bytes": 100 * MIB}, 100, 100),  # as a container sees it
        (V2, {"a/memory.max": 500 * MIB, "a/b/memory.max": "max", "a/memory.current": 100 * MIB}, 500, 400),
        (
            V2,
            {
                "a/b/memory.max": 500 * MIB,
                "a/b/memory.current": 400 * MIB,
                "a/b/memory.stat": f"anon 1\ninactive_file {200 * MIB}\nactive_file {50 * MIB}",
            },
            500,
            350,
        ),
        (V2, {"memory.max": 100 * MIB, "memory.current": 90 * MIB}, 100, 10),
        ("0::/../x\n", {"x/memory.max": MIB}, 8192, 6144),
    ],
)
def test_limits_of_cgroups_are_the_machines(
    tmp_path: Path, groups: str, files: dict[str, int | str], total: int, free: int
) -> None:
    root = machine(tmp_path, groups, files)
    assert (ram_bytes(root) // MIB, available_ram_bytes(root) // MIB) == (total, free)


def test_a_full_group_leaves_next_to_nothing_rather_than_unknown(tmp_path: Path) -> None:
    root = machine(tmp_path, V2, {"a/b/memory.max": MIB, "a/b/memory.current": 2 * MIB})
    assert available_ram_bytes(root) == 1
