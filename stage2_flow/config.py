"""Settings of the flow: the vector field, its training, and sampling."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.config import JsonDict

# Metadata of fields that change how a training is watched, stored or computed, not its result.
NO_EFFECT: JsonDict = {"changes_results": False}
# Metadata of fields of a network that do not change the shapes of its weights.
NO_SHAPE: JsonDict = {"changes_shapes": False}

TimeSampling = Literal["uniform", "logit_normal"]
ConditionTiming = Literal["per-evaluation", "per-frame"]
# Bounds that no machine's memory reaches, so that a mistyped size is refused at once.
Depth = Annotated[PositiveInt, Field(le=256)]
Size = Annotated[PositiveInt, Field(le=65536)]
Beta = Annotated[float, Field(ge=0, lt=1)]
SolverName = Literal["euler", "midpoint", "heun", "rk4", "rk4-38"]
# What `study` chooses together. Who sets one of them in `sampling` gets none of its choice.
SAMPLER_KEYS = frozenset({"preset", "solver", "steps", "nfe", "warm_start", "condition"})


class VectorFieldConfig(BaseModel):
    """Sizes of the vector field network. The defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Size = Field(768, description="features per token")
    depth: Depth = Field(4, description="number of in-blocks, and of out-blocks")
    mid_depth: NonNegativeInt = Field(5, le=256, description="number of blocks between in-blocks and out-blocks")
    heads: PositiveInt = 8
    head: Literal["ln", "bn"] = Field("ln", description="output head with LayerNorm (ln) or BatchNorm (bn)")
    reference: bool = Field(True, description="condition on the newest frames in addition to the random past frame")
    recent_frames: int = Field(
        1, ge=1, le=64, description="number of newest frames in the reference; the paper has 1, the previous frame"
    )
    past_noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="largest standard deviation of the noise on past frames in training, which the field is told: at "
        "sampling the past is the field's own imperfect frames; the paper has none",
    )
    convolutions: bool = Field(
        False,
        description="3x3 convolutions over the map: as the input layer, and depthwise before every block; the paper "
        "has none",
    )
    dropout: float = Field(
        0.05,
        ge=0,
        lt=1,
        json_schema_extra=NO_SHAPE,
        description="share of activations set to 0; masks depend on the number of processes and on training.accumulate",
    )
    qk_norm: bool = Field(False, description="normalize queries and keys of every head; the paper does not")

    @property
    def weights(self) -> int:
        """About the number of weights: those of attention and MLP in every block."""
        return 12 * self.width**2 * (2 * self.depth + self.mid_depth)

    @model_validator(mode="after")
    def _divisible(self) -> "VectorFieldConfig":
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")
        if not self.reference and self.recent_frames > 1:
            raise ValueError(f"recent_frames: {self.recent_frames} frames of a reference, but reference is false")
        return self


