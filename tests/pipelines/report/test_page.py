"""The page of the report: each section from whatever there is of a run, and what is missing or damaged."""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

from pipelines.config import parse_config
from pipelines.errors import UserError
from pipelines.prediction.pictures import animation, clip_strips, file_name, save_gif
from pipelines.report import page, predictions
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.results import EvaluationProtocol, Interval, RunPredictor, StudyPoint, StudyProtocol
from pipelines.training.flow_trainer import flow_plan

SIDE, CONTEXT, HORIZON = 32, 2, 4
EVIL = "<script>alert(1)</script>"


def filled(model: type[BaseModel], **values: Any) -> dict[str, Any]:
    """All fields of a class: some value of the right type where none is given."""
    some = {str: "text", int: 1, float: 1.0, bool: False, dict[str, Any]: {}, Interval: [0.0, 2.0], int | list[int]: 1,
            list[str]: ["text"], dict[str, str]: {}}  # fmt: skip
    return {name: some.get(field.annotation) for name, field in model.model_fields.items()} | values


def evaluation(
    predictor: Mapping[str, Any] = {}, *, prediction: float = 20.0, motion: float = 3.0, **protocol: Any
) -> dict[str, Any]:
    """As `evaluate` writes it: `prediction` is its PSNR, `motion` its gain over constant motion.

    `predictor` changes the run's part of the protocol.
    """
    subjects = {"prediction": prediction, "copy_last": 15.0, "reconstruction": 30.0}
    curves = {subject: [value + 1, value, value - 0.5, value - 0.5] for subject, value in subjects.items()}
    psnr = {
        **subjects,
        "per_frame": curves,
        "interval": {subject: [value - 1, value + 1] for subject, value in subjects.items()},
        "per_frame_interval": {subject: [[y - 1, y + 1] for y in curve] for subject, curve in curves.items()},
        "best_of": {"samples": 3, "value": 21.5, "per_frame": [22.0, 21.5, 21.0, 21.5], "interval": [20.5, 22.5]},
    }
    gain = prediction - subjects["copy_last"]
    psnr["gains"] = {
        baseline: {"value": x, "better": 0.75, "per_frame": [x, x, -1.0, -2.0], "interval": [x - 1, x + 1]}
        for baseline, x in (("copy_last", gain), ("constant_motion", motion))
    }
    fvd = {"prediction": 120.5, "copy_last": 300.25, "reconstruction": 40.0, "interval": {"prediction": [110.0, 131.0]}}
    fvd["autoencoded"] = {"prediction": 77.25, "copy_last": 250.0, "interval": {"prediction": [70.0, 85.0]}}
    whole = filled(
        EvaluationProtocol, clips=64, recordings=60, persons=5, context=CONTEXT, horizon=HORIZON, samples=3,
        interval="95 %, bootstrap over recordings", missing={"lpips": "the weights of VGG16 are not here"},
    )  # fmt: skip
    run = {"flow_step": 400, "nfe": 5, "sampling": {"solver": "euler", "steps": 5}, "autoencoder_sha256": "cd" * 32}
    whole["predictor"] = filled(RunPredictor, **run | predictor)
    sharpness = {"prediction": 0.625, "copy_last": 1.0, "per_frame": {"prediction": [0.75, math.nan, 0.5, 0.625]}}
    latent_frechet = {"prediction": 0.0123, "copy_last": 1.5}
    frame_mmd = {"prediction": 0.0009, "copy_last": -0.0012}  # single frames of copies are real ones
    metrics = {
        "psnr": psnr,
        "frame_mmd": frame_mmd,
        "sharpness": sharpness,
        "fvd": fvd,
        "latent_frechet": latent_frechet,
    }
    clips = {"walking 7": 6.5, "jump 2": -1.25}
    return {"protocol": whole | protocol, "metrics": metrics, "clips": clips}


