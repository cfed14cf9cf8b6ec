"""Protocols of the literature: the files, what one sets, what a result says about it, and what strictness refuses."""

from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.config import EvaluationConfig, RiverConfig, find_protocol, load_config, parse_config, protocol_files
from pipelines.errors import UserError
from pipelines.evaluation.published import check_protocol, describe_preset, format_protocol, format_protocols

_FVD = {"split": "test", "fvd_context": True, "fvd_frames": None}
_KTH = {"context": 10, "videos": 1000, "samples": 1, "window": "random", "seed": 0} | _FVD
_FIRST = {"videos": 256, "samples": 1, "window": "first"} | _FVD


def config(dataset: dict | None = None, **evaluation) -> RiverConfig:
    data = {"name": "toy", "source": "kth", "image_size": 64, "splits": {"test": "21-25"}} | (dataset or {})
    return parse_config({"dataset": data, "evaluation": evaluation}, "test")


def test_a_preset_sets_what_is_not_set():
    evaluation = EvaluationConfig(protocol="kth_10_40", videos=64)
    assert (evaluation.context, evaluation.horizon, evaluation.window, evaluation.videos) == (10, 40, "random", 64)
    assert evaluation.fvd_frames is None
    assert EvaluationConfig().fvd_frames == 16


@pytest.mark.parametrize(
    ("name", "settings"),
    [("kth_10_30", _KTH | {"horizon": 30}), ("kth_10_40", _KTH | {"horizon": 40}),
     ("bair_1_15", _FIRST | {"context": 1, "horizon": 15}), ("clevrer_2_14", _FIRST | {"context": 2, "horizon": 14})],
)  # fmt: skip
def test_the_presets_protocols_keep_their_meaning(name, settings):
    assert find_protocol(name).settings == settings


@pytest.mark.parametrize("name", protocol_files())
def test_a_shipped_protocol_is_whole_and_has_a_source(name):
    protocol = find_protocol(name)
    evaluation = EvaluationConfig(protocol=name)
    assert (evaluation.context, evaluation.horizon) == tuple(int(n) for n in name.split("_")[-2:])
    # Its values last through a run's config.yaml.
    assert EvaluationConfig.model_validate(evaluation.model_dump()) == evaluation
    assert protocol.source
    assert protocol.pitfalls or protocol.differs
    assert all(row.source for row in protocol.rows)
    known = {"psnr", "ssim", "lpips", "fvd", *evaluation.pitfalls}
    assert {number.removesuffix(" best") for number in protocol.numbers.values()} <= known
    published = {metric for row in protocol.rows for metric in ("psnr", "ssim", "fvd") if getattr(row, metric)}
    assert published <= protocol.numbers.keys()  # each number of a paper has one to compare with
    assert not any(" best" in number for number in protocol.numbers.values()) or protocol.aggregation == "best"
    text = format_protocol(protocol)
    assert max(map(len, text.splitlines())) <= 120
    assert all(name in text for name in evaluation.pitfalls)


def test_the_protocols_side_by_side():
    files = protocol_files()
    assert {*files} >= {"kth_srvp_10_30", "kth_mcvd_10_30", "kth_mcvd_10_40", "kth_extdm_10_40", "kth_stdiff_10_20",
                        "kth_nsde_4_36", "kth_river_10_30", "bair_mcvd_1_15", "bair_videogpt_1_15",
                        "bair_srvp_2_28"}  # fmt: skip
    lines = format_protocols(map(find_protocol, files)).splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[1 : len(files) + 1]] == sorted(files)


@pytest.mark.parametrize(
    ("dataset", "evaluation", "expected"),
    [
        ({}, {}, None),
        ({}, {"protocol": "kth_10_30"}, "kth_10_30"),
        ({}, {"protocol": "kth_10_30", "videos": 1000}, "kth_10_30"),  # set, to the same value
        ({}, {"protocol": "kth_10_30", "videos": 64, "horizon": 20}, "kth_10_30, with horizon=20, videos=64"),
        (
            {"image_size": 128, "fit": "pad", "splits": {"test": "17-25"}},
            {"protocol": "kth_10_30"},
            "kth_10_30, with dataset.image_size=128, dataset.fit=pad, dataset.splits.test=17-25",
        ),
        ({"splits": {"test": "21,22, 23-25"}}, {"protocol": "kth_10_30"}, "kth_10_30"),  # the same persons
        ({"splits": {}}, {"protocol": "kth_10_30"}, "kth_10_30"),  # KTH's own
        ({"fit": "stretch"}, {"protocol": "kth_srvp_10_30"}, "kth_srvp_10_30"),
    ],
)
def test_the_result_says_where_it_differs_from_the_preset(dataset, evaluation, expected):
    assert describe_preset(config(dataset, **evaluation)) == expected


def test_the_result_says_that_other_videos_were_measured():
    ours = config({"fit": "stretch"}, protocol="kth_mcvd_10_30")
    assert describe_preset(ours, 120) == "kth_mcvd_10_30"
    assert {"60", "120"} <= {*describe_preset(ours, 60).split()}


@pytest.mark.parametrize(
    ("name", "preset"),
    [("kth", "kth_10_30"), ("bair_64", "bair_1_15"), ("bair_256", "bair_1_15"), ("clevrer", "clevrer_2_14"),
     ("kth_small", None), ("shapes", None), ("videos", None)],
)  # fmt: skip
def test_the_papers_configurations_follow_the_literature_and_the_others_claim_nothing(repository, name, preset):
    assert describe_preset(load_config(repository / "configs" / f"{name}.yaml")) == preset


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [("protocol", "kth_10_20", "kth_10_30"), ("samples", 0, "0"), ("fvd_frames", 9, "10"), ("resamples", -1, "0"),
     ("pitfalls", ["psnr"], "psnr_of_mean_mse"), ("window", "last", "srvp")],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(key, value, allowed):
    with pytest.raises(UserError, match=rf"evaluation\.{key}.*{allowed}"):
        config(**{key: value})


