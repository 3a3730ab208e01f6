"Several nodes: two agents of torchrun, or srun alone, train what one agent with two ranks trains; what a node must see; other ranks on resuming"
import json
import os
import socket

import pytest
import torch.distributed.run
from conftest import TINY
from forks import end, process, start, state_of
from torch.testing import assert_close

from basd.cli import main
from basd.runs.metrics import read_metrics
from basd.runs.recipes import load_recipe
from basd.runs.run_directory import load_checkpoint
from basd.training.build import build_trainer

TRAIN = ["train", "basd_cifar10", *TINY, "train.epochs=1", "train.warmup_epochs=0"]


def free_port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@pytest.fixture(scope="module")
def on_one_node(tmp_path_factory):
    "Digest of the run on one node of two ranks"
    folder = tmp_path_factory.mktemp("one")
    status = end(start(main, [*TRAIN, "--run-dir", str(folder/"run")], out=folder/"out.txt", ranks=2))
    assert status == [0, 0], (folder/"out.txt").read_text()
    return state_of(folder/"run")


def agent(words):
    "A node's agent of torchrun, which starts its rank as a Python of its own"
    torch.distributed.run.main(words)
    return 0


def test_two_agents_are_one(on_one_node, tmp_path):
    "Two nodes of one rank, each with an agent of its own, end with the state of one node of two ranks, bit for bit"
    output, run = tmp_path/"out.txt", tmp_path/"run"
    words = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    agents = [start(agent, [*words, f"--node-rank={node}", "-m", "basd", *TRAIN, "--run-dir", str(run)], out=output)[0] for node in range(2)]
    status = end(agents)
    assert status == [0, 0], output.read_text()
    assert state_of(run) == on_one_node


def under_srun(f, *args, out, nodes=2):
    "Exit statuses of `f(*args)` on each of `nodes` nodes with one rank, in the environment that srun gives"
    launcher = dict(SLURM_STEP_NUM_TASKS=str(nodes), SLURM_NTASKS=str(nodes), SLURM_LOCALID="0", SLURM_JOB_ID="7", MASTER_PORT=str(free_port()),
                SLURM_STEP_NODELIST="localhost")
    ranks = [process(f, args, launcher | dict(SLURM_PROCID=str(r)), str(out), None) for r in range(nodes)]
    for p in ranks: p.start()
    return end(ranks)


def test_srun_without_torchrun(on_one_node, tmp_path):
    "Ranks that srun started meet at the first node of the list, without torchrun"
    status = under_srun(main, [*TRAIN, "--run-dir", str(tmp_path/"run")], out=tmp_path/"out.txt")
    assert status == [0, 0], (tmp_path/"out.txt").read_text()
    assert state_of(tmp_path/"run") == on_one_node


def on_a_disk_of_its_own(words, folder):
    "The command with the working directory on a disk that the other node does not see"
    disk = folder/f"disk_{os.environ['SLURM_PROCID']}"
    disk.mkdir(exist_ok=True)
    os.chdir(disk)
    return main(words)


def test_nodes_must_share_the_run_directory(tmp_path):
    "Ranks that do not see the files of rank 0 are refused before the first step"
    status = under_srun(on_a_disk_of_its_own, [*TRAIN, "--run-dir", "run"], tmp_path, out=tmp_path/"out.txt")
    output = (tmp_path/"out.txt").read_text()
    assert status == [2, 2] and "the files of run that rank 0 has are not those that rank 1 sees" in output and "Traceback" not in output, output
    assert not [*tmp_path.glob("disk_*/run/*")], "a refused start leaves no run"


def test_resumed_on_another_number_of_ranks(tmp_path):
    "One rank, then two: one message, that the steps may differ, no step is lost or doubled, and without dropout they differ by rounding"
    words = [*TRAIN[2:], "student.drop_path=0", "train.epochs=2", "train.log_gradients=false"]
    def made(name): return build_trainer(load_recipe("basd_cifar10", words)[""], tmp_path/name, bars=False)
    whole, half = made("whole"), made("half")
    whole.fit()
    half.agreed_to_stop = lambda: half.step >= 5
    assert half.fit() is None
    half.data.lock.close()                              # another process will train there
    status = end(start(main, ["resume", str(tmp_path/"half")], out=tmp_path/"out.txt", ranks=2))
    output = (tmp_path/"out.txt").read_text()
    assert status == [0, 0] and output.count("goes on under another ranks: 1, 2 (before, now), so its steps from here on need not be those") == 1, output
    rows = [[r["step"] for r in read_metrics(tmp_path/name, "step")] for name in ("whole", "half")]
    assert rows[0] == rows[1] and rows[1][-1] == whole.data.total
    weights = [load_checkpoint(tmp_path/name/"last.pt")["task"]["student.model.head.weight"] for name in ("whole", "half")]
    assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path/"half"/"environment.json").read_text())["resumed"][0]["ranks"] == 2
