"""Predictions of any other predictor, as users bring them: files of all kinds, what is refused, and comparisons."""

import json
import os
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipelines.evaluation.measures.intervals import draw_counts
from pipelines.evaluation.measures.metrics import psnr
from stage1_autoencoder.autoencoder import image_to_unit

HORIZON, CLIPS = 6, 12
EXACT = {"psnr", "ssim", "sharpness", "crps", "energy_score"}
SETS = ("dataset.splits={test: 12}", "evaluation.videos=12")  # enough recordings for intervals


@pytest.fixture
def clips(place, tmp_path: Path) -> Path:
    """The exported clips of a place without any network."""
    place.run("evaluate", "--export-clips", str(tmp_path / "clips"), sets=SETS).ok()
    return tmp_path / "clips"


def frames_of(clips: Path, part: str) -> dict[str, np.ndarray]:
    """Name -> uint8 [n, h, w, 3], in the order of the index."""
    names = [clip["name"] for clip in json.loads((clips / "clips.json").read_text())["clips"]]
    return {name: np.load(clips / part / f"{name}.npy") for name in names}


def copies_of(clips: Path) -> dict[str, np.ndarray]:
    """The last given frame of each clip, over and over."""
    return {name: np.repeat(given[-1:], HORIZON, axis=0) for name, given in frames_of(clips, "given").items()}


def write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> str:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return str(folder)


def write_coded(file: Path, array: np.ndarray, codec: str, pixels: str) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        stream.height, stream.width, stream.pix_fmt = *array.shape[1:3], pixels
        for frame in array:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_lossless(stem: Path, array: np.ndarray, kind: int, story: Any) -> None:
    """One prediction, in one of five kinds of files."""
    match kind:
        case 0:
            np.save(f"{stem}.npy", array)
        case 1:
            np.savez_compressed(f"{stem}.npz", anything=array)
        case 2:
            save_file({"anything": array}, f"{stem}.safetensors")
        case 3:
            story.write_video(stem, array)
        case 4:
            write_coded(Path(f"{stem}.mkv"), array, "ffv1", "bgr0")


def result_of(place, name: str = "comparison.json") -> dict[str, Any]:
    return json.loads((place.runs / name).read_text())


def test_files_of_all_kinds_with_copies_measure_as_copying_does(place, clips: Path, tmp_path: Path, story) -> None:
    given, copies = frames_of(clips, "given"), copies_of(clips)
    whole = {name: np.concatenate([given[name], copies[name]]) for name in copies}
    floats, lossless, coded = (tmp_path / name for name in ("floats.npz", "lossless", "coded"))
    np.savez(floats, **{name: image_to_unit(torch.from_numpy(x)).permute(0, 2, 3, 1).numpy()
                        for name, x in whole.items()})  # fmt: skip
    lossless.mkdir()
    coded.mkdir()
    for number, name in enumerate(copies):
        write_lossless(lossless / name, (copies if number < 6 else whole)[name], number % 5, story)
        write_coded(coded / f"{name}.mp4", whole[name], "mpeg4", "yuv420p")
    kinds = [str(path) for path in (floats, lossless, coded)]
    sets = [*SETS, "evaluation.batch_size=5"]
    outcome = place.run("evaluate", "--compare", *kinds, "--black", "-1", sets=sets).ok()

    found = result_of(place)
    assert [*found["evaluations"]] == kinds
    for kind, black in zip(kinds, (-1, None, None), strict=True):
        evaluation = found["evaluations"][kind]
        assert evaluation["protocol"]["predictor"]["path"] == kind
        assert evaluation["protocol"]["predictor"]["black"] == black
        assert {"reconstruction", "latent_frechet"} < {*evaluation["protocol"]["missing"]}
        for part in ("metrics", "objects") if kind != kinds[2] else ():
            for metric, values in evaluation[part].items():
                if metric not in EXACT and part == "metrics":  # of a network, which depends on its batch
                    assert values["prediction"] == pytest.approx(values["copy_last"], rel=1e-4)
                    continue
                curves = values["per_frame"]
                assert curves["prediction"] == pytest.approx(curves["copy_last"], abs=0, nan_ok=True)
                for difference in (found["differences"][part][metric][name] for name in (kinds[1], "copy_last")):
                    assert difference["value"] == 0 or np.isnan(difference["value"])
                    assert difference["interval"] == [0, 0] or np.isnan(difference["interval"]).all()
    psnrs = found["evaluations"][kinds[2]]["metrics"]["psnr"]
    assert psnrs["prediction"] == pytest.approx(psnrs["copy_last"], abs=0.5)
    assert max(len(line) for line in outcome.out.splitlines() if str(place.folder) not in line) <= 120
    assert not (place.runs / "evaluation_records").exists()


