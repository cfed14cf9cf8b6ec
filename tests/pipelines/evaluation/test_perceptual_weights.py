"""Finding, fetching and refusing the weights of LPIPS: small files, and a server on this machine."""

import hashlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.data import fetch as fetch_module
from pipelines.data.fetch import FetchError
from pipelines.errors import UserError
from pipelines.evaluation import perceptual_weights
from pipelines.evaluation.perceptual_weights import download_path, load_lpips, missing_weights_message
from stage1_autoencoder.lpips import HEADS_FILE, LPIPS, _vgg16

CPU = torch.device("cpu")
SETTING = "autoencoder.training.vgg_weights"


def vgg_state(value: float = 0.5) -> dict[str, Tensor]:
    """VGG16 in a file of some kB: each tensor is one number, repeated without being stored so often."""
    with torch.device("meta"):
        features, _ = _vgg16()
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    state |= {"classifier.0.weight": torch.empty(4, 4)}
    return {name: torch.full((1,), value).expand(tensor.shape) for name, tensor in state.items()}


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def promised(path: Path) -> str:
    """The name that torch gives to a file with this content."""
    return f"vgg16-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"


@pytest.fixture
def weights(tmp_path) -> Path:
    """A good file, under a name that promises nothing."""
    return save(vgg_state(), tmp_path / "mine.pth")


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    """torch's folder of downloads, empty; and nothing is asked of the real server."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(perceptual_weights, "VGG_URL", "http://127.0.0.1:9/nobody")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def name(weights, monkeypatch) -> str:
    """The name of the public file, if the public file were `weights`."""
    name = promised(weights)
    monkeypatch.setattr(perceptual_weights, "VGG_FILE", name)
    return name


@pytest.fixture
def served(tmp_path, name, monkeypatch) -> Iterator[Path]:
    """A folder that is served under the URL's place."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        monkeypatch.setattr(perceptual_weights, "VGG_URL", f"http://127.0.0.1:{server.server_address[1]}/{name}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder
        server.shutdown()
        thread.join()


def same(model: LPIPS | None, value: float = 0.5) -> bool:
    return model is not None and all((p == value).all() for p in model.features.parameters())


def test_the_public_name_and_address():
    assert perceptual_weights.VGG_FILE == "vgg16-397923af.pth"
    assert perceptual_weights._PROMISE.search(perceptual_weights.VGG_FILE)[1] == "397923af"


def test_a_path_is_taken_whatever_its_name(weights):
    model = load_lpips(weights, CPU, download=False)
    assert same(model)
    assert next(model.parameters()).device == CPU
    assert torch.equal(model.heads[0], load_file(HEADS_FILE)["lin0.model.1.weight"].flatten())


def test_a_path_in_the_home_folder(weights, monkeypatch):
    monkeypatch.setenv("HOME", str(weights.parent))
    assert same(load_lpips("~/mine.pth", CPU, download=False))


def test_the_path_wins_over_torchs_folder(weights, hub, name):
    hub.mkdir(parents=True)
    os.rename(weights, hub / name)
    other = save(vgg_state(0.25), weights)
    assert same(load_lpips(other, CPU, download=True), 0.25)
    assert same(load_lpips(None, CPU, download=False), 0.5)


def test_torchs_folder_is_looked_into_without_network(weights, hub, name, monkeypatch):
    monkeypatch.setattr(perceptual_weights, "fetch", lambda *_, **__: pytest.fail("asked the network"))
    assert load_lpips(None, CPU, download=False) is None
    assert not hub.exists()
    hub.mkdir(parents=True)
    os.rename(weights, hub / name)
    assert same(load_lpips(None, CPU, download=True))


def test_what_is_missing_is_fetched_when_allowed(weights, hub, name, served):
    os.rename(weights, served / name)
    assert load_lpips(None, CPU, download=False) is None
    assert same(load_lpips(None, CPU, download=True))
    assert [file.name for file in hub.iterdir()] == [name]
    assert download_path() == hub / name


def test_a_download_that_breaks_its_promise_leaves_nothing(hub, name, served):
    save(vgg_state(7), served / name)
    with pytest.raises(UserError, match=f"its name promises {name[6:14]}: .*get it again"):
        load_lpips(None, CPU, download=True)
    assert list(hub.iterdir()) == []


