"""Settings of the flow: the vector field, its training, and sampling."""

from typing import Literal

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

TimeSampling = Literal["uniform", "logit_normal"]
ConditionTiming = Literal["per-evaluation", "per-frame"]
SolverName = Literal["euler", "midpoint", "heun", "rk4", "rk4-38"]


class VectorFieldConfig(BaseModel):
    """Sizes of the vector field network. The defaults are the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: PositiveInt = Field(768, description="features of a token")
    depth: PositiveInt = Field(4, description="in-blocks, and as many out-blocks")
    mid_depth: NonNegativeInt = Field(5, description="blocks between them")
    heads: PositiveInt = 8
    head: Literal["ln", "bn"] = Field("ln", description="output head: with LayerNorm or with BatchNorm")
    reference: bool = Field(True, description="condition on the previous frame besides the random past one")
    dropout: float = Field(0.05, ge=0, lt=1)
    qk_norm: bool = Field(False, description="normalise queries and keys of every head; the paper does not")

    @model_validator(mode="after")
    def _divisible(self) -> "VectorFieldConfig":
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")
        return self


class FlowTrainingConfig(BaseModel):
    """How the vector field is trained. The defaults are the paper's; it had no EMA, clipping or bf16."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt = Field(300_000, json_schema_extra=NO_EFFECT)
    batch_size: PositiveInt = Field(16, description="of all processes together")
    accumulate: PositiveInt = Field(
        1, description="parts that a batch is computed in, to save memory", json_schema_extra=NO_EFFECT
    )
    learning_rate: PositiveFloat = 1e-4
    final_learning_rate: PositiveFloat = 1e-7
    warmup_steps: NonNegativeInt = 5000
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon on weight matrices, AdamW on the rest")
    muon_learning_rate: PositiveFloat = Field(2e-2, description="learning rate of the matrices with optimizer: muon")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 5e-6
    grad_clip: PositiveFloat | None = Field(None, description="largest gradient norm; null: no clipping")
    time_sampling: TimeSampling = Field("uniform", description="distribution of t; the paper's is uniform")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null: none")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto",
        description="of matrix products; weights and sums are fp32 in any case. auto: bf16 on a GPU, fp32 on a CPU",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the vector field: a minute at the start. auto: on a GPU",
        json_schema_extra=NO_EFFECT,
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto",
        description="record a whole step once and replay it. auto: on one GPU with adamw",
        json_schema_extra=NO_EFFECT,
    )
    standardize: bool = Field(
        False, description="learn on latents standardised with the store's per-channel statistics (paper: raw latents)"
    )
    clip_frames: int = Field(40, ge=3, description="a target's condition lies at most clip_frames - 1 frames before it")
    past_horizon: int | None = Field(
        None,
        ge=2,
        description="conditions are drawn from the last so many frames before a target, the reference among them; "
        "null: from all of its clip",
    )
    checkpoint_every: PositiveInt = Field(5000, json_schema_extra=NO_EFFECT)
    keep_checkpoints: PositiveInt = Field(2, json_schema_extra=NO_EFFECT)
    best_by: Literal["loss", "last"] = Field(
        "loss",
        description="which checkpoint predicts: that with the least validation loss, or the last one",
        json_schema_extra=NO_EFFECT,
    )
    max_bad_steps: PositiveInt = Field(
        10,
        description="steps in a row whose loss or gradients are not finite, and so change nothing, until it stops",
        json_schema_extra=NO_EFFECT,
    )
    validate_every: PositiveInt = Field(5000, json_schema_extra=NO_EFFECT)
    validation_pairs: PositiveInt = Field(
        512, description="fixed draws of the validation loss", json_schema_extra=NO_EFFECT
    )
    validation_samples: NonNegativeInt = Field(
        4,
        description="clips of the val split that each validation predicts, as GIF and contact sheet",
        json_schema_extra=NO_EFFECT,
    )


class SamplingConfig(BaseModel):
    """How latents are integrated from noise to the next frame, and what that is computed with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["default", "official"] = Field(
        "default",
        description="official: the paper's rk4-38 on linspace(ws, 1, int((1 - ws) * steps)) points, 396 evaluations",
    )
    solver: SolverName | None = Field(
        None,
        description="null: midpoint, or with preset official rk4-38 (Kutta's 3/8 rule, the official code's rk4)",
    )
    steps: PositiveInt | None = Field(
        None,
        description="solver steps from warm start to 1 (null: of 8 evaluations); with preset official the paper's "
        "count of time points, of which (1 - warm_start) are used (null: 100)",
    )
    nfe: PositiveInt | None = Field(
        None,
        description="evaluations of the field a frame, a multiple of the solver's 1 (euler), 2 (midpoint, heun) or 4 "
        "(rk4, rk4-38) a step; wins over steps",
    )
    warm_start: float = Field(
        0.0, ge=0, lt=1, description="start this part of the way from the previous frame's latent"
    )
    past_horizon: int | None = Field(
        None, ge=2, description="the condition is drawn from the last so many frames; null: from all"
    )
    condition: ConditionTiming = Field(
        "per-evaluation", description="when the condition is drawn: at every evaluation (the paper), or once a frame"
    )
    seed: int = Field(0, ge=0)
    weights: Literal["ema", "raw"] = Field(
        "ema", description="ema: the averaged weights where the training kept them; raw: those of the last step"
    )
    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="clips that are predicted at once; changes no prediction. auto: as many as fit"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto",
        description="of matrix products; the state is fp32 in any case. auto: bf16 on a GPU, fp32 on a CPU and with "
        "preset official",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile the field: a minute at the start. auto: on a GPU, for 10^4 evaluations or more",
    )
    cuda_graphs: bool | Literal["auto"] = Field(
        "auto", description="record a solver step once and replay it. auto: on a GPU"
    )
