"""Codebook initialization, usage and restarts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from stage1_autoencoder.quantizer import VectorQuantizer

# Largest number of vectors per code, and iterations, of k-means: 3e10 distances for 16384 codes.
VECTORS_PER_CODE = 16
ITERATIONS = 8
# Distance of a code from its vector, in standard deviations of the latents: two codes at one vector must differ.
NOISE = 0.01
# Sums are made in integers: sums of floats depend on their order, which on GPUs changes from run to run.
FIXED_POINT = 2.0**32


@dataclass(frozen=True)
class CodeUsage:
    """How evenly the codes of a codebook are used.

    Attributes:
        used: number of codes that were chosen.
        perplexity: exp(entropy of the frequencies), the effective number of codes; 0 if none was chosen.
        dead: number of codes that were never chosen.
    """

    used: int
    perplexity: float
    dead: int


def code_usage(counts: Tensor) -> CodeUsage:
    """Usage from counts [codes] of each code; synchronizes with the device."""
    counts = counts.cpu().double()
    used = int((counts > 0).sum())
    frequencies = counts / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(frequencies, frequencies).sum()
    return CodeUsage(used=used, perplexity=entropy.exp().item() if used else 0.0, dead=len(counts) - used)


class CodebookCare:
    """Keeps codes in use: initializes them at latents, counts their use, and moves unused codes.

    Processes that train together have the same counts and, with equal generators, make the same moves.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        *,
        start: Literal["kmeans", "sample", "uniform"],
        restart_every: int,
        window: int,
        last_restart: int | None = None,
        average: VectorQuantizer | None = None,
        reduce: Callable[[Tensor], None] = lambda counts: None,
        gather: Callable[[Tensor], Tensor] = lambda vectors: vectors,
    ) -> None:
        """Set all counts to zero.

        Args:
            quantizer: owner of the codes.
            start: initialize codes at cluster centers of latents, at latents, or not at all.
            restart_every: number of steps after which codes that were not used in them are moved; 0: never.
            window: number of steps that `usage` covers, an epoch.
            last_restart: number of steps after which no code is moved any more; None: there is no end.
            average: the quantizer of the averaged weights. Codes move in it too, since the average would take long to
                follow, through places without latents.
            reduce: sums a [codes] int64 tensor over all processes, in place; called in each step.
            gather: concatenates the vectors [n, c] of all processes, in the same order everywhere; called when codes
                are initialized or moved.
        """
        assert restart_every >= 0, restart_every
        assert window > 0, window
        self.quantizer = quantizer
        self.copies = (quantizer,) if average is None else (quantizer, average)
        self.how_to_start, self.restart_every, self.window = start, restart_every, window
        self.last_restart = last_restart
        self.reduce, self.gather = reduce, gather
        weight = quantizer.embedding.weight
        none = torch.zeros(3, len(weight), dtype=torch.int64, device=weight.device)
        self.since_restart, self.this_window, self.last_window = map(torch.clone, none)

    @torch.no_grad()
    def start(self, latents: Tensor, generator: torch.Generator) -> Literal["kmeans", "sample", "uniform"]:
        """Initialize the codes at the latents, before the first step.

        Args:
            latents: [n, c, h, w] float, of this process; more latents improve k-means.
            generator: on the latents' device.
        Returns:
            the method in use: sample instead of kmeans if there are fewer latent vectors than codes.
        Raises:
            ValueError: latents that are not finite.
        """
        if self.how_to_start == "uniform":
            return "uniform"
        vectors = self._vectors(latents)
        if not vectors.isfinite().all():
            raise ValueError(
                "cannot initialize the codebook: the latents are not finite; check the autoencoder's input"
            )
        if self.how_to_start == "kmeans" and len(vectors) >= len(self.since_restart):
            self._place(kmeans(self.quantizer, vectors, generator))
            return "kmeans"
        self._place(_spread(torch.ones_like(self.since_restart), vectors, generator))
        return "sample"

    @torch.no_grad()
    def after_step(
        self, step: int, codes: Tensor, latents: Tensor, generator: torch.Generator, finite: Tensor | None = None
    ) -> Tensor | None:
        """Count the step's codes; every `restart_every` steps move unused ones to latents of the batch.

        Does not synchronize with the device.

        Args:
            step: counted from 0.
            codes: [b, h, w] int64, of this process.
            latents: [b, c, h, w], before quantization, of this process.
            generator: on the latents' device.
            finite: scalar bool on the device; where it is False, the step counts nothing and moves nothing.
        Returns:
            [codes] bool, the moved ones, whose optimizer state is to be reset by `forget`; None in other steps.
        """
        counts = _count(codes.flatten(), len(self.since_restart))
        self.reduce(counts)
        counts = counts if finite is None else counts * finite
        self.since_restart += counts
        self.this_window += counts
        if (step + 1) % self.window == 0:
            self.last_window.copy_(self.this_window)
            self.this_window.zero_()
        done = step + 1
        if not self.restart_every or done % self.restart_every:
            return None
        if self.last_restart is not None and done > self.last_restart:
            return None
        unused = self.since_restart == 0
        if finite is not None:
            unused &= finite
        self._place(_spread(unused, self._vectors(latents), generator), unused)
        self.since_restart.zero_()
        return unused

    def usage(self) -> CodeUsage:
        """Usage over the last full window, or since the start if there is none; synchronizes with the device."""
        last = self.last_window.cpu()
        return code_usage(last if last.any() else self.this_window)

    def state(self) -> dict[str, Tensor]:
        """What an exact resume needs beside the weights: three tensors of counts [codes] int64."""
        return {name: getattr(self, name) for name in ("since_restart", "this_window", "last_window")}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from the result of `state`.

        Raises:
            ValueError: other tensors, or another number of codes.
        """
        own = self.state()
        shapes, expected = ({name: list(t.shape) for name, t in tensors.items()} for tensors in (state, own))
        if shapes != expected:
            raise ValueError(f"counts of codes are {shapes}, expected {expected}: they belong to another codebook")
        for name, counts in own.items():
            counts.copy_(state[name])

    def _vectors(self, latents: Tensor) -> Tensor:
        """Gather latents [b, c, h, w] as fp32 vectors [n, c] of all processes, of length 1 if the codes are."""
        vectors = self.gather(rearrange(latents.detach().float(), "b c h w -> (b h w) c"))
        return F.normalize(vectors, dim=1) if self.quantizer.normalize else vectors

    def _place(self, places: Tensor, moved: Tensor | None = None) -> None:
        """Set all codes, or those where `moved` [codes] is true, to places [codes, c]."""
        if self.quantizer.normalize:
            # Equal lengths, because an optimizer step turns a longer vector less.
            places = F.normalize(places, dim=1)
        for quantizer in self.copies:
            weight = quantizer.embedding.weight
            weight.copy_(places if moved is None else torch.where(moved[:, None], places, weight))


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, weight: nn.Parameter, moved: Tensor) -> None:
    """Zero an optimizer's moments of codes [codes, c] where `moved` [codes] is true: they belong to the old places."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(moved[:, None], 0)