def test_a_failed_download_says_the_way_out(hub, served, monkeypatch):
    with pytest.raises(FetchError, match=f"404 .*copy vgg16-.* to this machine and set {SETTING} to its path"):
        load_lpips(None, CPU, download=True)
    monkeypatch.setattr(fetch_module, "RETRIES", 0)
    monkeypatch.setattr(perceptual_weights, "VGG_URL", "http://127.0.0.1:9/nobody")
    with pytest.raises(FetchError, match=SETTING):
        load_lpips(None, CPU, download=True)
    assert list(hub.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "torch").write_text("a file")
    with pytest.raises(UserError, match=r"checkpoints: cannot be made \(Not a directory\): set TORCH_HOME"):
        load_lpips(None, CPU, download=True)


@pytest.mark.parametrize("digits", [8, 64])
def test_any_file_is_held_to_the_hash_in_its_name(weights, digits):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    good = weights.rename(weights.with_name(f"backup-{digest[:digits]}.pth"))
    assert same(load_lpips(good, CPU, download=False))
    wrong = digest[: digits - 1] + ("0" if digest[digits - 1] != "0" else "1")
    bad = good.rename(good.with_name(f"backup-{wrong}.pth"))
    with pytest.raises(UserError, match=rf"{bad.name}: its sha256 begins with {digest[:digits]}.* promises {wrong}"):
        load_lpips(bad, CPU, download=False)


def test_a_damaged_file_in_torchs_folder_is_refused_before_it_is_opened(weights, hub, name, monkeypatch):
    hub.mkdir(parents=True)
    (hub / name).write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(perceptual_weights, "load_pickle", lambda *_: pytest.fail("opened"))
    with pytest.raises(UserError, match=r"Remove it and get it again, from http.* or with --download"):
        load_lpips(None, CPU, download=True)


@pytest.mark.parametrize("download", [False, True])
def test_a_path_that_is_not_there_is_an_error(tmp_path, download):
    with pytest.raises(UserError, match=rf"{SETTING}: .*absent.pth: no such file; correct the path, or leave it out"):
        load_lpips(tmp_path / "absent.pth", CPU, download=download)
    with pytest.raises(UserError, match=rf"{SETTING}: .*: a folder; "):
        load_lpips(tmp_path, CPU, download=download)


class Runs:
    """Unpickling an object of this class makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_nothing_in_a_file_is_run(tmp_path):
    path = save({"features.0.weight": Runs(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth holds a pickled .*: refused"):
        load_lpips(path, CPU, download=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"features.0.weight": torch.zeros(1)}, r"not the convolutions of VGG16; missing: .*take torchvision's vgg16-"),
        ({"features.0.weight": 1}, "no dictionary of tensors"),
        ([torch.zeros(1)], "no dictionary of tensors"),
        (b"", "truncated or no torch.save file"),
    ],
)
def test_another_file_is_refused(tmp_path, content, message):
    path = tmp_path / "other.pth"
    path.write_bytes(content) if isinstance(content, bytes) else save(content, path)
    with pytest.raises(UserError, match=rf"other.pth.*{message}"):
        load_lpips(path, CPU, download=False)


def test_a_truncated_file_is_refused(weights):
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"mine.pth is truncated"):
        load_lpips(weights, CPU, download=False)


def test_a_file_that_cannot_be_read(weights, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(perceptual_weights, "load_pickle", refuse)
    with pytest.raises(UserError, match=rf"{SETTING}: .*mine.pth cannot be read: Permission denied"):
        load_lpips(weights, CPU, download=False)


def test_heads_of_ones_own(weights, tmp_path):
    public = load_file(HEADS_FILE)
    doubled = save({key: 2 * value for key, value in public.items()}, tmp_path / "vgg.pth")
    model = load_lpips(weights, CPU, download=False, heads=doubled)
    assert torch.equal(model.heads[4], 2 * public["lin4.model.1.weight"].flatten())
    del public["lin4.model.1.weight"]
    with pytest.raises(UserError, match=r"vgg.pth: not the heads of LPIPS; missing: lin4.*take LPIPS's"):
        load_lpips(weights, CPU, download=False, heads=save(public, tmp_path / "vgg.pth"))
    with pytest.raises(UserError, match=r"the heads of LPIPS: .*absent.pth: no such file"):
        load_lpips(weights, CPU, download=False, heads=tmp_path / "absent.pth")


def test_the_warning_names_the_places_and_both_ways_out(hub):
    message = missing_weights_message()
    for part in (str(hub / "vgg16-397923af.pth"), f"{SETTING} is not set", f"set {SETTING} to", "--download",
                 "perceptual: none"):  # fmt: skip
        assert part in message
    assert "LPIPS is left out" in missing_weights_message("LPIPS is left out")
    assert "perceptual: none" not in missing_weights_message("LPIPS is left out")
