"""What a user can get wrong before anything is built: exit code 2, one message, nothing written."""

from pathlib import Path

import pytest


@pytest.mark.parametrize(("override", "needed"), [
    ("flow.training.stesp=3", ["flow.training.stesp", "unknown key", 'did you mean "steps"?']),
    ("flow.training.steps=-1", ["flow.training.steps", "-1"]),
    ("flow.training.precision=fp8", ["flow.training.precision", "'fp8'", "'auto', 'fp32', 'tf32' or 'bf16'"]),
    ("dataset.source=youtube", ["dataset.source", "'youtube'", "'shapes', 'videos', 'kth', 'bair'", "'hdf5'"]),
    ("dataset.splits={train: many}", ["splits.train", "'many'"]),
    ("dataset.shapes.radius=40", ["dataset.shapes", "radius 40"]),
    ("sampling.past_horizon=1", ["sampling.past_horizon", "1"]),
    ("flow.training.steps", ["--set flow.training.steps: expected key.path=value"]),
    ("seed.deep=3", ["seed", "{'deep': 3}", "valid integer"]),
])  # fmt: skip
def test_wrong_settings(place, override: str, needed: list[str]) -> None:
    place.run("demo", sets=[override]).refused(2, *needed)
    assert sorted(path.name for path in place.folder.iterdir()) == ["tiny.yaml"]


def test_wrong_value_in_the_file_names_the_file(place) -> None:
    place.run("demo", "--dry-run")
    config = place.folder / "tiny.yaml"
    config.write_text(config.read_text().replace("batch_size: 4", "batch_sise: 4"))
    place.run("demo").refused(2, str(config), "autoencoder.training.batch_sise", 'did you mean "batch_size"?')


@pytest.mark.parametrize(("content", "needed"), [
    (None, "no such config file"), ("a: [1", "not a YAML file"), ("- 1", "expected sections"), ("seed: 1", "dataset"),
    ("base: missing.yaml", "missing.yaml: no such config file"), ("base: x.yaml", "`base`"),
])  # fmt: skip
def test_wrong_config_file(command, tmp_path: Path, content: str | None, needed: str) -> None:
    config = tmp_path / "x.yaml"
    if content is not None:
        config.write_text(content)
    command(["train-flow", "--config", str(config)]).refused(2, needed)


@pytest.mark.parametrize(("words", "needed"), [
    (["trian-flow"], "invalid choice: 'trian-flow'"),
    ([], "train-flow"),
    (["demo", "--fast"], "unrecognized arguments: --fast"),
    (["sample", "--videos", "0"], "'0'"),
    (["predict"], "required: video"),
])  # fmt: skip
def test_wrong_words(command, words: list[str], needed: str) -> None:
    command(words).refused(2, needed)


@pytest.mark.parametrize(("device", "needed"), [
    ("cuda:99", "CUDA devices; use --device cpu"), ("gpu", "allowed are auto, cpu, cuda"),
])  # fmt: skip
def test_device_that_is_not_there(place, command, device: str, needed: str) -> None:
    words = place.arguments("demo")
    words[words.index("--device") + 1] = device
    command(words).refused(2, f"--device {device}", needed)


def test_cuda_on_a_machine_without(place, command, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    words = place.arguments("demo")
    words[words.index("--device") + 1] = "cuda"
    command(words).refused(2, "--device cuda: this machine has 0 CUDA devices; use --device cpu")
