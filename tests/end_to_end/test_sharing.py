"""Runs that travel: a released run predicts as its run does, and is pushed and pulled byte by byte or not at all."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file

from pipelines.errors import UserError
from pipelines.loading import autoencoder_digest, find_autoencoder, find_flow
from pipelines.predictor import VideoPredictor
from pipelines.runtime.results import Evaluation
from pipelines.sharing.released_run import check_released_run, write_released_run


@pytest.fixture(scope="session")
def released(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released run of the trained place. Tests must not change it."""
    return write_released_run(trained.runs, tmp_path_factory.mktemp("released") / "tiny", data_license="CC0")


@pytest.fixture
def elsewhere(released: Path, trained: Any, tmp_path: Path, story: ModuleType) -> Any:
    """A place that has nothing but the released run."""
    shutil.copytree(released, tmp_path / "elsewhere" / "runs" / "tiny")
    return story.Place(tmp_path / "elsewhere", trained.sets)


def frames_of(run: Path) -> torch.Tensor:
    images = torch.rand(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return VideoPredictor.from_run(run, "cpu").generate_frames(images, 2)


def test_a_released_run_predicts_the_same_and_has_nothing_else(released, trained):
    assert torch.equal(frames_of(released), frames_of(trained.runs))
    files = {path.relative_to(released).as_posix() for path in released.rglob("*") if path.is_file()}
    release = check_released_run(released)
    assert files == {*release.files, "release.json"}
    assert sum(name.endswith(".safetensors") for name in files) == 2  # one for each network
    assert {"config.yaml", "evaluation.json", "README.md", "overview.gif"} <= files
    assert not [name for name in files if name.endswith((".jsonl", ".html", ".mp4"))]
    everything = b"".join((released / name).read_bytes() for name in files)
    assert os.fsencode(trained.folder) not in everything


def test_the_model_card_has_the_evaluation_s_numbers(released):
    card = (released / "README.md").read_text()
    psnr = Evaluation.model_validate_json((released / "evaluation.json").read_bytes()).metrics["psnr"]
    for number in (psnr.prediction, psnr.copy_last, psnr.reconstruction):
        assert f"{number:.2f}" in card
    assert card.startswith("---\n")
    assert "CC0" in card
    assert "overview.gif" in card


@pytest.mark.parametrize("half", [False, True])
def test_a_release_of_a_release_is_the_same(trained, tmp_path, story, half):
    release = write_released_run(trained.runs, tmp_path / "release", half=half, data_license="CC0")
    assert story.tree(write_released_run(release, tmp_path / "again", half=half)) == story.tree(release)


def test_weights_in_half_precision_are_read_in_full(trained, released, tmp_path):
    half = write_released_run(trained.runs, tmp_path / "half", half=True)
    stored = load_file(find_flow(half).path / "model.safetensors")
    loaded, full = find_flow(half).tensors("model"), find_flow(released).tensors("model")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name, tensor in full.items():
        assert loaded[name].dtype == torch.float32
        torch.testing.assert_close(loaded[name], tensor, rtol=2**-11, atol=2**-24)  # half of the last bit
    assert find_flow(half).state["store"]["autoencoder"] == autoencoder_digest(find_autoencoder(half))
    assert (frames_of(half) - frames_of(trained.runs)).abs().max() < 0.05


def test_a_named_run_is_released_with_its_autoencoder(copied, tmp_path):
    wide = copied.runs / "wide"
    shutil.copytree(copied.runs / "flow", wide / "flow")
    config = (copied.runs / "config.yaml").read_text().rpartition("# sha256")[0]
    (wide / "config.yaml").write_text(config.replace("run: null", "run: wide"))
    assert torch.equal(frames_of(write_released_run(wide, tmp_path / "wide")), frames_of(copied.runs))


def test_commands_read_a_released_run(elsewhere, story):
    elsewhere.run("sample", "--videos", "1").ok()
    assert (elsewhere.runs / "samples" / "overview.gif").exists()
    assert "8 steps" in elsewhere.run("train-flow").ok().out
    assert "8 steps" in elsewhere.run("runs").ok().out


@pytest.mark.long
def test_all_commands_read_a_released_run(elsewhere, story):
    elsewhere.run("evaluate").ok()
    elsewhere.run("report").ok()
    clip = elsewhere.folder / "clip.mp4"
    story.write_video(clip, story.moving_square(4, 0, 32, 32))
    elsewhere.run("predict", "--frames", "2", str(clip)).ok()


@pytest.mark.parametrize("words", [["--set", "flow.training.steps=20"], ["--resume", "8"]])
def test_training_from_a_released_run_is_fine_tuning(elsewhere, trained, words, story):
    shutil.copytree(trained.store, elsewhere.store)
    before = story.stamps(elsewhere.runs)
    elsewhere.run("train-flow", *words).refused(2, "--fine-tune", "step_00000008")
    assert story.stamps(elsewhere.runs) == before


@pytest.mark.long
def test_a_released_run_is_trained_further_on_ones_own_videos(elsewhere, story):
    story.write_videos(elsewhere.folder / "own", story.OWN_NAMES)
    root = f"dataset.root={elsewhere.folder / 'own'}"
    sets = ("--set", root, *(word for change in story.OWN_VIDEOS for word in ("--set", change)))
    elsewhere.run("encode", *sets).ok()
    elsewhere.run("train-flow", "--fine-tune", *sets).ok()
    assert find_flow(elsewhere.runs).state["fine_tuned_from"]["step"] == 8
    assert elsewhere.run("sample", "--videos", "1").ok()


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "release.json"
    content = json.loads(path.read_text())
    del content["content_sha256"]
    path.write_text(json.dumps(content | changes))


BREAKAGES = {
    "shorter": lambda folder: os.truncate(next(folder.rglob("model.safetensors")), 100),
    "flipped": lambda folder: (folder / "config.yaml").write_bytes((folder / "config.yaml").read_bytes()[:-2] + b"x\n"),
    "missing": lambda folder: (folder / "README.md").unlink(),
    "unlisted": lambda folder: (folder / "release.json").unlink(),
    "cut off": lambda folder: os.truncate(folder / "release.json", 50),
    "huge": lambda folder: edited(folder, files={"config.yaml": {"size": 2**40, "sha256": "0" * 64}}),
    "newer": lambda folder: edited(folder, format_version=2, more=[1]),
    "foreign": lambda folder: edited(folder, format="other"),
    **{
        name: lambda folder, name=name: edited(folder, files={name: {"size": 1, "sha256": "0" * 64}})
        for name in (
            "../up.json",
            "/etc/up.json",
            "a/../../up.json",
            "a\\up.json",
            ".hidden.json",
            "up.pkl",
            "release.json",
        )
    },
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_not_whole_is_no_released_run(released, tmp_path, breakage):
    folder = tmp_path / "broken"
    shutil.copytree(released, folder)
    BREAKAGES[breakage](folder)
    with pytest.raises(UserError, match=str(folder)) as refused:
        check_released_run(folder)
    assert "\n" not in str(refused.value)


def test_a_release_replaces_no_other_folder(trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="mine"):
        write_released_run(trained.runs, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_an_evaluation_of_other_weights_is_left_out(copied, tmp_path, capsys):
    path = copied.runs / "evaluation.json"
    content = json.loads(path.read_text())
    content["protocol"]["predictor"]["flow_sha256"] = "0" * 64
    del content["content_sha256"]
    path.write_text(json.dumps(content))
    release = write_released_run(copied.runs, tmp_path / "release")
    assert not (release / "evaluation.json").exists()
    assert "evaluation.json" in capsys.readouterr().err


@pytest.fixture
def pushed(released: Path, tmp_path: Path, command: Any) -> Path:
    """A folder to which the released run was pushed."""
    command(["push", str(released), str(tmp_path / "pushed")]).ok()
    return tmp_path / "pushed"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_a_run_goes_to_a_folder_and_back(trained, released, pushed, here, story, command):
    destination = here / "to"
    command(["push", str(trained.runs), str(destination), "--data-license", "CC0"]).ok()
    assert story.tree(destination) == story.tree(released) == story.tree(pushed)
    command(["pull", str(destination)]).ok()
    assert story.tree(here / "runs" / "tiny") == story.tree(released)
    assert not list((here / "runs").glob(".*"))
    before = story.stamps(here)
    command(["push", str(here / "runs" / "tiny"), str(destination)]).ok()
    command(["pull", str(destination)]).ok()
    assert story.stamps(here) == before
    assert VideoPredictor.from_pretrained("shapes-small", device="cpu").fps == 10  # comes with the program
    images = torch.zeros(1, 2, 3, 32, 32)
    predictor = VideoPredictor.from_pretrained(destination, device="cpu")
    expected = VideoPredictor.from_run(trained.runs, "cpu").generate_frames(images, 1)
    assert torch.equal(predictor.generate_frames(images, 1), expected)


def test_a_run_goes_with_half_of_the_bytes(trained, here, tmp_path, story, command):
    """As the bundled model was made."""
    half = story.tree(write_released_run(trained.runs, tmp_path / "half", half=True, data_license="CC0"))
    command(["push", str(trained.runs), "whole", "--data-license", "CC0"]).ok()
    for run in (str(trained.runs), "whole", "to"):
        command(["push", run, "to", "--half", "--data-license", "CC0"]).ok()
        assert story.tree(here / "to") == half
    command(["push", str(trained.runs), "with", "--half", "--store"]).refused(2, "--half", "--store")
    command(["push", str(trained.runs), str(trained.runs), "--half"]).refused(2, str(trained.runs))
    command(["push", "none", "to", "--half"]).refused(2, "none")


def whole_store(store: Path, story: ModuleType) -> dict[str, bytes]:
    return {name: content for name, content in story.tree(store).items() if not name.startswith(".")}


def test_a_store_travels_on_request(trained, here, story, command):
    release = ["push", str(trained.runs), "to"]
    command([*release, "--store"]).ok()
    assert story.tree(here / "to" / "latents" / "tiny.zarr") == whole_store(trained.store, story)
    command(["pull", "to", "other", "--store"]).ok()
    assert story.tree(here / "latents" / "tiny.zarr") == whole_store(trained.store, story)
    command(["inspect", "--verify", "--config", "other/config.yaml"]).ok()
    chunk = max((here / "latents").glob("*/train/latents/c/*/*/*/*"), key=os.path.getsize)
    chunk.write_bytes(bytes(chunk.stat().st_size))
    command(["push", "other", "more", "--store"]).refused(2, str(chunk.relative_to(here)), "inspect --verify")
    assert not (here / "more" / "release.json").exists()
    command(release).ok()  # without it: it is removed there
    assert not [name for name in story.tree(here / "to") if "zarr" in name]
    command(["pull", "to", "again", "--store"]).refused(2, "to", "--store")


def test_what_was_interrupted_resumes_and_never_looks_whole(released, here, story, command, monkeypatch):
    with monkeypatch.context() as patch:
        story.send_at(patch, LocalFileSystem, "put_file", 4)
        assert command(["push", str(released), "to"]).code == 143
    assert not (here / "to" / "release.json").exists()
    command(["pull", "to"]).refused(2, "to", "release.json")
    sent = story.stamps(here / "to")
    assert sent
    calls = story.count_calls(monkeypatch, LocalFileSystem, "put_file")
    command(["push", str(released), "to"]).ok()
    assert calls[0] == len(check_released_run(here / "to").files) - len(sent)
    assert sent.items() <= story.stamps(here / "to").items()
    with monkeypatch.context() as patch:
        story.send_at(patch, LocalFileSystem, "get_file", 4)
        assert command(["pull", "to"]).code == 143
    assert not (here / "runs" / "tiny").exists()
    fetched = story.count_calls(monkeypatch, LocalFileSystem, "get_file")
    command(["pull", "to"]).ok()
    assert story.tree(here / "runs" / "tiny") == story.tree(released)
    assert fetched[0] <= len(check_released_run(here / "to").files) - 3


def test_what_another_process_pulls_is_left_to_it(pushed, here, command):
    (here / "runs" / ".tiny.incomplete").mkdir(parents=True)
    with locked_folder(here / "runs" / ".tiny.incomplete"):
        command(["pull", str(pushed)]).refused(2, "runs/tiny")
    outcome = command(["clean", "--set", "dataset.name=tiny"]).ok()
    assert ".tiny.incomplete" in outcome.out
    command(["pull", str(pushed)]).ok()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """As a process has it that pulls into it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def test_a_new_release_replaces_the_old_one(trained, released, pushed, tmp_path, here, story, command):
    half = write_released_run(trained.runs, tmp_path / "half", half=True)
    command(["pull", str(pushed)]).ok()
    (pushed / "README.md").unlink()
    command(["push", str(half), str(pushed)]).ok()
    assert story.tree(pushed) == story.tree(half)
    before = story.stamps(here)
    command(["pull", str(pushed)]).refused(2, "runs/tiny")  # another version is there
    assert story.stamps(here) == before


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_what_is_not_whole_is_not_pulled(pushed, here, command, breakage):
    BREAKAGES[breakage](pushed)
    outcome = command(["pull", str(pushed)]).refused(2, str(pushed))
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (here / "runs" / "tiny").exists()


@pytest.mark.parametrize("place", ["/etc/river", "../up", "~/river"])
def test_settings_that_write_elsewhere_are_not_pulled(pushed, here, command, place):
    config = (pushed / "config.yaml").read_text().rpartition("# sha256")[0]
    (pushed / "config.yaml").write_text(config.replace("runs: runs", f"runs: {place}"))
    content = (pushed / "config.yaml").read_bytes()
    listed = json.loads((pushed / "release.json").read_text())["files"]
    listed["config.yaml"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edited(pushed, files=listed)
    command(["pull", str(pushed)]).refused(2, "config.yaml", place.strip("~"))
    assert not (here / "runs" / "tiny").exists()


def test_a_pulled_run_that_is_there_is_checked(pushed, here, command):
    command(["pull", str(pushed)]).ok()
    weights = next(here.rglob("model.safetensors"))
    weights.write_bytes(bytes(len(weights.read_bytes())))
    command(["pull", str(pushed)]).refused(2, "model.safetensors")


WRONG = {
    "ftp://host/run": (2, "ftp://host/run"),
    "s3:/bucket": (2, "s3:/bucket"),
    "s3://": (2, "s3://"),
    "hf://name": (2, "hf://name"),
    "file.txt": (2, "file.txt"),
    "file.txt/run": (1, "file.txt"),
    "mine": (2, "thesis.tex"),
    "/sys/river": (1, "/sys/river"),  # where even root has no rights
}


@pytest.mark.parametrize("destination", WRONG)
def test_a_wrong_destination_is_one_line_and_changes_nothing(released, here, story, command, destination):
    (here / "file.txt").write_text("text")
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("years of work")
    before = story.stamps(here)
    code, named = WRONG[destination]
    outcome = command(["push", str(released), destination]).refused(code, named)
    assert len(outcome.err.strip().splitlines()) == 1
    assert story.stamps(here) == before


@pytest.mark.parametrize("folder", ["nothing", "latents"])
def test_only_runs_are_pushed(trained, here, command, folder):
    command(["push", str(trained.folder / folder), "to"]).refused(2, folder, "config.yaml")
