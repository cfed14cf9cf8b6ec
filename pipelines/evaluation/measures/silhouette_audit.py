"""People in front of a still background: do predicted ones keep their area, their speed and their looks?

What moves is found without a network, since it differs from the median of the true frames of its clip: all of somebody
who walks, and of somebody who stands, what moves.
"""

import zlib
from collections import defaultdict
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d

from pipelines.evaluation.measures.intervals import Tally, summarize
from pipelines.evaluation.measures.measure import ClipBatch, Measure, Records
from pipelines.prediction.clips import Clip
from pipelines.runtime.results import MetricValues

# A pixel of a silhouette differs from the background by more than this in a channel, in levels of 0 to 255, and so do
# most of the nine around it.
DIFFERENT = 25
# Shares of a frame: smaller silhouettes are nobody; where true ones are larger on average, the background moves.
SMALLEST, STILL = 0.005, 0.2
# A silhouette is kept if its area is this many times the true one.
KEPT_AREA = (0.5, 2.0)
# Frames of a clip, evenly spread, whose median is the background: at most this many.
FRAMES_OF_MEDIAN = 16
# Of the histogram of each channel.
BINS = 8
# Given frames that are compared with, at most, and predicted ones at once.
MOST_KNOWN, AT_ONCE = 4096, 1024


def find_silhouettes(videos: Tensor, background: Tensor) -> Tensor:
    """Find what differs from the background.

    Args:
        videos: [b, t, 3, h, w] in [-1, 1].
        background: [b, 1, 3, h, w] in [-1, 1].
    Returns:
        [b, t, h, w] bool.
    """
    different = (videos - background).abs().amax(2) * 127.5 > DIFFERENT
    return different & (avg_pool2d(different.float(), 3, 1, 1) > 0.5)


def find_centers(silhouettes: Tensor) -> Tensor:
    """Centroids [b, t, xy] in pixels of silhouettes [b, t, h, w]; NaN where there is nobody."""
    mass = silhouettes.float()
    area = mass.sum((2, 3))
    sums = [mass.sum(dim) @ torch.arange(mass.shape[5 - dim], device=mass.device).float() for dim in (2, 3)]
    nobody = area < SMALLEST * silhouettes.shape[2] * silhouettes.shape[3]
    return (torch.stack(sums, -1) / area[..., None]).masked_fill(nobody[..., None], torch.nan)


def describe_looks(videos: Tensor, silhouettes: Tensor) -> Tensor:
    """Histograms of the colors of silhouettes, with linear weights between the two nearest bins.

    Args:
        videos: [b, t, 3, h, w] in [-1, 1].
        silhouettes: [b, t, h, w] bool.
    Returns:
        [b, t, 3 x bins] float32 on the CPU, shares of the area; NaN where there is nobody.
    """
    b, t, h, w = silhouettes.shape
    frame = torch.arange(b * t, device=videos.device).view(b, t, 1, 1).expand_as(silhouettes)[silhouettes]
    place = (rearrange(videos, "b t c h w -> b t h w c")[silhouettes].clamp(-1, 1) + 1) / 2 * (BINS - 1)
    below = place.floor().clamp(max=BINS - 2)
    number = (((frame[:, None] * 3 + torch.arange(3, device=frame.device)) * BINS) + below.long()).flatten()
    above, count = (place - below).flatten(), b * t * 3 * BINS
    sums = torch.bincount(number, 1 - above, count) + torch.bincount(number + 1, above, count)
    area = silhouettes.sum((2, 3)).view(-1, 1)
    looks = (sums.view(b * t, -1) / area).masked_fill(area < SMALLEST * h * w, torch.nan)
    return looks.view(b, t, -1).float().cpu()


def audit_silhouettes(found: Tensor, true: Tensor) -> dict[str, Tally]:
    """Compare silhouettes with the true ones.

    - `kept`: share of the clips whose silhouette's area is 0.5 to 2 times that of the true one.
    - `speed`: way of the centroid since the frame before, as a share of the true way.

    Args:
        found, true: [b, 1 + horizon, h, w] bool, of the last given frame and of the predicted ones.
    Returns:
        Measure -> [b, horizon]; of frames in which somebody truly is.
    """
    ways = [find_centers(silhouettes).diff(dim=1).norm(dim=-1) for silhouettes in (found, true)]
    area, true_area = (silhouettes[:, 1:].sum((2, 3)).double() for silhouettes in (found, true))
    somebody = true_area >= SMALLEST * true.shape[2] * true.shape[3]
    kept = somebody & (area >= KEPT_AREA[0] * true_area) & (area <= KEPT_AREA[1] * true_area)
    both = torch.isfinite(ways[0] + ways[1])
    return {
        "kept": Tally(kept.double(), somebody.double()),
        "speed": Tally(*(way.double().where(both, 0.0) for way in ways)),
    }