def study() -> dict[str, Any]:
    """As `study` writes it: three solvers, one other option, another seed of the reference."""

    def point(solver: str, nfe: int, psnr: float, **options: Any) -> dict[str, Any]:
        common = {"warm_start": 0.0, "condition": "per-evaluation", "seed": 0, "per_clip": {}, "frechet_resampled": []}
        measured = {"psnr": psnr, "psnr_interval": [psnr - 1, psnr + 1], "milliseconds_per_frame": 2.5 * nfe}
        return filled(StudyPoint, solver=solver, nfe=nfe, **common | measured | options)

    points = [point("rk4-38", 396, 21.0, preset="official"), point("rk4-38", 32, 9.75, seed=1)]
    points += [point("euler", nfe, 20 + nfe / 8) for nfe in (1, 4, 8)]
    points += [point("midpoint", nfe, 20 + nfe / 4) for nfe in (2, 4)] + [point("euler", 2, 3.25, warm_start=0.5)]
    protocol = filled(StudyProtocol, clips=["a", "b"], device="cpu", recordings=2, missing={})
    return {"protocol": protocol, "points": points, "reference": 0, "chosen": 3}


BENCHMARK = {
    "date": "2026-01-02T03:04:05+00:00", "hardware": "2 cores", "software": {"torch": "2.13"},
    "measurements": [
        {"name": "load", "value": 5.0, "unit": "ms", "ratio": 0.4, "at_least": 0.5},
        {"name": "sampling: frames of it", "value": 123.0, "unit": "frames/s"},
    ],
}  # fmt: skip
ENVIRONMENT = {"software": {"torch": "2.13.0"}, "platform": "Linux", "device": "a device", "threads": 2}


class Toys:
    """A run that is written part by part."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.fps = folder, folder / "runs" / "toys", 12.0
        content = {
            "paths": {name: str(folder / name) for name in ("data", "latents", "runs")},
            "dataset": {"name": "toys", "source": "shapes", "image_size": SIDE},
            "flow": {"training": {"steps": 400}},
            "autoencoder": {"training": {"steps": 400}, "model": {"codes": 100}},
        }
        self.config = parse_config(content, "a test")

    def write(self, name: str, content: Any) -> Path:
        path = self.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def write_log(self, training: str, *records: dict[str, Any]) -> Path:
        return self.write(f"{training}/log.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def write_samples(self, *names: str, frames: int = CONTEXT + HORIZON) -> None:
        listed = {"clips": names, "fps": [self.fps] * len(names), "context": CONTEXT, "horizon": frames - CONTEXT}
        self.write("samples/samples.json", listed | {"sampling": {}, "samples": 1, "refine": False})
        for seed, name in enumerate(names):
            videos = np.random.default_rng(seed).integers(0, 256, (2, frames, SIDE, SIDE, 3), dtype=np.uint8)
            strips = clip_strips(videos[0], videos[1], CONTEXT)
            save_gif(self.run / "samples" / f"{file_name(name)}.gif", animation([(name, strips)]), self.fps)

    def save_flow(self, step: int, **state: Any) -> None:
        whole = flow_plan(self.config).state | state
        tensors = {"model": {"a": torch.zeros(1)}, "optimizer": {}}
        CheckpointFolder(self.run / "flow" / "checkpoints").save(step, tensors, whole)

    def page(self) -> str:
        return page.write_report(self.config).read_text(encoding="utf-8")

    def notes(self, kind: str) -> list[str]:
        """The page's notes of a kind, as text."""
        return [text_of(part) for part in re.findall(rf'<p class="note {kind}">(.*?)</p>', self.page(), re.DOTALL)]


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def section(text: str, key: str) -> str:
    return re.search(rf'<section id="{key}">(.*?)</section>', text, re.DOTALL)[1]


@pytest.fixture
def toys(tmp_path: Path) -> Toys:
    return Toys(tmp_path)


