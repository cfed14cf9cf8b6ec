"""Settings of the autoencoder, its fast decoder and the refiner: sizes and training."""

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

from stage1_autoencoder.setting_types import LARGEST_WIDTH, MOST_HALVINGS, Betas, Depth, FilePath, Halvings, Size, Width

# Metadata of fields that change how a training is monitored, stored or computed, not its result.
NO_EFFECT: JsonDict = {"changes_results": False}
# Metadata of fields of a network that do not change the shapes of its weights.
NO_SHAPE: JsonDict = {"changes_shapes": False}

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
    """Sizes that both families of autoencoders have."""

    latent_channels: Width = Field(4, description="channels of a latent, dimensions of a code")
    norm_groups: Width = Field(32, description="groups of every GroupNorm")
    normalize_codes: bool = Field(
        False, description="latents and codes have length 1: the nearest code is the one at the smallest angle"
    )

    @property
    @abstractmethod
    def widths(self) -> tuple[int, ...]:
        """All numbers of channels inside, each normalized in groups."""

    @property
    @abstractmethod
    def downsampling(self) -> int:
        """Pixels per latent position, along each side."""

    def latent_shape(self, frame_size: tuple[int, int]) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of frames of (height, width) pixels."""
        height, width = frame_size
        return self.latent_channels, height // self.downsampling, width // self.downsampling

    @model_validator(mode="after")
    def _widths_fit(self) -> "_Sizes":
        for width in self.widths:
            if width > LARGEST_WIDTH:
                raise ValueError(f"channels: {self.channels} give a level of {width}, more than {LARGEST_WIDTH}")
            if width % self.norm_groups:
                raise ValueError(f"norm_groups: {self.norm_groups} does not divide the {width} channels of a level")
        return self


class VQGANConfig(_Sizes):
    """Sizes of a taming-transformers VQGAN. The defaults are the paper's `f8_small`."""

    architecture: Literal["vqgan"] = "vqgan"
    preset: Literal["f8_small", "f8", "f16"] | None = Field(
        None, exclude=True, description="the sizes of a public model; other keys take precedence"
    )
    channels: Width = Field(128, description="channels at full resolution (taming: ch)")
    channel_multipliers: tuple[Width, ...] = Field(
        (1, 2, 2, 4),
        min_length=1,
        max_length=1 + MOST_HALVINGS,
        description="channels of a level as multiples of `channels`; each level after the "
        "first halves the side (taming: ch_mult)",
    )
    blocks: Depth = Field(2, description="residual blocks per level of the encoder (taming: num_res_blocks)")
    decoder_blocks: Depth | None = Field(None, description="residual blocks per level of the decoder; default blocks+1")
    attention_resolutions: tuple[PositiveInt, ...] = Field((16,), description="sides of the levels with attention")
    resolution: PositiveInt = Field(
        64, description="side of the input for attention_resolutions: architecture, not image size"
    )
    codes: int = Field(16384, ge=1, le=65536, description="entries of the codebook")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        json_schema_extra=NO_SHAPE,
        description="share of activations set to 0; masks depend on the number of processes and on training.accumulate",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in VQGAN_PRESETS:
            return values
        return VQGAN_PRESETS[name] | {key: value for key, value in values.items() if key != "preset"}

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * multiplier for multiplier in (1, *self.channel_multipliers))

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def what_downsamples(self) -> str:
        """The setting that determines `downsampling`, for messages."""
        return f"channel_multipliers {list(self.channel_multipliers)}"

    @property
    def full_resolution_channels(self) -> int:
        """Channels of the largest feature maps that have the image's size."""
        return self.channels * max(1, self.channel_multipliers[0])


class VQVAEConfig(_Sizes):
    """Sizes of RIVER's custom VQ-VAE. The defaults are those of CLEVRER."""

    architecture: Literal["vqvae"] = "vqvae"
    channels: Width = Field(32, description="channels at full resolution; each level doubles them")
    levels: Halvings = Field(3, description="number of times that the side is halved")
    codes: int = Field(8192, ge=1, le=65536, description="entries of the codebook")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.channels * 2**level for level in range(self.levels + 1))

    @property
    def downsampling(self) -> int:
        return 2**self.levels

    @property
    def what_downsamples(self) -> str:
        """The setting that determines `downsampling`, for messages."""
        return f"levels {self.levels}"

    @property
    def full_resolution_channels(self) -> int:
        """Channels of the largest feature maps that have the image's size."""
        return 2 * self.channels


