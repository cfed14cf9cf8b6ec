"""Protocols of the literature: where an evaluation differs from one, whether it is exactly that one, and as text."""

import json
import textwrap
from collections.abc import Iterable
from typing import Any

from pipelines.config import PublishedProtocol, RiverConfig, find_protocol
from pipelines.config.literature import ALL_CLIPS, PITFALLS
from pipelines.errors import UserError
from pipelines.prediction.clips import open_windows
from stage1_autoencoder.videos.config import DatasetConfig
from stage1_autoencoder.videos.kth import PERSONS
from stage1_autoencoder.videos.source import VideoError
from stage1_autoencoder.videos.splits import assign_numbers

WIDTH = 120
NOT_STATED = "not stated"
_STARTS = {"first": "frame 0", "moving": "most moving", "srvp": "SRVP's draw", "mcvd": "random, not last",
           "extdm": "frame 0", "stdiff": "tiled, centered"}  # fmt: skip


def differences(config: RiverConfig, protocol: PublishedProtocol) -> dict[str, tuple[Any, Any]]:
    """Key -> its value, and that of the protocol, where they differ; of `dataset`, the whole path."""
    evaluation, dataset = config.evaluation.model_dump(), config.dataset.model_dump()
    pairs = {key: (evaluation[key], protocol.settings[key]) for key in evaluation if key in protocol.settings}
    for key, value in protocol.dataset.items():
        if key == "splits":
            pairs |= {f"dataset.splits.{split}": (_videos_of(config.dataset, split), value[split]) for split in value}
        else:
            pairs[f"dataset.{key}"] = dataset[key], value
    return {key: pair for key, pair in pairs.items() if not _are_equal(key, *pair)}


def _videos_of(dataset: DatasetConfig, split: str) -> Any:
    own = dataset.splits or (PERSONS if dataset.source == "kth" else {})
    return own.get(split)


def _are_equal(key: str, ours: Any, theirs: Any) -> bool:
    if ours == theirs or ours is None or not key.startswith("dataset.splits."):
        return ours == theirs
    try:  # 21-25 is 21,22,23-25
        numbers = [set(assign_numbers({"test": value}, "number", example="1-19")) for value in (ours, theirs)]
    except VideoError:
        return False
    return numbers[0] == numbers[1]


def describe_preset(config: RiverConfig, test_videos: int | None = None) -> str | None:
    """The protocol, and where the settings differ from it: `kth_10_30, with videos=64`; None without a protocol.

    Args:
        test_videos: number of videos of the split.
    """
    if config.evaluation.protocol is None:
        return None
    protocol = find_protocol(config.evaluation.protocol)
    changes = [f"{key}={ours}" for key, (ours, _) in differences(config, protocol).items()]
    if test_videos is not None and protocol.test_videos not in (None, test_videos):
        changes.append(f"{test_videos} instead of {protocol.test_videos} videos in the split")
    return protocol.name + (f", with {', '.join(changes)}" if changes else "")


def check_settings(config: RiverConfig) -> PublishedProtocol:
    """Refuse settings that are not exactly those of `evaluation.protocol`; no video is needed.

    Raises:
        UserError: names all that differs.
    """
    name = config.evaluation.protocol
    assert name is not None
    protocol = find_protocol(name)
    found = differences(config, protocol)
    _refuse(name, [f"{key} is {_show(ours)}, expected {_show(theirs)}" for key, (ours, theirs) in found.items()])
    return protocol


def check_protocol(config: RiverConfig) -> PublishedProtocol:
    """Refuse an evaluation that is not exactly `evaluation.protocol`, before anything is trained or predicted.

    Raises:
        UserError: names all that differs; no videos, or too short ones.
        VideoError: no videos.
    """
    protocol, name = check_settings(config), str(config.evaluation.protocol)
    wanted = config.evaluation.videos
    source, windows = open_windows(config, wanted)
    counts = {f"videos in split {config.evaluation.split}": (len(source.videos), protocol.test_videos),
              "clips in these videos": (len(windows), None if wanted == ALL_CLIPS else wanted)}  # fmt: skip
    _refuse(name, [f"{what}: {ours}, expected {n}" for what, (ours, n) in counts.items() if n not in (None, ours)])
    return protocol


def _refuse(name: str, wrong: list[str]) -> None:
    if wrong:
        raise UserError(
            f"--protocol {name}: {'; '.join(wrong)}: change this (other frames need an autoencoder and a flow of their "
            f"own: --set dataset.name=...), or measure with --set evaluation.protocol={name}, which reports the "
            "differences"
        )


def _show(value: Any) -> str:
    return json.dumps(value).strip('"')


