"""The Python API: predict videos from images or latents with a trained run."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from pipelines.config import RiverConfig
from pipelines.errors import UserError
from pipelines.loading import PredictorParts, load_run
from pipelines.official.official_networks import OFFICIAL_HEADS
from pipelines.official.parts import OfficialFiles, load_official
from pipelines.prediction.detail import restore_detail
from pipelines.prediction.frame_coding import DIVERGED, FrameCoding, check_finite, packed_for
from pipelines.prediction.pictures import to_video as to_video  # of this API
from pipelines.prediction.rollouts import FieldRollouts, overlapped, refine_frames
from pipelines.runtime.context import RunContext, fastest_threads, in_full_precision, resolve_device, sampling_precision
from pipelines.runtime.progress import progress, say
from pipelines.sharing.transfer import cached_run
from stage1_autoencoder.fast_decoder import FastDecoder
from stage1_autoencoder.rcan import RCAN
from stage2_flow.conditioning import FrameDraws, draw_frames, known_frames, make_draws, past_window
from stage2_flow.config import SAMPLER_KEYS, SamplingConfig
from stage2_flow.sampling_plan import SamplingPlan
from stage2_flow.vector_field import POSITIONS

# From how many frames an endless rollout draws its conditions, where neither training nor options know a bound.
ENDLESS_HORIZON = 1024


class VideoPredictor(FrameCoding, PredictorParts):
    """An autoencoder and a vector field that were trained together; attributes as `PredictorParts`."""

    @classmethod
    def from_run(
        cls, run: str | Path, device: str | torch.device = "auto", *, weights: Literal["ema", "raw"] | None = None
    ) -> "VideoPredictor":
        """Load the checkpoints of a run folder: the best ones by validation, else the newest.

        A refiner that was trained for another autoencoder is not loaded; asking for it is then an error.

        Args:
            run: for example `runs/kth`, with `autoencoder/`, `flow/`, `config.yaml`, and optionally `refiner/`; or a
                named run in it, `runs/kth/wide`, which uses that autoencoder.
            device: `auto`, `cpu`, `cuda`.
            weights: of the vector field: the average, if the training kept one, or those of the last step; None: as the
                run's `sampling.weights` says. The run's settings may leave the sampler to the choice of `study`, which
                is of averaged weights.
        Raises:
            UserError: a part of the run is missing, or its flow was trained on another autoencoder's latents.
        """
        return cls(**vars(load_run(Path(run), resolve_device(str(device)), weights)))

    @classmethod
    def from_official(
        cls,
        model: str | Path,
        autoencoder: str | Path | None = None,
        refiner: str | Path | None = None,
        device: str | torch.device = "auto",
        *,
        heads: int = OFFICIAL_HEADS,
    ) -> "VideoPredictor":
        """Load a released model without a configuration: all sizes are read off the shapes.

        It predicts as the official code does: raw latents, preset official. The files do not contain `fps`: it is 25,
        or 5 with the custom VQ-VAE, whose model was trained on every fifth frame.

        Args:
            model: the main model, `model.pth`.
            autoencoder: `vqvae.ckpt` or `vqvae.pth`; ignored if the model contains one.
            refiner: a refiner's `.pth`.
            device: `auto`, `cpu`, `cuda`.
            heads: attention heads, the one size that shapes do not tell.
        Raises:
            UserError: no such file; another format than the official code writes; a model without its autoencoder;
                files that do not belong together; heads that do not divide the width.
        """
        files = OfficialFiles(Path(model), *(path and Path(path) for path in (autoencoder, refiner)))
        return cls(**vars(load_official(files, resolve_device(str(device)), heads=heads)))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str | torch.device = "auto", cache: str | Path | None = None
    ) -> "VideoPredictor":
        """Load a released run, as `river push` makes them, from wherever it is. It is compared with its digests.

        Args:
            source: a folder, `s3://bucket/prefix`, `hf://user/name`, a version of it, `hf://user/name@revision`, or the
                name of a model that comes with the program, `shapes-small`.
            device: `auto`, `cpu`, `cuda`.
            cache: folder of copies of what is not local; None: `river-two-stage` in the user's folder of caches.
                Without a connection the last copy is used.
        Raises:
            UserError: no released run is there, or a damaged, foreign or newer one; a package is missing.
            OSError: it cannot be reached, and there is no copy.
        """
        return cls.from_run(cached_run(str(source), None if cache is None else Path(cache)), device)

    def sampling_with(self, changes: Mapping[str, Any] | SamplingConfig | None) -> SamplingConfig:
        """The run's sampling options with some of them changed.

        A sampler that `study` chose is one choice: a change of one of `SAMPLER_KEYS` puts the defaults in its place.

        Raises:
            UserError: an unknown option or a value out of range.
        """
        if isinstance(changes, SamplingConfig):
            return changes
        changes = dict(changes or {})
        if changes.get("weights", self.sampling.weights) != self.sampling.weights:
            raise UserError(
                f"sampling {changes}: weights are chosen when they are loaded: "
                f"VideoPredictor.from_run(..., weights={changes['weights']!r})"
            )
        # A preset decides solver and steps, so those of the run are dropped.
        dropped = {"solver", "steps", "nfe"} if "preset" in changes else set()
        if "steps" in changes:
            dropped |= {"nfe"}
        if self.sampler_is_chosen and changes.keys() & SAMPLER_KEYS:
            dropped |= SAMPLER_KEYS
        kept = self.sampling.model_dump(exclude=dropped)
        try:
            return SamplingConfig.model_validate(kept | changes)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
            raise UserError(f"sampling {changes}: {problems}") from None

    def generate_frames(
        self,
        images: Tensor,
        num_frames: int,
        *,
        sampling: Mapping[str, Any] | SamplingConfig | None = None,
        keys: Sequence[tuple[int, int]] | None = None,
        samples: int = 1,
        refine: bool = False,
        verbose: bool = False,
    ) -> Tensor:
        """Continue videos.

        Args:
            images: [b, n, 3, h, w] float in [-1, 1], n >= 1 context frames; sides are multiples of
                `autoencoder.downsampling`.
            num_frames: frames to predict.
            sampling: options that differ from the run's, such as {"steps": 20, "warm_start": 0.3}.
            keys: (video, sample) of each row, which decide its random draws; default (row, 0).
            samples: predictions per row, one after the other: number i has the draws of (video, sample + i).
            refine: apply the refiner to the predicted frames; predicted latents stay the same.
            verbose: show a progress bar.
        Returns:
            [b samples, n + num_frames, 3, h, w] float in [-1, 1] on the device, reconstructions of the context and then
            the prediction.
        Raises:
            UserError: images of another shape or range; `refine` without a refiner; decoder fast without one; NaN or
                inf, as `check_finite` says, in what is given or computed.
        """
        if refine:
            self.check_refiner()
        else:
            self._decoder_of(self.sampling_with(sampling))
        context = self._encode_context(images)
        latents = self.generate_latents(
            context, num_frames, sampling=sampling, keys=keys, samples=samples, verbose=verbose
        )
        given = images.repeat_interleave(samples, dim=0)
        predicted = self.decode_predictions(latents, given, sampling=sampling, refine=refine)
        return torch.cat([self.decode_videos(latents[:, : images.shape[1]]), predicted], 1)

    def stream(
        self,
        images: Tensor,
        *,
        sampling: Mapping[str, Any] | SamplingConfig | None = None,
        keys: Sequence[tuple[int, int]] | None = None,
        samples: int = 1,
    ) -> Iterator[Tensor]:
        """Continue videos without end: each frame is computed when it is asked for, and memory stays the same.

        All rows are predicted together. Where neither training nor `past_horizon` bounds how far back conditions are,
        they are drawn from the last `ENDLESS_HORIZON` frames, which is said once.

        Args:
            images, sampling, keys, samples: as in `generate_frames`.
        Returns:
            One predicted frame after the other, [b samples, 3, h, w] float in [-1, 1] on the device, as in
            `generate_frames` without its context. Closing the iterator (or no longer using it) frees its memory.
        Raises:
            UserError: as `generate_frames`; NaN or inf in what is computed is raised at the frame where it begins.
        """
        context = self._encode_context(images)
        rows, given = self._check_rows(context, keys, samples), images.shape[1]
        options = self.resolved_sampling(self.sampling_with(sampling), given, None)
        self._decoder_of(options)
        try:
            nfe, shape = SamplingPlan.from_config(options).evaluations, tuple(context.shape[2:])
            draws = draw_frames(
                options.seed, rows, nfe, given, shape, options.past_horizon, condition=options.condition
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        images, context = (part.to(self.device).repeat_interleave(samples, dim=0) for part in (images, context))
        return self._stream(images, context, options, draws, samples)

    def _stream(
        self, given: Tensor, context: Tensor, options: SamplingConfig, draws: Iterable[FrameDraws], samples: int
    ) -> Iterator[Tensor]:
        decoder = self._decoder_of(options)
        reconstructed = self._decode_by(options, context) if options.restore_detail else None

        @torch.inference_mode()
        def decode(numbered: tuple[int, Tensor]) -> Tensor:
            number, final = numbered
            raw = self.standardization.to_raw(final)[:, None]
            self._check_predicted(raw, samples, number)
            frame = self._decode(raw, decoder).clamp(-1, 1)
            return (frame if reconstructed is None else restore_detail(frame, given, reconstructed))[:, 0]

        with closing(self._rollouts.stream(self.standardization.to_final(context), options, draws)) as latents:
            numbered = enumerate(latents, start=context.shape[1])
            light = decoder is not None
            for frame in overlapped(decode, numbered, self.device, options.precision, self.threads, light):
                yield frame.clone()  # unlike inference tensors, it can be changed

    def _encode_context(self, images: Tensor) -> Tensor:
        """Raw latents of given images, which are checked."""
        if images.ndim != 5 or images.shape[2] != 3:
            raise UserError(f"images must be [b, n, 3, h, w], not {list(images.shape)}")
        if 0 in images.shape or not images.is_floating_point():
            raise UserError(f"images must be at least one frame of floats, not {list(images.shape)} of {images.dtype}")
        check_finite("images", images)
        if images.amin() < -1.001 or images.amax() > 1.001:
            raise UserError(
                f"images must be in [-1, 1], these range from {images.amin():.3g} to {images.amax():.3g}; convert "
                "uint8 frames by x / 127.5 - 1"
            )
        try:
            return self.encode_videos(images)
        except ValueError as error:
            raise UserError(str(error)) from None

    def generate_latents(
        self,
        context: Tensor,
        num_frames: int,
        *,
        sampling: Mapping[str, Any] | SamplingConfig | None = None,
        keys: Sequence[tuple[int, int]] | None = None,
        samples: int = 1,
        noise: Tensor | None = None,
        condition_indices: Tensor | None = None,
        verbose: bool = False,
    ) -> Tensor:
        """Continue videos of latents.

        Args:
            context: [b, n, c, h, w] raw latents.
            num_frames: frames to predict.
            sampling, keys, samples, verbose: as in `generate_frames`.
            noise: [num_frames, b samples, c, h, w], instead of drawn noise.
            condition_indices: [num_frames, nfe, b samples] int64, instead of drawn ones.
        Returns:
            [b samples, n + num_frames, c, h, w] raw latents, not quantized; the context is unchanged.
        Raises:
            UserError: sampling options or shapes that do not fit; NaN or inf in what is given or predicted.
        """
        options = self.sampling_with(sampling)
        if num_frames < 1:
            raise UserError(f"num_frames {num_frames} must be at least 1")
        rows = self._check_rows(context, keys, samples)
        if noise is not None:
            check_finite("noise", noise.transpose(0, 1), samples)
        context = context.to(self.device).repeat_interleave(samples, dim=0)
        total = num_frames * len(context)
        try:
            if condition_indices is None:
                options = self.resolved_sampling(options, context.shape[1], num_frames)
            draws = make_draws(
                options.seed,
                rows,
                num_frames,
                SamplingPlan.from_config(options).evaluations,
                context.shape[1],
                tuple(context.shape[2:]),
                options.past_horizon,
                self.device,
                condition=options.condition,
            )
            if noise is not None:
                draws = replace(draws, noise=noise.to(self.device))
            if condition_indices is not None:
                draws = replace(draws, condition_indices=condition_indices.to(self.device))
            with progress(total=total, description="predict", unit="frame") if verbose else nullcontext() as bar:
                final = self._rollouts.generate(
                    self.standardization.to_final(context),
                    num_frames,
                    options,
                    draws,
                    on_frames=bar.update if verbose else None,
                )
        except ValueError as error:
            raise UserError(str(error)) from None
        raw = self.standardization.to_raw(final)
        self._check_predicted(raw, samples)
        raw[:, : context.shape[1]] = context  # bit for bit, without rounding
        return raw

    def _check_predicted(self, raw: Tensor, samples: int, first: int = 0) -> None:
        way_out = f"{DIVERGED}, or predict with sampling.precision=fp32"
        check_finite("predicted latents", raw, samples, way_out, first)

    def _check_rows(
        self, context: Tensor, keys: Sequence[tuple[int, int]] | None, samples: int
    ) -> list[tuple[int, int]]:
        """The (video, sample) of each row to predict from a context of latents, which is checked."""
        if context.ndim != 5:
            raise UserError(f"context must be [b, n, c, h, w], not {list(context.shape)}")
        if samples < 1:
            raise UserError(f"samples {samples} must be at least 1")
        keys = [(row, 0) for row in range(len(context))] if keys is None else keys
        if len(keys) != len(context):
            raise UserError(f"{len(keys)} keys for {len(context)} videos: each row needs its own (video, sample)")
        self._check_grid(*context.shape[-2:])
        check_finite("context", context)
        return [(video, first + number) for video, first in keys for number in range(samples)]

    def resolved_sampling(self, options: SamplingConfig, context: int, num_frames: int | None) -> SamplingConfig:
        """Sampling options as a prediction uses them: in which precision, and from how many past frames.

        Conditions are not farther away than the field was trained for, which is said once. With preset official they
        may be, since the official code draws from all frames. A rollout without end draws from a bounded number.

        Args:
            context: number of given frames.
            num_frames: number of frames to predict; None: without end.
        """
        options = options.model_copy(update={"precision": sampling_precision(options, self.device)})
        longest, horizon = self.longest_distance, options.past_horizon or sys.maxsize
        bounded = longest is not None and options.preset != "official"
        if num_frames is None and not bounded and horizon > ENDLESS_HORIZON:
            self._say_once(f"conditions are drawn from the last {ENDLESS_HORIZON} frames: memory is bounded")
            options = options.model_copy(update={"past_horizon": ENDLESS_HORIZON})
        length = sys.maxsize if num_frames is None else known_frames(context) + num_frames - 1
        reached = past_window(length, options.past_horizon).count
        if longest is None or reached <= longest:
            return options
        if options.preset == "official":
            self._say_once(f"preset official: conditions up to {reached} frames back, and training knew {longest}")
            return options
        self._say_once(f"conditions are drawn from the last {longest + 1} frames: training knew none farther back")
        return options.model_copy(update={"past_horizon": longest + 1})

    def choose_threads(self, clips: int) -> None:
        """Compute on a CPU with as many threads as predict fastest now, which is measured in less than a second.

        The last digits of predictions may depend on it.

        Args:
            clips: predicted at once.
        """
        if self.device.type != "cpu":
            return
        grid = self.trained_grid or (8, 8)
        options = SamplingConfig(solver="euler", nfe=1, precision=self.sampling.precision)

        def predict(clips: int) -> None:
            context = torch.zeros(clips, 2, self.vector_field.latent_channels, *grid)
            self.decode_videos(self.generate_latents(context, 1, sampling=options)[:, 2:])

        self.threads = self._rollouts.threads = fastest_threads(predict, clips)

    def describe_threads(self) -> str:
        """How many threads predict on a CPU, for the end of a line; empty on a GPU."""
        threads = self.threads or torch.get_num_threads()
        return "" if self.device.type != "cpu" else f", {threads} thread{'s' if threads > 1 else ''}"

    def _check_grid(self, height: int, width: int) -> None:
        """Say where the field has never seen positions of the latents; refuse what it has no position codes for."""
        if max(height, width) > POSITIONS:
            raise UserError(
                f"latents of {height}x{width}: the vector field has position codes for {POSITIONS} per side: use "
                "smaller frames"
            )
        rows, columns = self.trained_grid or (POSITIONS, POSITIONS)
        if height > rows or width > columns:
            self._say_once(
                f"latents of {height}x{width}, and the field was trained on {rows}x{columns}: position codes beyond "
                "the former size are random"
            )

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            say(message)

    @cached_property
    def _said(self) -> set[str]:
        return set()

    @cached_property
    def _rollouts(self) -> FieldRollouts:
        return FieldRollouts(self.vector_field, self.device, self.threads)

    @torch.inference_mode()
    @in_full_precision
    def decode_predictions(
        self,
        latents: Tensor,
        given: Tensor,
        *,
        sampling: Mapping[str, Any] | SamplingConfig | None = None,
        refine: bool = False,
    ) -> Tensor:
        """Decode the frames after the given ones, with what is known of these.

        Args:
            latents: [b, k + n, c, h, w] raw latents, those of the given frames first.
            given: [b, k, 3, h f, w f] float in [-1, 1], the real first frames of the videos, k >= 1.
            sampling: options that differ from the run's; `decoder` and `restore_detail` are used.
            refine: apply the refiner to what the full decoder returns. Detail is not restored then: that is what the
                refiner is trained for.
        Returns:
            [b, n, 3, h f, w f] images in [-1, 1].
        Raises:
            UserError: `refine` without a refiner; decoder fast without one; NaN or inf in latents or pixels.
        """
        context, given = given.shape[1], given.to(self.device)
        if refine:
            refiner = self.check_refiner()
            refined = refine_frames(refiner, given[:, -1], self._decode(latents[:, context:]))
            check_finite("pixels of the refiner", refined, way_out=DIVERGED)
            return refined
        options = self.sampling_with(sampling)
        shown = self._decode_by(options, latents[:, context:])
        if options.restore_detail:
            return restore_detail(shown, given, self._decode_by(options, latents[:, :context]))
        return shown

    @torch.inference_mode()
    @in_full_precision
    def _decode_by(self, options: SamplingConfig, latents: Tensor) -> Tensor:
        """As `decode_videos`, by the decoder of these options."""
        return self._decode(latents, self._decoder_of(options)).clamp(-1, 1)

    def _decoder_of(self, options: SamplingConfig) -> Callable[[Tensor], Tensor] | None:
        """The fast decoder, on a CPU packed; None: these options have the autoencoder's.

        Raises:
            UserError: there is none; the message has the reason.
        """
        return None if options.decoder == "full" else self._fast_decoding

    @cached_property
    def _fast_decoding(self) -> Callable[[Tensor], Tensor]:
        return packed_for(self.check_fast_decoder(), self.device)

    def check_refiner(self) -> RCAN:
        """The refiner.

        Raises:
            UserError: there is none; the message has the reason.
        """
        if self.refiner is None:
            raise UserError(self.no_refiner)
        return self.refiner

    def check_fast_decoder(self) -> FastDecoder:
        """The fast decoder.

        Raises:
            UserError: there is none; the message has the reason.
        """
        if self.fast_decoder is None:
            raise UserError(self.no_fast_decoder)
        return self.fast_decoder

    def describe_sampling(self, refine: bool = False) -> str:
        """How frames are predicted, in a few words."""
        options, plan = self.sampling, SamplingPlan.from_config(self.sampling)
        words = [plan.describe(), f"warm start {plan.warm_start:g}"]
        words += ["one condition per frame"] if options.condition == "per-frame" else []
        words += [f"past horizon {options.past_horizon}"] if options.past_horizon is not None else []
        words += ["raw weights"] if options.weights == "raw" else []
        words += ["fast decoder"] if options.decoder == "fast" and not refine else []
        words += ["refined"] if refine else ["detail of the given frames"] if options.restore_detail else []
        return ", ".join(words)


def load_predictor(config: RiverConfig, run_context: RunContext, clips: int | None = None) -> VideoPredictor:
    """The predictor of a configuration's run, with the sampling options of that configuration.

    On a CPU it chooses its threads, unless the user did, with `--threads` or OMP_NUM_THREADS.

    Args:
        clips: predicted at once; None: `evaluation.batch_size`.
    """
    predictor = VideoPredictor(**vars(load_run(config.run_path, run_context.device, sampling=config.sampling)))
    choose_threads(predictor, run_context, clips or config.evaluation.batch_size)
    return predictor


def choose_threads(predictor: VideoPredictor, run_context: RunContext, clips: int) -> None:
    """See `VideoPredictor.choose_threads`; but the user's choice is respected."""
    if run_context.threads is None and "OMP_NUM_THREADS" not in os.environ:
        predictor.choose_threads(clips)
