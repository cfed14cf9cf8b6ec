"""The Slurm scripts of docs/cluster.md as they stand there, with stand-ins for Slurm's programs."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import dump_config, load_config

# Runs a command once per node, and passes SIGTERM on as srun does.
SRUN = """#!/bin/bash
trap 'kill -TERM $(jobs -p)' TERM
for node in $(seq "$SLURM_NNODES"); do "$@" & done
status=0
for job in $(jobs -p); do
  until wait "$job"; (( (code = $?) <= 128 )) || ! kill -0 "$job" 2> /dev/null; do :; done
  (( code )) && status=$code
done
exit $status
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) echo 127.0.0.1 ;;
  requeue) touch requeued ;;
esac
"""


def start_script(place: Any, what: str) -> subprocess.Popen:
    """Start the script whose job is called `what`, as if Slurm had given it two nodes with a GPU each."""
    page = Path(__file__).parents[2] / "docs" / "cluster.md"
    (script,) = re.findall(
        rf"^```bash\n(#!/bin/bash\n#SBATCH --job-name={what}\n.*?)^```", page.read_text(), re.M | re.S
    )
    folder, programs = place.folder, place.folder / "slurm"
    place.arguments(what)  # writes the configuration
    config = load_config(folder / "tiny.yaml", place.sets)
    for name, content in (
        ("configs/kth.yaml", dump_config(config)),
        (".venv/bin/activate", f'export PATH="{programs}:{Path(sys.executable).parent}:$PATH"'),
        ("slurm/srun", SRUN),
        ("slurm/scontrol", SCONTROL),
        ("slurm/hostname", "#!/bin/bash\necho 127.0.0.1"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "here", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_ID": job_id()}
    python = {"PYTHONPATH": str(page.parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", "-c", script], cwd=folder, env=os.environ | python | slurm, stdout=subprocess.PIPE, text=True
    )


def job_id() -> str:
    """One whose ports are free."""
    for number in range(10_000):
        try:
            for first in (20_000, 30_000):
                socket.create_server(("127.0.0.1", first + number)).close()
        except OSError:
            continue
        return str(number)
    raise AssertionError("no port is free")


@pytest.mark.long
def test_encoding(trained, tmp_path: Path, story) -> None:
    place = trained.copy(tmp_path / "place", "runs")
    script = start_script(place, "encode")
    out, _ = script.communicate(timeout=600)
    assert script.returncode == 0, out
    assert story.tree(place.store) == story.tree(trained.store)


@pytest.mark.long
def test_a_training_whose_time_is_up_is_queued_again_and_resumes(trained, tmp_path: Path, story) -> None:
    sets = ("flow.training.steps=200", "logging.every=1")
    place, alone = (trained.copy(tmp_path / name, "latents").with_sets(*sets) for name in ("place", "alone"))
    first = start_script(place, "train")
    while first.poll() is None and not (place.runs / "flow" / "checkpoints" / "latest").exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGUSR1)
    out, _ = first.communicate(timeout=600)
    assert (place.folder / "requeued").exists()
    saved = int(place.checkpoint("flow").name.removeprefix("step_"))
    assert 4 <= saved < 200, out
    second = start_script(place, "train")
    out, _ = second.communicate(timeout=600)
    assert second.returncode == 0, out
    assert f"steps {saved} to 200" in out
    alone.run("train-flow").ok()
    ours, theirs = (story.read_log(which, "flow") for which in (place, alone))
    assert [line["step"] for line in ours] == list(range(1, 201))
    # Rounding grows with the steps: 1e-5 after 8 of them (test_distributed), and this many more of the same size.
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5 * max(1, one["step"] / 8)), one["step"]
