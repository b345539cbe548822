"""What the doctor says of devices, limits, networks and schedulers: of made-up machines, and of this one."""

import os
import socket
from pathlib import Path

import pytest
from commands import invoke

from erollout.doctor import cpu, gpus, limits, network, schedulers

GPUS = "0, GPU-aa, NVIDIA H100, 81559, 4, 570.1\n1, GPU-bb, NVIDIA H100, 81559, 40960, 570.1\n"


def test_gpus_that_are_idle_held_and_hidden() -> None:
    found = gpus.parse_gpus(GPUS, gpus.parse_holders("GPU-bb, 123, python train.py, x\n"))
    assert [finding.text for finding in gpus.check_gpus(found[:1], 1)] == ["1 x NVIDIA H100, 80 GiB, driver 570.1"]
    both, held = gpus.check_gpus(found, 2)
    assert both.text.startswith("2 x NVIDIA H100") and held.level == "error"
    assert (held.topic, held.text) == ("GPU 1", "40.0 GiB held by pid 123 python train.py, x")
    assert [finding.level for finding in gpus.check_gpus(gpus.parse_gpus(GPUS, {}))] == ["ok", "warning"]
    assert [gpu.index for gpu in gpus.visible(found, "1")] == ["1"]
    assert [gpu.index for gpu in gpus.visible(found, "GPU-a")] == ["0"]
    assert gpus.visible(found, None) == found
    (missing,) = list(gpus.check_gpus([], 2))
    assert missing.level == "error" and "0 visible, 2 wanted" in missing.text


def test_links_between_gpus() -> None:
    """As nvidia-smi draws them, with an underlined head and a network card."""
    table = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\tSYS\tPIX\t0-47\n"
        "GPU1\tNV18\t X \tSYS\tSYS\t0-47\nGPU2\tSYS\tSYS\t X \tSYS\t48-95\nNIC0\tPIX\tSYS\tSYS\t X \n\n  GPU0 = none\n"
    )
    assert gpus.parse_links(table) == {"NV18": 1, "SYS": 2}
    assert not gpus.parse_links("")


