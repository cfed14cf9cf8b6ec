"""Finding, fetching, refusing and calling the video network: a small one, and a server on this machine."""

import hashlib
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipelines.data import fetch as fetch_module
from pipelines.data.fetch import FetchError
from pipelines.errors import UserError
from pipelines.evaluation import video_network
from pipelines.evaluation.video_network import I3D_FILE, VideoNetwork, find_video_network

CPU, SETTING, SPOILT = torch.device("cpu"), "evaluation.video_network", "nothing is comparable"


class Standing(nn.Module):
    """Stands for the I3D: means over halves of the clip, in 6 features; another call than the I3D's gives zeros."""

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        if rescale or not resize or not return_features:
            video = video * 0
        half = video.shape[2] // 2
        return torch.cat([video[:, :, :half].mean((2, 3, 4)), video[:, :, half:].mean((2, 3, 4))], 1)


class Short(nn.Module):
    """Wants longer clips, as the I3D does."""

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        assert video.shape[2] >= 10, "too few frames"
        return video.mean((2, 3, 4))


class Maps(nn.Module):
    """Answers maps, not vectors."""

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        return video


class Image(nn.Module):
    """Called as no video network is."""

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3, 4))


@pytest.fixture
def scripted(tmp_path) -> Callable[[nn.Module], Path]:
    def save(network: nn.Module) -> Path:
        path = tmp_path / f"{type(network).__name__}.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(network).save(path)
        return path

    return save


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    """torch's folder of downloads, empty; and nothing is asked of the real server."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(video_network, "I3D_URL", "http://127.0.0.1:9/nobody")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def usual(scripted, monkeypatch) -> bytes:
    """The content of the public file, if that were a small network."""
    content = scripted(Standing()).read_bytes()
    monkeypatch.setattr(video_network, "I3D_SHA256", hashlib.sha256(content).hexdigest())
    return content


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder that is served under the URL's place."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        monkeypatch.setattr(video_network, "I3D_URL", f"http://127.0.0.1:{server.server_address[1]}/{I3D_FILE}?dl=1")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def test_a_network_is_called_as_the_i3d_is(scripted, capsys):
    network = VideoNetwork(scripted(Standing()), CPU, SETTING, SPOILT)
    warning = capsys.readouterr().err
    assert SETTING in warning
    assert network.sha256 in warning
    assert video_network.I3D_SHA256 in warning
    assert SPOILT in warning
    videos = torch.rand(3, 12, 3, 8, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = torch.cat([videos[:, :6].mean((1, 3, 4)), videos[:, 6:].mean((1, 3, 4))], 1)
    torch.testing.assert_close(network.features(videos), expected)
    assert network.features(videos.double()).dtype == torch.float32
    assert not network.network.training


def test_the_usual_file_is_no_reason_to_warn(scripted, usual, capsys):
    VideoNetwork(scripted(Standing()), CPU, SETTING, SPOILT)
    assert capsys.readouterr().err == ""


def test_files_that_are_no_network_are_refused(tmp_path, scripted):
    with pytest.raises(UserError, match=rf"{SETTING}: .*none\.pt: no such file; get it from http.*set it to null"):
        VideoNetwork(tmp_path / "none.pt", CPU, SETTING, SPOILT)
    with pytest.raises(UserError, match=rf"{SETTING}: .*: a folder; "):
        VideoNetwork(tmp_path, CPU, SETTING, SPOILT)
    (tmp_path / "page.pt").write_text("<html>404</html>")
    (tmp_path / "cut.pt").write_bytes(scripted(Standing()).read_bytes()[:900])
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
    for name in ("page", "cut", "weights"):
        with pytest.raises(UserError, match=rf"{name}\.pt is no TorchScript file, or a damaged one .*get i3d_torchsc"):
            VideoNetwork(tmp_path / f"{name}.pt", CPU, SETTING, SPOILT)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Image(), r"can't be applied to videos of 8 frames of 6x4 \(.*: take the I3D from http"),
        (Short(), r"can't be applied to videos of 8 frames of 6x4 \(.*: take the I3D from http"),
        (Maps(), r"can't be applied.* it answers \[2, 3, 8, 6, 4\], and \[2, features\] is expected: take the I3D"),
    ],
)
def test_networks_that_are_no_i3d_are_refused_at_the_first_call(scripted, network, message):
    loaded = VideoNetwork(scripted(network), CPU, SETTING, SPOILT)
    with pytest.raises(UserError, match=rf"{SETTING}: .*{type(network).__name__}\.pt {message}"):
        loaded.features(torch.zeros(2, 8, 3, 6, 4))


def test_a_configured_path_wins_and_must_be_there(tmp_path, hub, usual):
    hub.mkdir(parents=True)
    (hub / I3D_FILE).write_bytes(usual)
    mine = tmp_path / "mine.pt"
    for download in (False, True):
        with pytest.raises(UserError, match=rf"{SETTING}: .*mine\.pt: no such file; .*null"):
            find_video_network(str(mine), SETTING, download=download)
    mine.write_bytes(b"anything")
    assert find_video_network(str(mine), SETTING, download=True) == mine
    assert find_video_network(None, SETTING, download=False) == hub / I3D_FILE


def test_without_a_file_and_leave_to_fetch_there_is_none(hub, monkeypatch):
    monkeypatch.setattr(video_network, "fetch", lambda *_, **__: pytest.fail("asked the network"))
    assert find_video_network(None, SETTING, download=False) is None
    assert not hub.exists()


def test_what_is_missing_is_fetched_when_allowed(hub, usual, served):
    (served / I3D_FILE).write_bytes(usual)
    assert find_video_network(None, SETTING, download=True) == hub / I3D_FILE
    assert [file.name for file in hub.iterdir()] == [I3D_FILE]
    assert (hub / I3D_FILE).read_bytes() == usual


def test_another_file_gets_no_name(hub, usual, served):
    (served / I3D_FILE).write_bytes(usual[:-1])
    with pytest.raises(UserError, match=rf"its sha256 is .* damaged one: .*set {SETTING} to its path"):
        find_video_network(None, SETTING, download=True)
    assert list(hub.iterdir()) == []


def test_a_damaged_file_in_torchs_folder_is_refused(hub, usual):
    hub.mkdir(parents=True)
    (hub / I3D_FILE).write_bytes(usual[:-1])
    with pytest.raises(UserError, match=r"i3d_torchscript\.pt: its sha256 is .* remove it and get it again"):
        find_video_network(None, SETTING, download=False)


def test_a_failed_download_says_the_way_out(hub, served, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, "RETRIES", 0)
    with pytest.raises(FetchError, match=rf"404 .*copy {I3D_FILE} to this machine and set {SETTING} to its path"):
        find_video_network(None, SETTING, download=True)
    assert list(hub.iterdir()) == []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be made \(Not a directory\): set TORCH_HOME"):
        find_video_network(None, SETTING, download=True)


def test_the_public_file_is_known():
    assert I3D_FILE == "i3d_torchscript.pt"
    assert video_network.I3D_SHA256.startswith("bec6519f66ea534e")
    assert len(video_network.I3D_SHA256) == 64
