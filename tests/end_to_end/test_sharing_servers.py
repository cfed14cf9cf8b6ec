"""Runs that travel by servers: S3, as moto's server speaks it, and the calls of the Hugging Face hub."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import latent_cache
from pipelines.predictor import VideoPredictor
from pipelines.sharing.released_run import write_released_run
from tests.file_server import serving
from tests.hub_server import TOKEN, HubServer, serve_hub

boto3 = pytest.importorskip("boto3")
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytest.importorskip("huggingface_hub")
pytestmark = [
    pytest.mark.long,
    # Of the libraries, when their connections are collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of the hub's client, by itself
]

SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture(scope="module")
def released(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_released_run(trained.runs, tmp_path_factory.mktemp("released") / "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a user without caches, keys and tokens."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "here"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The URL of a server that speaks S3."""
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            break
        except OSError:
            time.sleep(0.1)
    yield url
    server.terminate()
    server.wait(10)


@pytest.fixture
def s3(s3_server: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the server, with an empty bucket called `bucket`."""
    use_s3(monkeypatch, s3_server)
    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    yield client
    for name in objects(client):
        client.delete_object(Bucket="bucket", Key=name)
    client.delete_bucket(Bucket="bucket")


def use_s3(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


def objects(client: Any) -> dict[str, Any]:
    """Name -> time at which it was written."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
    return {found["Key"]: found["LastModified"] for page in pages for found in page.get("Contents", [])}


def contents(client: Any, prefix: str) -> dict[str, bytes]:
    return {
        name.removeprefix(prefix): client.get_object(Bucket="bucket", Key=name)["Body"].read()
        for name in objects(client)
        if name.startswith(prefix)
    }


def one_line(outcome: Any, code: int, *needed: str) -> None:
    outcome.refused(code, *needed)
    assert len(outcome.err.strip().splitlines()) == 1
    assert SECRET not in outcome.err + outcome.out
    assert TOKEN not in outcome.err + outcome.out


def test_a_run_and_its_store_travel_by_s3(s3, trained, released, here, story, command):
    command(["push", str(trained.runs), "s3://bucket/models/tiny", "--store"]).ok()
    there = contents(s3, "models/tiny/")
    store = {name: file for name, file in story.tree(trained.store).items() if not name.startswith(".")}
    assert {name: file for name, file in there.items() if "zarr" in name} == {
        f"latents/tiny.zarr/{name}": file for name, file in store.items()
    }
    expected = story.tree(released)
    assert {name: there[name] for name in expected if name != "release.json"} == {
        name: file for name, file in expected.items() if name != "release.json"
    }
    command(["pull", "s3://bucket/models/tiny", "--store"]).ok()
    assert story.tree(here / "runs" / "tiny") == {name: file for name, file in there.items() if "zarr" not in name}
    assert story.tree(here / "latents" / "tiny.zarr") == store
    # In its place, without pulling.
    remote = latent_cache.open("s3://bucket/models/tiny/latents/tiny.zarr", "train")
    assert (remote.latents[:] == latent_cache.open(trained.store, "train").latents[:]).all()
    before = objects(s3)
    command(["push", str(trained.runs), "s3://bucket/models/tiny", "--store"]).ok()
    assert objects(s3) == before  # nothing is sent again


def test_a_killed_upload_to_s3_resumes(s3, released, here, story, command):
    slow = (
        "import time, s3fs\n"
        "put = s3fs.S3FileSystem.put_file\n"
        "s3fs.S3FileSystem.put_file = lambda *a, **o: (put(*a, **o), time.sleep(0.5))\n"
        f"import sys; from pipelines.__main__ import main; sys.exit(main(['push', {str(released)!r}, 's3://bucket/tiny']))"
    )
    upload = subprocess.Popen([sys.executable, "-c", slow], cwd=story.REPOSITORY, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if len(objects(s3)) >= 3:
            break
        time.sleep(0.1)
    upload.kill()
    upload.wait()
    sent = objects(s3)
    assert 3 <= len(sent) < len(story.tree(released))
    assert "tiny/release.json" not in sent
    one_line(command(["pull", "s3://bucket/tiny"]), 2, "s3://bucket/tiny", "release.json")
    command(["push", str(released), "s3://bucket/tiny"]).ok()
    assert sent.items() <= objects(s3).items()
    assert contents(s3, "tiny/") == story.tree(released)


def test_what_is_wrong_on_s3_is_one_line(s3, released, here, command, monkeypatch):
    push = ["push", str(released)]
    one_line(command([*push, "s3://no-such-bucket/tiny"]), 1, "s3://no-such-bucket/tiny")
    command([*push, "s3://bucket/tiny"]).ok()
    one_line(command(["pull", "s3://bucket/tin"]), 2, "s3://bucket/tin", "release.json")
    one_line(command([*push, "s3://bucket"]), 2, "s3://bucket", "other files")
    name = next(name for name in objects(s3) if name.endswith(".safetensors"))
    size = s3.head_object(Bucket="bucket", Key=name)["ContentLength"]
    s3.put_object(Bucket="bucket", Key=name, Body=bytes(size))
    one_line(command(["pull", "s3://bucket/tiny"]), 2, name, "sha256")
    assert not (here / "runs" / "tiny").exists()
    command([*push, "s3://bucket/tiny"]).ok()  # mends it
    command(["pull", "s3://bucket/tiny"]).ok()
    use_s3(monkeypatch, f"http://127.0.0.1:{free_port()}")
    one_line(command([*push, "s3://bucket/tiny"]), 1, "s3://bucket/tiny")
    with serving(here) as server:
        (here / "bucket" / "tiny").mkdir(parents=True)
        (here / "bucket" / "tiny" / "release.json").touch()
        server.status = 403
        use_s3(monkeypatch, server.url)
        one_line(command(["pull", "s3://bucket/tiny"]), 1, "s3://bucket/tiny")


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """As HF_ENDPOINT does, which the client reads when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that the client of this process uses."""
    with serve_hub() as server:
        use_hub(monkeypatch, server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_run_travels_by_the_hub(hub, trained, released, here, story, command):
    command(["push", str(released), "hf://user/tiny"]).ok()
    repository = hub.repositories["user/tiny"]
    assert {name: file for name, file in repository.items() if name != ".gitattributes"} == story.tree(released)
    command(["pull", "hf://user/tiny"]).ok()
    assert story.tree(here / "runs" / "tiny") == story.tree(released)
    sent = len(hub.sent)
    half = write_released_run(trained.runs, here / "half", half=True)
    (half / "overview.gif").unlink()
    command(["push", str(half), "hf://user/tiny"]).ok()  # no longer as it was released: it is released again
    command(["push", str(released), "hf://user/tiny"]).ok()
    assert len(set(hub.sent[sent:])) == len(hub.sent[sent:])
    command(["push", str(trained.runs), "hf://user/tiny", "--store"]).ok()
    command(["pull", "hf://user/tiny", "with_store", "--store"]).ok()
    command(["inspect", "--verify", "--config", "with_store/config.yaml"]).ok()


def test_a_killed_upload_to_the_hub_resumes(hub, released, here, story, command):
    hub.waits_at = 2
    code = f"import sys; from pipelines.__main__ import main; sys.exit(main(['push', {str(released)!r}, 'hf://user/tiny']))"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    upload = subprocess.Popen([sys.executable, "-c", code], cwd=story.REPOSITORY, env=environment)
    assert hub.waiting.wait(60)
    for _ in range(100):
        if hub.large:
            break
        time.sleep(0.1)
    upload.kill()
    upload.wait()
    assert set(hub.repositories["user/tiny"]) == {".gitattributes"}
    one_line(command(["pull", "hf://user/tiny"]), 2, "hf://user/tiny", "release.json")
    hub.waits_at, kept = 0, set(hub.large)
    assert kept
    hub.sent.clear()
    command(["push", str(released), "hf://user/tiny"]).ok()
    assert not kept & set(hub.sent)
    command(["pull", "hf://user/tiny"]).ok()
    assert story.tree(here / "runs" / "tiny") == story.tree(released)


def test_a_predictor_comes_from_the_hub_and_then_from_the_cache(hub, trained, released, here, command, monkeypatch):
    command(["push", str(released), "hf://user/tiny"]).ok()
    images = torch.zeros(1, 2, 3, 32, 32)
    expected = VideoPredictor.from_run(trained.runs, "cpu").generate_frames(images, 1)
    predictor = VideoPredictor.from_pretrained("hf://user/tiny", device="cpu", cache=here / "cache")
    assert torch.equal(predictor.generate_frames(images, 1), expected)
    copies = list((here / "cache").glob("*/*/release.json"))
    assert len(copies) == 1
    use_hub(monkeypatch, f"http://127.0.0.1:{free_port()}")
    predictor = VideoPredictor.from_pretrained("hf://user/tiny", device="cpu", cache=here / "cache")
    assert torch.equal(predictor.generate_frames(images, 1), expected)
    with pytest.raises(OSError, match="hf://user/other"):
        VideoPredictor.from_pretrained("hf://user/other", device="cpu", cache=here / "cache")


def test_what_is_wrong_on_the_hub_is_one_line(hub, released, here, command, monkeypatch):
    push = ["push", str(released), "hf://user/tiny"]
    one_line(command(["pull", "hf://user/tiny"]), 2, "hf://user/tiny")
    hub.repositories["user/tiny"] = {"thesis.tex": b"years of work"}
    one_line(command(push), 2, "thesis.tex")
    assert hub.repositories["user/tiny"] == {"thesis.tex": b"years of work"}
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    one_line(command(["push", str(released), "hf://user/new"]), 1, "hf://user/new")
    use_hub(monkeypatch, f"http://127.0.0.1:{free_port()}")
    one_line(command(push), 1, "hf://user/tiny")
    one_line(command(["pull", "hf://user/tiny"]), 1, "hf://user/tiny")