def _fake_command(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_nvidia_smi_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_command(tmp_path, monkeypatch, f'case "$1" in --query-gpu*) printf "{GPUS}";; esac'.replace("\n", "\\n"))
    assert [gpu.uuid for gpu in gpus.find_gpus()] == ["GPU-aa", "GPU-bb"]


def test_a_driver_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_command(tmp_path, monkeypatch, "echo No devices were found; exit 6")
    outcome = invoke("doctor", "--node", "--gpus", "1")
    assert outcome.status == 1
    assert "bad: GPUs: nvidia-smi fails: No devices were found" in outcome.stdout.splitlines()[-1]
    without = invoke("doctor", "--node")
    assert without.status == 0 and "warning: GPUs: nvidia-smi fails" in without.stdout


def test_fewer_cores_than_ranks() -> None:
    assert list(cpu.check_cores(8, 8)) == list(cpu.check_cores(2, 0)) == []
    (few,) = cpu.check_cores(1, 8)
    assert (few.level, few.text) == ("error", "1 usable by 8 ranks") and "cpus_per_task" in few.fix


def test_memory_bandwidth() -> None:
    assert cpu.memory_bandwidth() > 1e7
    assert cpu.check_bandwidth(20e9, strict=True).level == "ok"
    assert cpu.check_bandwidth(0.5e9, strict=True).level == "error"
    assert cpu.check_bandwidth(0.5e9).level == "warning"


@pytest.mark.parametrize(
    ("line", "file"), [("0::/a/b", "a/memory.max"), ("4:memory:/a/b", "memory/a/memory.limit_in_bytes"), ("3:cpu:/a", None)]
)
def test_a_limit_of_memory(line: str, file: str | None, tmp_path: Path) -> None:
    """The limit is that of this process's group or one above it; `max` is no limit."""
    (tmp_path / "own").write_text(f"{line}\n")
    root = tmp_path / "groups"
    for folder in ("a/b", "memory/a/b"):
        (root / folder).mkdir(parents=True)
    (root / "a/b/memory.max").write_text("max\n")
    assert cpu.memory_limit(tmp_path / "own", root) is None
    if file is not None:
        (root / file).write_text("1000\n")
        assert cpu.memory_limit(tmp_path / "own", root) == 1000


def test_limits_of_a_process() -> None:
    def topics(files: int, locked: int, has_fabric: bool) -> list[str]:
        found = limits.describe_limits({"open files": files, "processes": -1}, locked, has_fabric)
        return [finding.topic for finding in found if finding.level == "warning"]

    assert topics(65536, 2**16, has_fabric=False) == []
    assert topics(1024, 2**16, has_fabric=False) == ["open files"]
    assert topics(65536, 2**16, has_fabric=True) == ["locked memory"]
    assert topics(65536, -1, has_fabric=True) == []


def _card(root: Path, name: str, layer: str, state: str) -> None:
    port = root / name / "ports" / "1"
    port.mkdir(parents=True)
    for file, text in (("link_layer", layer), ("state", state), ("rate", "400 Gb/sec (4X NDR)")):
        (port / file).write_text(f"{text}\n")


def test_infiniband_cards(tmp_path: Path) -> None:
    assert network.check_fabric(tmp_path).text == "none"
    _card(tmp_path, "mlx5_0", "InfiniBand", "1: DOWN")
    assert network.check_fabric(tmp_path).level == "warning"
    _card(tmp_path, "mlx5_1", "InfiniBand", "4: ACTIVE")
    _card(tmp_path, "mlx5_2", "InfiniBand", "4: ACTIVE")
    _card(tmp_path, "mlx5_3", "Ethernet", "4: ACTIVE")
    finding = network.check_fabric(tmp_path)
    assert finding.level == "ok" and network.has_fabric(tmp_path)
    assert "mlx5_1:1, mlx5_2:1: InfiniBand, 400 Gb/sec (4X NDR), active; mlx5_3:1: RoCE, " in finding.text


def test_the_interface_on_the_way_out_and_a_faster_one() -> None:
    slow = network.Interface("eth0", "10.0.0.7", 1000, is_card=True)
    fast = network.Interface("ib0", "10.1.0.7", 200000, is_card=True)
    bridge = network.Interface("br0", "10.2.0.7", 400000, is_card=False)
    (chosen,) = network.check_way_out("eth0", [slow, bridge])
    assert chosen.level == "ok" and "eth0, 10.0.0.7" in chosen.text
    _, warning = network.check_way_out("eth0", [slow, fast, bridge])
    assert warning.level == "warning" and "--interface ib0" in warning.fix
    (alone,) = network.check_way_out(None, [])
    assert alone.level == "ok" and "only this machine" in alone.text


def test_a_chosen_interface_must_be_there() -> None:
    found = {"lo": "127.0.0.1", "eth0": "10.0.0.7"}
    levels = {
        chosen: [f.level for f in network.check_choice("N", chosen, found)] for chosen in (None, "eth0", "eth9", "eth", "^lo")
    }
    assert levels == {None: [], "eth0": ["ok"], "eth9": ["error"], "eth": ["ok"], "^lo": ["ok"]}


def test_a_name_that_nobody_knows() -> None:
    assert network.check_own_name("localhost").level == "ok"
    assert "/etc/hosts" in network.check_own_name("no.such.host.invalid").fix


def test_taken_ports_are_read_from_the_table_of_the_kernel() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert taken.getsockname()[1] in network.parse_ports(Path("/proc/net/tcp").read_text())


def test_slurm(tmp_path: Path) -> None:
    assert schedulers.parse_partitions("debug* 1/3/0/4\ngpu 0/12/4/16\n") == ["debug* 3/4", "gpu 12/16"]
    assert schedulers.check_slurm(None).level == "ok"
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    (tmp_path / "sinfo").chmod(0o755)
    finding = schedulers.check_slurm(str(tmp_path / "sinfo"))
    assert finding.level == "warning" and "Unable to contact slurm controller" in finding.text


def test_ray(tmp_path: Path) -> None:
    noted = tmp_path / "ray_current_cluster"
    assert schedulers.check_ray(None, noted).text == "no cluster here"
    assert schedulers.check_ray("nonsense", noted).level == "warning"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        noted.write_text(f"127.0.0.1:{listener.getsockname()[1]}")
        assert schedulers.check_ray(None, noted).level == "warning"
        listener.listen()
        assert schedulers.check_ray(None, noted).level == schedulers.check_ray("auto", noted).level == "ok"
