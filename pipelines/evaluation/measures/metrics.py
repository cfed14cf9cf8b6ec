"""Image metrics, one number per frame: PSNR, SSIM, LPIPS, and the gradient energy that sharpness compares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from pipelines.config import SSIM_WINDOW, RiverConfig
from pipelines.evaluation.measures.intervals import Tally, summarize
from pipelines.evaluation.measures.measure import ClipBatch, Measure, Records
from pipelines.evaluation.measures.networks import NO_VGG16, load_lpips
from pipelines.runtime.context import RunContext, computing_in
from pipelines.runtime.results import BestOf, Gain, MetricValues
from stage1_autoencoder.lpips import LPIPS, SMALLEST_SIDE

# Pixels per call of a metric: LPIPS holds some kB for each.
PIXELS_AT_ONCE = 2**18
SHARPNESS_DEFINITION = "gradient energy (mean squared difference of neighboring pixels), as a share of the true frames'"
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2
SSIM_DEFINITION = "Gaussian windows 11x11, sigma 1.5, inside the image; values in [0, 1], k1 0.01, k2 0.03"


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB, for signals in [-1, 1].

    Args:
        images: [n, 3, h, w] float; clamped to [-1, 1].
        truth: [n, 3, h, w] float in [-1, 1].
    Returns:
        [n]; at most 100 dB, which keeps means finite when an image has no error.
    """
    values = peak_signal_noise_ratio(
        images.clamp(-1, 1), truth, data_range=2.0, dim=(1, 2, 3), reduction="none", base=10.0
    )
    return torch.as_tensor(values).clamp(max=100.0)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image, by the standard definition: mean over channels and windows.

    Windows are Gaussian (11x11, sigma 1.5) and lie inside the image; values are in [0, 1], the data range is 1. It
    equals scikit-image's `structural_similarity` cropped by the window's radius. In float64, because variances are
    small differences of large numbers.

    Args:
        images: [n, 3, h, w] float; clamped to [-1, 1].
        truth: [n, 3, h, w] float in [-1, 1].
    Returns:
        [n] float64 in [-1, 1].
    Raises:
        ValueError: images smaller than the window.
    """
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of {SSIM_WINDOW} pixels a side, not {list(images.shape)}")
    x, y = (images.clamp(-1, 1).double() + 1) / 2, (truth.double() + 1) / 2
    rows, columns = (_window_weights(side, x) for side in x.shape[-2:])
    mean_x, mean_y, square_x, square_y, product = rows @ torch.stack([x, y, x * x, y * y, x * y]) @ columns.T
    variance_x, variance_y, covariance = square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y
    # Eq. 13 of Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    luminance = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (variance_x + variance_y + SSIM_C2)
    return (luminance * structure).mean((1, 2, 3))


def _window_weights(side: int, like: Tensor) -> Tensor:
    """[side - 10, side] weights of the pixels of a line in each window inside it; a 2-D window is their product."""
    pixel = torch.arange(side, device=like.device, dtype=like.dtype)
    offset = pixel - pixel[: side - SSIM_WINDOW + 1, None] - SSIM_WINDOW // 2
    weights = torch.exp(-0.5 * (offset / SSIM_SIGMA) ** 2) * (offset.abs() <= SSIM_WINDOW // 2)
    return weights / weights.sum(1, keepdim=True)


def ssim_8bit(images: Tensor, truth: Tensor) -> Tensor:
    """`ssim` of gray frames of 8 bits, as MCVD's code measures it.

    Predictions are truncated to 8 bits, as torchvision's `ToPILImage` does, and gray as Pillow's `convert("L")`.

    Args:
        images: [n, 3, h, w] float; clamped to [-1, 1].
        truth: [n, 3, h, w] float in [-1, 1], of 8 bits.
    Returns:
        [n] float64 in [-1, 1].
    """
    weights = torch.tensor([19595, 38470, 7471], device=images.device)[:, None, None]  # of Pillow, in 1 / 65536

    def gray(levels: Tensor) -> Tensor:
        return ((levels.long() * weights).sum(1, keepdim=True) + 2**15 >> 16) / 127.5 - 1

    # A copied frame is of whole levels but for the rounding of floats, which must not take it to the level below.
    levels = ((images.clamp(-1, 1).double() + 1) * 127.5 + 1e-3).floor()
    return ssim(gray(levels), gray(((truth.double() + 1) * 127.5).round()))


def gradient_energy(videos: Tensor) -> Tensor:
    """Mean squared difference to the right neighbor plus that to the lower one, of each frame.

    Of an edge that a blur spreads over k pixels the k-th part is left. (The sum of absolute differences would stay.)

    Args:
        videos: [b, n, 3, h, w] float; clamped to [-1, 1].
    Returns:
        [b, n] float64, on the CPU; 0 for a flat frame.
    """

    def of_images(images: Tensor) -> Tensor:
        images = images.float().clamp(-1, 1).contiguous()  # equal frames have equal sums, whatever their layout
        return images.diff(dim=-1).square().mean((1, 2, 3)) + images.diff(dim=-2).square().mean((1, 2, 3))

    return torch.stack([of_images(images) for images in videos.unbind(1)], dim=1).double().cpu()


@dataclass(frozen=True)
class Metric:
    """A distance or similarity of images.

    Attributes:
        name: its key in results.
        function: (images, truth), both [n, 3, h, w] in [-1, 1] -> [n].
        higher_is_better: whether a higher number means closer to the truth.
        to_truth: truth -> images -> [n], the same in two steps, of which the first is done once for all subjects.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    higher_is_better: bool
    to_truth: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None

    def compare_with(self, truth: Tensor) -> Callable[[Tensor], Tensor]:
        """Images -> [n], for truth and images [n, 3, h, w]."""
        return self.to_truth(truth) if self.to_truth else lambda images: self.function(images, truth)


