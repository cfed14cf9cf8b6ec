"""The model card of a released run: a README with YAML front matter, as model hubs want it."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from pipelines.config import RiverConfig
from pipelines.runtime.results import SUBJECTS, Evaluation, EvaluationProtocol, RunPredictor

# Of `sample`, by name -> what they show.
PICTURES = {
    "overview.gif": "ground truth and prediction, playing side by side",
    "contact_sheet.png": "ground truth above prediction, frame by frame",
}
# Metric -> title, digits
_METRICS = {
    "psnr": ("PSNR [dB], higher is better", 2),
    "ssim": ("SSIM, higher is better", 3),
    "lpips": ("LPIPS, lower is better", 3),
    "st_lpips": ("ST-LPIPS, lower is better", 3),
    "latent_frechet": ("Fréchet of latents, lower is better", 4),
    "fvd": ("FVD, lower is better", 1),
}
_SUBJECTS = ("prediction", "copy_last", "constant_motion", "reconstruction")


def model_card(
    config: RiverConfig, evaluation: Evaluation | None, pictures: Path, data_license: str | None, rounded: bool
) -> str:
    """The text of a released run's README.md.

    Args:
        config: of the run.
        evaluation: None: the run was not evaluated.
        pictures: folder that has some of `PICTURES`.
        data_license: of the training videos; None: not stated.
        rounded: whether the weights were rounded to fp16 since.
    """
    name = config.dataset.name
    front = {
        "library_name": "river-two-stage",
        "pipeline_tag": "image-to-video",
        "tags": ["video-prediction", "flow-matching", "latent-video"],
    }
    height, width = config.dataset.frame_size
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False) + "---",
            "",
            f"# Video prediction on {name}",
            "",
            f"An autoencoder and a latent flow, trained on videos of {name} (source: {config.dataset.source}), that "
            f"continue videos of {width}x{height} pixels. They predict what such videos show, and nothing else well.",
            *(line for file, text in PICTURES.items() if (pictures / file).is_file() for line in _picture(file, text)),
            "",
            "## Quality",
            "",
            *_quality(evaluation, rounded),
            "",
            "## Use",
            "",
            "```python",
            "from river_two_stage import VideoPredictor, to_video",
            "",
            'predictor = VideoPredictor.from_pretrained("...")  # where this folder is: a path, s3:// or hf://user/name',
            "frames = predictor.generate_frames(images, num_frames=16)  # images: [videos, frames, 3, h, w] in [-1, 1]",
            "video = to_video(frames)",
            "```",
            "",
            f"`river pull SOURCE` puts the run into `runs/{name}`, where `river predict clip.mp4`, `river sample` and "
            f"`river evaluate` find it with `--config runs/{name}/config.yaml`.",
            "",
            "## Continue",
            "",
            "The weights can be trained further, on the same or on other videos. There is no state of the optimizer to "
            "resume from: a new training begins with these weights.",
            "",
            "```bash",
            "river pull SOURCE runs/mine",
            'MINE="--config runs/mine/config.yaml --set dataset.name=mine"',
            'MINE="$MINE --set dataset.source=videos --set dataset.root=/path/to/videos"',
            "river encode $MINE    # with this autoencoder",
            "river train-flow --fine-tune $MINE",
            "```",
            "",
            "## Data and files",
            "",
            f"- License of the training videos: {data_license or 'not stated'}.",
            "- Weights are safetensors, everything else is JSON, YAML, Markdown and pictures. `release.json` lists all "
            "files with their sha256.",
            "- The method is that of [RIVER](https://arxiv.org/abs/2211.14575) (Davtyan, Sameni, Favaro, ICCV 2023).",
            "",
        ]
    )


def _picture(file: str, text: str) -> list[str]:
    return ["", f"![{text.capitalize()}]({file})", "", f"*{text.capitalize()}.*"]


def _quality(evaluation: Evaluation | None, rounded: bool) -> Iterator[str]:
    if evaluation is None:
        yield "Not measured."
        return
    protocol, metrics = evaluation.protocol, evaluation.metrics
    shown = {name: metrics[name] for name in _METRICS if name in metrics}
    subjects = [subject for subject in _SUBJECTS if any(getattr(each, subject) is not None for each in shown.values())]
    yield "| mean | " + " | ".join(SUBJECTS[subject] for subject in subjects) + " |"
    yield "|---" * (len(subjects) + 1) + "|"
    for name, values in shown.items():
        title, digits = _METRICS[name]
        numbers = (getattr(values, subject) for subject in subjects)
        cells = ("" if number is None else f"{number:.{digits}f}" for number in numbers)
        yield f"| {title} | " + " | ".join(cells) + " |"
    yield ""
    if (gain := evaluation.describe_gain()) is not None:
        yield f"{gain} The reconstruction is the autoencoder's, of the true frames: no prediction is better."
        yield ""
    yield from _protocol(protocol)
    if rounded:
        yield "- The weights were measured in fp32 and are rounded to fp16 here."


def _protocol(protocol: EvaluationProtocol) -> Iterator[str]:
    yield "Measured so (`evaluation.json` has everything):"
    yield ""
    yield (
        f"- {protocol.split} split: {protocol.clips} clips of {protocol.describe_recordings()}, {protocol.context} "
        f"frames given, {protocol.horizon} predicted, {protocol.samples} sample(s) per clip; {protocol.aggregation}."
    )
    yield f"- Protocol: {protocol.protocol or 'none of the literature'}."
    if isinstance(protocol.predictor, RunPredictor):
        yield f"- Sampler: {protocol.predictor.description}, {protocol.predictor.precision}."
    for name, definition in (("SSIM", protocol.ssim), ("Intervals", protocol.interval)):
        if definition is not None:
            yield f"- {name}: {definition}."