def _architecture(values: Any) -> str:
    if isinstance(values, dict):
        name = values.get("architecture")
    else:
        name = getattr(values, "architecture", None)
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
    """Sizes from the plain data of `model_dump`.

    Raises:
        ValueError: unknown keys or values out of range.
    """
    return TypeAdapter(AutoencoderModelConfig).validate_python(values)


class ColorJitterConfig(_Settings):
    """Ranges of the random color changes of training images; one draw per clip."""

    brightness: float = Field(0.0, ge=0, lt=1, description="factor 1 +- this")
    contrast: float = Field(0.0, ge=0, lt=1, description="factor 1 +- this")
    saturation: float = Field(0.0, ge=0, lt=1, description="factor 1 +- this")
    hue: float = Field(0.0, ge=0, le=0.5, description="+- this fraction of the color circle")

    @property
    def changes_nothing(self) -> bool:
        return not (self.brightness or self.contrast or self.saturation or self.hue)


class AdversarialConfig(_Settings):
    """The PatchGAN discriminator, and the weight of its term in the autoencoder's loss."""

    weight: NonNegativeFloat = Field(
        0.0, description="weight of the adversarial term, times the adaptive ratio; 0: none"
    )
    start: NonNegativeInt = Field(0, description="first step of the discriminator's training; late is safer")
    warm_in: NonNegativeInt = Field(0, description="number of steps over which the weight rises to its full value")
    learning_rate: PositiveFloat = Field(1e-4, description="learning rate of the discriminator's AdamW; same schedule")
    betas: Betas = (0.5, 0.9)
    filters: Width = 64
    layers: Halvings = Field(3, description="number of times that the discriminator halves the side")

    @property
    def smallest_side(self) -> int:
        """Smallest side of an image in pixels: the map is halved `layers` times and then loses 1 twice."""
        return 3 * 2**self.layers


