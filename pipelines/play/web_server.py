"""The page's server: it sends the page and predicted frames, and takes uploads, for this machine alone by default."""

import asyncio
import re
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NoReturn

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tornado.web import HTTPError, stream_request_body
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.play.playing import MOST_BYTES, Clips, Past, Prediction
from pipelines.prediction.pictures import file_name
from pipelines.predictor import VideoPredictor, load_predictor
from pipelines.runtime.context import RunContext
from pipelines.runtime.files import size_text
from pipelines.runtime.local_server import MOST_WORDS, Guarded, Texts, serve_pages, serve_until_signal
from pipelines.runtime.progress import say
from stage2_flow.sampling_plan import SamplingPlan

PAGE = {"": "text/html", "play.css": "text/css", "play.js": "text/javascript"}
# The head of a message of frames, little-endian: number of the prediction, of the frame, and whether it was given.
FRAME_HEAD = struct.Struct("<III")
# Seconds in which tabs close at the end.
GRACE = 1.0


class Message(BaseModel):
    """What the page sends; none of it is trusted."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Origin(Message):
    """A frame that the page shows, of one of its futures."""

    frame: int = Field(ge=0)
    sample: int = Field(ge=0)


class Start(Message):
    """Begin a prediction.

    Attributes:
        play: its number, which its frames carry.
        clip: to start from.
        origin: the frame to continue from instead; None: the clip.
        samples: futures side by side.
        nfe: evaluations per frame, with Euler steps; None: the run's sampler.
    """

    play: int = Field(ge=0, le=2**31)
    clip: int
    origin: Origin | None
    samples: int = Field(ge=1, le=4)
    nfe: int | None = Field(ge=1, le=64)
    decoder: Literal["full", "fast"] | None
    seed: int = Field(ge=0, le=2**53)

    def sampling(self) -> dict[str, Any]:
        """Sampling options that differ from the run's."""
        options: dict[str, Any] = {"seed": self.seed}
        if self.nfe is not None:
            options |= {"preset": "default", "solver": "euler", "nfe": self.nfe}
        if self.decoder is not None:
            options["decoder"] = self.decoder
        return options


class Request(Message):
    """Either a prediction begins, or the page says which frame of the present one it shows."""

    start: Start | None = None
    shown: int | None = None


class Player:
    """A trained run that is played with: one prediction at a time, in a thread of its own.

    Attributes:
        tabs: open pages.
    """

    def __init__(self, name: str, predictor: VideoPredictor, clips: Clips) -> None:
        self.name, self.predictor, self.clips = name, predictor, clips
        self.tabs: set[Tab] = set()
        self.reader = ThreadPoolExecutor(1, "upload")
        self._worker = ThreadPoolExecutor(1, "prediction")
        self._playing: tuple[Tab, Prediction] | None = None
        self._runs: Future | None = None

    @property
    def is_predicting(self) -> bool:
        return self._runs is not None and not self._runs.done()

    def begin(self, tab: "Tab", prediction: Prediction, run: Callable[[], None]) -> None:
        """Run a prediction of a tab instead of the present one, whose tab is told if it is another."""
        if self._playing is not None:
            other, former = self._playing
            former.stop()
            if other is not tab:
                other.tell({"ended": "Another tab plays now. Any button goes on in this one."})
        self._playing, self._runs = (tab, prediction), self._worker.submit(run)
        self._runs.add_done_callback(lambda done: done.cancelled() or done.result())  # logs what it raised

    def leave(self, tab: "Tab") -> None:
        """A tab was closed: its prediction ends."""
        self.tabs.discard(tab)
        if self._playing is not None and self._playing[0] is tab:
            self._playing[1].stop()
            self._playing = None

    async def close(self) -> None:
        """Close all tabs and end the threads."""
        for tab in self.tabs:
            tab.close(1001)
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                while self.tabs:
                    await asyncio.sleep(0.01)
        for tab in [*self.tabs]:
            self.leave(tab)
        self._worker.shutdown(cancel_futures=True)
        self.reader.shutdown(cancel_futures=True)


class OfPlayer(Guarded):
    """A handler that uses the player."""

    def initialize(self, player: Player) -> None:
        self.player = player


