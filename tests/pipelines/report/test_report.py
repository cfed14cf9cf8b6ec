"""`report`: every section from whatever there is of a run, and what is said where something lacks or is damaged."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipelines.__main__ import main
from pipelines.prediction.pictures import animation, clip_strips, file_name, save_gif
from pipelines.report import assembly as command
from pipelines.report import predictions
from pipelines.report.inputs import read_log
from pipelines.runtime.checkpoints import CheckpointFolder

SIDE, CONTEXT, HORIZON = 32, 2, 4
SUBJECTS = {"prediction": 20.0, "copy_last": 15.0, "reconstruction": 30.0}
EVIL = "<script>alert(1)</script>"


def evaluation(**values: float) -> dict[str, Any]:
    """As `evaluate` writes it; `values` are other PSNRs."""
    subjects = SUBJECTS | values
    curves = {subject: [value + 1, value, value - 0.5, value - 0.5] for subject, value in subjects.items()}
    psnr = {
        **subjects,
        "per_frame": curves,
        "interval": {subject: [value - 1, value + 1] for subject, value in subjects.items()},
        "per_frame_interval": {subject: [[y - 1, y + 1] for y in curve] for subject, curve in curves.items()},
        "best_of": {"samples": 3, "value": 21.5, "per_frame": [22.0, 21.5, 21.0, 21.5], "interval": [20.5, 22.5]},
    }
    fvd = {"prediction": 120.5, "copy_last": 300.25, "reconstruction": 40.0, "interval": {"prediction": [110.0, 131.0]}}
    fvd["autoencoded"] = {"prediction": 77.25, "copy_last": 250.0, "interval": {"prediction": [70.0, 85.0]}}
    protocol = {
        "dataset": "toys", "split": "test", "clips": 64, "videos": 60, "context": CONTEXT, "horizon": HORIZON, "nfe": 5,
        "sampling": {"solver": "euler", "steps": 5}, "interval": "95 %, bootstrap over videos",
        "missing": {"lpips": "the weights of VGG16 are not here"},
    }  # fmt: skip
    return {"protocol": protocol, "metrics": {"psnr": psnr, "fvd": fvd}}


def quality() -> dict[str, Any]:
    """As `study` writes it: two solvers, one other option, another seed of the reference."""

    def point(solver: str, nfe: int, psnr: float, **options: Any) -> dict[str, Any]:
        numbers = {"psnr": psnr, "ssim": 0.8, "lpips": None, "frechet": 0.1, "milliseconds_per_frame": 2.5 * nfe}
        intervals = {"psnr_interval": [psnr - 1, psnr + 1], "frechet_interval": [0.0, 0.2]}
        return {"solver": solver, "nfe": nfe, "steps": nfe, "seed": 0} | numbers | intervals | options

    points = [point("rk4-38", 396, 21.0, preset="official"), point("rk4-38", 32, 9.75, seed=1)]
    points += [point("euler", nfe, 20 + nfe / 8) for nfe in (1, 4, 8)]
    points += [point("midpoint", nfe, 20 + nfe / 4) for nfe in (2, 4)] + [point("euler", 2, 3.25, warm_start=0.5)]
    return {"protocol": {"clips": ["a", "b"], "device": "cpu"}, "points": points, "reference": 0, "cheapest": 3}


BENCHMARK = {
    "date": "2026-01-02T03:04:05+00:00", "hardware": "2 cores", "software": {"torch": "2.13"},
    "measurements": [
        {"name": "load", "value": 5.0, "unit": "ms", "ratio": 0.4, "at_least": 0.5, "at_most": None, "reached": False},
        {"name": "sampling: frames of it", "value": 123.0, "unit": "frames/s"},
    ],
}  # fmt: skip


class Toys:
    """A run that is written part by part, and the command that reports on it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        self.run = folder / "runs" / "toys"
        content = {
            "paths": {name: str(folder / name) for name in ("data", "latents", "runs")},
            "dataset": {"name": "toys", "source": "shapes", "image_size": SIDE},
            "flow": {"training": {"steps": 400}},
            "autoencoder": {"training": {"steps": 400}, "model": {"codes": 100}},
        }
        (folder / "toys.yaml").write_text(yaml.safe_dump(content))

    def write(self, name: str, content: Any) -> Path:
        path = self.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def write_log(self, training: str, *records: dict[str, Any]) -> Path:
        return self.write(f"{training}/log.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def write_samples(self, *names: str, frames: int = CONTEXT + HORIZON) -> None:
        self.write("samples/samples.json", {"clips": names, "context": CONTEXT, "horizon": frames - CONTEXT})
        for seed, name in enumerate(names):
            videos = np.random.default_rng(seed).integers(0, 256, (2, frames, SIDE, SIDE, 3), dtype=np.uint8)
            strips = clip_strips(videos[0], videos[1], CONTEXT)
            save_gif(self.run / "samples" / f"{file_name(name)}.gif", animation([(name, strips)]), 10)

    def save_flow(self, step: int, **state: Any) -> None:
        CheckpointFolder(self.run / "flow" / "checkpoints").save(step, {"model": {"a": torch.zeros(1)}}, state)

    def report(self) -> SimpleNamespace:
        self.capsys.readouterr()
        code = main(["report", "--config", str(self.folder / "toys.yaml"), "--device", "cpu"])
        captured = self.capsys.readouterr()
        page = self.run / "report.html"
        return SimpleNamespace(code=code, err=captured.err, page=page.read_text() if page.exists() else "")

    def notes(self, kind: str) -> list[str]:
        """The remarks of a kind on the page, as text."""
        result = self.report()
        assert result.code == 0, result.err
        return [text_of(part) for part in re.findall(rf'<p class="note {kind}">(.*?)</p>', result.page)]


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def section(page: str, key: str) -> str:
    return re.search(rf'<section id="{key}">(.*?)</section>', page, re.DOTALL)[1]


@pytest.fixture
def toys(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Toys:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    return Toys(tmp_path, capsys)


@pytest.fixture
def whole(toys: Toys) -> Toys:
    """A run that has everything but a store."""
    toys.write("evaluation.json", evaluation())
    toys.write("quality.json", quality())
    toys.write("benchmark.json", BENCHMARK)
    toys.write("config.yaml", "dataset: {name: toys, image_size: 32}\n")
    toys.write("environment.json", {"software": {"torch": "2.13.0"}, "device": "a device", "threads": 2})
    toys.write_samples("walk", "jump")
    for training in ("autoencoder", "flow"):
        losses = [{"step": step, "loss": 1 / step, "validation_loss": 2 / step} for step in range(10, 401, 10)]
        toys.write_log(training, *losses)
    toys.save_flow(400, fps=12.0, store={"fingerprint": "ab" * 32, "autoencoder": "cd" * 32})
    return toys


def test_a_run_that_is_not_there_is_refused(toys: Toys):
    result = toys.report()
    assert result.code == 2
    assert "holds no run to report on" in result.err
    assert "make train-autoencoder DATASET=toys" in result.err
    assert not toys.run.exists()


def test_all_sections_of_a_whole_run(whole: Toys):
    result = whole.report()
    assert (result.code, result.err) == (0, "")
    for key, words in {
        "summary": ["20.00", "95 %: 19.00 to 21.00", "copying 15.00", "reconstruction 30.00", "120.5"],
        "predictions": ["walk", "jump", "truth", "prediction", "2 x difference", "2 frames given", "4 predicted"],
        "quality": ["PSNR of each predicted frame", "best of 3 samples", "77.2", "LPIPS was not measured: the weights"],
        "evaluations": ["PSNR against NFE", "euler", "midpoint", "level of 396 evaluations", "warm start 0.5"],
        "training": ["Stage 2: the flow", "400 of 400 steps", "validation"],
        "speed": ["load", "≥ 0.5, not reached", "2 cores"],
        "run": ["a device", "ab" * 32, "cd" * 32, "dataset: {name: toys, image_size: 32}"],
    }.items():
        page = result.page if key == "summary" else section(result.page, key)
        for text in words:
            assert text in text_of(page), f"{text!r} is not in {key}"
    assert section(result.page, "predictions").count("<canvas") == 6
    assert section(result.page, "quality").count("<polygon") == 3  # a band a subject
    assert 'data-fps="12"' in result.page


def test_other_seeds_and_options_are_no_part_of_a_solvers_line(whole: Toys):
    chart = html.unescape(re.search(r'data-chart="([^"]*)"', section(whole.report().page, "evaluations"))[1])  # of PSNR
    lines = {line["name"]: [point[1:] for point in line["points"]] for line in json.loads(chart)["lines"]}
    assert lines["rk4-38"] == [["396", "21"]]
    assert lines["euler"] == [["1", "20.12"], ["4", "20.5"], ["8", "21"]]


def test_the_page_needs_nothing_and_may_load_nothing(whole: Toys):
    page = whole.report().page
    assert not re.search(r"(?:src|href|action|data)\s*=\s*[\"']?(?!data:|#)[a-z/.]", re.sub(r"data-\w+=", "", page))
    assert not re.search(r"@import|url\(|//cdn|https?://", page)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    for tag in ("style", "script"):
        content = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert 'name="viewport"' in page
    assert not re.search(r"<[^>]*\s(style|on\w+)=", page), "what the policy forbids"


def test_the_same_run_gives_the_same_page(whole: Toys):
    first, second = (re.sub(r"Written [^<]*", "", whole.report().page) for _ in range(2))
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
        shown = f"make {target} DATASET=toys"
        if name != part and not (part == "autoencoder" and name == "autoencoder"):
            assert shown in text


def test_imported_weights_are_no_unfinished_training(toys: Toys):
    toys.save_flow(7, imported={"file": "model.pth", "sha256": "ef" * 32, "iterations": None, "weights": "0" * 64})
    toys.write_log("flow", {"step": 7, "loss": 1.0})
    page = toys.report().page
    assert "imported from model.pth" in page
    assert "ef" * 32 in page
    assert toys.notes("warning") == []


def test_an_older_evaluation_has_no_intervals(toys: Toys):
    content = evaluation()
    for name in ("interval", "per_frame_interval", "best_of"):
        del content["metrics"]["psnr"][name]
    content["protocol"] = {"clips": 64}
    content["metrics"].pop("fvd")
    toys.write("evaluation.json", content)
    result = toys.report()
    assert (result.code, result.err) == (0, "")
    assert "no interval" in result.page
    assert "<polygon" not in section(result.page, "quality")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", '{\n"protocol": {},\n"metrics": {', "evaluation.json, line 3: no JSON"),
        ("evaluation.json", [], "evaluation.json: all of it: "),
        ("evaluation.json", {"protocol": {}, "metrics": {"psnr": {"prediction": "high"}}}, "metrics.psnr.prediction: "),
        ("quality.json", {"protocol": {}, "points": []}, "quality.json: points: "),
        ("quality.json", quality() | {"reference": 99}, "quality.json: it names a point that it does not have"),
        ("benchmark.json", {"measurements": [{"name": "load"}]}, "benchmark.json: measurements.0."),
        ("samples/samples.json", {"clips": 3}, "samples.json: clips: "),
        ("environment.json", "\x00", "environment.json, line 1: no JSON"),
        ("samples/walk.gif", "no GIF", "walk.gif: not a GIF that can be read"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named_and_hides_nothing_else(whole: Toys, name: str, content: Any, message: str):
    whole.write(name, content)
    problems = whole.notes("problem")
    assert len(problems) == 1
    assert message in problems[0]
    assert f"{whole.run}/" in problems[0]
    page = whole.report().page
    for key in command.SECTIONS:
        assert f'<section id="{key}">' in page
    assert "Stage 2: the flow" in page


def test_a_damaged_checkpoint_is_named_and_passed_over(whole: Toys):
    whole.write("flow/checkpoints/step_00000500/state.json", '{"step": 500')
    (problem,) = whole.notes("problem")
    assert "step_00000500/state.json, line 1: no JSON" in problem
    assert "the checkpoint of step 400 is used" in text_of(whole.report().page)


def test_damaged_lines_of_a_log_are_left_out(whole: Toys):
    path = whole.run / "flow" / "log.jsonl"
    path.write_text('{"step": 10, "loss": 1}\n{"step": 20, "lo\n[]\n{"loss": 3}\n{"step": 30, "loss": "nan"}\n')
    log = read_log(path)
    assert [record["step"] for record in log.records] == [10, 30]
    assert log.series("loss") == ([10, 30], [1, None])
    problems = whole.notes("problem")
    assert [re.search(r"log\.jsonl, line (\d)", problem)[1] for problem in problems] == ["2", "3", "4"]


def test_names_out_of_files_are_only_text(whole: Toys):
    whole.write_samples(EVIL, "jump")
    content = evaluation()
    content["protocol"] |= {"description": EVIL, EVIL: EVIL, "missing": {EVIL: EVIL}}
    whole.write("evaluation.json", content)
    whole.write("config.yaml", f"x: {EVIL}")
    whole.write("benchmark.json", BENCHMARK | {"measurements": [{"name": EVIL, "value": 1.0, "unit": EVIL}]})
    whole.write("environment.json", {"device": EVIL, "software": {EVIL: EVIL}})
    broken = whole.write("flow/log.jsonl", f'{{"step": "{EVIL}"}}')
    assert broken.exists()
    page = whole.report().page
    assert page.count("<script") == 1  # ours
    assert page.count("alert(1)") >= 10


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda toys: toys.write("evaluation.json", evaluation(prediction=14.0)), "no better than copying"),
        (lambda toys: toys.write("evaluation.json", evaluation(prediction=15.5)), "intervals overlap"),
        (lambda toys: toys.write_log("flow", *rising(1.2)), "validation loss rises"),
        (lambda toys: toys.write_log("flow", {"step": 100, "loss": 1.0}), "is at step 100 of 400"),
        (lambda toys: toys.write_log("autoencoder", {"step": 400, "codes_used": 30, "code_perplexity": 20.0}),
         "30 of 100 codes"),
        (lambda toys: toys.write_log("autoencoder", {"step": 400, "codes_used": 99, "code_perplexity": 3.0}),
         "codebook has collapsed"),
        (lambda toys: toys.write("evaluation.json", with_protocol(flow_step=300)), "of the flow at step 300"),
        (lambda toys: toys.write("evaluation.json", with_protocol(autoencoder_sha256="0" * 64)), "another autoencoder"),
        (lambda toys: toys.write("evaluation.json", with_protocol(clips=4)), "of 4 clips only"),
        (lambda toys: toys.write("benchmark.json", BENCHMARK), "below what is wanted in: load"),
    ],
)  # fmt: skip
def test_warnings(whole: Toys, change: Callable[[Toys], Path], warning: str):
    (whole.run / "benchmark.json").unlink()
    assert whole.notes("warning") == []
    change(whole)
    warnings = whole.notes("warning")
    assert len(warnings) == 1
    assert warning in warnings[0]


