"""Devices, skipped videos, and what a run folder records."""

import argparse
import json
import re
import time

import pytest
import torch

from pipelines.config import load_config, model_sizes, parse_config, parse_size, result_settings
from pipelines.errors import UserError
from pipelines.runtime import context
from pipelines.runtime.arguments import add_common_options
from pipelines.runtime.checkpoints import CheckpointFolder
from pipelines.runtime.context import RunContext, fastest_threads, resolve_device
from pipelines.runtime.run_folder import read_run_config, trained_settings, write_run_files


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=r"--device toaster: allowed are auto, cpu, cuda, cuda:<number>"):
        resolve_device("toaster")
    with pytest.raises(UserError, match=r"--device cuda:99: this machine has \d+ CUDA devices; use --device cpu"):
        resolve_device("cuda:99")


@pytest.mark.parametrize("delays", [(0.004, 0.001, 0.002), (0.001, 0.004, 0.004), (0.001, 0.001, 0.001)])
def test_the_fastest_number_of_threads_is_found_and_the_one_before_restored(monkeypatch, delays):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(context, "THREADS_MEASURED", 0.02)
    before, sizes = torch.get_num_threads(), set()

    def work(size: int) -> None:
        sizes.add(size)
        time.sleep(delays[(1, 2, 4).index(torch.get_num_threads())])

    assert delays[(1, 2, 4).index(fastest_threads(work, 3))] == min(delays)
    assert (torch.get_num_threads(), sizes) == (before, {1, 3})


def test_what_takes_long_gets_all_cores_without_a_measurement(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(3))
    monkeypatch.setattr(context, "THREADS_MEASURED", 0.001)
    calls = []
    assert fastest_threads(lambda size: calls.append(time.sleep(0.002)), 8) == 3
    assert len(calls) == 2


def test_the_user_decides_how_many_threads_compute(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    parser = argparse.ArgumentParser()
    add_common_options(parser)
    assert RunContext.from_options(parser.parse_args(["--threads", "3", "--device", "cpu"])).threads == 3
    assert RunContext.from_options(parser.parse_args(["--device", "cpu"])).threads is None
    assert set_to == [3]


def test_a_skipped_video_is_noted_and_said_once(capsys):
    run_context = RunContext(device=torch.device("cpu"))
    run_context.skip("a", "torn")
    run_context.skip("a", "torn again")
    run_context.skip("b", "empty")
    assert run_context.skipped == {"a": "torn", "b": "empty"}
    assert capsys.readouterr().out.splitlines() == ["skipped video a: torn", "skipped video b: empty"]


def test_strict_sessions_skip_nothing():
    with pytest.raises(UserError, match=r"video a: torn .--strict: nothing is skipped"):
        RunContext(device=torch.device("cpu"), strict=True).skip("a", "torn")


def test_prerequisites_are_neither_replaced_nor_forgotten():
    run_context = RunContext(device=torch.device("cpu"), overwrite=True, restart=True, strict=True)
    before = run_context.for_prerequisites()
    assert (before.overwrite, before.restart, before.strict) == (False, False, True)
    assert before.skipped is run_context.skipped


def config(tmp_path, **sections):
    return parse_config(
        {"dataset": {"name": "toy", "source": "shapes"}, "paths": {"runs": str(tmp_path / "runs")}, **sections}, "test"
    )


def test_a_run_keeps_its_resolved_configuration_and_environment(tmp_path):
    settings = config(tmp_path, seed=4)
    write_run_files(settings, torch.device("cpu"))
    assert load_config(tmp_path / "runs" / "toy" / "config.yaml") == settings
    path = tmp_path / "runs" / "toy" / "config.yaml"
    assert read_run_config(path) == settings
    changed = path.read_text().replace("seed: 4", "seed: 5")
    path.write_text(changed)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_run_config(path)
    path.write_text("".join(changed.splitlines(keepends=True)[:-1]))
    assert read_run_config(path).seed == 5
    environment = json.loads((tmp_path / "runs" / "toy" / "environment.json").read_text())
    assert environment["software"]["torch"] == torch.__version__
    assert {"python", "zarr", "numpy"} <= environment["software"].keys()


def test_a_damaged_configuration_of_a_run_is_told(tmp_path, capsys):
    settings, recorded = config(tmp_path, seed=4), {"flow": {}, "seed": 4}
    CheckpointFolder(settings.training_folder("flow") / "checkpoints").save(1, {}, {"settings": recorded})
    assert trained_settings(settings) == recorded
    write_run_files(settings, torch.device("cpu"))
    assert trained_settings(settings).keys() == {*recorded, "dataset", "cache"}
    assert capsys.readouterr().err == ""
    path = tmp_path / "runs" / "toy" / "config.yaml"
    path.write_text(path.read_text().replace("seed: 4", "seed: 5"))
    assert trained_settings(settings) == recorded
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("training", "changes"),
    [
        ({"steps": 5, "checkpoint_every": 3, "keep_checkpoints": 9, "validate_every": 4, "compile": True}, False),
        ({"compile": False, "best_by": "last", "max_bad_steps": 3, "validation_pairs": 7}, False),
        ({"validation_samples": 0}, False),
        ({"learning_rate": 0.5}, True),
        ({"batch_size": 3}, True),
    ],
)
def test_the_settings_that_a_result_depends_on(tmp_path, training, changes):
    plain, other = (result_settings(config(tmp_path, flow={"training": values}).flow) for values in ({}, training))
    assert (plain != other) == changes


def test_dropout_is_no_size(tmp_path):
    model = config(tmp_path).flow.model
    assert model_sizes(model) == model_sizes(model.model_copy(update={"dropout": 0.5}))
    assert model_sizes(model) != model_sizes(model.model_copy(update={"qk_norm": True}))


@pytest.mark.parametrize(
    ("text", "size"),
    [("4 GiB", 4 * 2**30), ("512MB", 512 * 10**6), ("1000", 1000), (" 1.5 kib ", 1536), ("3 b", 3)],
)
def test_sizes_of_memory(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "4 GB please", "-3 MB", "4 XB", "1e9"])
def test_texts_that_are_no_size(text):
    with pytest.raises(UserError, match=re.escape(repr(text)) + ".*4 GiB"):
        parse_size(text)
