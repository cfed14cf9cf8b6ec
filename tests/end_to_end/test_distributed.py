"""Training in several processes under torchrun is the training in one; one that dies ends the others or its node."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipelines.config import load_config
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.context import RunContext
from pipelines.runtime.distributed import Processes
from pipelines.stages import run_to

REPOSITORY = Path(__file__).parents[2]
PATHS = ("data", "latents", "runs")


def start_torchrun(
    place,
    command: str,
    *options: str,
    prelude: str = "",
    sets: tuple[str, ...] = (),
    arguments: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.Popen:
    """Start torchrun with these options for a command on the CPU; `prelude` is Python that each process runs before."""
    script = place.folder / "process.py"
    words = place.arguments(command, *arguments, sets=sets)
    script.write_text(
        f"import os, sys, torch\ntorch.set_num_threads(1)\n{prelude}\n"
        f"from pipelines.__main__ import main\nsys.exit(main({words!r}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(place, command: str, processes: int = 2, **how) -> subprocess.CompletedProcess:
    """Run a command in some processes, see `start_torchrun`."""
    started = start_torchrun(place, command, "--standalone", f"--nproc-per-node={processes}", **how)
    try:
        out, err = started.communicate(timeout=600)
    finally:
        started.kill()
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


STOPPED = """
from pipelines.training.autoencoder_trainer import AutoencoderTrainer
import signal
step = AutoencoderTrainer.train_step
def stopped(self, number):
    if number == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, number)
AutoencoderTrainer.train_step = stopped
"""


@pytest.mark.long
def test_adversarial_training_in_two_processes_is_stopped(place, story) -> None:
    """By a signal to the second one, after a step of both networks; both save what a single process would."""
    adversarial = ("autoencoder.training.adversarial={weight: 0.5, start: 1, layers: 2, filters: 8}",)
    stopped = torchrun(place, "train-autoencoder", prelude=STOPPED, sets=adversarial)
    assert stopped.returncode != 0
    assert "stopped at step 3, saved" in stopped.stderr
    assert 'Traceback (most recent call last):\n  File "<string>"' not in stopped.stderr
    assert place.checkpoint("autoencoder").name == "step_00000003"
    assert {"adversarial", "discriminator"} <= story.read_log(place, "autoencoder")[-1].keys()
    done = place.run("train-autoencoder", sets=adversarial).ok()  # in one process
    assert "steps 3 to 6" in done.out


FLOW = (
    "flow.training.batch_size=24", "flow.training.accumulate=3", "flow.training.ema_decay=0.9", "logging.every=1",
    "flow.training.time_sampling=logit_normal", "flow.training.grad_clip=1.0", "flow.model.dropout=0",
)  # fmt: skip
# Writes the weights after each step, one line per process, and leaves no room on the device of the second process.
WATCHED = """
from pipelines.loading import weights_digest
from pipelines.training.flow_trainer import FlowTrainer
from latent_cache.sampling import residency
step = FlowTrainer.train_step
def watched(self, number):
    result = step(self, number)
    with open(os.path.join(os.path.dirname(__file__), "weights." + os.environ["RANK"]), "a") as file:
        print(number, weights_digest(self.model), weights_digest(self.train_state.average.module), file=file)
    return result
FlowTrainer.train_step = watched
if os.environ["RANK"] == "1":
    residency.USABLE_FRACTION["device"] = 0.0