PSNR, SSIM = Metric("psnr", psnr, True), Metric("ssim", ssim, True)
SSIM_8BIT = Metric("ssim_8bit", ssim_8bit, True)


def lpips_metric(network: Callable[[Tensor, Tensor], Tensor]) -> Metric:
    """LPIPS by a loaded network; images are clamped to [-1, 1] as for the others."""

    def to_truth(truth: Tensor) -> Callable[[Tensor], Tensor]:
        assert isinstance(network, LPIPS)
        theirs = network.maps(truth)
        return lambda images: network.compare(network.maps(images.clamp(-1, 1)), theirs).sum(0)

    def distance(images: Tensor, truth: Tensor) -> Tensor:
        return network(images.clamp(-1, 1), truth)

    return Metric("lpips", distance, False, to_truth if isinstance(network, LPIPS) else None)


def load_frame_metrics(config: RiverConfig, run_context: RunContext) -> tuple[list[Metric], dict[str, str]]:
    """PSNR, and SSIM and LPIPS if they can be measured; metric -> reason if they cannot.

    Raises:
        UserError, FetchError: see `load_lpips`.
    """
    side, metrics, missing = min(config.dataset.frame_size), [PSNR], {}
    if side < SSIM_WINDOW:
        missing["ssim"] = f"it is not defined for images of less than {SSIM_WINDOW} pixels a side (dataset.image_size)"
    else:
        metrics.append(SSIM)
    lpips = None
    if side < SMALLEST_SIDE:
        missing["lpips"] = f"it needs images of {SMALLEST_SIDE} pixels a side (dataset.image_size)"
    else:
        lpips = load_lpips(config.autoencoder.training.vgg_weights, run_context.device, download=run_context.download)
        if lpips is None:
            missing["lpips"] = NO_VGG16
    return metrics + ([] if lpips is None else [lpips_metric(lpips)]), missing


def measure_frames(metric: Metric, videos: Tensor, truth: Tensor) -> Tensor:
    """A metric of every frame, from float32 frames on the device of the videos.

    Args:
        videos, truth: [b, n, 3, h, w] in [-1, 1].
    Returns:
        [b, n] float, on the CPU.
    """
    return measure_futures(metric, {"videos": videos[:, None]}, truth)["videos"][:, 0]


