"""A store behind a URL is read like a local one; errors of the network name the URL."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from zarr.core.sync import sync

import latent_cache
from latent_cache import CorruptStoreError, IncompleteStoreError, StoreError
from latent_cache.reading import remote
from tests.file_server import FileServer, Handler, serving


@pytest.fixture
def site(tmp_path: Path) -> Iterator[FileServer]:
    """A web server that lists no folder and knows no ranges."""
    with serving(tmp_path / "site") as server:
        server.ranges = False
        yield server
    remote.close_connections()


@pytest.fixture
def web_store(site: FileServer, toys: Path) -> str:
    (site.folder / "toys.zarr").symlink_to(toys)
    return f"{site.url}/toys.zarr"


@pytest.fixture(params=["http", "memory"])
def published(request: pytest.FixtureRequest, toys: Path) -> tuple[Path, str]:
    """A local store, and the URL of its copy."""
    if request.param == "memory":
        return toys, request.getfixturevalue("publish")(toys)
    return toys, request.getfixturevalue("web_store")


@pytest.mark.parametrize("slash", ["", "/"])
def test_everything_is_read_as_from_a_folder(published, slash: str) -> None:
    path, url = published
    url += slash
    assert latent_cache.splits(url) == ["train", "test"]
    assert latent_cache.is_complete(url)
    assert latent_cache.open_metadata(url) == latent_cache.open_metadata(path)
    assert latent_cache.open_notes(url) == latent_cache.open_notes(path)
    for split in ("train", "test"):
        there, here = latent_cache.open(url, split), latent_cache.open(path, split)
        assert torch.equal(there.load(), here.load())
        assert list(there.video_ids) == list(here.video_ids)
        np.testing.assert_array_equal(there.offsets, here.offsets)
        assert there.fingerprint == here.fingerprint
        assert there.fingerprints == here.fingerprints
        name = here.video_ids[0]
        np.testing.assert_array_equal(there.video(name), here.video(name))
        np.testing.assert_array_equal(there.video_codes(name), here.video_codes(name))
        assert not list(there.index_damages())
        assert set(there.latent_reader.damages()) == set(there.code_reader.damages()) == {None}


@pytest.mark.parametrize("residency", ["device", "stream"])
def test_sampling(published, residency: str) -> None:
    path, url = published
    batches = []
    for place in (url, path):
        cache = latent_cache.open(place)
        sampler = latent_cache.open_sampler(cache, "cpu", 0, 4, 5, residency=residency, memory_budget=10**6)
        batches.append([sampler.batch(step) for step in range(3)])
        sampler.close()
    for ours, theirs in zip(*batches, strict=True):
        for name in ("target", "reference", "condition", "distance"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_no_folder_is_listed(kit, site: FileServer, tmp_path: Path) -> None:
    (site.folder / "toys.zarr").symlink_to(kit.build(tmp_path / "toys.zarr", codes=False))
    url = f"{site.url}/toys.zarr"
    cache = latent_cache.open(url, latent_cache.splits(url)[1])
    cache.load()
    assert cache.codes is None
    assert site.asked
    assert not [path for path in site.asked if path.endswith("/") or path.endswith((".zarr", "/train", "/test"))]


def test_no_store_there(published) -> None:
    _, url = published
    for place in (url.replace("toys", "toy"), url.replace("/toys.zarr", "")):
        with pytest.raises(StoreError, match=f"{place}: .*Zarr v3 group"):
            latent_cache.open(place)
    with pytest.raises(StoreError, match=f"{url}/train: .*format is None"):
        latent_cache.open(f"{url}/train")


def test_incomplete(kit, site: FileServer, tmp_path: Path) -> None:
    (site.folder / "half.zarr").symlink_to(kit.build(tmp_path / "half.zarr", stop_after=2))
    url = f"{site.url}/half.zarr"
    assert not latent_cache.is_complete(url)
    with pytest.raises(IncompleteStoreError, match=url):
        latent_cache.open(url)
    with pytest.raises(StoreError, match=f"{url}.*local path"):
        latent_cache.open_progress(url)


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/toys.zarr"
    for read in (latent_cache.open, latent_cache.splits, latent_cache.is_complete):
        with pytest.raises(StoreError, match=rf"{url}/zarr.json .*check the URL"):
            read(url)
    remote.close_connections()


def hang_up(handler: Handler) -> None:
    """Promise more than is sent."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"x" * 10)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda handler: handler.send_error(500), "500"),
        (lambda handler: handler.send_error(403), "403"),
        (hang_up, "payload|196|1000"),
    ],
    ids=["500", "403", "hang up"],
)
@pytest.mark.parametrize("where", ["zarr.json", "latents/zarr.json", "video_offset/c/0", "latents/c/1"])
def test_a_server_that_fails(site: FileServer, web_store: str, fault: Callable, reason: str, where: str) -> None:
    site.faults[where] = fault

    def read() -> None:
        cache = latent_cache.open(web_store)
        cache.load()

    with pytest.raises(StoreError, match=rf"{web_store}/.*({reason})"):
        read()
    site.faults.clear()
    remote.close_connections()  # they are opened again
    read()  # and nothing of the failure stays