"""


@pytest.mark.parametrize(
    "processes", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.long)]
)
def test_several_processes_train_a_flow_as_one(trained, tmp_path: Path, story, processes: int) -> None:
    alone, together = (trained.copy(tmp_path / name, "latents").with_sets(*FLOW) for name in ("alone", "together"))
    alone.run("train-flow").ok()
    done = torchrun(together, "train-flow", processes, prelude=WATCHED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("flow: step 8: validation") == 1  # the others are silent
    assert f"cpu x {processes}" in done.stdout
    assert "fits into 70%" in done.stdout  # of the host's memory: all keep the latents where there is room in each
    first, *others = ((together.folder / f"weights.{rank}").read_text().splitlines() for rank in range(processes))
    assert others == [first] * (processes - 1)
    assert len(first) == 8
    ours, theirs = story.read_log(together, "flow"), story.read_log(alone, "flow")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, 9))
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5), one["step"]
    assert ours[-1]["validation_loss"] == pytest.approx(theirs[-1]["validation_loss"], abs=1e-5)
    files = [CheckpointFolder(p.runs / "flow" / "checkpoints").latest() for p in (together, alone)]
    for file in ("model", "ema"):
        one, other = (checkpoint.tensors(file) for checkpoint in files)
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)


# In step 6, after the checkpoint of step 4.
LOST = """
from pipelines.training.flow_trainer import FlowTrainer
import signal
step = FlowTrainer.train_step
def step_or_die(self, number):
    if number == 5 and os.environ["NODE"] == "second":
        if os.environ["LOCAL_RANK"] == "0":
            os.kill(os.getppid(), signal.SIGKILL)  # torchrun
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)
FlowTrainer.train_step = step_or_die
"""


@pytest.mark.long
def test_a_node_that_is_lost_leaves_the_training_to_the_other(trained, tmp_path: Path, story) -> None:
    """Two nodes of two processes; one is lost, and the other goes on alone. The losses are those of one process."""
    place = trained.copy(tmp_path / "nodes", "latents")
    port = free_port()
    options = (
        "--nnodes=1:2", "--nproc-per-node=2", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-id=test",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-conf=last_call_timeout=20",  # the second node may come this much later, and is waited for as long again
    )  # fmt: skip
    first = start_torchrun(place, "train-flow", *options, prelude=LOST, NODE="first")
    wait_for_port(port, first)  # the first one keeps what the nodes exchange
    second = start_torchrun(place, "train-flow", *options, prelude=LOST, NODE="second")
    try:
        out, err = first.communicate(timeout=600)
        messages = second.communicate(timeout=10)[1]
    finally:
        first.kill()
        second.kill()
    assert second.returncode == -signal.SIGKILL, messages
    assert first.returncode == 0, err
    assert "cpu x 4" in out
    assert "cpu x 2" in out
    assert "steps 4 to 8" in out
    ours, theirs = story.read_log(place, "flow"), story.read_log(trained, "flow")
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5), one["step"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_port(port: int, process: subprocess.Popen) -> None:
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)


FAILED = """
from pipelines.training import flow_trainer
from pipelines.errors import UserError
check = flow_trainer.check_data
def failed(*arguments):
    if os.environ["RANK"] == "1":
        raise UserError("the disk of this machine is broken")
    check(*arguments)
flow_trainer.check_data = failed
"""


@pytest.mark.long
def test_a_process_that_fails_while_it_starts_ends_the_others_with_its_reason(trained, tmp_path: Path) -> None:
    """Without torchrun, which would end them."""
    place = trained.copy(tmp_path / "failed", "latents")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in ("0", "1"):
        surroundings = shared | {"RANK": rank, "LOCAL_RANK": rank}
        started.append(place.start("train-flow", prelude=f"import os\nos.environ |= {surroundings}\n{FAILED}"))
    try:
        errors = [process.communicate(timeout=100)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [1, 2]
    assert "[process 0 of 2]: process 1 of 2 failed: the disk of this machine is broken" in errors[0]
    assert "[process 1 of 2]: the disk of this machine is broken" in errors[1]
    assert not any("Traceback" in error for error in errors)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_do_not_make_the_store(trained, tmp_path: Path, rank: int) -> None:
    place = trained.copy(tmp_path / "no store", "runs")
    config = load_config(place.runs / "config.yaml", [f"paths.{name}={place.folder / name}" for name in PATHS])
    with pytest.raises(UserError, match=f"{place.store}: no complete store"):
        run_to("flow", config, RunContext(torch.device("cpu"), restart=True, processes=Processes(rank, 2)))
    assert not place.store.exists()


@pytest.mark.parametrize(("what", "multiple"), [("flow", "such as 9"), ("autoencoder", "such as 3")])
def test_a_batch_that_cannot_be_split_evenly(trained, tmp_path: Path, what: str, multiple: str) -> None:
    place = trained.copy(tmp_path / "parts", "latents")
    place.run(f"train-{what}", sets=[f"{what}.training.accumulate=3"]).refused(
        2, f"{what}.training.batch_size: ", "in 3 part(s) each", multiple
    )
    with pytest.raises(UserError, match=r"autoencoder.training.batch_size: .*10 .* 4 .* multiple of 8, such as 8"):
        Processes(0, 4).check_batch(10, 2, "autoencoder.training.batch_size")


@pytest.mark.long
def test_two_processes_begin_one_fine_tuning(trained, tmp_path: Path, story) -> None:
    alone, together = (trained.copy(tmp_path / name, "latents", "runs") for name in ("alone", "together"))
    alone.run("train-flow", "--fine-tune").ok()
    done = torchrun(together, "train-flow", arguments=("--fine-tune",))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is kept in") == 1
    assert len([path for path in together.runs.iterdir() if path.name.startswith("flow.")]) == 1
    for ours, theirs in zip(*(story.read_log(place, "flow") for place in (together, alone)), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    files = [CheckpointFolder(p.runs / "flow" / "checkpoints").latest() for p in (together, alone)]
    assert files[0].state["fine_tuned_from"]["weights"] == files[1].state["fine_tuned_from"]["weights"]
