"""The fast decoder as users meet it: trained on the way, used when asked for, resumed, refused."""

import json
import re
import shutil
import signal
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from pipelines.errors import UserError
from pipelines.predictor import VideoPredictor
from pipelines.training.decoder_trainer import DecoderTrainer

SMALL = (
    "decoder.training.steps=12", "decoder.training.checkpoint_every=6", "decoder.training.validate_every=6",
    "decoder.training.validation_frames=8", "decoder.training.batch_size=4",
)  # fmt: skip
FAST = ["sampling.decoder=fast"]


@pytest.fixture(scope="module")
def decoded(trained, tmp_path_factory: pytest.TempPathFactory):
    """A place in which `sample` trained a fast decoder. Tests must not change it."""
    place = trained.copy(tmp_path_factory.mktemp("decoder") / "decoded", "latents", "runs").with_sets(*SMALL)
    outcome = place.run("sample", sets=FAST).ok()
    (place.folder / "sample.txt").write_text(outcome.out)
    return place


def test_sample_trains_it_first_and_leaves_the_rest_as_it_was(decoded, trained, story: ModuleType) -> None:
    said = (decoded.folder / "sample.txt").read_text()
    assert said.index("decoder: step 12: validation PSNR") < said.index("sample: 4 clips")
    assert re.search("sample: 4 clips.*fast decoder", said)
    records = story.read_log(decoded, "decoder")
    assert records[-1]["validation_psnr"] > records[2]["validation_psnr"] > 0
    assert story.pictures(decoded, "decoder") == [6, 12]
    predicted, before = (load_file(place.runs / "samples" / "predictions.safetensors") for place in (decoded, trained))
    assert torch.equal(predicted["latents"], before["latents"])
    # A later command without the option has the full decoder again.
    assert (decoded.runs / "config.yaml").read_bytes() == (trained.runs / "config.yaml").read_bytes()
    at = story.stamps(decoded.runs / "decoder")
    assert "decoder: done, 12 steps" in decoded.run("train-decoder").ok().out
    assert story.stamps(decoded.runs / "decoder") == at


def test_evaluate_measures_it_and_reconstructs_as_before(decoded, trained, tmp_path) -> None:
    place = decoded.copy(tmp_path / "evaluated", "latents", "runs")
    place.run("evaluate", sets=FAST).ok()
    plain, fast = (json.loads((of.runs / "evaluation.json").read_text()) for of in (trained, place))
    predictor = fast["protocol"]["predictor"]
    assert (predictor["sampling"]["decoder"], len(predictor["decoder_sha256"])) == ("fast", 64)
    assert plain["protocol"]["predictor"]["decoder_sha256"] is None
    for subject in ("copy_last", "reconstruction"):
        assert fast["metrics"]["psnr"][subject] == plain["metrics"]["psnr"][subject]
    assert fast["metrics"]["psnr"]["prediction"] != plain["metrics"]["psnr"]["prediction"]


def test_the_python_api_and_named_runs_use_it(decoded, trained, tmp_path) -> None:
    place = decoded.copy(tmp_path / "named", "latents", "runs")
    shutil.copytree(place.runs / "flow", place.runs / "wide" / "flow")
    config = (place.runs / "config.yaml").read_text().rpartition("# sha256")[0]
    (place.runs / "wide" / "config.yaml").write_text(config.replace("run: null", "run: wide"))
    images = torch.rand(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    runs = [VideoPredictor.from_run(run, "cpu") for run in (place.runs, place.runs / "wide")]
    full, fast, named = (
        predictor.generate_frames(images, 2, sampling={"decoder": decoder})
        for predictor, decoder in ((runs[0], "full"), (runs[0], "fast"), (runs[1], "fast"))
    )
    assert torch.equal(fast[:, :2], full[:, :2])  # the context is the full decoder's
    assert not torch.equal(fast[:, 2:], full[:, 2:])
    assert torch.equal(fast, named)
    place.run("train-decoder", "--restart", "--run", "wide").refused(2, "--run")
    with pytest.raises(UserError, match=r"decoder/checkpoints .*`river train-decoder`"):
        VideoPredictor.from_run(trained.runs, "cpu").generate_frames(images, 2, sampling={"decoder": "fast"})


def test_stopped_by_a_signal_and_resumed(decoded, trained, tmp_path, story: ModuleType, monkeypatch) -> None:
    place = trained.copy(tmp_path / "halves", "latents").with_sets(*SMALL)
    shutil.copytree(trained.runs / "autoencoder", place.runs / "autoencoder")
    # Without memory for the latents, frames are read from the store: they are the same.
    few = ["cache.memory_budget=1 KiB"]
    story.send_at(monkeypatch, DecoderTrainer, "train_step", call=7, number=signal.SIGINT)
    place.run("train-decoder", sets=few).refused(130, "stopped at step 7", "step_00000007")
    assert "steps 7 to 12" in place.run("train-decoder").ok().out
    ours, theirs = story.tree(place.checkpoint("decoder")), story.tree(decoded.checkpoint("decoder"))
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= theirs.keys()
    assert ours == theirs
    assert story.timeless(story.read_log(place, "decoder")) == story.timeless(story.read_log(decoded, "decoder"))


def test_it_belongs_to_one_autoencoder(decoded, tmp_path) -> None:
    place = decoded.copy(tmp_path / "other", "latents", "runs")
    for path in (place.runs / "decoder" / "checkpoints").glob("step_*/state.json"):
        state = json.loads(path.read_text())
        del state["content_sha256"]
        path.write_text(json.dumps(state | {"autoencoder": "0" * 64}))
    place.run("sample", sets=FAST).refused(2, "autoencoder: ", "->", "train-decoder --restart")
    place.run("sample", "--videos", "1").ok()  # who does not ask for it is not troubled by it
    predictor = VideoPredictor.from_run(place.runs, "cpu")
    assert predictor.fast_decoder is None
    with pytest.raises(UserError, match=r"was trained for autoencoder 0.*\.\.\., but .*`train-decoder --restart`"):
        predictor.generate_frames(torch.zeros(1, 2, 3, 32, 32), 1, sampling={"decoder": "fast"})
    place.run("train-decoder", "--restart").ok()
    assert len(list(place.runs.glob("decoder.*"))) == 1
