"""SLURM's lines of docs/sweeps.md, run by a cluster of one node that the test starts: Debian's slurm-wlm.

apt-get install slurm-wlm munge && pytest -m slow tests/test_slurm.py      # as root
"""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SBIN = f"{os.environ['PATH']}:/usr/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
CONFIG = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge.socket
CredType=cred/munge
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name, path=SBIN) for name in NEEDED),
        reason="needs root and apt-get install slurm-wlm munge",
    ),
]


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return ports


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """Start munge and SLURM in a folder of their own, and give the environment that finds them."""
    at, host, daemons = Path(tempfile.mkdtemp(prefix="slurm")), socket.gethostname().split(".")[0], []
    at.chmod(0o755)  # munge wants nobody else to write there
    (at / "state").mkdir()
    (at / "key").write_bytes(secrets.token_bytes(128))
    (at / "key").chmod(0o600)
    config = CONFIG.format(at=at, host=host, user=getpass.getuser(), ports=free_ports(2))
    (at / "slurm.conf").write_text(config)
    env = os.environ | {"SLURM_CONF": str(at / "slurm.conf"), "PATH": SBIN}
    munge = [
        "munged",
        "-F",
        f"--socket={at}/munge.socket",
        f"--key-file={at}/key",
        f"--pid-file={at}/munge.pid",
    ]
    munge += [f"--log-file={at}/munge.log", f"--seed-file={at}/munge.seed"]
    with (at / "log").open("w") as log:
        for command in (munge, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]):
            daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
            time.sleep(1)
    try:
        wait_until(lambda: "idle" in ask(env, "sinfo", "-h", "-o", "%T", check=False), 60, at / "log")
        yield env
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        shutil.rmtree(at, ignore_errors=True)


def ask(env: dict[str, str], *command: str | Path, check: bool = True) -> str:
    done = subprocess.run(list(map(str, command)), env=env, cwd=ROOT, capture_output=True, text=True)
    assert not check or done.returncode == 0, (command, done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout


def wait_until(fulfilled: Callable[[], bool], seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < end, log.read_text()[-3000:] if log.exists() else f"no {log}"
        time.sleep(0.1)


def test_an_array_of_cells_runs_one_is_killed_and_requeued_and_the_report_follows(cluster, tmp_path):
    out, log = tmp_path / "runs", tmp_path / "log"
    env = cluster | {"OUT": str(out), "DATA": str(tmp_path / "data"), "ARMS": "E0 E1", "TOTAL_SAMPLES": "320"}
    env |= {"VENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{cluster['PATH']}"}
    ask(env, "./run_matrix.sh", "smoke", "--prepare")
    cells = ask(env, "./run_matrix.sh", "smoke", "--list").split()
    submit = (
        "sbatch",
        "--parsable",
        "--requeue",
        "--cpus-per-task=1",
        "--open-mode=append",
        "-o",
        f"{log}.%a",
    )
    cell = "./run_matrix.sh smoke --cell $SLURM_ARRAY_TASK_ID"
    array = ask(env, *submit, f"--array=1-{len(cells)}", "--wrap", cell).strip()
    after = (*submit, f"--dependency=afterany:{array}")
    report = ask(env, *after, "--wrap", "./run_matrix.sh smoke --report").strip()

    first = out / cells[0]
    wait_until(lambda: (first / "metrics.jsonl").exists(), 180, Path(f"{log}.1"))
    assert not (first / "finished.txt").exists()  # it trains
    ask(env, "scontrol", "requeue", f"{array}_1")
    shown = lambda job: ask(env, "scontrol", "show", "job", job)  # noqa: E731
    wait_until(lambda: "Restarts=1" in shown(f"{array}_1"), 60, Path(f"{log}.1"))
    wait_until(lambda: "stopped by SIGTERM" in Path(f"{log}.1").read_text(), 60, Path(f"{log}.1"))
    # Not before SLURM is done with the killed one: it would take that one's end for the new one's.
    wait_until(lambda: "JobState=PENDING Reason=BeginTime" in shown(f"{array}_1"), 60, Path(f"{log}.1"))
    ask(env, "scontrol", "update", f"JobId={array}_1", "StartTime=now")  # SLURM would wait two minutes

    def all_completed() -> bool:  # a queue may look empty while a requeued job is on its way back
        jobs = (f"{array}_1", f"{array}_2", report)
        return all("JobState=COMPLETED" in shown(job) for job in jobs)

    wait_until(all_completed, 500, Path(f"{log}.1"))
    assert Path(f"{log}.1").read_text().count(f"begin: {cells[0]}") == 2
    for name, mode in zip(cells, ("off", "zero"), strict=True):
        folder = out / name
        [line] = map(json.loads, (folder / "episodes.jsonl").read_text().splitlines())
        assert (line["memory"], line["crash"]) == (mode, None)
        samples = [json.loads(x)["samples"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert samples == sorted(set(samples)) and samples[-1] == 320  # nothing is trained twice
        assert len((folder / "finished.txt").read_text().splitlines()) == 2
    table = (out / "report" / "table.md").read_text()
    assert re.search(r"\| E0 ", table) and re.search(r"\| E1 ", table)