def test_differences_are_paired_and_clustered_by_recording(place, clips: Path, tmp_path: Path) -> None:
    truth, copies, noise = frames_of(clips, "truth"), copies_of(clips), np.random.default_rng(0)
    noisy = {name: np.clip(x + noise.normal(0, 30, x.shape), 0, 255).astype(np.uint8) for name, x in truth.items()}
    two = {name: np.stack([noisy[name], copies[name], truth[name]]) for name in truth}  # of which the first two count
    paths = [write_arrays(tmp_path / "copies", copies), str(tmp_path / "two.safetensors")]
    save_file(two, paths[1])
    for name, array in copies.items():
        np.save(tmp_path / "copies" / f"{name}-2.npy", array)
    sets = (*SETS, "evaluation.samples=2", "evaluation.resamples=100")
    outcome = place.run("evaluate", "--compare", *paths, sets=sets).ok()

    def of_clips(arrays: dict[str, np.ndarray]) -> np.ndarray:
        pairs = [(image_to_unit(torch.from_numpy(arrays[name])), image_to_unit(torch.from_numpy(truth[name])))
                 for name in truth]  # fmt: skip
        return np.array([psnr(*pair).double().mean().item() for pair in pairs])

    expected = (of_clips(noisy) + of_clips(copies)) / 2 - of_clips(copies)
    counts = draw_counts(range(CLIPS), 100, 0).numpy()
    interval = np.quantile(counts @ expected / CLIPS, [0.025, 0.975])
    difference = result_of(place)["differences"]["metrics"]["psnr"][paths[1]]
    assert difference["value"] == pytest.approx(expected.mean(), rel=1e-6)
    assert difference["interval"] == pytest.approx(interval.tolist(), rel=1e-6)
    assert interval[0] > 0
    assert "better" in next(line for line in outcome.out.splitlines() if f"{expected.mean():+.2f}" in line)
    best = result_of(place)["evaluations"][paths[1]]["metrics"]["psnr"]["best_of"]
    assert best["value"] == pytest.approx(np.maximum(of_clips(noisy), of_clips(copies)).mean(), rel=1e-6)


def _rename(folder: Path) -> None:
    (folder / "test_00003.npy").rename(folder / "third.npy")


def _squeeze(folder: Path) -> None:
    with zipfile.ZipFile(folder / "test_00003.npz", "w") as archive:
        archive.writestr("x.npy", (folder / "test_00003.npy").read_bytes()[:-5])
    (folder / "test_00003.npy").unlink()


def _claim(folder: Path) -> None:
    """Say that there are a million million samples."""
    with (folder / "test_00003.npy").open("wb") as file:
        shape = (10**12, HORIZON, 32, 32, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})


def _pipe(folder: Path) -> None:
    (folder / "test_00003.npy").unlink()
    os.mkfifo(folder / "test_00003.npy")


def _save(array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "test_00003.npy", array)


