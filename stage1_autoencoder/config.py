"""Settings of the autoencoder: its sizes and its training."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    TypeAdapter,
    model_validator,
)
from pydantic.config import JsonDict

# Metadata of fields that change how a training is watched, stored or computed, not its result.
NO_EFFECT: JsonDict = {"changes_results": False}

# The sizes of the public models (taming-transformers, latent-diffusion), by name.
VQGAN_PRESETS: dict[str, dict[str, Any]] = {
    "f8_small": {"channel_multipliers": (1, 2, 2, 4), "attention_resolutions": (16,), "resolution": 64,
                 "latent_channels": 4},
    "f8": {"channel_multipliers": (1, 2, 2, 4), "attention_resolutions": (32,), "resolution": 256,
           "latent_channels": 4},
    "f16": {"channel_multipliers": (1, 1, 2, 2, 4), "attention_resolutions": (16,), "resolution": 256,
            "latent_channels": 8},
}  # fmt: skip


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Sizes(_Settings, ABC):
    """What both families of autoencoders have."""

    latent_channels: PositiveInt = Field(4, description="channels of a latent, and dimensions of a code")
    norm_groups: PositiveInt = Field(32, description="groups of every GroupNorm")
    normalize_codes: bool = Field(
        False, description="latents and codes have length 1, so that the nearest code is the one of the nearest angle"
    )

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """The numbers of channels that there are inside; each is normalised in groups."""

    @model_validator(mode="after")
    def _groups_divide(self) -> "_Sizes":
        for width in self.widths:
            if width % self.norm_groups:
                raise ValueError(f"norm_groups: {self.norm_groups} does not divide the {width} channels of a level")
        return self


class VQGANConfig(_Sizes):
    """Sizes of a taming-transformers VQGAN. The defaults are the paper's `f8_small`."""

    architecture: Literal["vqgan"] = "vqgan"
    preset: Literal["f8_small", "f8", "f16"] | None = Field(
        None, exclude=True, description="the sizes of a public model; keys beside it win"
    )
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
    codes: int = Field(16384, ge=1, le=65536, description="entries of the codebook")
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") in VQGAN_PRESETS:
            values = dict(values)
            return VQGAN_PRESETS[values.pop("preset")] | values
        return values

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * multiplier for multiplier in (1, *self.channel_multipliers))

    @property
    def downsampling(self) -> int:
        """Pixels of the image to one of the latent, along each side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def what_downsamples(self) -> str:
        """The setting that decides `downsampling`, for messages."""
        return f"channel_multipliers {list(self.channel_multipliers)}"

    @property
    def full_resolution_channels(self) -> int:
        """Channels of the largest feature maps that have the image's size."""
        return self.channels * max(1, self.channel_multipliers[0])


class VQVAEConfig(_Sizes):
    """Sizes of RIVER's custom VQ-VAE. The defaults are the ones of CLEVRER's."""

    architecture: Literal["vqvae"] = "vqvae"
    channels: PositiveInt = Field(32, description="channels at full resolution; each level doubles them")
    levels: PositiveInt = Field(3, description="how often the side is halved")
    codes: int = Field(8192, ge=1, le=65536, description="entries of the codebook")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * 2**level for level in range(self.levels + 1))

    @property
    def downsampling(self) -> int:
        """Pixels of the image to one of the latent, along each side."""
        return 2**self.levels

    @property
    def what_downsamples(self) -> str:
        """The setting that decides `downsampling`, for messages."""
        return f"levels {self.levels}"

    @property
    def full_resolution_channels(self) -> int:
        """Channels of the largest feature maps that have the image's size."""
        return 2 * self.channels


def _architecture(values: Any) -> str:
    name = values.get("architecture", "vqgan") if isinstance(values, dict) else values.architecture
    return name if isinstance(name, str) else "vqgan"


AutoencoderModelConfig = Annotated[
    Annotated[VQGANConfig, Tag("vqgan")] | Annotated[VQVAEConfig, Tag("vqvae")],
    Discriminator(
        _architecture,
        custom_error_type="architecture",
        custom_error_message="architecture: allowed are vqgan (taming-transformers) and vqvae (RIVER's custom VQ-VAE)",
    ),
]


def parse_model_config(values: dict[str, Any]) -> VQGANConfig | VQVAEConfig:
    """Sizes from plain data, as `model_dump` wrote them.

    Raises:
        ValueError: unknown keys or values out of range.
    """
    return TypeAdapter(AutoencoderModelConfig).validate_python(values)