class AutoencoderTrainingConfig(_Settings):
    """Training of the autoencoder: reconstruction (L1, L2, perceptual) + codebook + adversarial loss."""

    steps: PositiveInt | None = Field(
        None, description="null: as many as suit the amount of data", json_schema_extra=NO_EFFECT
    )
    batch_size: Size = Field(16, description="images per update, over all processes")
    accumulate: PositiveInt = Field(1, description="number of parts in which a batch is computed, to save memory")
    learning_rate: PositiveFloat = 1e-4
    warmup_steps: NonNegativeInt = Field(500, description="of linear warm-up, at most half of the steps")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon on weight matrices (convolutions flattened), AdamW on the rest"
    )
    muon_learning_rate: PositiveFloat = Field(5e-3, description="learning rate of the matrices with optimizer: muon")
    betas: Betas = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat | None = Field(1.0, description="largest gradient norm; null: no clipping")
    l1_weight: NonNegativeFloat = 1.0
    l2_weight: NonNegativeFloat = Field(0.0, description="weight of the mean squared error; helps short trainings")
    perceptual: Literal["none", "lpips", "st_lpips"] = Field(
        "none", description="lpips needs the weights of VGG16, st_lpips (AlexNet) the package stlpips_pytorch"
    )
    perceptual_weight: NonNegativeFloat = 1.0
    vgg_weights: FilePath | None = Field(
        None,
        description="path of vgg16-397923af.pth; null: torch's download folder, or downloaded with --download",
        json_schema_extra=NO_EFFECT,
    )
    codebook_weight: NonNegativeFloat = 1.0
    commitment: NonNegativeFloat = Field(0.25, description="weight beta of the commitment term")
    adversarial: AdversarialConfig = Field(default_factory=AdversarialConfig)
    color_jitter: ColorJitterConfig = Field(default_factory=ColorJitterConfig)
    flip: bool = Field(False, description="mirror half of the training images left to right")
    codebook_start: Literal["kmeans", "sample", "uniform"] = Field(
        "kmeans",
        description="initialize codes at cluster centers of the first latents, at some of them, or as in taming",
    )
    restart_every: NonNegativeInt = Field(
        100,
        description="number of steps after which unused codes move to latents of the batch, except in the last tenth "
        "of the training; 0: never",
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null: none")
    max_bad_steps: PositiveInt = Field(
        10,
        description="stop after this many consecutive steps whose loss or gradients are not finite; such steps change "
        "nothing",
        json_schema_extra=NO_EFFECT,
    )
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    compile: bool = Field(
        False,
        description="torch.compile: a minute or more at the start, faster steps after",
        json_schema_extra=NO_EFFECT,
    )
    pool_memory: str = Field("1 GiB", description="memory for decoded frames per process")
    checkpoint_every: PositiveInt = Field(2000, json_schema_extra=NO_EFFECT)
    keep_checkpoints: PositiveInt = Field(2, json_schema_extra=NO_EFFECT)
    validate_every: PositiveInt = Field(2000, json_schema_extra=NO_EFFECT)
    validation_frames: PositiveInt = Field(128, json_schema_extra=NO_EFFECT)
    best_by: Literal["auto", "psnr", "ssim", "lpips", "last"] = Field(
        "auto",
        description="metric of the checkpoint that `encode` uses; auto: the perceptual loss if there is one, else the "
        "last checkpoint with adversarial training, else psnr",
        json_schema_extra=NO_EFFECT,
    )

    @property
    def warmup(self) -> int:
        """Steps of warm-up, when the number of steps is known."""
        return min(self.warmup_steps, (self.steps + 1) // 2)


class DecoderModelConfig(_Settings):
    """Sizes of the fast decoder: by default it takes at most a fifth of the arithmetic of the autoencoder's own."""

    features: Width | None = Field(
        None,
        ge=4,
        description="channels at the latents' resolution, twice those at higher ones; null: half of the VQGAN's or a "
        "quarter of the VQ-VAE's, at most 256",
    )
    blocks: Depth = Field(
        1, description="residual blocks per resolution; those at the highest have half of the channels inside"
    )

    def widths(self, autoencoder: VQGANConfig | VQVAEConfig) -> tuple[int, ...]:
        """Channels by resolution, from the latents' to half of the image's."""
        share = 4 if isinstance(autoencoder, VQVAEConfig) else 2
        # By default multiples of 16 everywhere, for which CPUs have fast kernels.
        features = self.features or max(32, min(256, autoencoder.widths[-1] // share) // 32 * 32)
        return features, *[features // 2] * (autoencoder.downsampling.bit_length() - 2)


class DecoderTrainingConfig(_Settings):
    """Training of the fast decoder, on stored latents and what the full decoder makes of them."""

    steps: PositiveInt | None = Field(None, description="null: 2000", json_schema_extra=NO_EFFECT)
    batch_size: Size = Field(8, description="frames per update, over all processes")
    learning_rate: PositiveFloat = 2e-3
    warmup_steps: NonNegativeInt = Field(20, description="of linear warm-up, at most half of the steps")
    optimizer: Literal["adamw", "muon"] = Field(
        "muon", description="muon: Muon on the convolutions between first and last, AdamW on the rest"
    )
    muon_learning_rate: PositiveFloat = Field(1e-2, description="learning rate of the matrices with optimizer: muon")
    betas: Betas = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: PositiveFloat | None = Field(1.0, description="largest gradient norm; null: no clipping")
    l2_weight: NonNegativeFloat = Field(4.0, description="weight of the mean squared error beside the L1 error")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null: none")
    max_bad_steps: PositiveInt = Field(
        10,
        description="stop after this many consecutive steps whose loss or gradients are not finite; such steps change "
        "nothing",
        json_schema_extra=NO_EFFECT,
    )
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    checkpoint_every: PositiveInt = Field(1000, json_schema_extra=NO_EFFECT)
    keep_checkpoints: PositiveInt = Field(2, json_schema_extra=NO_EFFECT)
    validate_every: PositiveInt = Field(500, json_schema_extra=NO_EFFECT)
    validation_frames: PositiveInt = Field(
        128, description="frames of the validation split, the same in each validation", json_schema_extra=NO_EFFECT
    )

    @property
    def warmup(self) -> int:
        """Steps of warm-up, when the number of steps is known."""
        return min(self.warmup_steps, (self.steps + 1) // 2)


# The official learning rate is for a batch of 256 and scales with the batch.
OFFICIAL_LEARNING_RATE = 3e-4
OFFICIAL_LEARNING_RATE_BATCH = 256


class RefinerModelConfig(_Settings):
    """Sizes of the RCAN; by default the official ones, 0.8 M parameters."""

    groups: Depth = Field(3, description="residual groups, each with a convolution and a skip at its end")
    blocks: Depth = Field(3, description="channel-attention blocks per group")
    features: Width = Field(64, ge=3, description="channels of all feature maps")
    reduction: PositiveInt = Field(8, description="divisor of the channels inside the channel attention")
    tanh: bool = Field(False, description="end with a tanh")

    @model_validator(mode="after")
    def _attention_has_channels(self) -> "RefinerModelConfig":
        if self.reduction > self.features:
            raise ValueError(
                f"reduction: {self.reduction} leaves none of the {self.features} channels of features: lower it"
            )
        return self


class RefinerTrainingConfig(_Settings):
    """Training of the refiner, on clips of real frames and their decoded latents."""

    steps: PositiveInt | None = Field(
        None, description="null: as many as suit the amount of data", json_schema_extra=NO_EFFECT
    )
    batch_size: Size = Field(24, description="clips per update, over all processes")
    accumulate: PositiveInt = Field(
        1, description="number of parts in which a batch is computed, to save memory", json_schema_extra=NO_EFFECT
    )
    clip_frames: Size = Field(17, ge=2, description="frames per clip; the first is only a previous frame")
    learning_rate: PositiveFloat | None = Field(
        None, description="null: 3e-4 x batch_size / 256, as in the official training"
    )
    warmup_steps: NonNegativeInt | None = Field(
        None,
        description="steps of linear warm-up before the cosine to 0, at most half of the steps; null: steps / 5 "
        "(officially 2 of 10 epochs)",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon on the convolutions between first and last, AdamW on the rest"
    )
    muon_learning_rate: PositiveFloat = Field(5e-3, description="learning rate of the matrices with optimizer: muon")
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 5e-4
    grad_clip: PositiveFloat | None = Field(None, description="largest gradient norm; null: no clipping")
    loss: Literal["mse", "l1"] = "mse"
    perceptual_network: FilePath | None = Field(
        None,
        description="path of a TorchScript video network, i3d_torchscript.pt; null: no perceptual term",
        json_schema_extra=NO_EFFECT,
    )
    perceptual_weight: NonNegativeFloat = 0.1
    start: Literal["copy", "random"] = Field(
        "copy", description="copy: the untrained network returns the decoded frame; random: as in the official training"
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights; null: none")
    max_bad_steps: PositiveInt = Field(
        10,
        description="stop after this many consecutive steps whose loss or gradients are not finite; such steps change "
        "nothing",
        json_schema_extra=NO_EFFECT,
    )
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    checkpoint_every: PositiveInt = Field(1000, json_schema_extra=NO_EFFECT)
    keep_checkpoints: PositiveInt = Field(2, json_schema_extra=NO_EFFECT)
    validate_every: PositiveInt = Field(1000, json_schema_extra=NO_EFFECT)
    validation_clips: PositiveInt = Field(
        16, description="clips of the validation split, the same in each validation", json_schema_extra=NO_EFFECT
    )

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return OFFICIAL_LEARNING_RATE * self.batch_size / OFFICIAL_LEARNING_RATE_BATCH

    @property
    def warmup(self) -> int:
        """Steps of warm-up, when the number of steps is known."""
        return self.steps // 5 if self.warmup_steps is None else min(self.warmup_steps, (self.steps + 1) // 2)
