"""Results of `evaluate` and `study` in the folder of a run: `evaluation.json` and `quality.json`."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

# Lower and upper end of a 95 % interval.
Interval = tuple[float, float]


class Result(BaseModel):
    """A JSON file or a part of one. Keys that a later version adds are ignored; NaN is written as NaN, not as null."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class OptionalParts(Result):
    """A part whose fields are left out of the file where they are None."""

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class BestOf(OptionalParts):
    """Best of several samples, chosen per clip by the metric itself.

    Attributes:
        samples: per clip.
        value: mean over clips and frames.
        per_frame: [horizon] means over clips.
    """

    samples: int
    value: float
    per_frame: list[float]
    interval: Interval | None = None


class Gain(OptionalParts):
    """How much better predictions are than a baseline: differences on the same clips.

    Attributes:
        value: mean over clips, samples and frames, in units of the metric; positive is better.
        better: share of the clips that are better in the mean over their samples and frames.
        per_frame: [horizon] means over clips and samples.
        interval: of the value; None where there are too few recordings.
    """

    value: float
    better: float
    per_frame: list[float]
    interval: Interval | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the predictions are better, and the interval, if there is one, says so."""
        return self.value > 0 and (self.interval is None or self.interval[0] > 0)


class Distances(OptionalParts):
    """Distances between sets of videos, by subject; the fields with a title are `SUBJECTS`.

    Attributes:
        resampled: subject -> the number in each bootstrap resample, for differences. It is not written.
    """

    prediction: float | None = Field(None, title="prediction")
    copy_last: float | None = Field(None, title="copying the last frame")
    constant_motion: float | None = Field(None, title="constant motion")
    nearest_clip: float | None = Field(None, title="nearest training clip")
    reconstruction: float | None = Field(None, title="autoencoder's reconstruction")
    interval: dict[str, Interval] | None = None
    resampled: dict[str, list[float]] | None = Field(None, exclude=True, repr=False)


# What is compared: the prediction and its baselines, by name -> title.
SUBJECTS = {name: field.title for name, field in Distances.model_fields.items() if field.title is not None}


class MetricValues(Distances):
    """One metric: per subject the mean over clips, samples and frames.

    Attributes:
        per_frame: subject -> [horizon] means over clips and samples; None for a distance between sets.
        interval, per_frame_interval: subject -> 95 % interval(s); None where there are too few recordings.
        best_of: None where there is one sample per clip.
        gains: by baseline; None where a metric is of no single frame, or neither more nor less is better.
        autoencoded: of FVD, the distances to autoencoded instead of real videos.
    """

    prediction: float
    per_frame: dict[str, list[float]] | None = None
    per_frame_interval: dict[str, list[Interval]] | None = None
    best_of: BestOf | None = None
    gains: dict[str, Gain] | None = None
    autoencoded: Distances | None = None


class Calibration(OptionalParts):
    """Whether the samples of a clip differ as much as they err.

    Attributes:
        samples: K per clip.
        spread_skill: deviation of the samples over the error of their mean, times sqrt((K + 1) / K); 1 is calibrated.
        ranks: [K + 1] share of the pixels' values with 0..K samples below them, but for those that all samples have
            right; calibrated samples have equal shares.
        ranks_interval: 95 % intervals of `ranks`; None where there are too few recordings.
    """

    samples: int
    spread_skill: MetricValues
    ranks: list[float]
    ranks_interval: list[Interval] | None = None

    @property
    def outside(self) -> float:
        """Share of the values that lie below or above all samples; 2 / (K + 1) if calibrated."""
        return self.ranks[0] + self.ranks[-1]


class Memorization(OptionalParts):
    """How near predictions are to the training clips, see `nearest_clips.MemorizationMeasure`; means over clips.

    Distances are root mean squares of final latents over the horizon.

    Attributes:
        prediction, truth: distance to the nearest training clip.
        error: distance between prediction and truth.
        nearer: share of the predictions that are nearer to a training clip than their truth is; 0.5 for a perfect
            predictor, more for one that memorizes or blurs.
        smallest: `prediction` and `truth` -> smallest distance to a training clip; about 0 for a copy.
        interval: of the first four.
        training_clips: number of them, as long as the horizon.
        store_fingerprint: of the store that has them.
    """

    prediction: float
    truth: float
    error: float
    nearer: float
    smallest: dict[str, float]
    interval: dict[str, Interval] | None = None
    training_clips: int
    store_fingerprint: str


class Protocol(Result):
    """What decides the numbers of an evaluation and of a study, whatever predicts: the frames, and what is measured.

    Attributes:
        recordings: number of files or drawn videos that the clips were cut from.
        persons: number of people in them; None where the data set does not say.
        ssim: its definition; None where it was not measured.
        interval: how intervals were made; None where there are none.
        missing: metric, or `interval`, that was not measured -> reason.
        image_size: side of square frames, or [height, width].
        autoencoder_sha256: of the one that reconstructions and latents are of; None: there is none.
    """

    dataset: str
    split: str
    recordings: int
    persons: int | None
    ssim: str | None
    interval: str | None
    missing: dict[str, str]
    window: str
    context: int
    horizon: int
    image_size: int | list[int]
    autoencoder_sha256: str | None
    device: str

    def describe_recordings(self) -> str:
        """What the clips were cut from: `60 recordings of 5 persons`."""
        parts = [f"{self.recordings} recording{'s' if self.recordings > 1 else ''}"]
        parts += [f"{self.persons} person{'s' if self.persons > 1 else ''}"] if self.persons else []
        return " of ".join(parts)


class RunPredictor(Result):
    """A run as what predicts: its weights and its sampler.

    Attributes:
        decoder_sha256: of the fast decoder; None: predicted frames are decoded by the autoencoder.
        nfe: evaluations of the vector field per predicted frame.
        description: of the sampler, in words.
    """

    flow_step: int
    flow_sha256: str
    flow_origin: dict[str, Any]
    store_fingerprint: str | None
    autoencoder_sha256: str
    refine: bool
    refiner_step: int | None
    refiner_sha256: str | None
    decoder_sha256: str | None = None
    sampling: dict[str, Any]
    seed: int
    nfe: int
    precision: str
    description: str

    def describe(self) -> str:
        """In a few words."""
        return f"flow at step {self.flow_step}, {self.description}"


class FilePredictor(Result):
    """Any other predictor, known by the files that it wrote.

    Attributes:
        path: as it was given.
        sha256: over the names of the measured clips and the content of their files.
        black: the value of black in arrays of floats; None: there are none.
    """

    path: str
    sha256: str
    black: int | None

    def describe(self) -> str:
        """In a few words."""
        return f"predictions in {self.path}"


class EvaluationProtocol(Protocol):
    """Everything that decides the numbers of an evaluation.

    Attributes:
        predictor: what predicts.
        protocol: `evaluation.protocol`, with the settings that differ from it.
        differs: what is done otherwise than in the published code, whatever the settings.
        pitfalls: name of a metric that is computed as published code does -> its definition.
        clips, videos: how many were measured; with `dataset.sequences`, several videos are cut from one recording.
        fps: that videos were resampled to (`dataset.fps`); None: they were not.
        sharpness, scores, latent_frechet, features: their definitions; None where they were not measured.
    """

    predictor: RunPredictor | FilePredictor
    protocol: str | None
    differs: list[str] = []
    pitfalls: dict[str, str] = {}
    clips: int
    videos: int
    window_seed: int
    samples: int
    aggregation: str
    best_of: str | None
    sharpness: str | None = None
    scores: str | None = None
    latent_frechet: str | None = None
    pixels: str
    fps: float | None = None
    frame_step: int
    resize: dict[str, Any]
    vgg_sha256: str | None
    st_lpips_sha256: str | None = None
    features: str | None = None
    fvd: dict[str, Any] | None
    torch: str


def _difference_text(gain: Gain) -> str:
    ends = "" if gain.interval is None else f" (95 %: {gain.interval[0]:.2f} to {gain.interval[1]:.2f})"
    return f"{abs(gain.value):.2f} dB {'better' if gain.value >= 0 else 'WORSE'}{ends}"


class Evaluation(OptionalParts):
    """`evaluation.json`: metric (`psnr`, `sharpness`, `fvd`...) -> values, and the protocol they belong to.

    Attributes:
        objects: measure of `object_audit.audit_objects` and `audit_bounces` -> values; None for videos that are no
            `shapes`.
        silhouettes: measure of `silhouette_audit.SilhouetteAudit` -> values; None for `shapes`, and where backgrounds
            move.
        calibration: None where there is one sample per clip.
        clips: name of each clip -> its gain in PSNR over copying.
        memorization: None without the store of the training videos.
    """

    protocol: EvaluationProtocol
    metrics: dict[str, MetricValues]
    objects: dict[str, MetricValues] | None = None
    silhouettes: dict[str, MetricValues] | None = None
    calibration: Calibration | None = None
    clips: dict[str, float] | None = None
    memorization: Memorization | None = None

    def describe_gain(self) -> str | None:
        """The gain in PSNR in a sentence: how much, in how many clips, from which frame on there is none."""
        gains = self.metrics["psnr"].gains
        if gains is None:
            return None
        gain, clips = gains["copy_last"], self.protocol.clips
        text = (
            f"The prediction is {_difference_text(gain)} than copying the last frame, and better in "
            f"{round(gain.better * clips)} of {clips} clips"
        )
        useful = next((n for n in range(len(gain.per_frame), 0, -1) if gain.per_frame[n - 1] > 0), 0)
        if useful < len(gain.per_frame):
            text += f"; after frame +{useful} it is no better" if useful else "; it is better at no frame"
        if "constant_motion" in gains:
            text += f". It is {_difference_text(gains['constant_motion'])} than constant motion"
        return f"{text}."


class Difference(OptionalParts):
    """A metric's difference to that of the reference, on the same clips.

    Attributes:
        interval: 95 %, of the same bootstrap resamples for both; None where there are too few recordings.
    """

    value: float
    interval: Interval | None = None


class Comparison(Result):
    """`comparison.json`: several predictors on the same clips.

    Attributes:
        evaluations: predictor, as it was named, -> its evaluation. All have one protocol, but for the predictor.
        reference: the predictor that differences are taken to.
        differences: part of `Evaluation` -> metric -> predictor, or baseline of `SUBJECTS` -> difference.
    """

    evaluations: dict[str, Evaluation] = Field(min_length=1)
    reference: str
    differences: dict[str, dict[str, dict[str, Difference]]]


class StudyPoint(Result):
    """One sampler setting and its quality.

    Attributes:
        key: the setting as JSON; a point is kept by a later study that measures the same key.
        nfe: evaluations of the vector field per predicted frame.
        whole: share of the clips in which every shape is whole, mean over predicted frames, see
            `object_audit.audit_objects`; None for videos whose shapes are not known.
        score: see `sampler_study.score_points`; None until all points are measured.
        *_difference: mean difference to the reference point on the same clips; None, as the metric, if not measured.
        *_interval: None where there are too few recordings.
        per_clip: metric -> [clips]; of sharpness, whose mean is over gradients and not over clips, each clip's share.
        frechet_resampled: the distance of each bootstrap resample.
        milliseconds_per_frame: of predicting all clips at once, without decoding.
    """

    key: str
    solver: str
    warm_start: float
    condition: str
    seed: int
    preset: str
    steps: int
    nfe: int = Field(gt=0)
    psnr: float
    psnr_interval: Interval | None
    psnr_difference: float
    psnr_difference_interval: Interval | None
    ssim: float | None = None
    ssim_interval: Interval | None = None
    ssim_difference: float | None = None
    ssim_difference_interval: Interval | None = None
    lpips: float | None = None
    lpips_interval: Interval | None = None
    lpips_difference: float | None = None
    lpips_difference_interval: Interval | None = None
    sharpness: float
    sharpness_interval: Interval | None
    sharpness_difference: float
    sharpness_difference_interval: Interval | None
    frechet: float
    frechet_interval: Interval | None
    frechet_difference: float
    frechet_difference_interval: Interval | None
    whole: float | None
    score: float | None = None
    frechet_resampled: list[float]
    per_clip: dict[str, list[float]]
    milliseconds_per_frame: float

    @property
    def is_plain(self) -> bool:
        """Whether solver and number of evaluations are the only choices that differ from the defaults."""
        return self.warm_start == 0 and self.condition == "per-evaluation"

    def describe(self) -> str:
        """The sampler setting in a few words, without the number of evaluations and the seed."""
        words = [self.solver]
        words += [f"warm start {self.warm_start:g}"] if self.warm_start else []
        words += ["one condition per frame"] if self.condition == "per-frame" else []
        words += ["official grid"] if self.preset == "official" else []
        return ", ".join(words)


class StudyProtocol(Protocol):
    """Everything but the sampler settings that decides the numbers of a study.

    Attributes:
        clips: names of the clips.
    """

    flow_step: int
    flow_sha256: str
    precision: str
    clips: list[str]
    past_horizon: int | None
    frechet: str
    sharpness: str


class Study(Result):
    """`quality.json`: quality per sampler setting.

    Attributes:
        reference: index of the point that differences are taken to.
        chosen: index of the point whose sampler the run's predictions use; None until all are measured, and if no score
            is a number.
    """

    protocol: StudyProtocol
    points: list[StudyPoint] = Field(min_length=1)
    reference: int = Field(ge=0)
    chosen: int | None = Field(ge=0)

    @model_validator(mode="after")
    def _points_exist(self) -> Self:
        if max(self.reference, self.chosen or 0) >= len(self.points):
            raise ValueError(
                f"reference {self.reference} or chosen {self.chosen} is no index of {len(self.points)} points"
            )
        return self

    @property
    def choice(self) -> StudyPoint | None:
        """The chosen point."""
        return None if self.chosen is None else self.points[self.chosen]

    def solver_line(self, solver: str) -> list[StudyPoint]:
        """The points that differ from the reference only in solver and evaluations, by evaluations."""
        seed = self.points[self.reference].seed
        line = [point for point in self.points if point.solver == solver and point.is_plain and point.seed == seed]
        return sorted(line, key=lambda point: point.nfe)
