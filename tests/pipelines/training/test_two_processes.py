"""Two processes that exchange gradients: equal weights after every step, and the losses of a single process.

Both run this file; they train all cases, write what they measured, and at last one of them fails.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import latent_cache
from pipelines.errors import UserError
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.distributed import ALONE, Processes, join_processes
from pipelines.training import autoencoder_trainer
from pipelines.training.training_loop import LoopSettings, Trainer, steps_until

CPU = torch.device("cpu")
FLOWS = [f"flow {accumulate}" for accumulate in (1, 3)]
AUTOENCODERS = ["autoencoder 3"]
STEPS = 3
START = 1  # of adversarial training


class Judge(nn.Module):
    """A discriminator without BatchNorm, whose statistics would be of one process's rows."""

    def __init__(self, filters: int, layers: int) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.main(images)


def build(case: str, folder: Path, processes: Processes) -> Trainer:
    kind, accumulate = case.split()
    accumulate = int(accumulate)
    helpers = importlib.import_module(f"tests.pipelines.training.test_{kind}_trainer")
    training = {"accumulate": accumulate, "ema_decay": 0.9, "grad_clip": 1.0}
    if kind == "flow":
        store = helpers.write_store(folder / f"{processes.rank} {processes.count} {case}.zarr", [12, 9, 7])
        settings = helpers.config(**training, batch_size=4 * accumulate)
        return helpers.trainer(latent_cache.open(store, "train"), settings, processes)
    adversarial = {"weight": 0.5, "start": START, "layers": 1, "filters": 8}
    made = helpers.make(**training, batch_size=12, adversarial=adversarial, restart_every=1, processes=processes)
    made.pool.batch_size = 12
    return made


def train(case: str, folder: Path, processes: Processes) -> list[dict[str, float]]:
    """The terms of each step, averaged over processes. All processes must have equal weights after it."""
    trainer, lines = build(case, folder, processes), []
    for step in range(STEPS):
        result = trainer.train_step(step)
        terms = {name: value.detach().clone() for name, value in result.terms.items()}
        for value in terms.values():
            processes.mean_(value)
        lines.append({name: value.item() for name, value in terms.items()})
        tensors = [tensor for file in trainer.files().values() for tensor in file.values()]
        weights = torch.cat([tensor.detach().flatten().double() for tensor in tensors])
        ranks = processes.gather(weights[None])
        lines[-1]["differing"] = int((ranks != ranks[0]).sum())
        if "adaptive_weight" in terms:
            ratios = processes.gather(result.terms["adaptive_weight"][None])
            lines[-1]["differing"] += int((ratios != ratios[0]).sum())
    return lines


def count_steps(folder: Path, processes: Processes) -> dict[str, Any]:
    """Each process would end at another time. What is measured must be forgotten."""
    folder.mkdir(exist_ok=True)
    trainer, settings = build("flow 1", folder, processes), LoopSettings("flow", None, 100, 100, 100)
    before = torch.cat([tensor.flatten().double() for tensor in trainer.files()["model"].values()])
    end = time.perf_counter() + 2 + 500 * processes.rank
    steps = steps_until(end, trainer, settings, CheckpointFolder(folder / "checkpoints"), processes)
    after = trainer.files()
    same = torch.equal(before, torch.cat([tensor.flatten().double() for tensor in after["model"].values()]))
    found = torch.tensor([[steps, int(same and not after["optimizer"])]])
    return {"ranks": processes.gather(found).tolist(), "files": len(list((folder / "checkpoints").iterdir()))}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    autoencoder_trainer.PatchDiscriminator = Judge
    processes, measured = join_processes(), {}
    processes.connect(CPU)
    for case in [*FLOWS, *AUTOENCODERS]:
        measured[case] = {"two": train(case, folder, processes)}
        if processes.is_first:
            measured[case]["one"] = train(case, folder, ALONE)
    measured["clock"] = count_steps(folder / "clock", processes)
    started = time.monotonic()
    try:
        with processes.sharing_failures():
            if not processes.is_first:
                raise UserError("the disk of the other process is broken")
            processes.wait()
    except UserError:
        time.sleep(5)  # the process ends long after its failure
    except ConnectionError as error:
        measured["failure"] = str(error)
        measured["seconds"] = time.monotonic() - started
    if processes.is_first:
        (folder / "measured.json").write_text(json.dumps(measured))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, repository = tmp_path_factory.mktemp("two"), Path(__file__).parents[3]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    surroundings = {
        "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=os.environ | surroundings | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    return json.loads((folder / "measured.json").read_text())


@pytest.mark.parametrize("case", FLOWS + AUTOENCODERS)
def test_weights_are_equal_in_all_processes_after_every_step(measured, case: str) -> None:
    assert [line["differing"] for line in measured[case]["two"]] == [0] * STEPS


@pytest.mark.parametrize("case", FLOWS + AUTOENCODERS)
def test_the_losses_are_those_of_one_process(measured, case: str) -> None:
    one, two = measured[case]["one"], measured[case]["two"]
    # The adaptive weight belongs to one part of a batch, and parts are made of each process's rows.
    compared = START if case == "autoencoder 3" else STEPS
    for ours, theirs in zip(two[:compared], one[:compared], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    assert {line["loss"] for line in two} != {two[0]["loss"]}


def test_all_processes_train_for_the_time_of_the_first(measured) -> None:
    (steps, unchanged), other = measured["clock"]["ranks"]
    assert other == [steps, unchanged]
    assert unchanged
    assert steps > 1
    assert not measured["clock"]["files"]


def test_a_failure_of_one_process_ends_the_others_with_its_reason(measured) -> None:
    assert "process 1 of 2" in measured["failure"]
    assert "the disk of the other process is broken" in measured["failure"]
    assert measured["seconds"] < 4


if __name__ == "__main__":
    main(Path(sys.argv[1]))
