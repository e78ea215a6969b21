"""The scripts of scripts/slurm on a real Slurm: Debian's, on this one machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from test_resume import PATIENCE, contents, journaled, start, states, wait_for

ROOT = Path(__file__).parent.parent
TRAINER = ROOT / ".venv-4.37.2/bin/python"
DAEMONS = ("munged", "slurmctld", "slurmd")
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED")
pytestmark = pytest.mark.slow

CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=2
MinJobAge=3600
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={control_port}
SlurmdPort={node_port}
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster of one node; its environment for the client commands."""
    _install()
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/slurm-XXXXXX"], text=True).strip())
    folder.chmod(0o755)  # munged wants a socket that others can reach
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = {"control_port": _free_port(), "node_port": _free_port()}
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, folder=folder, **ports))
    started = []
    try:
        started.append(_munged(folder))
        started.append(_daemon(["slurmctld", "-D", "-f", conf], folder))
        started.append(_daemon(["slurmd", "-D", "-f", conf, "-N", host], folder))
        environment = os.environ | {"SLURM_CONF": str(conf)}
        wait_for(lambda: "idle" in _ask(environment, "sinfo", "-h", "-o", "%T"))
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder)


def _install():
    if all(shutil.which(daemon) for daemon in DAEMONS):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip("Slurm is not installed and cannot be: neither root nor apt-get")
    for call in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(["apt-get", *call], env=environment, capture_output=True).returncode:
            pytest.skip(f"Slurm is not installed and `apt-get {' '.join(call)}` failed")


def _munged(folder):
    """A munge daemon of our own: another key and socket than the system's, if it has one."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    names = ("log", "pid", "seed")
    files = [f"--{name}-file={folder}/munge.{name}" for name in names]
    call = ["munged", "-F", f"--socket={folder}/munge.socket", f"--key-file={key}", *files]
    process = _daemon([*call, "--force"], folder)
    wait_for((folder / "munge.socket").exists, process)
    return process


def _daemon(call, folder):
    log = (folder / f"{call[0]}.out").open("w")
    return subprocess.Popen(list(map(str, call)), stdout=log, stderr=log, start_new_session=True)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ask(environment, *call):
    return subprocess.run(call, env=environment, capture_output=True, text=True).stdout


def _jobs(environment):
    """State and restarts of every job, by id."""
    shown = _ask(environment, "scontrol", "show", "job", "-o")
    pattern = r"JobId=(\d+) .*?JobState=(\w+) .*?Restarts=(\d+)"
    return {int(i): (state, int(n)) for i, state, n in re.findall(pattern, shown)}


def _hurry(environment):
    """Slurm lets a requeued job wait two minutes; start it now.

    Not within the second it was killed in: slurmd would take the new start for the old one.
    """
    time.sleep(3)
    for job, (state, restarts) in _jobs(environment).items():
        if state == "PENDING" and restarts:
            _ask(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")


def _pids(out):
    """Processes that answer requests for one output folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"eval" in words and b"run" in words and str(out).encode() in words:
            yield int(process.name)