class FlowTrainingConfig(BaseModel):
    """Training of the vector field. The defaults are the paper's, which used no EMA, clipping or bf16."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt | None = Field(
        None, description="null: as many as suit the amount of data", json_schema_extra=NO_EFFECT
    )
    batch_size: Size = Field(16, description="global batch size, over all processes")
    accumulate: PositiveInt = Field(
        1, description="number of parts a batch is computed in, to save memory", json_schema_extra=NO_EFFECT
    )
    learning_rate: PositiveFloat = 1e-4
    final_learning_rate: PositiveFloat = 1e-7
    warmup_steps: NonNegativeInt = Field(5000, description="of linear warm-up, at most half of the steps")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon on weight matrices, AdamW on the rest")
    muon_learning_rate: PositiveFloat = Field(2e-2, description="learning rate of weight matrices with optimizer: muon")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 5e-6
    grad_clip: PositiveFloat | None = Field(None, description="maximum gradient norm; null: no clipping")
    time_sampling: TimeSampling = Field("uniform", description="distribution of t; the paper uses uniform")
    time_mean: float = Field(
        0.0, ge=-5, le=5, description="mean of the logit of t with time_sampling: logit_normal; below 0: more noise"
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null: none")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto",
        description="precision of matrix products; weights and sums are always fp32. auto: that of the existing "
        "training; of a new one bf16 on a GPU that computes in it, else fp32",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the vector field, on a single GPU with CUDA graphs; takes a minute at the start. "
        "auto: on a GPU",
        json_schema_extra=NO_EFFECT,
    )
    standardize: bool = Field(
        False, description="train on latents standardized with the store's per-channel statistics (paper: raw latents)"
    )
    clip_frames: Size = Field(40, ge=3, description="a condition is at most clip_frames - 1 frames before its target")
    past_horizon: int | None = Field(
        None,
        ge=2,
        description="draw conditions from the last past_horizon frames before a target, the reference included; "
        "null: from the whole clip",
    )
    checkpoint_every: PositiveInt = Field(5000, json_schema_extra=NO_EFFECT)
    keep_checkpoints: PositiveInt = Field(2, json_schema_extra=NO_EFFECT)
    best_by: Literal["loss", "last"] = Field(
        "loss",
        description="checkpoint used for predictions: the one with the lowest validation loss, or the last one",
        json_schema_extra=NO_EFFECT,
    )
    max_bad_steps: PositiveInt = Field(
        10,
        description="stop after this many consecutive steps whose loss or gradients are not finite; such steps change "
        "nothing",
        json_schema_extra=NO_EFFECT,
    )
    validate_every: PositiveInt = Field(5000, json_schema_extra=NO_EFFECT)
    validation_pairs: Size = Field(
        512, description="number of fixed draws for the validation loss", json_schema_extra=NO_EFFECT
    )
    validation_samples: NonNegativeInt = Field(
        4,
        description="clips of the val split predicted at each validation, as GIF and contact sheet",
        json_schema_extra=NO_EFFECT,
    )

    @model_validator(mode="after")
    def _mean_of_a_logit(self) -> "FlowTrainingConfig":
        if self.time_mean and self.time_sampling != "logit_normal":
            raise ValueError(f"time_mean {self.time_mean:g} belongs to time_sampling: logit_normal, not uniform")
        return self

    @property
    def warmup(self) -> int:
        """Steps of warm-up, when the number of steps is known."""
        return min(self.warmup_steps, (self.steps + 1) // 2)


class DistillationConfig(BaseModel):
    """A student: a flow of a few evaluations per frame that learns from another run's flow, its teacher.

    Its network, and its training's settings but for those below, are the teacher's; `flow` sets others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str | None = Field(
        None,
        description="name of the run with the teacher; null: the data set's default run; --teacher NAME sets it",
        json_schema_extra=NO_EFFECT,  # its weights are compared
    )
    evaluations: int = Field(1, ge=1, le=64, description="Euler steps per frame, of which the student learns each")
    own_past: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the samples whose newest past frames are the student's own predictions, as in a rollout",
    )
    own_frames: int = Field(3, ge=1, le=64, description="largest number of these frames")
    steps_share: float = Field(
        0.25,
        gt=0,
        le=10,
        description="steps of a new student, as a share of its teacher's; flow.training.steps sets a number",
        json_schema_extra=NO_EFFECT,
    )
    learning_rate_share: float = Field(
        0.2,
        gt=0,
        le=10,
        description="learning rates of a new student, as a share of its teacher's; flow.training sets other ones",
        json_schema_extra=NO_EFFECT,
    )


class SamplingConfig(BaseModel):
    """Integration of latents from noise to the next frame, and its precision and speed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["default", "official"] = Field(
        "default",
        description="official: the paper's rk4-38 on linspace(ws, 1, int((1 - ws) * steps)) points, 396 evaluations",
    )
    solver: SolverName | None = Field(
        None,
        description="null: what `study` chose for the run, else midpoint; with preset official rk4-38 (Kutta's 3/8 "
        "rule, called rk4 in the official code)",
    )
    steps: Size | None = Field(
        None,
        description="solver steps from warm start to 1 (null: what `study` chose, else 8 evaluations); with preset "
        "official the paper's number of time points, of which a share of 1 - warm_start is used (null: 100)",
    )
    nfe: Size | None = Field(
        None,
        description="evaluations of the field per frame, a multiple of the solver's evaluations per step: 1 (euler), "
        "2 (midpoint, heun) or 4 (rk4, rk4-38); overrides steps",
    )
    warm_start: float = Field(
        0.0, ge=0, lt=1, description="start from the previous frame's latent, at this time of the path"
    )
    past_horizon: int | None = Field(
        None,
        ge=2,
        description="draw the condition from the last past_horizon frames; null: from all frames, as far back as the "
        "training went (preset official: farther as well)",
    )
    condition: ConditionTiming = Field(
        "per-evaluation", description="draw a condition at every evaluation (the paper), or once per frame"
    )
    restore_detail: bool = Field(
        False,
        description="add to predicted frames what the autoencoder loses of the given ones, where they show the same",
    )
    decoder: Literal["full", "fast"] = Field(
        "full",
        description="decoder of predicted frames: the autoencoder's, or the small one of `train-decoder`; refined "
        "frames are always those of the full one",
    )
    seed: int = Field(0, ge=0, le=2**63 - 1)
    weights: Literal["ema", "raw"] = Field(
        "ema", description="ema: averaged weights, if there are any; raw: weights of the last step"
    )
    batch_size: Size | Literal["auto"] = Field(
        "auto", description="clips predicted at once; does not change predictions. auto: as many as fit"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto",
        description="precision of matrix products; the state is always fp32. auto: bf16 on a GPU, fp32 on a CPU and "
        "with preset official",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the field; takes a minute at the start. auto: on a GPU, from 10^4 evaluations on",
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto",
        description="record a frame (of many evaluations: a solver step) as a CUDA graph and replay it. auto: on a GPU",
    )

    @property
    def leaves_sampler_open(self) -> bool:
        """Whether none of `SAMPLER_KEYS` is set: then the choice of `study` is used, which is of averaged weights."""
        return self.weights == "ema" and all(
            getattr(self, name) == SamplingConfig.model_fields[name].default for name in SAMPLER_KEYS
        )
