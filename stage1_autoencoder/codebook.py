"""The care of a codebook in training: where codes start, which are in use, and what becomes of those that are not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.quantizer import VectorQuantizer

# k-means looks at so many vectors a code at most, so many times: 3e10 distances for 16384 codes.
VECTORS_PER_CODE = 16
ITERATIONS = 8
# Of the latents' standard deviation, how far from its vector a code is put: two codes of one vector must differ.
NOISE = 0.01
# Sums of floats change with their order, and on GPUs the order changes from run to run; integers don't care.
FIXED_POINT = 2.0**32


@dataclass(frozen=True)
class CodeUsage:
    """How evenly codes were chosen.

    Attributes:
        used: codes that were chosen at all.
        perplexity: exp(entropy of the frequencies): so many equally frequent codes would be as hard to guess; or 0.
        dead: codes that were never chosen.
    """

    used: int
    perplexity: float
    dead: int


def code_usage(counts: Tensor) -> CodeUsage:
    """Usage from counts [codes], how often each code was chosen; waits for the device."""
    counts = counts.cpu().double()
    used = int((counts > 0).sum())
    frequencies = counts / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(frequencies, frequencies).sum()
    return CodeUsage(used=used, perplexity=entropy.exp().item() if used else 0.0, dead=len(counts) - used)


def nothing(counts: Tensor) -> None:
    """Sum counts over a single process."""


def identity(vectors: Tensor) -> Tensor:
    """Gather the vectors of a single process."""
    return vectors


class CodebookCare:
    """Keeps codes in use: starts them among the latents, counts them, and moves those that nobody chose.

    Processes that train together hold the same counts and, given equal generators, move the same codes to equal places.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        *,
        start: Literal["kmeans", "sample", "uniform"],
        restart_every: int,
        window: int,
        average: VectorQuantizer | None = None,
        reduce: Callable[[Tensor], None] = nothing,
        gather: Callable[[Tensor], Tensor] = identity,
    ) -> None:
        """Begin to count.

        Args:
            quantizer: whose codes are cared for.
            start: codes begin at centres of clusters of latents, at latents, or stay as they are.
            restart_every: steps after which codes that nobody chose in them are moved; 0: never.
            window: steps that `usage` speaks of, an epoch.
            average: the quantizer of the averaged weights. Codes move in it too: it would take the average long to
                follow, with codes on the way where no latents are.
            reduce: sums a [codes] int64 tensor over all processes, in place; called in each step.
            gather: vectors [n, c] of all processes, in one order everywhere; called when codes start or move.
        """
        assert restart_every >= 0, restart_every
        assert window > 0, window
        self.quantizer = quantizer
        self.copies = (quantizer,) if average is None else (quantizer, average)
        self.how_to_start, self.restart_every, self.window = start, restart_every, window
        self.reduce, self.gather = reduce, gather
        weight = quantizer.embedding.weight
        none = torch.zeros(3, len(weight), dtype=torch.int64, device=weight.device)
        self.since_restart, self.this_window, self.last_window = map(torch.clone, none)

    @torch.no_grad()
    def start(self, latents: Tensor, generator: torch.Generator) -> Literal["kmeans", "sample", "uniform"]:
        """Put the codes where the latents are, before the first step.

        Args:
            latents: [n, c, h, w] float, this process's; the more of them, the better k-means.
            generator: on the latents' device.
        Returns:
            How the codes did start: sample instead of kmeans where there are fewer latent vectors than codes.
        Raises:
            ValueError: latents that are not finite.
        """
        if self.how_to_start == "uniform":
            return "uniform"
        vectors = self._vectors(latents)
        if not vectors.isfinite().all():
            raise ValueError("the codebook can't start on latents that are not finite: look at the autoencoder's input")
        if self.how_to_start == "kmeans" and len(vectors) >= len(self.since_restart):
            self._place(kmeans(self.quantizer, vectors, generator))
            return "kmeans"
        self._place(_spread(torch.ones_like(self.since_restart), vectors, generator))
        return "sample"

    @torch.no_grad()
    def after_step(self, step: int, codes: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor | None:
        """Count the step's codes; every `restart_every` steps move those that nobody chose to latents of the batch.

        Does not wait for the device.

        Args:
            step: counted from 0.
            codes: [b, h, w] int64, this process's.
            latents: [b, c, h, w], before quantization, this process's.
            generator: on the latents' device.
        Returns:
            [codes] bool, which were moved and are to be `forget`-ed by optimizers; None in steps that move none.
        """
        counts = _count(codes.flatten(), len(self.since_restart))
        self.reduce(counts)
        self.since_restart += counts
        self.this_window += counts
        if (step + 1) % self.window == 0:
            self.last_window.copy_(self.this_window)
            self.this_window.zero_()
        if not self.restart_every or (step + 1) % self.restart_every:
            return None
        unused = self.since_restart == 0
        self._place(_spread(unused, self._vectors(latents), generator), unused)
        self.since_restart.zero_()
        return unused

    def usage(self) -> CodeUsage:
        """Usage over the last full window, or since the start where none is full yet; waits for the device."""
        last = self.last_window.cpu()
        return code_usage(last if last.any() else self.this_window)

    def state(self) -> dict[str, Tensor]:
        """All that an exact resume needs beside the weights: three times counts [codes] int64."""
        return {name: getattr(self, name) for name in ("since_restart", "this_window", "last_window")}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on counting from what `state` gave.

        Raises:
            ValueError: other tensors, or of another number of codes.
        """
        own = self.state()
        shapes, expected = ({name: list(t.shape) for name, t in tensors.items()} for tensors in (state, own))
        if shapes != expected:
            raise ValueError(f"counts of codes are {shapes}, expected {expected}: written for another codebook")
        for name, counts in own.items():
            counts.copy_(state[name])

    def _vectors(self, latents: Tensor) -> Tensor:
        """Latents [b, c, h, w] of this process to vectors [n, c] of all, fp32, of length 1 where codes are."""
        vectors = self.gather(rearrange(latents.detach().float(), "b c h w -> (b h w) c"))
        return F.normalize(vectors, dim=1) if self.quantizer.normalize else vectors

    def _place(self, places: Tensor, moved: Tensor | None = None) -> None:
        """Put the codes, or those where `moved` [codes] is true, to places [codes, c]."""
        if self.quantizer.normalize:
            # The longer a vector, the less a step of the optimizer turns it: all have length 1.
            places = F.normalize(places, dim=1)
        for quantizer in self.copies:
            weight = quantizer.embedding.weight
            weight.copy_(places if moved is None else torch.where(moved[:, None], places, weight))


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, weight: nn.Parameter, moved: Tensor) -> None:
    """Zero an optimizer's moments of codes [codes, c] where `moved` [codes]: they would push on from the old places."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(moved[:, None], 0)


@torch.no_grad()
def kmeans(quantizer: VectorQuantizer, vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Centres of clusters of vectors, by Lloyd's algorithm from random ones of them.

    A centre without vectors goes on from one that is far from its own, drawn as k-means++ draws. To draw all first
    centres so lowers the error of Gaussian vectors by a few per cent, but spends codes on outliers: with heavy tails it
    halves the perplexity. With normalized codes, vectors have length 1 and centres are directions (spherical k-means).

    Args:
        quantizer: finds the nearest centres; its codes are overwritten.
        vectors: [n, c] fp32, n at least the number of codes; more than `VECTORS_PER_CODE` a code are thinned out.
        generator: on the vectors' device. The same draws and vectors give the same centres, to the bit.
    Returns:
        [codes, c] fp32.
    """
    weight = quantizer.embedding.weight
    codes = len(weight)
    vectors = vectors[_order(vectors, generator)[: VECTORS_PER_CODE * codes]]
    scale = FIXED_POINT / vectors.abs().max().double().clamp(min=torch.finfo(torch.float32).tiny)
    fixed = (vectors.double() * scale).round().long()
    centres = vectors[:codes]
    for _ in range(ITERATIONS):
        weight.copy_(centres)
        nearest = quantizer.nearest(vectors[:, :, None, None]).flatten()
        size = _count(nearest, codes)
        total = torch.zeros_like(fixed[:codes]).index_add_(0, nearest, fixed)
        means = (total / (size.clamp(min=1)[:, None] * scale)).float()
        # Drawn without replacement, with probabilities as the squared distances: the largest of d^2 / Exp(1).
        squared = (vectors - quantizer.codebook[nearest]).square().sum(1)
        keys = squared / torch.empty_like(squared).exponential_(generator=generator)
        far = vectors[keys.argsort(descending=True, stable=True)[_ranks(size == 0)]]
        centres = torch.where((size == 0)[:, None], _noisy(far, vectors, generator), means)
    return centres


def _count(chosen: Tensor, codes: int) -> Tensor:
    """Counts [codes] int64 of codes [n] int64, without waiting for the device as `bincount` does."""
    return chosen.new_zeros(codes).scatter_add_(0, chosen, torch.ones_like(chosen))


def _spread(wanted: Tensor, vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Places [codes, c] near random vectors [n, c], no two near the same while there are enough for those wanted."""
    return _noisy(vectors[_order(vectors, generator)[_ranks(wanted) % len(vectors)]], vectors, generator)


def _order(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of vectors, [n] int64."""
    return torch.rand(len(vectors), generator=generator, device=vectors.device).argsort(stable=True)


def _ranks(wanted: Tensor) -> Tensor:
    """How many wanted ones are before each; anything in range for those not wanted. [codes] int64."""
    return (wanted.cumsum(0) - 1).clamp(min=0)


def _noisy(places: Tensor, vectors: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(places.shape, generator=generator, device=places.device)
    return places + NOISE * vectors.std(0, correction=0) * noise