def test_an_array_survives_a_kill_and_its_table_is_that_of_one_run(slurm, table, drawn, tmp_path):
    config, out = table("pope, ocrbench", rows=("full", "hivtp")), tmp_path / "out"
    settings = {
        "CONFIG": config, "DATA": drawn, "OUT": out, "LIMIT": 30, "TIMING_N": 2, "JOBS": 2,
        "CPUS": 1, "GRES": "none", "PYTHON": sys.executable, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    environment = slurm | {key: str(value) for key, value in settings.items()}
    submitted = subprocess.run(
        ["bash", ROOT / "scripts/slurm/submit.sh", "tiny"],
        env=environment, cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    merge = int(re.search(r"job (\d+)", submitted.stdout)[1])

    wait_for(lambda: journaled(out) >= 3)
    for pid in _pids(out):
        os.kill(pid, 9)
    wait_for(lambda: any(n for _, n in _jobs(slurm).values()))
    assert _jobs(slurm)[merge] == ("PENDING", 0)  # the table waits for the requeued jobs
    _hurry(slurm)
    wait_for(lambda: _jobs(slurm)[merge][0] in ENDED)
    ended = {state for state, _ in _jobs(slurm).values()}
    assert ended == {"COMPLETED"}, [p.read_text()[-2000:] for p in (out / "logs").iterdir()]

    assert states(config, out, limit=30) == ["done"] * 4
    written = (out / "tiny.md").read_text()
    assert "4 units, 4 done" in written
    assert "| 50 %" in written
    one = tmp_path / "one"
    assert start(config, drawn, one, "--no-timing", "--limit", 30).wait(PATIENCE) == 0
    assert contents(config, out, limit=30) == contents(config, one, limit=30)


def test_a_job_out_of_time_queues_itself_again(slurm, table, drawn, tmp_path):
    """Slurm announces the end of the walltime by USR1, as `scancel --signal` does here."""
    config, out = table("pope", rows=("full",)), tmp_path / "out"
    settings = {
        "CONFIG": config, "DATA": drawn, "OUT": out, "LIMIT": 30, "TIMING_N": 2, "JOBS": 1,
        "CPUS": 1, "GRES": "none", "PYTHON": sys.executable, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    environment = slurm | {key: str(value) for key, value in settings.items()}
    subprocess.run(
        ["bash", ROOT / "scripts/slurm/submit.sh", "tiny"],
        env=environment, cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    array = max(_jobs(slurm)) - 1
    wait_for(lambda: list(out.rglob("*.journal.jsonl")))
    _ask(slurm, "scancel", "--batch", "--signal=USR1", str(array))
    wait_for(lambda: _jobs(slurm)[array][1] == 1)
    _hurry(slurm)
    wait_for(lambda: _jobs(slurm)[array][0] in ENDED)
    assert _jobs(slurm)[array] == ("COMPLETED", 1)
    assert states(config, out, limit=30) == ["done"]
    assert "stopped by SIGTERM" in next((out / "logs").glob("*_1.log")).read_text()


@pytest.mark.skipif(
    not TRAINER.is_file(), reason="needs LLaVA's trainer: make setup TRANSFORMERS=4.37.2"
)
def test_a_training_out_of_time_queues_itself_again_and_ends_with_the_same_losses(slurm, tmp_path):
    make = "import sys; from eval.untrained.random_llava import random_llava as make; "
    make += "make(sys.argv[1], encoder_layers=4, image_size=56)"
    model, images = tmp_path / "llava-v1.5-tiny", tmp_path / "images"
    subprocess.run([TRAINER, "-c", make, model], cwd=ROOT, check=True)
    images.mkdir()
    Image.new("RGB", (60, 40), "red").save(images / "a.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A sign."}]
    sample = {"id": "a", "image": "a.png", "conversations": said}
    (images / "data.json").write_text(json.dumps([sample] * 4))
    settings = {
        "MODEL": model, "DATA": images / "data.json", "IMAGES": images, "BATCH": 2,
        "GLOBAL_BATCH": 2, "SAVE_STEPS": 5, "LR": "1e-2", "PRUNER_ARGS": "r=2,k=25,c=2",
        "PYTHON": TRAINER, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    environment = slurm | {key: str(value) for key, value in settings.items()}
    options = ["--max_steps", "40", "--dataloader_num_workers", "0"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    subprocess.run(
        ["bash", ROOT / "scripts/finetune.sh", *options],
        env=environment | {"OUT": str(whole)}, cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip

    log = tmp_path / "log"
    submitted = subprocess.run(
        ["sbatch", "--parsable", "--gres=none", "--cpus-per-task=1", f"--output={log}"]
        + [ROOT / "scripts/slurm/finetune.sbatch", "finetune", *options],
        env=environment | {"OUT": str(out)}, cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    job = int(submitted.stdout)
    wait_for((out / "checkpoint-5").is_dir)
    _ask(slurm, "scancel", "--batch", "--signal=USR1", str(job))
    wait_for(lambda: _jobs(slurm)[job][1] == 1)
    assert not (out / "trainer_state.json").is_file()
    _hurry(slurm)
    wait_for(lambda: _jobs(slurm)[job][0] in ENDED)
    assert _jobs(slurm)[job] == ("COMPLETED", 1), log.read_text()[-4000:]
    assert _losses(out) == _losses(whole)
    assert len(_losses(out)) == 40
    assert (tmp_path / "out-merged" / "config.json").is_file()


def _losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