@pytest.fixture
def whole(toys: Toys) -> Toys:
    """A run that has everything but a store."""
    toys.write("evaluation.json", evaluation())
    toys.write("quality.json", study())
    toys.write("benchmark.json", BENCHMARK)
    toys.write("config.yaml", "dataset: {name: toys, image_size: 32}\n")
    toys.write("environment.json", ENVIRONMENT)
    toys.write_samples("walk", "jump")
    for training in ("autoencoder", "flow"):
        losses = [{"step": step, "loss": 1 / step, "validation_loss": 2 / step} for step in range(10, 401, 10)]
        toys.write_log(training, *losses)
    toys.save_flow(400, store={"fingerprint": "ab" * 32, "autoencoder": "cd" * 32})
    return toys


def test_a_missing_run_is_refused(toys: Toys):
    with pytest.raises(UserError, match=re.escape(str(toys.run))) as refused:
        toys.page()
    assert "river train-flow --config toys" in str(refused.value)
    assert not toys.run.exists()


def test_all_sections_of_a_whole_run(whole: Toys, capsys: pytest.CaptureFixture[str]):
    text = whole.page()
    assert capsys.readouterr().err == ""
    for key, words in {
        "summary": ["20.00", "95 %: 19.00 to 21.00", "copying 15.00", "reconstruction 30.00", "120.5"],
        "predictions": ["walk", "jump", "truth", "prediction", "2 x difference", "2 frames given", "4 predicted"],
        "quality": [
            "PSNR of each predicted frame",
            "best of 3 samples",
            "77.2",
            "the weights of VGG16 are not here",
            "Sharpness of each predicted frame",
            "0.625",
            "0.0123",
        ],
        "study": ["PSNR against NFE", "euler", "midpoint", "level of 396 evaluations", "warm start 0.5", "seed 1"],
        "training": ["Stage 2: the flow", "Done: 400 steps", "validation"],
        "speed": ["load", "≥ 0.5", "not reached", "2 cores"],
        "contents": ["a device", "ab" * 32, "cd" * 32, "dataset: {name: toys, image_size: 32}"],
    }.items():
        part = text if key == "summary" else section(text, key)
        for word in words:
            assert word in text_of(part), f"{word!r} is not in {key}"
    assert section(text, "predictions").count("<canvas") == 6
    assert section(text, "quality").count("<polygon") == 3  # a band per subject
    assert section(text, "quality").count("<circle") == 3 * HORIZON + 3  # of sharpness, a frame has none
    assert "0.625" not in text_of(text.partition("<nav")[0])  # headlines are of what is better the higher or lower
    assert 'data-fps="12"' in text
    assert not re.search(r'="[^"]*\b(nan|inf|None)\b', text)
    assert "undefined" not in text_of(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)).lower()


def test_a_clip_of_another_rate_says_so(whole: Toys):
    path = whole.run / "samples" / "samples.json"
    whole.write_samples("walk", "jump", "wave")
    content = json.loads(path.read_text())
    save = dict(content, fps=[12.0, 3.0, 12.0])
    video = np.random.default_rng(0).integers(0, 256, (CONTEXT + HORIZON, SIDE, SIDE, 3), dtype=np.uint8)
    save_gif(path.with_name("jump.gif"), animation([("jump", clip_strips(video, video, CONTEXT))]), 3)
    whole.write("samples/samples.json", save)
    text = section(whole.page(), "predictions")
    assert whole.notes("problem") == []
    assert 'data-fps="12"' in text
    assert re.findall(r"([\d.]+) frames per second", text) == ["3"]


def test_other_seeds_and_settings_are_no_part_of_a_solvers_line(whole: Toys):
    of_psnr = html.unescape(re.search(r'data-chart="([^"]*)"', section(whole.page(), "study"))[1])
    lines = {line["name"]: [point[1:] for point in line["points"]] for line in json.loads(of_psnr)["lines"]}
    assert lines["rk4-38"] == [["396", "21"]]
    assert lines["euler"] == [["1", "20.12"], ["4", "20.5"], ["8", "21"]]