def format_protocols(protocols: Iterable[PublishedProtocol]) -> str:
    """Protocols side by side, one a line of at most 120 characters."""
    rows = [("protocol", "c->p", "clips", "start", "samples", "FVD of clips", "context", "I3D", "source")]
    for protocol in protocols:
        settings = protocol.evaluation
        cells = {
            "videos": "all" if settings.videos == ALL_CLIPS else f"{settings.videos}",
            "window": _STARTS.get(settings.window, settings.window),
            "samples": f"{settings.samples}",
            "aggregation": protocol.aggregation,
            "fvd_context": "yes" if settings.fvd_context else "no",
        }
        cells |= {key: f"{cells[key]} (?)" for key in protocol.not_stated if key in cells}
        of = f"/{protocol.test_videos}" if protocol.test_videos else ""
        aggregation = "" if settings.samples == 1 else f" {cells['aggregation']}"
        rows.append((
            protocol.name, f"{settings.context}->{settings.horizon}", cells["videos"] + of, cells["window"],
            cells["samples"] + aggregation, protocol.fvd_sets, cells["fvd_context"], protocol.fvd_network,
            protocol.paper,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [
        "",
        *_paragraph(
            "c->p: frames given and predicted. clips: how many, of how many test videos. samples: per clip, and "
            "whether the best of them counts, per metric, or the mean. FVD of clips: predicted:real; context: whether "
            "with the given frames; I3D: PyTorch (i3d_torchscript.pt) or TF-Hub (i3d-kinetics-400). (?): not stated by "
            "the paper or its code; the value is this project's choice."
        ),
        "`river protocols NAME` shows one with the rows that it can be compared with; `river evaluate --protocol NAME` "
        "runs it.",
    ]
    return "\n".join(lines)


def format_protocol(protocol: PublishedProtocol) -> str:
    """All that is known of a protocol, at most 120 characters a line."""
    splits = protocol.dataset.get("splits", {})
    dataset = {key: value for key, value in protocol.dataset.items() if key != "splits"}
    data = [f"{key}: {_show(value)}" for key, value in dataset.items()]
    data += [f"splits.{split}: {_show(value)}" for split, value in splits.items()]
    data += [f"{protocol.test_videos} videos in the split"] if protocol.test_videos else []
    unknown = {key: f" ({NOT_STATED})" for key in protocol.not_stated}
    settings = [f"{key}: {_show(value)}{unknown.get(key, '')}" for key, value in protocol.settings.items()]
    facts = {
        "source": protocol.source,
        "data set": ", ".join(data),
        "evaluation": ", ".join(settings),
        "samples": f"{protocol.aggregation} of {protocol.evaluation.samples}{unknown.get('aggregation', '')}",
        "FVD": f"predicted:real clips {protocol.fvd_sets}; I3D: {protocol.fvd_network}",
    } | {name: PITFALLS[name] for name in protocol.evaluation.pitfalls}
    lines = [f"{protocol.name}: {protocol.title}", ""]
    for name, fact in facts.items():
        lines += _paragraph(fact, f"  {name:<18}")
    lines += ["", *_rows(protocol), *_listed("Pitfalls", protocol.pitfalls), *_differing(protocol)]
    return "\n".join(lines)


def format_published(protocol: PublishedProtocol) -> str:
    """For the end of an evaluation: the numbers to compare with, and what was done otherwise than in published code."""
    return "\n".join([*_rows(protocol), *_differing(protocol)])


def _differing(protocol: PublishedProtocol) -> list[str]:
    return _listed("Otherwise than in the published code", protocol.differs)


def _listed(heading: str, texts: Iterable[str]) -> list[str]:
    items = [line for text in texts for line in _paragraph(text, "  - ", "    ")]
    return ["", f"{heading}:", *items] if items else []


def _rows(protocol: PublishedProtocol) -> list[str]:
    """Published numbers that this protocol's may be compared with, and which of `evaluation.json` those are."""
    if not protocol.rows:
        return [f"No published numbers are known that {protocol.name} can be compared with."]
    metrics = ("fvd", "psnr", "ssim", "lpips")
    numbers = ["" if metric not in protocol.numbers else protocol.numbers[metric] for metric in metrics]
    rows = [("compare", *(metric.upper() for metric in metrics), "where"),
            ("evaluation.json", *numbers, "")]  # fmt: skip
    for row in protocol.rows:
        values = [getattr(row, metric) for metric in metrics]
        rows.append((row.method, *("" if value is None else str(value) for value in values), row.source))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    lines = []
    for row in rows:
        first = "  " + "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=False))
        lines += _paragraph(row[-1], first) if row[-1] else [first.rstrip()]
    return lines


def _paragraph(text: str, first: str = "", following: str | None = None) -> list[str]:
    rest = " " * len(first) if following is None else following
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