def test_a_chunk_that_fails_while_it_is_read(site: FileServer, web_store: str) -> None:
    cache = latent_cache.open(web_store)
    site.faults["latents/c/1"] = lambda handler: handler.send_error(503)
    for read in (lambda: cache.video("clip-01"), lambda: list(cache.latent_reader.damages())):
        with pytest.raises(StoreError, match=rf"{web_store}/train/latents/c/1/0/0/0 .*503") as caught:
            read()
        assert not isinstance(caught.value, CorruptStoreError)  # the store may well be sound


def test_an_examination_that_is_given_up(site: FileServer, web_store: str) -> None:
    """Garbage is collected by any thread, also by the one that does the reading for all others."""
    cache = latent_cache.open(web_store)
    started = threading.Event()

    def slow(handler: Handler) -> None:
        started.set()
        time.sleep(0.3)
        handler.send_error(503)

    site.faults["latents/c/1"] = site.faults["latents/c/2"] = site.faults["latents/c/3"] = slow
    damages = cache.latent_reader.damages()
    assert next(damages) is None
    started.wait(10)

    async def close() -> None:
        damages.close()

    sync(close(), timeout=20)


def test_a_server_that_does_not_tell_sizes(site: FileServer, web_store: str, kit) -> None:
    def without_length(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write((site.folder / handler.path[1:]).read_bytes())

    site.faults["/c/"] = without_length
    expected = kit.expected(kit.plan([3, 7, 2, 1, 9])).astype(np.float16)
    np.testing.assert_array_equal(latent_cache.open(web_store).load().numpy(), expected)


@pytest.mark.parametrize("ranges", [False, True])
def test_shards(site: FileServer, kit, shards, tmp_path: Path, ranges: bool) -> None:
    """Parts of files, also from a server that always sends the whole file."""
    path = kit.build(tmp_path / "toys.zarr", shards)
    (site.folder / "toys.zarr").symlink_to(path)
    site.ranges = ranges
    cache = latent_cache.open(f"{site.url}/toys.zarr")
    expected = kit.expected(shards["train"]).astype(np.float16)
    np.testing.assert_array_equal(cache.load().numpy(), expected)
    np.testing.assert_array_equal(cache.video("clip-04"), expected[13:22])
    (path / "train/latents/c/2/0/0/0").unlink()
    found = [str(damage) for damage in cache.latent_reader.damages() if damage is not None]
    assert len(found) == 3  # the chunks of the file
    assert all(f"{cache.url}/train/latents/c/2/0/0/0 is missing" in text for text in found)


def test_connections_are_closed_at_the_end_of_the_process(web_store: str, monkeypatch) -> None:
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")  # which keeps them open
    code = f"""
import atexit
sessions = []
atexit.register(lambda: print([session.closed for session in sessions]))  # called last, as it is registered first
import latent_cache
cache = latent_cache.open({web_store!r})
cache.load()
sessions.append(cache.latents.store._store.fs._session)
"""
    done = subprocess.run([sys.executable, "-X", "dev", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[True]"), done.stderr
    for text in ("nclosed", "Traceback", "never awaited"):
        assert text not in done.stderr, done.stderr