def rising(factor: float) -> list[dict[str, Any]]:
    losses = {100: 2.0, 200: 1.0, 400: factor}
    return [{"step": step, "loss": 1.0, "validation_loss": loss} for step, loss in losses.items()]


def with_protocol(**values: Any) -> dict[str, Any]:
    content = evaluation()
    return content | {"protocol": content["protocol"] | values}


def test_scatter_is_no_rise(whole: Toys):
    whole.write_log("flow", *rising(1.03))
    assert not [text for text in whole.notes("warning") if "rises" in text]


def test_pictures_keep_to_their_budget(whole: Toys, monkeypatch: pytest.MonkeyPatch):
    """Noise is the worst that can come; clips that don't fit in any quality are left out, which is said."""
    whole.write_samples(*"abcdef", frames=12)

    def bytes_of_clips() -> tuple[int, int]:
        pictures = re.findall(r'base64,([^"]*)"', section(whole.report().page, "predictions"))
        return len(pictures), sum(len(base64.b64decode(picture)) for picture in pictures)

    assert bytes_of_clips()[0] == 6
    lossless = bytes_of_clips()[1]
    monkeypatch.setattr(predictions, "BUDGET", lossless // 3)
    count, size = bytes_of_clips()
    assert count == 6
    assert size <= lossless // 3
    monkeypatch.setattr(predictions, "BUDGET", 20_000)
    count, size = bytes_of_clips()
    assert 1 <= count < 6
    assert size <= 20_000
    assert f"{6 - count} clip(s) are left out" in whole.notes("problem")[0]


def test_the_budgets_leave_room_for_the_rest():
    from pipelines.report import codes

    assert (predictions.BUDGET + codes.BUDGET) * 4 / 3 < command.LARGEST_PAGE - 3_000_000