def test_the_page_needs_nothing_and_may_load_nothing(whole: Toys):
    text = whole.page()
    assert not re.search(r"(?:src|href|action|data)\s*=\s*[\"']?(?!data:|#)[a-z/.]", re.sub(r"data-\w+=", "", text))
    assert not re.search(r"@import|url\(|//cdn|https?://", text)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert 'name="viewport"' in text
    assert not re.search(r"<[^>]*\s(style|on\w+)=", text), "what the policy forbids"


def test_the_same_run_gives_the_same_page(whole: Toys):
    first, second = (re.sub(r"Written [^<]*", "", whole.page()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "part", ["benchmark.json", "quality.json", "evaluation.json", "samples", "flow", "autoencoder"]
)
def test_a_part_of_a_run_is_enough(whole: Toys, part: str):
    for path in list(whole.run.iterdir()):
        if path.name != part:
            path.rename(whole.folder / path.name)
    assert not whole.notes("problem")
    commands = {
        "benchmark.json": "bench", "quality.json": "study", "evaluation.json": "evaluate", "samples": "sample",
        "flow": "train-flow", "autoencoder": "train-autoencoder",
    }  # fmt: skip
    text = " ".join(whole.notes("missing"))
    for name, target in commands.items():
        if name != part:
            assert f"river {target} --config toys" in text


def test_stages_that_are_not_done(toys: Toys):
    toys.save_flow(100)
    (warning,) = toys.notes("warning")
    assert "100 of 400" in warning
    assert "river train-flow --config toys" in warning
    toys.save_flow(200, identity={"seed": 7})
    (warning,) = toys.notes("warning")
    assert str(toys.run / "flow" / "checkpoints" / "step_00000200") in warning
    assert "seed" in warning
    toys.config.store_path.mkdir(parents=True)
    (toys.config.store_path / "a file").touch()
    assert any(str(toys.config.store_path) in warning for warning in toys.notes("warning"))


def test_imported_weights_are_no_unfinished_training(toys: Toys):
    toys.save_flow(7, imported={"file": "model.pth", "sha256": "ef" * 32, "iterations": None, "weights": "0" * 64})
    toys.write_log("flow", {"step": 7, "loss": 1.0})
    text = toys.page()
    assert "imported from model.pth" in text
    assert "ef" * 32 in text
    assert toys.notes("warning") == []


def test_an_evaluation_without_intervals(whole: Toys):
    content = evaluation(interval=None, samples=1)
    for name in ("interval", "per_frame_interval", "best_of"):
        del content["metrics"]["psnr"][name]
    del content["metrics"]["fvd"]["interval"]
    whole.write("evaluation.json", content)
    text = whole.page()
    assert whole.notes("problem") == []
    assert "no interval" in text
    assert "<polygon" not in section(text, "quality")


@pytest.mark.parametrize("intervals", [True, False])
def test_scores_of_samples(whole: Toys, intervals: bool):
    content = evaluation()
    content["metrics"]["crps"] = {"prediction": 3.25, "per_frame": {"prediction": [3.0, 3.0, 3.5, 3.5]}}
    ratio = {"prediction": 0.75, "per_frame": {"prediction": [1.0, 0.75, 0.5, 0.75]}}
    content["calibration"] = {"samples": 3, "spread_skill": ratio, "ranks": [0.375, 0.125, 0.125, 0.375]}
    content["calibration"] |= {"ranks_interval": [[0.0, 0.5]] * 4} if intervals else {}
    whole.write("evaluation.json", content)
    part = section(whole.page(), "quality")
    for words in ("CRPS of each predicted frame", "Spread/skill of each predicted frame", "among 3 samples", "0.375"):
        assert words in text_of(part)
    assert len(re.findall('<rect class="bar ', part)) == 4
    assert len(re.findall('<rect class="band ', part)) == 4 * intervals
    assert whole.notes("problem") == []


def test_the_audit_of_objects(whole: Toys):
    subjects = {"prediction": [1.0, 0.75, math.nan, 0.5], "copy_last": [1.0] * 4, "reconstruction": [1.0] * 4}
    values = {subject: np.nanmean(curve) for subject, curve in subjects.items()} | {"per_frame": subjects}
    whole.write("evaluation.json", evaluation() | {"objects": {"whole": values, "position": values}})
    assert any("river evaluate --config toys" in note for note in whole.notes("missing"))
    path = whole.run / "objects.png"
    Image.new("RGB", (40, 30)).save(path)
    part = section(whole.page(), "quality")
    assert "Clips with all objects whole" in text_of(part)
    assert "Position error" in text_of(part)
    assert "Ghosts" not in text_of(part)
    assert part.count("<img") == 1
    assert whole.notes("problem") == []
    path.write_bytes(path.read_bytes()[:30])
    (problem,) = whole.notes("problem")
    assert str(path) in problem


def test_the_audit_of_silhouettes(whole: Toys):
    values = {"prediction": 0.75, "per_frame": {"prediction": [1.0, 0.75, math.nan, 0.5]}}
    whole.write("evaluation.json", evaluation() | {"silhouettes": {"kept": values, "speed": values}})
    part = text_of(section(whole.page(), "quality"))
    assert "Speed of silhouettes of each predicted frame" in part
    assert "The same person of each predicted frame" not in part


def test_a_study_that_is_not_finished_has_chosen_no_sampler(whole: Toys):
    content = study() | {"chosen": None}
    content["protocol"]["missing"] = {"interval": "of two files only"}
    for point in content["points"]:
        point["psnr_interval"] = None
    whole.write("quality.json", content)
    part = section(whole.page(), "study")
    assert "Chosen" not in part
    assert "PSNR against NFE" in part
    assert "<polygon" not in part
    assert whole.notes("problem") == []


def older(result: dict[str, Any]) -> dict[str, Any]:
    """As it was written when SSIM was another function."""
    return result | {"protocol": {name: value for name, value in result["protocol"].items() if name != "ssim"}}


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("evaluation.json", '{\n"protocol": {},\n"metrics": {', "line 3"),
        ("evaluation.json", [], "content"),
        ("evaluation.json", {"protocol": {}, "metrics": {}}, "protocol."),
        ("evaluation.json", older(evaluation()), "protocol.ssim"),
        ("quality.json", older(study()), "protocol.ssim"),
        ("evaluation.json", evaluation() | {"metrics": {"psnr": {"prediction": "high"}}}, "metrics.psnr.prediction"),
        ("quality.json", study() | {"points": []}, "points"),
        ("quality.json", study() | {"reference": 99}, "99"),
        ("benchmark.json", BENCHMARK | {"measurements": [{"name": "load"}]}, "measurements.0."),
        ("samples/samples.json", {"clips": 3}, "clips"),
        ("environment.json", "\x00", "line 1"),
        ("samples/walk.gif", "no GIF", "walk.gif"),
        ("autoencoder/reconstructions/step_00000100.png", "no picture", "cannot be shown"),
        ("flow/checkpoints/step_00000500/state.json", '{"step": 500', "line 1"),
        ("flow/log.jsonl", '{"step": 10, "loss": 1}\n{"step": 20, "lo', "line 2"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_hides_nothing_else(whole: Toys, name: str, content: Any, place: str):
    path = whole.write(name, content)
    (problem,) = whole.notes("problem")
    assert str(path) in problem
    assert place in problem
    text = whole.page()
    for key in page.SECTIONS:
        assert f'<section id="{key}">' in text
    assert "the checkpoint of step 400 is used" in text_of(text)


def test_text_of_files_is_escaped(whole: Toys):
    whole.write_samples(EVIL, "jump")
    whole.write("evaluation.json", evaluation({"description": EVIL, "sampling": {EVIL: EVIL}}, missing={EVIL: EVIL}))
    whole.write("config.yaml", f"x: {EVIL}")
    whole.write("benchmark.json", BENCHMARK | {"measurements": [{"name": EVIL, "value": 1.0, "unit": EVIL}]})
    whole.write("environment.json", ENVIRONMENT | {"device": EVIL, "software": {EVIL: EVIL}})
    whole.write("flow/log.jsonl", f'{{"step": "{EVIL}"}}')
    whole.save_flow(500, best={EVIL: 1.0}, store={"fingerprint": EVIL})
    text = whole.page()
    assert text.count("<script") == 1  # ours
    assert text.count("alert(1)") >= 12
    assert not re.search(r'="[^"<>]*<', text), "markup within an attribute"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda toys: toys.write("evaluation.json", evaluation(prediction=14.0)), ["PSNR", "14.00", "15.00"]),
        (lambda toys: toys.write("evaluation.json", evaluation(prediction=15.5)), ["PSNR", "hardly better"]),
        (lambda toys: toys.write("evaluation.json", evaluation(motion=0.5)), ["+0.50 dB", "-0.50 to 1.50"]),
        (lambda toys: toys.write_log("flow", *rising(1.2)), ["validation loss rises", "20 %", "step 200"]),
        (lambda toys: toys.write_log("flow", {"step": 9, "loss": 1.0, "skipped_steps": 3}), ["3 steps of the flow"]),
        (lambda toys: toys.write_log("flow", *falling(20.0, 19.0)), ["19.00 dB", "20.00 dB"]),
        (lambda toys: toys.write_log("autoencoder", {"step": 400, "codes_used": 30, "code_perplexity": 20.0}),
         ["codebook", "30 of 100 codes"]),
        (lambda toys: toys.write_log("autoencoder", {"step": 400, "codes_used": 99, "code_perplexity": 3.0}),
         ["codebook", "perplexity of 3"]),
        (lambda toys: toys.write("evaluation.json", evaluation({"flow_step": 300})), ["step 300", "step 400"]),
        (lambda toys: toys.write("evaluation.json", evaluation({"autoencoder_sha256": "0" * 64})), ["0" * 9, "cd" * 6]),
        (lambda toys: toys.write("evaluation.json", evaluation(recordings=4)), ["4 recordings"]),
        (lambda toys: toys.write("benchmark.json", BENCHMARK), ["load"]),
    ],
)  # fmt: skip
def test_warnings(whole: Toys, change: Callable[[Toys], Path], words: list[str]):
    (whole.run / "benchmark.json").unlink()
    assert whole.notes("warning") == []
    change(whole)
    (warning,) = whole.notes("warning")
    for word in words:
        assert word in warning


