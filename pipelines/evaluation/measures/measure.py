"""What an evaluation measures: the clips of a batch with all their futures, and the interface of every measure."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from pipelines.prediction.clips import Clip

# Name -> [clips, ...] on the CPU: what a measure keeps of each clip. Frames are not kept.
Records = dict[str, Tensor]
# Why something was not measured.
NO_AUTOENCODER = "it needs an autoencoder, and there is none"


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """Clips, their true futures, and what is predicted in their place; all on one device.

    Attributes:
        clips: b of them.
        given: [b, context, 3, h, w] in [-1, 1].
        truth: [b, horizon, 3, h, w] in [-1, 1].
        autoencoded: [b, context + horizon, 3, h, w] in [-1, 1], reconstructions of all true frames; None: there is no
            autoencoder, and so neither a `reconstruction` nor latents.
        futures: subject -> [b, samples, horizon, 3, h, w] in [-1, 1]; of `results.SUBJECTS`, of which only
            `prediction` can have more than one sample.
        latents: subject -> [b, samples, context + horizon, c, y, x] final latents; of `truth` and some of `SUBJECTS`.
    """

    clips: Sequence[Clip]
    given: Tensor
    truth: Tensor
    autoencoded: Tensor | None
    futures: Mapping[str, Tensor]
    latents: Mapping[str, Tensor]


class Measure(ABC):
    """Something that is measured of every clip, and summarized over all of them.

    Attributes:
        name: unique, in messages and file names.
        part: the field of `Evaluation` that has its results.
        needs_autoencoder: without one there is nothing to measure.
    """

    name: str
    part: ClassVar[str] = "metrics"
    needs_autoencoder: ClassVar[bool] = False

    @abstractmethod
    def measure(self, batch: ClipBatch) -> Records:
        """What is kept of each clip of a batch: the results depend on nothing else."""

    @abstractmethod
    def results(self, records: Records, counts: Tensor | None) -> Mapping[str, Any]:
        """The entries that this measure adds to its part of the evaluation.

        Args:
            records: of all clips.
            counts: [resamples, clips] of the bootstrap from `draw_counts`; None: no intervals.
        Raises:
            ValueError: it cannot be measured on these clips; the message is the reason.
        """

    def pictures(self, records: Records, clips: Callable[[Sequence[int]], ClipBatch]) -> dict[str, Image.Image]:
        """Name -> a picture for the run's folder, of some clips.

        Args:
            records: of all clips.
            clips: numbers of clips -> these clips, read and predicted again.
        """
        return {}
