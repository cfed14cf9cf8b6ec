"""Official weights on own videos: imported, used to encode, fine-tuned, sampled, and evaluated."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pipelines.loading import weights_digest
from pipelines.predictor import VideoPredictor
from stage1_autoencoder.config import VQVAEConfig
from stage1_autoencoder.vqvae import VQVAE
from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import VectorField

SIZES = (
    "autoencoder.model={architecture: vqvae, channels: 32, levels: 1, codes: 16}",
    "flow.model={width: 32, depth: 1, mid_depth: 1, dropout: 0.1}",
)
OURS = (
    *SIZES, "dataset.image_size=16", "flow.training.standardize=false", "flow.training.ema_decay=0.9",
    "sampling={preset: official, steps: 2}", "evaluation.videos=2", "evaluation.horizon=2",
    "flow.training.validation_samples=1",
)  # fmt: skip


def write_model(path: Path) -> VectorField:
    """A random official main model with its autoencoder inside; gives its field."""
    torch.manual_seed(0)
    autoencoder = VQVAE(VQVAEConfig(channels=32, levels=1, codes=16))
    field = VectorField(VectorFieldConfig(width=32, depth=1, mid_depth=1), 4)
    state = {
        f"module.ae.backbone.{re.sub('^quantizer', 'vector_quantizer', name)}": tensor
        for name, tensor in autoencoder.state_dict().items()
    } | {f"module.vector_field_regressor.{name}": tensor for name, tensor in field.state_dict().items()}
    torch.save({"model": state, "global_step": 300_000}, path)
    return field


@pytest.fixture
def imported(place, story: ModuleType):
    """A place with videos of its own, their store, and an imported model."""
    place = place.with_sets(*story.OWN_VIDEOS, *OURS)
    story.write_videos(place.data, story.OWN_NAMES)
    write_model(place.folder / "model.pth")
    place.run("import-official", "--model", str(place.folder / "model.pth")).ok()
    place.run("encode").ok()
    return place


def weights_of(place, name: str = "ema") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(place.checkpoint("flow") / f"{name}.safetensors")


def test_official_weights_are_fine_tuned_on_ones_own_videos(imported, story: ModuleType, tmp_path: Path) -> None:
    field = write_model(tmp_path / "again.pth")
    still = imported.copy(tmp_path / "still", "latents", "runs")
    # The first step of a warm-up has learning rate 0: what comes out is what was there.
    still.run("train-flow", "--fine-tune", sets=["flow.training.steps=1"]).ok()
    assert all(torch.equal(weights_of(still)[name], tensor) for name, tensor in field.state_dict().items())
    still.run("train-flow", "--restart", sets=["flow.training.steps=1"]).ok()
    assert not torch.equal(weights_of(still)["project_in.1.weight"], field.state_dict()["project_in.1.weight"])

    assert "flow: done, imported from model.pth" in imported.run("train-flow").ok().out
    imported.run("distill").ok()
    student = json.loads((imported.checkpoint("student/flow") / "state.json").read_text())
    assert student["teacher"]["weights"] == weights_digest(field)
    assert (student["teacher"]["sampler"]["preset"], student["sampler"]["nfe"]) == ("official", 1)
    assert student["standardization"] == {"mean": [0.0] * 4, "std": [1.0] * 4}
    outcome = imported.run("train-flow", "--fine-tune").ok()
    assert "steps 0 to 8" in outcome.out
    assert re.search(r"flow: step 0: validation loss \d", outcome.out)
    state = json.loads((imported.checkpoint("flow") / "state.json").read_text())
    origin = state["fine_tuned_from"]
    assert (origin["step"], origin["weights"]) == (300_000, weights_digest(field))
    assert origin["imported"]["file"] == "model.pth"
    assert state["standardization"] == {"mean": [0.0] * 4, "std": [1.0] * 4}
    assert state["fps"] == 10
    assert (imported.runs / "flow" / "log.jsonl").exists()
    (aside,) = (path for path in imported.runs.iterdir() if path.name.startswith("flow."))
    assert (aside / "checkpoints" / "step_00300000" / "model.safetensors").exists()

    for arguments in ([], ["--fine-tune"]):
        again = imported.run("train-flow", *arguments).ok()
        assert "flow: done, 8 steps of fine-tuning from model.pth" in again.out
        assert "steps/s" not in again.out
    assert "8 steps of fine-tuning" in imported.run("sample", "--videos", "1").ok().out
    imported.run("evaluate").ok()
    evaluation = json.loads((imported.runs / "evaluation.json").read_text())
    assert evaluation["protocol"]["predictor"]["flow_step"] in (4, 8)
    assert evaluation["protocol"]["predictor"]["flow_origin"]["fine_tuned_from"]["imported"]["file"] == "model.pth"
    frames = VideoPredictor.from_run(imported.runs, device="cpu").generate_frames(torch.zeros(1, 2, 3, 16, 16), 1)
    assert frames.shape == (1, 3, 3, 16, 16)
    # Importing over what was trained here needs a word.
    again = ("import-official", "--model", str(imported.folder / "model.pth"))
    imported.run(*again).refused(2, "was trained here", "--restart")


def test_a_store_without_its_autoencoder_is_enough_to_fine_tune_and_not_to_predict(imported) -> None:
    shutil.rmtree(imported.runs / "autoencoder")
    imported.run("train-flow", "--fine-tune").ok()
    imported.run("sample").refused(2, "runs/tiny/autoencoder/checkpoints", "`import-official`")
    imported.run("import-official", "--autoencoder", str(imported.folder / "model.pth")).ok()
    assert "8 steps of fine-tuning" in imported.run("sample", "--videos", "1").ok().out


def test_what_does_not_go_together_is_refused(imported, story: ModuleType) -> None:
    before = story.stamps(imported.runs)
    imported.run("train-flow", "--fine-tune", sets=["flow.training.standardize=true"]).refused(
        2, "flow.training.standardize: true", "set flow.training.standardize=false"
    )
    imported.run("train-flow", "--fine-tune", sets=["flow.model.width=64"]).refused(2, "flow.model.width: 32 -> 64")
    imported.run("train-flow", "--fine-tune", "--resume", "4").refused(2, "--resume 4", "--fine-tune")
    imported.run("train-autoencoder", "--fine-tune").refused(2, "unrecognized arguments: --fine-tune")
    assert story.stamps(imported.runs) == before