class ColorJitterConfig(_Settings):
    """How far the colours of a training clip vary; one draw holds for all frames of a clip."""

    brightness: float = Field(0.0, ge=0, lt=1, description="factor 1 +- this")
    contrast: float = Field(0.0, ge=0, lt=1, description="factor 1 +- this")
    saturation: float = Field(0.0, ge=0, lt=1, description="factor 1 +- this")
    hue: float = Field(0.0, ge=0, le=0.5, description="+- this part of the colour circle")

    @property
    def changes_nothing(self) -> bool:
        return not (self.brightness or self.contrast or self.saturation or self.hue)


class AdversarialConfig(_Settings):
    """The PatchGAN discriminator, and when and how strongly the autoencoder feels it."""

    weight: NonNegativeFloat = Field(0.0, description="of the adversarial term, times the adaptive ratio; 0: none")
    start: NonNegativeInt = Field(0, description="step from which the discriminator is trained; late is safer")
    warm_in: NonNegativeInt = Field(
        0, description="steps over which the weight rises to its full value after the start"
    )
    learning_rate: PositiveFloat = Field(1e-4, description="of the discriminator's AdamW; same course as the other")
    betas: tuple[float, float] = (0.5, 0.9)
    filters: PositiveInt = 64
    layers: PositiveInt = Field(3, description="how often the discriminator halves the side")

    @property
    def smallest_side(self) -> int:
        """Pixels that an image must have along each side: the map halves `layers` times and then loses 1 twice."""
        return 3 * 2**self.layers


class AutoencoderTrainingConfig(_Settings):
    """How the autoencoder is trained: reconstruction (L1, L2, LPIPS) + codebook + adversarial loss."""

    steps: PositiveInt = Field(100_000, json_schema_extra=NO_EFFECT)
    batch_size: PositiveInt = Field(16, description="images of one update, over all processes")
    accumulate: PositiveInt = Field(1, description="parts that a batch is computed in, for less memory")
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
    perceptual: Literal["none", "lpips"] = Field("none", description="lpips needs the weights of VGG16")
    perceptual_weight: NonNegativeFloat = 1.0
    vgg_weights: str | None = Field(
        None,
        description="vgg16-397923af.pth; null: where torch keeps its downloads, or fetched with --download",
        json_schema_extra=NO_EFFECT,
    )
    codebook_weight: NonNegativeFloat = 1.0
    commitment: NonNegativeFloat = Field(0.25, description="beta, on the commitment term")
    adversarial: AdversarialConfig = Field(default_factory=AdversarialConfig)
    color_jitter: ColorJitterConfig = Field(default_factory=ColorJitterConfig)
    flip: bool = Field(False, description="mirror half of the training images left to right")
    codebook_start: Literal["kmeans", "sample", "uniform"] = Field(
        "kmeans",
        description="codes begin at centres of clusters of the first latents, at some of these, or as in taming",
    )
    restart_every: NonNegativeInt = Field(
        100, description="every so many steps unused codes move to encoder outputs of the batch; 0: never"
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null: none")
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = Field(
        False,
        description="torch.compile: a minute or more at the start, faster steps after",
        json_schema_extra=NO_EFFECT,
    )
    pool_memory: str = Field("1 GiB", description="memory for decoded frames to draw batches from, in each process")
    checkpoint_every: PositiveInt = Field(2000, json_schema_extra=NO_EFFECT)
    keep_checkpoints: PositiveInt = Field(2, json_schema_extra=NO_EFFECT)
    validate_every: PositiveInt = Field(2000, json_schema_extra=NO_EFFECT)
    validation_frames: PositiveInt = Field(128, json_schema_extra=NO_EFFECT)
    best_by: Literal["auto", "psnr", "ssim", "lpips", "last"] = Field(
        "auto",
        description="which checkpoint `encode` takes; auto: by lpips with a perceptual loss, else by psnr, but the "
        "last one of adversarial training",
        json_schema_extra=NO_EFFECT,
    )


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

    steps: PositiveInt = Field(20_000, json_schema_extra=NO_EFFECT)
    batch_size: PositiveInt = Field(24, description="clips of one update, over all processes")
    accumulate: PositiveInt = Field(
        1, description="parts that a batch is computed in, for less memory", json_schema_extra=NO_EFFECT
    )
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
        None,
        description="a TorchScript video network, i3d_torchscript.pt; null: no perceptual term",
        json_schema_extra=NO_EFFECT,
    )
    perceptual_weight: NonNegativeFloat = 0.1
    start: Literal["copy", "random"] = Field(
        "copy", description="copy: before its first update the network hands the decoded frame on; random: officially"
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null: none")
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    checkpoint_every: PositiveInt = Field(1000, json_schema_extra=NO_EFFECT)
    keep_checkpoints: PositiveInt = Field(2, json_schema_extra=NO_EFFECT)
    validate_every: PositiveInt = Field(1000, json_schema_extra=NO_EFFECT)
    validation_clips: PositiveInt = Field(
        16, description="clips of the validation split, the same at each validation", json_schema_extra=NO_EFFECT
    )

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
