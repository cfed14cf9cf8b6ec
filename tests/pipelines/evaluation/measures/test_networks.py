"""Public networks: found, downloaded from a server on this machine, refused, and called; small files replace them."""

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.data.fetch import FetchError
from pipelines.errors import UserError
from pipelines.evaluation.measures.networks import I3D, VGG16, PublicFile, VideoNetwork, load_lpips, load_st_lpips
from stage1_autoencoder.lpips import HEADS_FILE, STAGES
from tests.file_server import FileServer, serving

CPU, SETTING = torch.device("cpu"), "evaluation.video_network"
CONTENT = b"the weights of a small network"


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    """torch's folder of downloads, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path) -> Iterator[FileServer]:
    with serving(tmp_path / "server") as running:
        yield running


@pytest.fixture
def public(server) -> PublicFile:
    """A public file, on the server."""
    (server.folder / "net.pt").write_bytes(CONTENT)
    return PublicFile("net.pt", f"{server.url}/net.pt", hashlib.sha256(CONTENT).hexdigest(), "30 bytes")


def test_a_missing_file_is_downloaded_only_when_allowed(public, hub):
    assert public.find(None, SETTING, download=False) is None
    assert not hub.exists()
    assert public.find(None, SETTING, download=True) == hub / "net.pt" == public.path
    assert [file.name for file in hub.iterdir()] == ["net.pt"]
    assert public.path.read_bytes() == CONTENT
    offline = dataclasses.replace(public, url="http://127.0.0.1:9/nobody")
    assert offline.find(None, SETTING, download=True) == hub / "net.pt"


def test_a_configured_path_wins_and_must_exist(public, hub, tmp_path):
    public.find(None, SETTING, download=True)
    for download in (False, True):
        for path in (tmp_path / "mine.pt", tmp_path):
            with pytest.raises(UserError, match=re.escape(f"{SETTING}: {path}: ")) as raised:
                public.find(path, SETTING, download=download)
            assert public.url in str(raised.value)
            assert "null" in str(raised.value)
    (tmp_path / "mine.pt").write_bytes(b"anything")
    assert public.find(str(tmp_path / "mine.pt"), SETTING, download=True) == tmp_path / "mine.pt"


@pytest.mark.parametrize("digits", [8, 64])
def test_a_damaged_file_in_torchs_folder_is_refused(public, hub, digits):
    public = dataclasses.replace(public, sha256=public.sha256[:digits])
    hub.mkdir(parents=True)
    public.path.write_bytes(CONTENT)
    assert public.find(None, SETTING, download=False) == public.path
    public.path.write_bytes(CONTENT[:-1])
    for download in (False, True):
        with pytest.raises(UserError) as raised:
            public.find(None, SETTING, download=download)
        for part in (str(public.path), hashlib.sha256(CONTENT[:-1]).hexdigest(), public.sha256, "remove it"):
            assert part in str(raised.value)


def test_another_file_from_the_server_gets_no_name(public, hub, server):
    (server.folder / "net.pt").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=f"sha256.*set {SETTING} to its path"):
        public.find(None, SETTING, download=True)
    assert list(hub.iterdir()) == []


def test_a_failed_download_tells_the_way_out(public, hub, server, tmp_path, monkeypatch):
    (server.folder / "net.pt").unlink()
    with pytest.raises(FetchError, match=f"404 .*set {SETTING} to its path"):
        public.find(None, SETTING, download=True)
    assert list(hub.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=rf"Not a directory.*TORCH_HOME.*{SETTING}"):
        public.find(None, SETTING, download=True)


def vgg_state(value: float = 0.5) -> dict[str, Tensor]:
    """VGG16 in a file of some kB: each tensor is one number, repeated without being stored as often."""
    state, channels, place = {"classifier.0.weight": torch.zeros(1).expand(4, 4)}, 3, 0
    for widths in STAGES:
        for width in widths:
            state[f"features.{place}.weight"] = torch.full((1,), value).expand(width, channels, 3, 3)
            state[f"features.{place}.bias"] = torch.full((1,), value).expand(width)
            channels, place = width, place + 2
        place += 1  # the pooling
    return state


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_lpips_has_the_weights_of_the_configured_file(tmp_path, hub):
    assert load_lpips(None, CPU, download=False) is None
    model = load_lpips(save(vgg_state(0.25), tmp_path / "mine.pth"), CPU, download=True)
    assert all((parameter == 0.25).all() for parameter in model.features.parameters())
    assert next(model.parameters()).device == CPU
    assert torch.equal(model.heads[0], load_file(HEADS_FILE)["lin0.model.1.weight"].flatten())


@pytest.mark.parametrize("configured", [True, False])
def test_a_file_under_the_public_name_must_be_that_file(tmp_path, hub, configured):
    folder = tmp_path if configured else hub
    folder.mkdir(parents=True, exist_ok=True)
    copy = save(vgg_state(), folder / VGG16.name)
    with pytest.raises(UserError, match=f"{VGG16.name}: sha256.*{VGG16.url}"):
        load_lpips(copy if configured else None, CPU, download=False)


def test_another_file_than_the_packages_is_refused(tmp_path):
    for content in (b"damaged", None):
        path = tmp_path / ("weights.pth" if content else "gone.pth")
        if content:
            path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{re.escape(str(path))}.*pip install --force-reinstall"):
            load_st_lpips(path, CPU)


class Runs:
    """Unpickling an object of this class creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_nothing_in_a_file_is_run(tmp_path):
    path = save({"features.0.weight": Runs(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_lpips(path, CPU, download=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"features.0.weight": torch.zeros(1)}, {"features.0.weight": 1}, [torch.zeros(1)], b"", "truncated",
        vgg_state(float("nan")),
    ],
)  # fmt: skip
def test_other_files_than_vgg16_are_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    if content == "truncated":
        content = save(vgg_state(), path).read_bytes()[:3000]
    path.write_bytes(content) if isinstance(content, bytes) else save(content, path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_lpips(path, CPU, download=False)


class VideoStandIn(nn.Module):
    """Stands for the I3D: called as it is, with features made by `output`; another call gives zeros."""

    def __init__(self, output: nn.Module) -> None:
        super().__init__()
        self.output = output

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        if rescale or not resize or not return_features:
            video = video * 0
        return self.output(video)


class Halves(nn.Module):
    """Means over the halves of a clip, 6 features."""

    def forward(self, video: Tensor) -> Tensor:
        half = video.shape[2] // 2
        return torch.cat([video[:, :, :half].mean((2, 3, 4)), video[:, :, half:].mean((2, 3, 4))], 1)


class Short(nn.Module):
    """Wants longer clips, as the I3D does."""

    def forward(self, video: Tensor) -> Tensor:
        assert video.shape[2] >= 10, "too few frames"
        return video.mean((2, 3, 4))


class Blind(nn.Module):
    """Passes no gradients."""

    def forward(self, video: Tensor) -> Tensor:
        return video.detach().mean((2, 3, 4))


class Convolved(nn.Module):
    """Has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(3, 2, 3)

    def forward(self, video: Tensor) -> Tensor:
        return self.convolution(video).mean((2, 3, 4))


@pytest.fixture
def scripted(tmp_path) -> Callable[[nn.Module], Path]:
    def script(network: nn.Module) -> Path:
        path = tmp_path / "scripted.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(network).save(path)
        return path

    return script


def random_videos(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_video_network_is_called_as_the_i3d(scripted, capsys):
    path, videos = scripted(VideoStandIn(Halves())), random_videos(3, 12, 3, 8, 6)
    network = VideoNetwork(path, CPU, SETTING)
    expected = torch.cat([videos[:, :6].mean((1, 3, 4)), videos[:, 6:].mean((1, 3, 4))], 1)
    torch.testing.assert_close(network.features(videos), expected)
    assert network.features(videos.double()).dtype == torch.float32
    assert not network.network.training
    warning = capsys.readouterr().err
    for part in (SETTING, str(path), hashlib.sha256(path.read_bytes()).hexdigest(), I3D.sha256):
        assert part in warning


@pytest.mark.parametrize("content", [b"<html>404</html>", b"", "cut", "not finite", {"a": torch.ones(2)}])
def test_files_that_hold_no_network_are_refused(tmp_path, scripted, content):
    path = tmp_path / "net.pt"
    if content == "cut":
        content = scripted(VideoStandIn(Halves())).read_bytes()[:900]
    if content == "not finite":
        convolved = Convolved()
        nn.init.constant_(convolved.convolution.bias, float("inf"))
        content = scripted(VideoStandIn(convolved)).read_bytes()
    path.write_bytes(content) if isinstance(content, bytes) else save(content, path)
    with pytest.raises(UserError, match=re.escape(f"{SETTING}: {path}")) as raised:
        VideoNetwork(path, CPU, SETTING)
    assert I3D.url in str(raised.value)


@pytest.mark.parametrize("network", [Halves(), VideoStandIn(Short()), VideoStandIn(nn.Identity())])
def test_networks_unlike_the_i3d_are_refused_at_the_first_call(scripted, network):
    loaded = VideoNetwork(scripted(network), CPU, SETTING)
    with pytest.raises(UserError, match=re.escape(f"{SETTING}: {loaded.path}")) as raised:
        loaded.features(torch.zeros(2, 8, 3, 6, 4))
    assert "8 frames of 6x4" in str(raised.value)
    assert I3D.url in str(raised.value)


def test_the_distance_as_a_loss(scripted):
    network = VideoNetwork(scripted(VideoStandIn(Convolved())), CPU, SETTING)
    videos, truth = random_videos(2, 6, 3, 8, 8).requires_grad_(), random_videos(2, 6, 3, 8, 8, seed=1)
    distance = network.distance(videos, truth)
    with torch.no_grad():
        expected = (network.features(videos) - network.features(truth)).square().mean()
    assert distance.item() == pytest.approx(expected.item())
    distance.backward()
    assert videos.grad.abs().amax((2, 3, 4)).min() > 0  # every frame of every clip
    assert not any(parameter.requires_grad for parameter in network.network.parameters())
    with pytest.raises(UserError, match=f"{SETTING}: .*gradients.*{re.escape(I3D.url)}"):
        VideoNetwork(scripted(VideoStandIn(Blind())), CPU, SETTING).distance(videos, truth)
