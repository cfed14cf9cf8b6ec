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
from pipelines.evaluation import networks
from pipelines.evaluation.networks import PublicFile, VideoNetwork, load_lpips, missing_weights_message
from stage1_autoencoder.lpips import HEADS_FILE, LPIPS, STAGES
from tests.file_server import FileServer, serving

CPU, SETTING = torch.device("cpu"), "evaluation.video_network"
CONTENT = b"the weights of a small network"


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    """torch's folder of downloads, empty; nothing is asked of real servers."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("VGG16", "I3D"):
        public = getattr(networks, name)
        monkeypatch.setattr(networks, name, dataclasses.replace(public, url=f"http://127.0.0.1:9/{public.name}"))
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


def test_the_files_that_everybody_has():
    assert (networks.VGG16.name, networks.VGG16.sha256) == ("vgg16-397923af.pth", "397923af")
    assert networks.I3D.name == "i3d_torchscript.pt"
    assert networks.I3D.sha256.startswith("bec6519f66ea534e")


def test_a_missing_file_is_downloaded_only_when_allowed(public, hub):
    assert public.find(None, SETTING, download=False) is None
    assert not hub.exists()
    assert public.find(None, SETTING, download=True) == hub / "net.pt" == public.path
    assert [file.name for file in hub.iterdir()] == ["net.pt"]
    assert public.path.read_bytes() == CONTENT
    offline = dataclasses.replace(public, url="http://127.0.0.1:9/nobody")
    assert offline.find(None, SETTING, download=True) == hub / "net.pt"


def test_a_configured_path_wins_and_must_exist(public, hub, tmp_path, monkeypatch):
    public.find(None, SETTING, download=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    for download in (False, True):
        for path in (tmp_path / "mine.pt", tmp_path):
            with pytest.raises(UserError, match=re.escape(f"{SETTING}: {path}: ")) as raised:
                public.find(path, SETTING, download=download)
            assert public.url in str(raised.value)
            assert "null" in str(raised.value)
    (tmp_path / "mine.pt").write_bytes(b"anything")
    assert public.find("~/mine.pt", SETTING, download=True) == tmp_path / "mine.pt"


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


def has_weights(model: LPIPS | None, value: float) -> bool:
    return model is not None and all((p == value).all() for p in model.features.parameters())


def test_lpips_takes_the_configured_file_before_torchs(tmp_path, hub, monkeypatch):
    assert load_lpips(None, CPU, download=False) is None
    hub.mkdir(parents=True)
    file = save(vgg_state(), hub / networks.VGG16.name)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(networks, "VGG16", dataclasses.replace(networks.VGG16, sha256=digest[:8]))
    model = load_lpips(None, CPU, download=False)
    assert has_weights(model, 0.5)
    assert next(model.parameters()).device == CPU
    assert torch.equal(model.heads[0], load_file(HEADS_FILE)["lin0.model.1.weight"].flatten())
    assert has_weights(load_lpips(save(vgg_state(0.25), tmp_path / "mine.pth"), CPU, download=True), 0.25)


def test_a_copy_under_the_public_name_must_be_that_file(tmp_path):
    copy = save(vgg_state(), tmp_path / networks.VGG16.name)
    with pytest.raises(UserError, match=f"{networks.VGG16.name}: sha256.*{networks.VGG16.url}"):
        load_lpips(copy, CPU, download=False)


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
    "content", [{"features.0.weight": torch.zeros(1)}, {"features.0.weight": 1}, [torch.zeros(1)], b"", "truncated"]
)
def test_other_files_than_vgg16_are_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    if content == "truncated":
        content = save(vgg_state(), path).read_bytes()[:3000]
    path.write_bytes(content) if isinstance(content, bytes) else save(content, path)
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_lpips(path, CPU, download=False)


def test_missing_weights_come_with_both_ways_out(hub):
    message = missing_weights_message()
    for part in (str(hub / networks.VGG16.name), networks.VGG_SETTING, "--download", "perceptual: none"):
        assert part in message
    assert "without LPIPS" in missing_weights_message("without LPIPS")


class Means(nn.Module):
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
    """Returns maps, not vectors."""

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        return video


class Image(nn.Module):
    """Called as no video network is."""

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3, 4))


class Blind(nn.Module):
    """Passes no gradients."""

    def forward(
        self, video: Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        return video.detach().mean((2, 3, 4))


@pytest.fixture
def scripted(tmp_path) -> Callable[[nn.Module], Path]:
    def script(network: nn.Module) -> Path:
        path = tmp_path / f"{type(network).__name__}.pt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(network).save(path)
        return path

    return script


def random_videos(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_video_network_is_called_as_the_i3d(scripted):
    network, videos = VideoNetwork(scripted(Means()), CPU, SETTING), random_videos(3, 12, 3, 8, 6)
    expected = torch.cat([videos[:, :6].mean((1, 3, 4)), videos[:, 6:].mean((1, 3, 4))], 1)
    torch.testing.assert_close(network.features(videos), expected)
    assert network.features(videos.double()).dtype == torch.float32
    assert not network.network.training


def test_another_network_than_the_public_one_is_a_warning(scripted, monkeypatch, capsys):
    path = scripted(Means())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert VideoNetwork(path, CPU, SETTING).sha256 == digest
    warning = capsys.readouterr().err
    for part in (SETTING, str(path), digest, networks.I3D.sha256):
        assert part in warning
    monkeypatch.setattr(networks, "I3D", dataclasses.replace(networks.I3D, sha256=digest))
    VideoNetwork(path, CPU, SETTING)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", [b"<html>404</html>", b"", "cut", {"a": torch.ones(2)}])
def test_files_that_hold_no_network_are_refused(tmp_path, scripted, content):
    path = tmp_path / "net.pt"
    if content == "cut":
        content = scripted(Means()).read_bytes()[:900]
    path.write_bytes(content) if isinstance(content, bytes) else save(content, path)
    with pytest.raises(UserError, match=re.escape(f"{SETTING}: {path}")) as raised:
        VideoNetwork(path, CPU, SETTING)
    assert networks.I3D.url in str(raised.value)


@pytest.mark.parametrize("network", [Image(), Short(), Maps()])
def test_networks_unlike_the_i3d_are_refused_at_the_first_call(scripted, network):
    loaded = VideoNetwork(scripted(network), CPU, SETTING)
    with pytest.raises(UserError, match=re.escape(f"{SETTING}: {loaded.path}")) as raised:
        loaded.features(torch.zeros(2, 8, 3, 6, 4))
    assert "8 frames of 6x4" in str(raised.value)
    assert networks.I3D.url in str(raised.value)


def test_the_distance_as_a_loss(scripted):
    network = VideoNetwork(scripted(Means()), CPU, SETTING)
    videos, truth = random_videos(2, 6, 3, 8, 8).requires_grad_(), random_videos(2, 6, 3, 8, 8, seed=1)
    distance = network.distance(videos, truth)
    with torch.no_grad():
        expected = (network.features(videos) - network.features(truth)).square().mean()
    assert distance.item() == pytest.approx(expected.item())
    distance.backward()
    assert videos.grad.abs().amax((2, 3, 4)).min() > 0  # every frame of every clip
    with pytest.raises(UserError, match=f"{SETTING}: .*gradients.*{re.escape(networks.I3D.url)}"):
        VideoNetwork(scripted(Blind()), CPU, SETTING).distance(videos, truth)


def test_the_network_has_no_gradients_of_its_own(scripted):
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv3d(3, 2, 3)

        def forward(
            self, video: Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
        ) -> Tensor:
            return self.convolution(video).mean((2, 3, 4))

    network, videos = VideoNetwork(scripted(Convolved()), CPU, SETTING), random_videos(2, 6, 3, 8, 8)
    network.distance(videos.requires_grad_(), videos.detach() / 2).backward()
    parameters = list(network.network.parameters())
    assert len(parameters) == 2
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in parameters)