FLOATS = np.zeros((HORIZON, 32, 32, 3), np.float32)
BAD = {
    "missing": (lambda folder: (folder / "test_00003.npy").unlink(), ["1 of 12 clips", "test_00003"]),
    "misnamed": (_rename, ["test_00003", "third"]),
    "short": (_save(np.zeros((5, 32, 32, 3), np.uint8)), ["5 frames", "6 predicted", "2 given"]),
    "small": (_save(np.zeros((6, 16, 32, 3), np.uint8)), ["32x16", "32x32"]),
    "channels first": (_save(np.zeros((6, 3, 32, 32), np.uint8)), ["[6, 3, 32, 32]"]),
    "no samples": (_save(np.zeros((0, 6, 32, 32, 3), np.uint8)), ["[0, 6, 32, 32, 3]"]),
    "integers": (_save(np.zeros((6, 32, 32, 3), np.int64)), ["int64"]),
    "nan": (_save(np.full_like(FLOATS, np.nan)), ["nan"]),
    "out of range": (_save(FLOATS - 1), ["-1", "--black"]),
    "twice": (lambda folder: (folder / "test_00003").mkdir(), ["test_00003.npy", "test_00003"]),
    "claimed": (_claim, ["ends after 0"]),
    "pipe": (_pipe, ["1 of 12 clips"]),
    "cut off": (_squeeze, ["test_00003.npz"]),
    "pickled": (_save(np.array([{}], object)), ["object"]),
}


def test_what_cannot_be_measured_is_one_line(place, clips: Path, tmp_path: Path) -> None:
    copies = copies_of(clips)
    for number, (spoil, needed) in enumerate(BAD.values()):
        folder = write_arrays(tmp_path / str(number), copies)
        spoil(Path(folder))
        outcome = place.run("evaluate", "--predictions", folder, "--black", "0", sets=SETS).refused(2, *needed)
        assert "test_00003" in outcome.err
        assert len(outcome.err.splitlines()) == 1
    floats = write_arrays(tmp_path / "floats", {name: x / np.float32(255) for name, x in copies.items()})
    place.run("evaluate", "--predictions", floats, sets=SETS).refused(2, "--black 0", "--black -1")
    place.run("evaluate", "--predictions", floats, "--black", "-1", sets=SETS).refused(2, "--black 0")
    place.run("evaluate", "--predictions", str(tmp_path / "gone"), sets=SETS).refused(2, "gone", "folder")
    place.run("evaluate", "--predictions", floats, "--refine", sets=SETS).refused(2, "--refine")
    place.run("evaluate", "--export-clips", floats, sets=SETS).refused(2, "other files")
    for names in (("x", "x"), ("x", "copy_last")):
        place.run("evaluate", "--compare", *names, sets=SETS).refused(2, "--compare x")
    assert not place.runs.exists()


def test_with_an_autoencoder_all_is_measured_and_the_run_itself_can_be_compared(copied, tmp_path: Path) -> None:
    before = (copied.runs / "evaluation.json").read_bytes()
    copied.run("evaluate", "--export-clips", str(tmp_path / "clips")).ok()
    copies = write_arrays(tmp_path / "copies", copies_of(tmp_path / "clips"))
    copied.run("evaluate", "--predictions", copies).ok()
    (path,) = copied.runs.glob("evaluation_of_*.json")
    own = json.loads(path.read_text())["metrics"]
    reference = json.loads(before)["metrics"]
    for metric in ("psnr", "latent_frechet"):
        # Of copies the latents are those that copying has, up to the size of the autoencoder's batches.
        assert own[metric]["prediction"] == pytest.approx(reference[metric]["copy_last"], rel=1e-4)
    assert own["psnr"]["reconstruction"] == pytest.approx(reference["psnr"]["reconstruction"], rel=1e-4)

    outcome = copied.run("evaluate", "--compare", "run", str(copied.runs), copies).ok()
    found = result_of(copied)
    assert found["reference"] == "run"
    assert found["evaluations"]["run"]["metrics"]["psnr"]["prediction"] == pytest.approx(
        reference["psnr"]["prediction"], rel=1e-6
    )
    for differences in (*found["differences"]["metrics"].values(), *found["differences"]["objects"].values()):
        assert differences[str(copied.runs)]["value"] in (0, pytest.approx(np.nan, nan_ok=True))
    psnr_difference = found["differences"]["metrics"]["psnr"][copies]["value"]
    assert psnr_difference == pytest.approx(reference["psnr"]["copy_last"] - reference["psnr"]["prediction"], rel=1e-4)
    assert "differences to run" in outcome.out
    assert (copied.runs / "evaluation.json").read_bytes() == before
