"""Settings of the refiner: sizes and training."""

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

from stage1_autoencoder.config import _Settings

# The official training's rate is for a batch of 256 and scales with the batch.
OFFICIAL_LEARNING_RATE = 3e-4
OFFICIAL_LEARNING_RATE_BATCH = 256


class RefinerModelConfig(_Settings):
    """Sizes of the RCAN; by default the official ones, 0.8 M parameters."""

    groups: PositiveInt = Field(3, description="residual groups, each closed by a convolution and a skip")
    blocks: PositiveInt = Field(3, description="channel-attention blocks a group")
    features: int = Field(64, ge=3, description="channels of all feature maps")
    reduction: PositiveInt = Field(8, description="channels divided by this inside the channel attention")
    tanh: bool = Field(False, description="end with a tanh")

    @model_validator(mode="after")
    def _attention_has_channels(self) -> "RefinerModelConfig":
        if self.reduction > self.features:
            raise ValueError(f"reduction: {self.reduction} leaves none of the {self.features} of features: lower it")
        return self


class RefinerTrainingConfig(_Settings):
    """How the refiner is trained: clips of real frames beside their decoded latents."""

    steps: PositiveInt = 20_000
    batch_size: PositiveInt = Field(24, description="clips of one update, over all processes")
    accumulate: PositiveInt = Field(1, description="parts that a batch is computed in, for less memory")
    clip_frames: int = Field(17, ge=2, description="frames of a clip; the first is only a previous frame")
    learning_rate: PositiveFloat | None = Field(
        None, description="null: 3e-4 x batch_size / 256, as the official training has it"
    )
    warmup_steps: NonNegativeInt | None = Field(
        None, description="of linear warm-up before the cosine to 0; null: a fifth of steps (officially 2 of 10 epochs)"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon on the convolutions between first and last, AdamW on the rest"
    )
    muon_learning_rate: PositiveFloat = Field(5e-3, description="learning rate of the matrices with optimizer: muon")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 5e-4
    grad_clip: PositiveFloat | None = Field(None, description="largest gradient norm; null: no clipping")
    loss: Literal["mse", "l1"] = "mse"
    perceptual_network: str | None = Field(
        None, description="a TorchScript video network, i3d_torchscript.pt; null: no perceptual term"
    )
    perceptual_weight: NonNegativeFloat = 0.1
    start: Literal["copy", "random"] = Field(
        "copy", description="copy: before its first update the network hands the decoded frame on; random: officially"
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null: none")
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = 2
    validate_every: PositiveInt = 1000
    validation_clips: PositiveInt = Field(16, description="clips of the validation split, the same at each validation")

    @property
    def peak_learning_rate(self) -> float:
        """The rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return OFFICIAL_LEARNING_RATE * self.batch_size / OFFICIAL_LEARNING_RATE_BATCH

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return self.steps // 5 if self.warmup_steps is None else self.warmup_steps