def rising(factor: float) -> list[dict[str, Any]]:
    losses = {100: 2.0, 200: 1.0, 400: factor}
    return [{"step": step, "loss": 1.0, "validation_loss": loss} for step, loss in losses.items()]


def falling(*psnrs: float) -> list[dict[str, Any]]:
    return [{"step": 400 - len(psnrs) + number, "validation_psnr": psnr} for number, psnr in enumerate(psnrs, start=1)]


def test_scatter_is_no_rise(whole: Toys):
    whole.write_log("flow", *rising(1.03))
    assert not [text for text in whole.notes("warning") if "rises" in text]


def test_a_clip_that_is_too_large_is_left_out(whole: Toys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(predictions, "PICTURE_BUDGET", 100)
    problems = whole.notes("problem")
    assert [name in problem for name, problem in zip(("walk.gif", "jump.gif"), problems, strict=True)] == [True, True]
    assert "river sample --config toys" in problems[0]


def test_the_budgets_leave_room_for_the_rest():
    pictures = predictions.MAX_CLIPS + 1  # clips and the reconstructions
    assert pictures * predictions.PICTURE_BUDGET * 4 / 3 < page.MAX_PAGE - 3_000_000


def test_long_clips_show_a_regular_choice_of_frames(whole: Toys):
    whole.write_samples("long", frames=400)
    frames = [int(frame) for frame in re.search(r'data-frames="([^"]*)"', whole.page())[1].split()]
    assert (frames[0], frames[-1]) == (0, 399)
    assert len(frames) * SIDE <= predictions.MAX_SHEET_WIDTH
    assert set(np.diff(frames)) <= {1, 2}