@stream_request_body
class Upload(OfPlayer):
    """A video file, the body of a request, which never is in memory as a whole."""

    def prepare(self) -> None:
        super().prepare()
        if self.request.headers.get("Origin") != f"{self.request.protocol}://{self.request.host}":
            raise HTTPError(403, reason="Uploads are taken from this page only")
        if int(self.request.headers.get("Content-Length", "0")) > MOST_BYTES:
            raise HTTPError(413, reason=f"The file is too large: at most {size_text(MOST_BYTES)}")
        self.request.connection.set_max_body_size(MOST_BYTES)  # whatever was announced
        given = Path(self.get_query_argument("name", "clip"))
        name = file_name(given.stem[:80] + given.suffix[:8])
        self._folder = TemporaryDirectory(prefix="river-play-")
        self._path = Path(self._folder.name) / name
        self._file = self._path.open("wb")

    def data_received(self, chunk: bytes) -> None:
        self._file.write(chunk)

    async def post(self) -> None:
        self._file.close()
        loop = asyncio.get_running_loop()
        try:
            clip = await loop.run_in_executor(self.player.reader, self.player.clips.read, self._path)
        except UserError as error:
            self.set_status(422)
            self.finish({"error": str(error)})
            return
        self.finish({"clip": described(self.player.clips.add(clip), clip)})

    def on_finish(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
            self._folder.cleanup()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.on_finish()


class Tab(WebSocketHandler, OfPlayer):
    """An open page: it asks for predictions, and gets their frames."""

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._prediction: Prediction | None = None
        self.player.tabs.add(self)
        predictor, clips = self.player.predictor, self.player.clips
        decoders = [] if predictor.fast_decoder is None else ["full", "fast"]
        self.tell(
            {
                "name": self.player.name,
                "clips": [described(number, clip) for number, clip in clips.by_number.items()],
                "missing": clips.missing,
                "sampler": SamplingPlan.from_config(predictor.sampling).describe(),
                "seed": predictor.sampling.seed,
                "decoders": sorted(decoders, key=lambda name: name != predictor.sampling.decoder),
                "most_bytes": MOST_BYTES,
                "most_text": size_text(MOST_BYTES),
            }
        )

    def on_message(self, message: str | bytes) -> None:
        try:
            asked = Request.model_validate_json(message)
            if asked.start is not None:
                self._start(asked.start)
            elif asked.shown is not None and self._prediction is not None:
                self._prediction.has_shown(asked.shown)
        except ValidationError:
            self.tell({"ended": "The page sent what this server does not understand: reload it."})
        except UserError as error:
            self.tell({"ended": str(error)})

    def _start(self, asked: Start) -> None:
        if asked.origin is not None and self._prediction is not None:
            past = self._prediction.past(asked.origin.frame, asked.origin.sample)
            first, is_new = asked.origin.frame + 1, False
        else:
            past = self.player.clips.by_number.get(asked.clip)
            if past is None:
                raise UserError("This clip is not there any more: choose another one.")
            first, is_new = len(past.frames), True
        prediction = Prediction(past, asked.samples, asked.sampling(), first, is_new)
        self._prediction = prediction
        height, width = past.frames.shape[1:3]
        sizes = {"samples": asked.samples, "height": height, "width": width}
        self.tell({"began": asked.play, "fps": past.fps, **sizes})

        def send(number: int, given: bool, frame: np.ndarray) -> None:
            pixels = np.full((*frame.shape[:3], 4), 255, np.uint8)
            pixels[..., :3] = frame
            message = FRAME_HEAD.pack(asked.play, number, given) + pixels.tobytes()
            self._loop.call_soon_threadsafe(self.tell, message)

        def run() -> None:
            try:
                prediction.run(self.player.predictor, send)
            except Exception as error:  # the page says whatever it is
                self._loop.call_soon_threadsafe(self.tell, {"ended": str(error) or type(error).__name__})
                if not isinstance(error, UserError):
                    raise

        self.player.begin(self, prediction, run)

    def tell(self, message: dict[str, Any] | bytes) -> None:
        """Send a message, if the page is still open."""
        with suppress(WebSocketClosedError):
            sent = self.write_message(message, binary=isinstance(message, bytes))
            sent.add_done_callback(lambda future: future.exception())

    def on_close(self) -> None:
        self.player.leave(self)


def described(number: int, clip: Past) -> dict[str, Any]:
    """A clip for the page."""
    return {"number": number, "name": clip.name, "thumbnail": clip.thumbnail}


async def serve(player: Player, host: str, port: int, ready: Callable[[str], object], stop: asyncio.Event) -> None:
    """Serve the page until `stop` is set. Arguments and errors as of `serve_pages`."""
    texts = {name: (kind, _read(name or "play.html")) for name, kind in PAGE.items()}
    handlers: list[tuple[str, type, dict[str, Any]]] = [
        (f"/({'|'.join(map(re.escape, PAGE))})", Texts, {"texts": texts}),
        ("/clips", Upload, {"player": player}),
        ("/play", Tab, {"player": player}),
    ]
    limits = {"websocket_max_message_size": MOST_WORDS, "websocket_ping_interval": 20}
    await serve_pages(handlers, host, port, ready, stop, player.close, **limits)


def play(config: RiverConfig, run_context: RunContext, host: str, port: int, opens_browser: bool) -> NoReturn:
    """Serve the page of a run until a signal ends it.

    Args:
        host, port: see `serve_pages`.
        opens_browser: open the page in this machine's browser, if there is a display.
    Raises:
        UserError: the run cannot predict; as `serve_pages`.
        StoppedBySignal: the way it ends.
    """
    name = config.dataset.name if config.run is None else f"{config.dataset.name}/{config.run}"
    player = Player(name, load_predictor(config, run_context, clips=1), Clips(config, run_context))
    if player.clips.missing:
        say(f"play: no test clips, uploads only: {player.clips.missing}")
    serve_until_signal(
        lambda ready, stop: serve(player, host, port, ready, stop), f"play: {config.run_path}", host, opens_browser
    )


def _read(name: str) -> str:
    text = files("pipelines.play").joinpath("templates", name).read_text(encoding="utf-8")
    if name != "play.css":
        return text
    return files("pipelines.report").joinpath("templates", "house.css").read_text(encoding="utf-8") + text