def measure_futures(metric: Metric, futures: Mapping[str, Tensor], truth: Tensor) -> Records:
    """A metric of every frame of all subjects: subject -> [b, samples, n], see `measure_frames`.

    Args:
        futures: subject -> [b, samples, n, 3, h, w].
        truth: [b, n, 3, h, w].
    """
    videos = {
        (subject, sample): flatten(of_sample).float()
        for subject, of_subject in futures.items()
        for sample, of_sample in enumerate(of_subject.unbind(1))
    }
    parts: dict[tuple[str, int], list[Tensor]] = {key: [] for key in videos}
    size = max(1, PIXELS_AT_ONCE // (truth.shape[3] * truth.shape[4]))
    with computing_in("fp32", truth.device), torch.inference_mode():
        for number, targets in enumerate(flatten(truth).float().split(size)):
            compare = metric.compare_with(targets)
            for key, images in videos.items():
                parts[key].append(compare(images[number * size :][:size]))
    found = {key: torch.cat(of_frames).view(truth.shape[:2]).cpu() for key, of_frames in parts.items()}
    return {
        subject: torch.stack([found[subject, sample] for sample in range(of_subject.shape[1])], dim=1)
        for subject, of_subject in futures.items()
    }


def choose_best(values: Tensor, higher_is_better: bool) -> Tensor:
    """Best-of-K as SVG and SRVP report it: of each clip the sample whose mean over the horizon is best.

    Args:
        values: [clips, samples, horizon] of one metric, by which the sample is chosen.
    Returns:
        [clips, horizon] of the chosen samples.
    """
    means = values.double().mean(2)
    chosen = means.argmax(1) if higher_is_better else means.argmin(1)
    return values[torch.arange(len(values)), chosen]


def flatten(videos: Tensor) -> Tensor:
    """[b, n, 3, h, w] to [b n, 3, h, w]."""
    return rearrange(videos, "b n c h w -> (b n) c h w")


class FrameMeasure(Measure):
    """A metric of every predicted frame, of all subjects. Records: subject -> [clips, samples, horizon]."""

    def __init__(self, metric: Metric) -> None:
        self.metric, self.name = metric, metric.name

    def measure(self, batch: ClipBatch) -> Records:
        return measure_futures(self.metric, batch.futures, batch.truth)

    def results(self, records: Records, counts: Tensor | None) -> dict[str, MetricValues]:
        return {self.name: summarize_metric(self.metric, records, counts)}


class PooledErrorMeasure(FrameMeasure):
    """PSNR of the squared error averaged over all frames of a clip, as MCVD's code measures it.

    Records: subject -> [clips, samples, horizon], the PSNR of each frame.
    """

    def __init__(self) -> None:
        super().__init__(Metric("psnr_of_mean_mse", psnr, True))

    def results(self, records: Records, counts: Tensor | None) -> dict[str, MetricValues]:
        errors = {subject: (10 ** (-decibels.double() / 10)).mean(2) for subject, decibels in records.items()}
        clips = {subject: -10 * error.log10()[:, :, None] for subject, error in errors.items()}
        found = summarize_metric(self.metric, clips, counts)
        return {self.name: found.model_copy(update={"per_frame": None, "per_frame_interval": None})}


class SharpnessMeasure(Measure):
    """Gradient energy as a share of the true frames'. Records: subject -> [clips, horizon], mean over samples."""

    name = "sharpness"

    def measure(self, batch: ClipBatch) -> Records:
        energy = {subject: torch.stack([gradient_energy(x) for x in videos.unbind(1)]).mean(0)
                  for subject, videos in batch.futures.items()}  # fmt: skip
        return energy | {"truth": gradient_energy(batch.truth)}

    def results(self, records: Records, counts: Tensor | None) -> dict[str, MetricValues]:
        truth = records["truth"]
        tallies = {subject: Tally(energy, truth) for subject, energy in records.items() if subject != "truth"}
        return {self.name: summarize(tallies, counts)}


def summarize_metric(metric: Metric, values: Records, counts: Tensor | None) -> MetricValues:
    """One metric of all subjects, see `summarize`, its gains over the baselines, and its best-of-K.

    Args:
        values: by subject [clips, samples, horizon]; baselines have one sample.
        counts: [resamples, clips] of the bootstrap; None: no intervals.
    """
    means = {subject: of_samples.double().mean(1) for subject, of_samples in values.items()}
    found = summarize({subject: Tally.of_values(of_clips) for subject, of_clips in means.items()}, counts)
    sign = 1 if metric.higher_is_better else -1
    gains = {
        subject: summarize_gain(sign * (means["prediction"] - of_clips), counts)
        for subject, of_clips in means.items()
        if subject not in ("prediction", "reconstruction")
    }
    found = found.model_copy(update={"gains": gains})
    samples = values["prediction"].shape[1]
    if samples == 1:
        return found
    best = summarize(
        {"prediction": Tally.of_values(choose_best(values["prediction"], metric.higher_is_better))}, counts
    )
    assert best.per_frame is not None
    best_of = BestOf(
        samples=samples,
        value=best.prediction,
        per_frame=best.per_frame["prediction"],
        interval=(best.interval or {}).get("prediction"),
    )
    return found.model_copy(update={"best_of": best_of})


def summarize_gain(gains: Tensor, counts: Tensor | None) -> Gain:
    """Differences [clips, horizon] that are positive where predictions are better than a baseline."""
    found = summarize({"prediction": Tally.of_values(gains)}, counts)
    assert found.per_frame is not None
    return Gain(
        value=found.prediction,
        better=(gains.mean(1) > 0).double().mean().item(),
        per_frame=found.per_frame["prediction"],
        interval=(found.interval or {}).get("prediction"),
    )