@torch.no_grad()
def kmeans(quantizer: VectorQuantizer, vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Cluster centers of vectors, by Lloyd's algorithm from random vectors.

    A center without vectors moves to a vector far from its own center, drawn as in k-means++. Drawing all first centers
    like this lowers the error of Gaussian vectors by a few percent, but spends codes on outliers: with heavy tails it
    halves the perplexity. With normalized codes, vectors have length 1 and centers are directions (spherical k-means).

    Args:
        quantizer: finds the nearest centers; its codes are overwritten.
        vectors: [n, c] fp32, n at least the number of codes; at most `VECTORS_PER_CODE` per code are used, at random.
        generator: on the vectors' device. Equal draws and vectors give bitwise equal centers.
    Returns:
        [codes, c] fp32.
    """
    weight = quantizer.embedding.weight
    codes = len(weight)
    vectors = vectors[_order(vectors, generator)[: VECTORS_PER_CODE * codes]]
    scale = FIXED_POINT / vectors.abs().max().double().clamp(min=torch.finfo(torch.float32).tiny)
    fixed = (vectors.double() * scale).round().long()
    centers = vectors[:codes]
    for _ in range(ITERATIONS):
        weight.copy_(centers)
        nearest = quantizer.nearest(vectors[:, :, None, None]).flatten()
        size = _count(nearest, codes)
        total = torch.zeros_like(fixed[:codes]).index_add_(0, nearest, fixed)
        means = (total / (size.clamp(min=1)[:, None] * scale)).float()
        # Drawn without replacement, with probabilities as the squared distances: the largest of d^2 / Exp(1).
        squared = (vectors - quantizer.codebook[nearest]).square().sum(1)
        keys = squared / torch.empty_like(squared).exponential_(generator=generator)
        far = vectors[keys.argsort(descending=True, stable=True)[_ranks(size == 0)]]
        centers = torch.where((size == 0)[:, None], _noisy(far, vectors, generator), means)
    return centers


def _count(chosen: Tensor, codes: int) -> Tensor:
    """Counts [codes] int64 of codes [n] int64; unlike `bincount` it does not synchronize with the device."""
    return chosen.new_zeros(codes).scatter_add_(0, chosen, torch.ones_like(chosen))


def _spread(wanted: Tensor, vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Places [codes, c] near random vectors [n, c], near different ones for the wanted codes if there are enough."""
    return _noisy(vectors[_order(vectors, generator)[_ranks(wanted) % len(vectors)]], vectors, generator)


def _order(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of vectors, [n] int64."""
    return torch.rand(len(vectors), generator=generator, device=vectors.device).argsort(stable=True)


def _ranks(wanted: Tensor) -> Tensor:
    """Rank [codes] int64 of each wanted code among the wanted ones; a valid rank for others."""
    return (wanted.cumsum(0) - 1).clamp(min=0)


def _noisy(places: Tensor, vectors: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(places.shape, generator=generator, device=places.device)
    return places + NOISE * vectors.std(0, correction=0) * noise
