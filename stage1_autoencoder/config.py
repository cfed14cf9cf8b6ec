"""Settings of the autoencoder: its sizes and its training."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class AutoencoderModelConfig(BaseModel):
    """Sizes of a taming-transformers VQGAN. The defaults are the paper's `f8_small`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Literal["vqgan"] = "vqgan"
    channels: PositiveInt = Field(128, description="channels at full resolution (taming: ch)")
    channel_multipliers: tuple[PositiveInt, ...] = Field(
        (1, 2, 2, 4),
        min_length=1,
        description="channels of a level as multiples of `channels`; each level after the "
        "first halves the side (taming: ch_mult)",
    )
    blocks: PositiveInt = Field(2, description="residual blocks a level of the encoder (taming: num_res_blocks)")
    decoder_blocks: PositiveInt | None = Field(
        None, description="residual blocks a level of the decoder; default blocks+1"
    )
    attention_resolutions: tuple[PositiveInt, ...] = Field((16,), description="sides at which levels have attention")
    resolution: PositiveInt = Field(
        64, description="the side that attention_resolutions refer to: architecture, not input size"
    )
    latent_channels: PositiveInt = Field(4, description="channels of a latent (taming: z_channels = embed_dim)")
    codes: int = Field(16384, ge=1, le=65536, description="entries of the codebook")
    norm_groups: PositiveInt = Field(32, description="groups of every GroupNorm")
    dropout: float = Field(0.0, ge=0, lt=1)

    @property
    def downsampling(self) -> int:
        """Pixels of the image to one of the latent, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)


class AutoencoderTrainingConfig(BaseModel):
    """How the autoencoder is trained: L1 (and, by weight, L2) reconstruction + codebook loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: PositiveInt = 100_000
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-4
    warmup_steps: NonNegativeInt = 500
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon on weight matrices (convolutions flattened), AdamW on the rest"
    )
    muon_learning_rate: PositiveFloat = Field(5e-3, description="learning rate of the matrices with optimizer: muon")
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat | None = Field(1.0, description="largest gradient norm; null: no clipping")
    l1_weight: NonNegativeFloat = 1.0
    l2_weight: NonNegativeFloat = Field(0.0, description="weight of the mean squared error; helps short trainings")
    codebook_weight: NonNegativeFloat = 1.0
    commitment: NonNegativeFloat = Field(0.25, description="beta, on the commitment term")
    jitter: float = Field(
        0.0, ge=0, lt=1, description="brightness and contrast of training images vary by up to this share"
    )
    flip: bool = Field(False, description="mirror half of the training images left to right")
    restart_every: NonNegativeInt = Field(
        100, description="every so many steps unused codes move to encoder outputs of the batch; 0: never"
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null: none")
    precision: Literal["fp32", "bf16"] = "fp32"
    pool_memory: str = Field("1 GiB", description="memory for decoded frames to draw batches from")
    checkpoint_every: PositiveInt = 2000
    keep_checkpoints: PositiveInt = 2
    validate_every: PositiveInt = 2000
    validation_frames: PositiveInt = 128
