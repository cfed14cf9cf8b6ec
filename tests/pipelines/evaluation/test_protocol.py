"""Protocols of the literature: what a preset sets, and what a result says about it."""

import pytest

from pipelines.config import PROTOCOLS, EvaluationConfig, RiverConfig, load_config, parse_config
from pipelines.errors import UserError
from pipelines.evaluation.protocol import describe_preset


def config(dataset: dict | None = None, **evaluation) -> RiverConfig:
    data = {"name": "toy", "source": "kth", "image_size": 64, "splits": {"test": "21-25"}} | (dataset or {})
    return parse_config({"dataset": data, "evaluation": evaluation}, "test")


def test_a_preset_sets_what_is_not_set():
    evaluation = EvaluationConfig(protocol="kth_10_40", videos=64)
    assert (evaluation.context, evaluation.horizon, evaluation.window, evaluation.videos) == (10, 40, "random", 64)
    assert evaluation.fvd_frames is None
    assert EvaluationConfig().fvd_frames == 16
    for name, preset in PROTOCOLS.items():
        evaluation = EvaluationConfig(protocol=name)
        assert (evaluation.context, evaluation.horizon) == tuple(int(n) for n in name.split("_")[1:])
        # Every preset is a whole protocol, and its values last through a run's config.yaml.
        assert preset.keys() >= {"split", "videos", "samples", "window", "fvd_context", "fvd_frames"}
        assert EvaluationConfig.model_validate(evaluation.model_dump()) == evaluation


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
    ],
)
def test_the_result_says_where_it_differs_from_the_preset(dataset, evaluation, expected):
    assert describe_preset(config(dataset, **evaluation)) == expected


@pytest.mark.parametrize(
    ("name", "preset"),
    [("kth", "kth_10_30"), ("bair_64", "bair_1_15"), ("bair_256", "bair_1_15"), ("clevrer", "clevrer_2_14"),
     ("kth_small", None), ("shapes", None), ("videos", None)],
)  # fmt: skip
def test_the_papers_configurations_follow_the_literature_and_the_others_claim_nothing(repository, name, preset):
    assert describe_preset(load_config(repository / "configs" / f"{name}.yaml")) == preset


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [("protocol", "kth_10_20", "kth_10_30"), ("samples", 0, "0"), ("fvd_frames", 9, "10"), ("resamples", -1, "0")],
)
def test_impossible_settings_are_refused_by_name(key, value, allowed):
    with pytest.raises(UserError, match=rf"evaluation\.{key}: .*{allowed}"):
        config(**{key: value})