MINE = """\
title: four videos of shapes
paper: me
source: my own
dataset: {source: shapes, image_size: 32, fit: crop, fps: null, frame_step: 1, splits: {test: 4}}
test_videos: 4
evaluation: {split: test, context: 2, horizon: 6, videos: 4, samples: 1, window: first, fvd_context: true,
             fvd_frames: null, pitfalls: [psnr_of_mean_mse]}
aggregation: mean
fvd_sets: "4:4"
fvd_network: PyTorch
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a protocol that somebody added in ./configs/protocols."""
    (tmp_path / "configs" / "protocols").mkdir(parents=True)
    (tmp_path / "configs" / "protocols" / "mine.yaml").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return "mine"


def shapes(dataset: dict | None = None, **evaluation) -> RiverConfig:
    data = {"name": "toy", "source": "shapes", "image_size": 32, "splits": {"test": 4}} | (dataset or {})
    return parse_config({"dataset": data, "evaluation": {"protocol": "mine"} | evaluation}, "test")


def test_a_protocol_that_somebody_added_is_found_by_name_and_path(mine, tmp_path, monkeypatch):
    assert list(protocol_files())[-1] == mine
    assert check_protocol(shapes()).title == "four videos of shapes"
    assert shapes().evaluation.pitfalls == ("psnr_of_mean_mse",)
    by_path = shapes(protocol="configs/protocols/mine.yaml")
    monkeypatch.chdir("/")  # a run's config.yaml is read in any folder
    assert describe_preset(parse_config(by_path.model_dump(mode="json"), "again")) == mine
    assert check_protocol(by_path).name == mine


@pytest.mark.parametrize(
    ("dataset", "evaluation", "needed"),
    [
        ({"image_size": 64}, {}, ["dataset.image_size", "64", "32"]),
        ({"fit": "stretch"}, {}, ["dataset.fit", "stretch", "crop"]),
        ({"frame_step": 2}, {}, ["dataset.frame_step", "2", "1"]),
        ({"source": "videos", "fps": 12, "splits": {"test": 0.5}}, {}, ["dataset.source", "dataset.fps", "12", "null"]),
        ({"splits": {"test": 3}}, {}, ["dataset.splits.test", "3", "4"]),
        ({}, {"videos": 3}, ["videos is 3", "4"]),
        ({}, {"context": 3, "horizon": 5, "samples": 2}, ["context", "horizon", "samples"]),
        ({}, {"window": "random", "fvd_context": False}, ["window", "fvd_context", "false", "true"]),
        ({}, {"pitfalls": []}, ["pitfalls"]),
    ],
)
def test_a_strict_run_refuses_what_differs(mine, dataset, evaluation, needed):
    with pytest.raises(UserError) as refused:
        check_protocol(shapes(dataset, **evaluation))
    for text in (*needed, "evaluation.protocol=mine"):
        assert text in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("test_videos: 4", "test_videos: 5", "split test: 4, expected 5"),
        ("videos: 4, s", "videos: 6, s", "4, expected 6"),
    ],
)
def test_a_strict_run_refuses_other_numbers_of_videos_and_clips(mine, line, other, message):
    Path("configs/protocols/mine.yaml").write_text(MINE.replace(line, other))
    with pytest.raises(UserError, match=message):
        check_protocol(shapes())


@pytest.mark.parametrize("persons", ["17-25", "21-24"])
def test_a_strict_run_refuses_other_persons(persons):
    ours = config({"fit": "stretch", "splits": {"test": persons}}, protocol="kth_srvp_10_30")
    with pytest.raises(UserError, match=rf"dataset\.splits\.test is {persons}, expected 21-25"):
        check_protocol(ours)


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        (("window: first", "window: middle"), ["evaluation.window", "first"]),
        (("split: test, ", ""), ["evaluation", "split"]),
        (("source: my own\n", ""), ["source"]),
        (("fps: null", "rate: null"), ["dataset", "rate", "fps"]),
        (("splits: {test: 4}", "splits: 4"), ["dataset", "splits"]),
        (("title:", "base: mine\ntitle:"), ["base"]),
        (("paper: me", "paper: me\nauthor: me"), ["author"]),
        ((MINE, "- 1"), ["title"]),
    ],
)
def test_a_damaged_protocol_is_one_line(mine, change, needed):
    Path("configs/protocols/mine.yaml").write_text(MINE.replace(*change))
    with pytest.raises(UserError) as refused:
        find_protocol(mine)
    for text in ("mine.yaml", *needed):
        assert text in str(refused.value)


def test_a_protocol_over_another(mine):
    Path("configs/protocols/mine_long.yaml").write_text("base: mine\ntitle: long\nevaluation: {horizon: 9}\n")
    long, short = find_protocol("mine_long"), find_protocol(mine)
    assert long.settings == short.settings | {"horizon": 9}
    assert (long.title, long.source, long.name) == ("long", "my own", "mine_long")


def test_a_dry_run_refuses_the_same_settings(capsys):
    assert main(["evaluate", "--config", "kth", "--protocol", "kth_mcvd_10_30", "--dry-run", "--device", "cpu"]) == 2
    refusal = capsys.readouterr().err
    assert "dataset.fit is crop, expected stretch" in refusal
    assert "\n" not in refusal.strip()