def same_person(looks: Tensor, persons: Tensor, known: Tensor) -> Tally:
    """Whether predicted people look most like given frames of the same person.

    Args:
        looks: [clips, horizon, d] of predicted frames; NaN where there is nobody.
        persons: [clips] int.
        known: [clips, n, d] of given frames of these clips; NaN where there is nobody.
    Returns:
        [clips, horizon] 1 if the nearest given frame, of all clips, shows the same person; Euclidean distance, each
        number in units of its standard deviation over the given frames.
    """
    owners = persons[:, None].expand(known.shape[:2])
    seen = torch.isfinite(known[..., 0])
    known, owners = known[seen], owners[seen]
    stride = -(-len(known) // MOST_KNOWN) or 1
    known, owners = known[::stride], owners[::stride]
    scale = known.std(0).clamp(min=0.01)
    there = torch.isfinite(looks[..., 0])
    asked = looks[there].split(AT_ONCE)
    nearest = [owners[torch.cdist(part / scale, known / scale).argmin(1)] for part in asked if len(part)]
    right = torch.zeros(there.shape, dtype=torch.float64)
    if nearest:
        right[there] = (torch.cat(nearest) == persons[:, None].expand(there.shape)[there]).double()
    return Tally(right, there.double())


def number_persons(clips: Sequence[Clip]) -> Tensor:
    """[clips] int64: equal for clips of one person; -1 where the data set does not say."""
    persons = [clip.recording.person for clip in clips]
    return torch.tensor([-1 if person is None else zlib.crc32(person.encode()) for person in persons])


class SilhouetteAudit(Measure):
    """The audit of the silhouettes of all subjects.

    Records: `<measure> <subject>` -> [clips, horizon, 2], total and count of `Tally`, added up over samples; `looks
    <subject>` -> [clips, horizon, d] of the first sample; `known` -> [clips, n, d] looks of the given frames and of
    their reconstructions; `person` -> [clips]; `moving` -> [clips], share of true frames that differs from the
    background.
    """

    name, part = "silhouettes", "silhouettes"

    def measure(self, batch: ClipBatch) -> Records:
        context, frames = batch.given.shape[1], torch.cat([batch.given, batch.truth], 1)
        background = frames[:, :: -(-frames.shape[1] // FRAMES_OF_MEDIAN)].median(1, keepdim=True).values
        true = find_silhouettes(frames, background)
        known = [describe_looks(batch.given, true[:, :context])]
        if batch.autoencoded is not None:
            # A decoder changes the looks of everything, so its own pictures of the given frames are known, too.
            decoded = batch.autoencoded[:, :context]
            known.append(describe_looks(decoded, find_silhouettes(decoded, background)))
        records: Records = {
            "moving": true.double().mean((1, 2, 3)).cpu(),
            "person": number_persons(batch.clips),
            "known": torch.cat(known, 1),
        }
        for subject, samples in batch.futures.items():
            found = [find_silhouettes(sample, background) for sample in samples.unbind(1)]
            last = true[:, context - 1 :]
            audits = [audit_silhouettes(torch.cat([last[:, :1], silhouettes], 1), last) for silhouettes in found]
            for measure in audits[0]:
                tallies = [torch.stack([audit[measure].total, audit[measure].count], -1) for audit in audits]
                records[f"{measure} {subject}"] = torch.stack(tallies).sum(0).cpu()
            records[f"looks {subject}"] = describe_looks(samples[:, 0], found[0])
        return records

    def results(self, records: Records, counts: Tensor | None) -> dict[str, MetricValues]:
        still = (records["moving"] <= STILL) & (records["kept prediction"][..., 1].sum(1) > 0)
        if 2 * still.sum() < len(still):
            shaken = (records["moving"] > STILL).sum().item()
            raise ValueError(
                f"the background moves in {shaken} of {len(still)} clips, and nothing in {(~still).sum() - shaken}"
            )
        persons, known = records["person"], records["known"].where(still[:, None, None], torch.nan)
        tallies: dict[str, dict[str, Tally]] = defaultdict(dict)
        for name, values in records.items():
            measure, _, subject = name.partition(" ")
            if measure == "looks":
                tallies["identity"][subject] = same_person(
                    values.where(still[:, None, None], torch.nan), persons, known
                )
            elif subject:
                tallies[measure][subject] = Tally(*(values * still[:, None, None]).unbind(-1))
        if persons.min() < 0 or len(persons[still].unique()) == 1:
            del tallies["identity"]
        return {measure: summarize(subjects, counts) for measure, subjects in tallies.items()}
