"""How much memory counts as free, and when the KV cache size of an earlier start is kept."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from fastgen_jax.engine import memory
from fastgen_jax.engine.memory import Room, cgroup_room, round_down

MIB = 2**20
V2_MOUNT = "35 31 0:32 {shown} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = (
    "34 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {shown} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def machine(root: Path, *, cgroup: str, mounts: str, groups: dict[str, dict[str, str | int]]) -> Path:
    """A tree of control group files as Linux shows them, by folder."""
    for folder, files in {"proc/self": {"cgroup": cgroup, "mountinfo": mounts}, **groups}.items():
        (root / folder).mkdir(parents=True)
        for name, text in files.items():
            (root / folder / name).write_text(f"{text}\n")
    return root


def v2(limit: int | str, used: int, *, files: int = 0) -> dict[str, str | int]:
    stat = f"anon 5\nfile {files}\ninactive_file {files // 2}\nactive_file {files - files // 2}\nslab 7"
    return {"memory.max": limit, "memory.high": "max", "memory.current": used, "memory.stat": stat}


def v1(limit: int, used: int, *, files: int = 0) -> dict[str, str | int]:
    stat = f"cache 1\ninactive_file 1\ntotal_inactive_file {files // 2}\ntotal_active_file {files - files // 2}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}


def test_a_container_with_version_2_may_take_its_limit_less_what_it_uses_and_files_count_as_free(tmp_path) -> None:
    # What docker and Kubernetes show: the container's own group is the root of what it sees.
    root = machine(
        tmp_path,
        cgroup="0::/",
        mounts=V2_MOUNT.format(shown="/"),
        groups={"sys/fs/cgroup": v2(1000 * MIB, 700 * MIB, files=200 * MIB)},
    )
    assert cgroup_room(root) == 500 * MIB


@pytest.mark.parametrize(("outer", "inner", "room"), [(900, "max", 700), (900, 500, 400), (300, 500, 100)])
def test_the_nested_group_with_the_least_room_counts(tmp_path, outer, inner, room) -> None:
    limit = inner if inner == "max" else inner * MIB
    root = machine(
        tmp_path,
        cgroup="0::/user.slice/job",
        mounts=V2_MOUNT.format(shown="/"),
        groups={
            "sys/fs/cgroup/user.slice": v2(outer * MIB, 200 * MIB),
            "sys/fs/cgroup/user.slice/job": v2(limit, 100 * MIB),
        },
    )
    assert cgroup_room(root) == room * MIB


def test_a_soft_limit_counts_as_well_since_beyond_it_the_kernel_slows_the_process_down(tmp_path) -> None:
    group = v2(1000 * MIB, 100 * MIB) | {"memory.high": 400 * MIB}
    root = machine(tmp_path, cgroup="0::/", mounts=V2_MOUNT.format(shown="/"), groups={"sys/fs/cgroup": group})
    assert cgroup_room(root) == 300 * MIB


def test_version_1_with_the_mount_showing_the_container_s_group_as_its_root(tmp_path) -> None:
    # docker without a separate control group namespace: the path is the host's, the mount shows its last part
    root = machine(
        tmp_path,
        cgroup="9:name=systemd:/docker/abc\n4:memory:/docker/abc\n0::/",
        mounts=V1_MOUNT.format(shown="/docker/abc"),
        groups={"sys/fs/cgroup/memory": v1(800 * MIB, 300 * MIB, files=100 * MIB)},
    )
    assert cgroup_room(root) == 600 * MIB


def test_version_1_with_nested_groups_and_no_limit_at_the_root(tmp_path) -> None:
    root = machine(
        tmp_path,
        cgroup="5:cpuacct,memory:/job/step\n0::/",
        mounts=V1_MOUNT.format(shown="/"),
        groups={
            "sys/fs/cgroup/memory": v1(2**63 - 4096, 5),
            "sys/fs/cgroup/memory/job": v1(500 * MIB, 450 * MIB),
            "sys/fs/cgroup/memory/job/step": v1(400 * MIB, 100 * MIB),
        },
    )
    assert cgroup_room(root) == 50 * MIB


def test_a_group_beyond_its_limit_has_no_room(tmp_path) -> None:
    root = machine(tmp_path, cgroup="0::/", mounts=V2_MOUNT.format(shown="/"), groups={"sys/fs/cgroup": v2(MIB, 2 * MIB)})
    assert cgroup_room(root) == 0


@pytest.mark.parametrize(
    ("cgroup", "mounts", "group"),
    [
        pytest.param("0::/", V2_MOUNT.format(shown="/"), {}, id="the machine's root group has no limit"),
        pytest.param("0::/", V2_MOUNT.format(shown="/"), v2("max", 5), id="max"),
        pytest.param("0::/../../x", V2_MOUNT.format(shown="/"), v2("max", 5), id="outside the namespace"),
        pytest.param("0::/", "", {}, id="nothing mounted"),
        pytest.param("", V2_MOUNT.format(shown="/"), v2(5, 5), id="in no group"),
        pytest.param("0::/", V2_MOUNT.format(shown="/"), {"memory.max": "?", "memory.current": 3}, id="nonsense"),
    ],
)
def test_without_a_limit_there_is_none(tmp_path, cgroup, mounts, group) -> None:
    assert cgroup_room(machine(tmp_path, cgroup=cgroup, mounts=mounts, groups={"sys/fs/cgroup": group})) is None


def test_without_proc_there_is_no_limit(tmp_path) -> None:
    assert cgroup_room(tmp_path) is None


def test_available_memory_is_what_the_system_can_give_within_the_limit(monkeypatch) -> None:
    # MemFree would be smaller, because it does not count cached files.
    monkeypatch.setattr(memory, "cgroup_room", lambda: None)
    assert memory.available() > 0.9 * psutil.virtual_memory().available
    monkeypatch.setattr(memory, "cgroup_room", lambda: 12345)
    assert memory.available() == 12345


def test_a_choice_is_rounded_down_to_few_binary_digits() -> None:
    assert [round_down(n, 3) for n in (0, 1, 7, 8, 9, 15, 16, 19, 1000)] == [0, 1, 7, 8, 8, 14, 16, 16, 896]
    assert all(round_down(n, 3) > 0.8 * n and round_down(n, 6) > 0.96 * n for n in range(1, 5000))


def room(free: int) -> Room:
    usual, least, most = (int(share * free) for share in memory.HOST_SHARES)
    return Room(usual=usual, least=least, most=most, digits=3)


def test_an_earlier_choice_stays_while_it_takes_between_an_eighth_and_a_half_of_what_is_free() -> None:
    first = room(1000).num_blocks(1, wanted=10_000)
    assert first == 224
    for free in (1000, 999, 1100, 600, 448, 1792):
        assert room(free).num_blocks(1, wanted=10_000, earlier=first) == first, free
    assert room(440).num_blocks(1, wanted=10_000, earlier=first) == 96  # it would use more than half
    assert room(2000).num_blocks(1, wanted=10_000, earlier=first) == 448  # it would waste memory


def test_no_more_blocks_are_chosen_than_all_sequences_can_use_and_that_choice_stays_as_well() -> None:
    assert room(10**6).num_blocks(1, wanted=100) == 100
    assert room(10**6).num_blocks(1, wanted=100, earlier=100) == 100
    assert room(300).num_blocks(1, wanted=100, earlier=100) == 100
    assert room(10**6).num_blocks(1, wanted=100, earlier=500) == 100  # no engine chose this number
    assert room(10**6).num_blocks(1, wanted=100, earlier=-3) == 100
    assert room(3).num_blocks(1, wanted=100, earlier=100) == 0


def test_an_accelerator_s_choice_survives_a_little_more_or_less_in_use(monkeypatch) -> None:
    class Device:
        in_use = 2_000

        def memory_stats(self):
            return {"bytes_limit": 100_000, "bytes_in_use": self.in_use}

    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device()])
    first = memory.memory_now("tpu").room().num_blocks(1, wanted=10**6)
    assert 0.96 * 83_000 < first <= 83_000
    for in_use in (0, 1_999, 2_001, 5_000, 7_000):
        monkeypatch.setattr(Device, "in_use", in_use)
        assert memory.memory_now("tpu").room().num_blocks(1, wanted=10**6, earlier=first) == first, in_use
    monkeypatch.setattr(Device, "in_use", 40_000)
    assert memory.memory_now("tpu").room().num_blocks(1, wanted=10**6, earlier=first) < 45_001
    monkeypatch.setattr(Device, "in_use", 0)
    assert memory.memory_now("tpu").room().num_blocks(1, wanted=10**6, share=2) > 0.96 * 170_000
