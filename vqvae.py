"""Hierarchical VQ-VAE-2 (Razavi et al., 2019, arXiv:1906.00446) that is the identity before it has seen an image.

Level 0 is the finest. Every convolution starts as a linear map on the centre tap, every residual branch with weight zero
(ReZero, Bachlechner et al., 2020, arXiv:2003.04887), every decoder as the transpose of its encoder, and every level codes
at first what the coarser ones leave over, as a Laplacian pyramid does (Burt and Adelson, 1983). So the path past the
quantisers returns its input exactly as long as `in_channels * scaling_rates[0]**2 <= embed_dim`, whatever the coarser
levels do, and the path through them starts as a residual quantiser.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preprocessing.noise import NoiseModel
from preprocessing.stabilize import colour, full_scale_of, stabilize, unstabilize, whiten
from running import distributed

REFERENCE_LEVEL = 0.2  # noise level at which a stabilised image is divided by its full scale, and lies in [0, 1] again
FULL_SCALE = full_scale_of(REFERENCE_LEVEL)
LOOKUP_ROWS = 2048  # rows of the distance matrix held at once in a codebook lookup: what a core's cache holds ...
LOOKUP_ROWS_GPU = 65536  # ... and what keeps a GPU busy
LOOKUP_BLOCK = 32  # distances that are compared at once


def _centre_tap(matrix: Tensor, kernel_size: int = 3) -> nn.Conv2d:
    """A convolution that starts as `matrix` (out, in) at every pixel: the other taps and the bias are zero."""
    conv = nn.Conv2d(matrix.shape[1], matrix.shape[0], kernel_size, padding=kernel_size // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        conv.weight[:, :, kernel_size // 2, kernel_size // 2] = matrix
    return conv


class ReZeroBlock(nn.Module):
    """x + alpha * f(x) with alpha = 0 at first (Bachlechner et al., 2020, eq. 1); keeps the shape (N, C, H, W).

    alpha multiplies the weights of f's last convolution, which are few, not its pixels. None: they are multiplied already.
    """

    def __init__(self, channels: int, res_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, res_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(res_channels, channels, 1)
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.conv2.weight, self.conv2.bias
        if self.alpha is not None:
            weights = tuple(self.alpha * weight for weight in weights)
        # in place: no backward pass looks at what a convolution returned
        return F.conv2d(F.relu(self.conv1(F.relu(x)), inplace=True), *weights).add_(x)


def _residual_stack(channels: int, res_channels: int, nb_res_layers: int) -> nn.Sequential:
    return nn.Sequential(*(ReZeroBlock(channels, res_channels) for _ in range(nb_res_layers)))


@dataclass
class Quantized:
    """What a codebook returns for (N, D, H, W) vectors."""

    code: Tensor  # (N, D, H, W): nearest entries with straight-through gradient, or the input if not quantised
    indices: Tensor  # (N, H, W) int64: nearest entry of every vector
    error: Tensor  # (N,): mean ||z - e||^2 / D


class VectorQuantizer(nn.Module):
    """Codebook of (nb_entries, embed_dim) entries e, and the averages that `Codebooks` computes them from."""

    def __init__(self, nb_entries: int, embed_dim: int):
        super().__init__()
        self.register_buffer("codebook", torch.randn(nb_entries, embed_dim))
        self.register_buffer("ema_count", torch.ones(nb_entries))
        self.register_buffer("ema_sum", self.codebook.clone())

    @torch.no_grad()
    def lookup(self, vectors: Tensor) -> Tensor:
        """Index of the nearest entry (Euclidean) of each of (M, D) vectors; (M,) int64."""
        vectors = vectors.float()
        # argmin ||v - e||^2 = argmin ||e||^2 / 2 - v.e, in chunks: no M x K matrix is kept
        norms, product = self.codebook.square().sum(1), dict(beta=0.5, alpha=-1)
        if vectors.is_cuda:
            chunks = (torch.addmm(norms, rows, self.codebook.t(), **product) for rows in vectors.split(LOOKUP_ROWS_GPU))
            found = [distances.argmin(1) for distances in chunks]
            return torch.cat(found) if len(found) > 1 else found[0]
        indices = torch.empty_like(vectors[:, 0], dtype=torch.int64)
        # one chunk's memory serves all: fresh pages for each would cost as much as its product
        distances = vectors.new_empty(min(LOOKUP_ROWS, len(vectors)), len(norms))
        width = math.gcd(len(norms), LOOKUP_BLOCK)
        for rows, nearest in zip(vectors.split(LOOKUP_ROWS), indices.split(LOOKUP_ROWS), strict=True):
            torch.addmm(norms, rows, self.codebook.t(), **product, out=distances[: len(rows)])
            # amin is vectorised on the CPU, argmin is not: first the block of the least, then its place in it
            blocks = distances[: len(rows)].unflatten(1, (-1, width))
            block = blocks.amin(2).argmin(1)
            within = blocks[torch.arange(len(rows), device=block.device), block].argmin(1)
            torch.add(within, block, alpha=width, out=nearest)
        return indices

    def nearest(self, x: Tensor) -> Tensor:
        """Index of the nearest entry of every vector of (N, D, H, W); (N, H, W) int64."""
        n, d, h, w = x.shape
        return self.lookup(x.permute(0, 2, 3, 1).reshape(-1, d)).view(n, h, w)

    def embed(self, indices: Tensor) -> Tensor:
        """Entries at (N, H, W) indices as (N, D, H, W)."""
        return F.embedding(indices, self.codebook).permute(0, 3, 1, 2)

    @torch.no_grad()
    def initialise(
        self, vectors: Tensor, count: float, generator: torch.Generator | None = None, rounds: int = 10
    ) -> None:
        """Set the entries by `rounds` of k-means (Lloyd, 1982) on (M, D) vectors; `count` vectors are expected in a batch."""
        entries = self.codebook.shape[0]
        vectors = vectors.to(self.codebook)
        order = torch.randperm(len(vectors), generator=generator)
        picked = vectors[order.repeat(math.ceil(entries / len(order)))[:entries].to(vectors.device)]
        # vectors of flat background are all alike, and few vectors repeat: part equal entries
        jitter = torch.randn(picked.shape, generator=generator).to(picked)
        self.codebook.copy_(picked + 0.01 * vectors.std(0, unbiased=False) * jitter)
        used = torch.zeros_like(self.ema_count)
        for _ in range(rounds):
            indices = self.lookup(vectors)
            used = torch.zeros_like(self.ema_count).index_add_(0, indices, torch.ones_like(vectors[:, 0]))
            sums = torch.zeros_like(self.codebook).index_add_(0, indices, vectors)
            # an entry that serves nothing moves to one of the vectors that are served worst
            error = (vectors - self.codebook[indices]).square().sum(1)
            worst = vectors[error.topk(min(entries, len(error))).indices]
            worst = worst[torch.arange(entries, device=worst.device) % len(worst)]
            self.codebook.copy_(torch.where(used[:, None] > 0, sums / used.clamp(min=1)[:, None], worst))
        share = max(count, 1e-3) / entries
        self.ema_count.copy_((used / len(vectors) * entries * share).clamp(min=share / 3))
        self.ema_sum.copy_(self.codebook * self.ema_count[:, None])

    def forward(self, x: Tensor, weight: Tensor) -> Quantized:
        """Quantise (N, D, H, W) vectors, of the samples whose `weight` (N,) is 1; others, with 0, stay as they are."""
        own = x.dtype  # what follows works in it: single precision would be cast on the way
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            indices = self.nearest(x.detach())  # (N, H, W)
            nearest = self.embed(indices)  # (N, D, H, W)
            code = torch.addcmul(x, nearest - x.detach(), weight[:, None, None, None])  # (N, D, H, W)
            error = F.mse_loss(x, nearest, reduction="none").mean(dim=(1, 2, 3))
            return Quantized(code.to(own), indices, error)


class Codebooks(nn.ModuleList):
    """Codebooks of `nb_levels` levels, with EMA updates (van den Oord et al., 2017, arXiv:1711.00937, appendix A.1).

    Entries whose EMA count falls under `revive_threshold` times the even share are re-seeded from the current batch.
    Statistics are summed over all processes, so that every process holds the same codebooks. All levels learn at once: a GPU
    waits longer for the launch of these small operators than it takes to run them.
    """

    def __init__(self, levels: Iterable[VectorQuantizer] = (), decay: float = 0.99, revive_threshold: float = 0.02):
        super().__init__(levels)
        self.decay, self.revive_threshold = decay, revive_threshold

    def draws(self, generator: torch.Generator | None = None) -> Tensor:
        """Random numbers for `learn`, in [0, 1): (nb_levels, nb_entries) float64 on the host."""
        return torch.rand(len(self), len(self[0].codebook), generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def learn(self, vectors: Sequence[Tensor], indices: Sequence[Tensor], weight: Tensor, draws: Tensor) -> Tensor:
        """One EMA step, in training: of every level on (N, D, H, W) vectors and (N, H, W) indices of samples with `weight` (N,) 1.

        Vectors that are not finite, or none at all, leave their level as it is. `draws` are those of the method. Returns how
        often each entry was used, (nb_levels, nb_entries), over all processes.
        """
        (levels, entries), sizes = draws.shape, [each.numel() for each in indices]
        rows = torch.cat([each.movedim(1, -1).flatten(0, 2) for each in vectors]).float()  # (M, D), level after level
        firsts = [level * entries for level in range(levels)]  # of the entries of all levels
        flat = torch.cat(torch._foreach_add([each.flatten() for each in indices], firsts))  # (M,)
        weight = torch.cat([weight[:, None, None].expand_as(each).flatten() for each in indices])  # (M,)
        used = rows.new_zeros(levels * entries, 1 + rows.shape[1])
        used[:, 0].index_add_(0, flat, weight)
        used[:, 1:].index_add_(0, flat, rows * weight[:, None])
        both = distributed.all_reduce(used).view(levels, entries, -1)
        counts, sums = both.tensor_split([1], 2)  # (L, K, 1), (L, K, D)
        if self.training:
            buffers = [*self.buffers()]
            before = [torch.stack(buffers[i::3]).view(levels, entries, -1) for i in range(3)]
            count, total = (old.lerp(new, 1 - self.decay) for old, new in zip(before[1:], (counts, sums), strict=True))
            number = count.sum(1, keepdim=True)  # (L, 1, 1)
            smoothed = (count + 1e-5) / (number + entries * 1e-5) * number  # Laplace smoothing
            codebook = total / smoothed.clamp(min=1e-12)
            if self.revive_threshold > 0:
                error = (rows - codebook.flatten(0, 1)[flat]).square().sum(1) * weight
                candidates, found = self._candidates(rows, error, sizes, draws)
                dead = (count < self.revive_threshold / entries * number) & found
                # a revived entry gets a third of the share: enough to stay for about a hundred steps without being used
                count = torch.where(dead, number / (3 * entries), count)
                codebook = torch.where(dead, candidates, codebook)
                total = torch.where(dead, candidates * count, total)
            finite = torch.linalg.vector_norm(sums, math.inf, (1, 2), keepdim=True) < math.inf
            learns = finite & (counts.sum(1, keepdim=True) > 0)
            learnt = [torch.where(learns, *each) for each in zip((codebook, count, total), before, strict=True)]
            values = itertools.chain(*zip(*learnt, strict=True))  # level after level, as the buffers are
            torch._foreach_copy_(buffers, [new.view_as(old) for new, old in zip(values, buffers, strict=True)])
        return counts.squeeze(2)

    def _candidates(self, rows: Tensor, error: Tensor, sizes: Sequence[int], draws: Tensor) -> tuple[Tensor, Tensor]:
        """For every entry one of its level's vectors, (L, K, D), and whether there is any, (L, 1, 1).

        Drawing by squared error, as k-means++ does (Arthur and Vassilvitskii, 2007), puts the entry where it is missed: `error`
        (M,) is that of the vectors `rows` (M, D), so many of each level. The vectors of several processes count as one row of
        them, in the order of the processes.
        """
        ends = list(itertools.accumulate(sizes))
        cumulative = error.nan_to_num(0, 0, 0).cumsum(0, dtype=torch.float64)
        after = torch.stack([cumulative[end - 1] for end in ends])  # (L,)
        before = F.pad(after[:-1], (1, 0))
        own = after - before
        parts = distributed.stack(own).cumsum(0)  # (P, L), of the processes' parts of the row
        targets = distributed.broadcast(draws) * parts[-1, :, None]  # (L, K)
        owner = torch.searchsorted(parts.t().contiguous(), targets, right=True)
        start = before + own - parts[distributed.rank()]
        picked = torch.searchsorted(cumulative, targets + start[:, None], right=True)
        torch._foreach_clamp_max_(picked.unbind(), [end - 1 for end in ends])
        is_own = owner.clamp(max=len(parts) - 1) == distributed.rank()
        return distributed.all_reduce(torch.where(is_own[..., None], rows[picked], 0)), parts[-1, :, None, None] > 0


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of usage counts (..., K): the number of entries in even use; 1 if nothing was counted."""
    return torch.special.entr(counts / counts.sum(-1, keepdim=True).clamp(min=1e-12)).sum(-1).exp()


@dataclass
class VQVAEOutput:
    """What the decode path returns."""

    reconstruction: Tensor  # (N, C, H, W)
    indices: list[Tensor]  # per level, finest first: (N, h, w) int64; empty on the continuous path
    vectors: list[Tensor]  # per level: (N, embed_dim, h, w), of which the indices are the nearest entries
    commitment_loss: Tensor  # scalar: ||z - e||^2 / D, the mean over vectors of quantised samples, summed over levels


class VQVAE(nn.Module):
    """VQ-VAE-2 with `nb_levels` pyramid levels. Constructor words as in `hps.py`; raises ValueError for settings that clash.

    Its domain is images in [0, 1] or, with `stabilize`, images in units of their noise: see `to_domain`.
    The features of level l are (N, hidden_channels, H / r_l, W / r_l), r_l the product of the first l + 1 scaling rates.
    The code of a level is computed from its features and the decoded codes of all coarser levels, as in Razavi et al.
    (2019), figure 2a.
    """

    def __init__(
        self,
        in_channels: int = 1,
        hidden_channels: int = 128,
        res_channels: int = 32,
        nb_res_layers: int = 2,
        nb_levels: int = 5,
        scaling_rates: Iterable[int] = (4, 2, 2, 2, 2),
        embed_dim: int = 64,
        nb_entries: int = 512,
        codebook_decay: float = 0.99,
        revive_threshold: float = 0.02,
        stabilize: bool = False,
    ):
        super().__init__()
        self.stabilize, self.scaling_rates = stabilize, tuple(scaling_rates)
        if len(self.scaling_rates) != nb_levels:
            raise ValueError(f"nb_levels is {nb_levels}, but scaling_rates holds {len(self.scaling_rates)} rates")
        if embed_dim > hidden_channels:
            raise ValueError(f"embed_dim {embed_dim} must not exceed hidden_channels {hidden_channels}")
        self.in_channels, self.hidden_channels, self.nb_levels = in_channels, hidden_channels, nb_levels
        self.scale = math.prod(self.scaling_rates)
        self.downs, self.encoders, self.projections = (nn.ModuleList() for _ in range(3))
        self.quantizers = Codebooks(decay=codebook_decay, revive_threshold=revive_threshold)
        self.inputs, self.decoders, self.ups = (nn.ModuleList() for _ in range(3))
        basis = torch.empty(hidden_channels, hidden_channels)  # one for all levels: what one fills, the next one keeps
        nn.init.orthogonal_(basis)
        project = basis[:, :embed_dim].t()
        for level, rate in enumerate(self.scaling_rates):
            patch = (hidden_channels if level else in_channels) * rate**2
            has_above = level < nb_levels - 1
            if level:  # coarser levels start as averages of rate x rate features, times rate to be semi-orthogonal
                down = torch.eye(hidden_channels).repeat_interleave(rate**2, dim=1) / rate
            elif patch <= hidden_channels:
                down = basis[:, :patch]
            else:
                nn.init.orthogonal_(down := torch.empty(hidden_channels, patch))
            self.downs.append(_centre_tap(down))
            self.encoders.append(_residual_stack(hidden_channels, res_channels, nb_res_layers))
            # what a level codes starts as what the coarser levels leave of it ...
            own_minus_above = torch.cat([project, -project], dim=1) if has_above else project
            self.projections.append(_centre_tap(own_minus_above, kernel_size=1))
            self.quantizers.append(VectorQuantizer(nb_entries, embed_dim))
            # ... and its decoder starts by adding the two up again
            code_plus_above = torch.cat([project.t(), torch.eye(hidden_channels)], dim=1) if has_above else project.t()
            self.inputs.append(_centre_tap(code_plus_above))
            self.decoders.append(_residual_stack(hidden_channels, res_channels, nb_res_layers))
            self.ups.append(_centre_tap(down.t()))
        for parameter in self.parameters():
            if parameter.dim() == 4:  # Module.to would swap fake tensors, which other references forbid
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def merged_weights(self) -> dict[str, Tensor | None]:
        """The parameters with every ReZero block's alpha merged into its last convolution; the alphas are None.

        All are multiplied at once: a GPU waits longer for a launch than it takes to multiply these.
        """
        weights: dict[str, Tensor | None] = dict(self.named_parameters())
        blocks = [name for name, module in self.named_modules() if isinstance(module, ReZeroBlock)]
        if blocks:
            alphas = torch.stack([weights[f"{block}.alpha"] for block in blocks])  # (B,)
            for part in ("weight", "bias"):
                names = [f"{block}.conv2.{part}" for block in blocks]
                together = torch.stack([weights[name] for name in names])  # (B, C) or (B, C, R, 1, 1)
                weights |= zip(names, together * alphas.view(-1, *[1] * (together.dim() - 1)), strict=True)
        return weights | dict.fromkeys([f"{block}.alpha" for block in blocks])

    def to_domain(self, images: Tensor, noise: NoiseModel | None) -> Tensor:
        """Images (N, C, H, W) in [0, 1] as the model sees them: with `stabilize`, in units of their noise, whitened.

        Those are divided by a constant. Raises ValueError if a stabilised model is not told the noise.
        """
        if not self.stabilize:
            return images
        noise = self._known(noise)
        return whiten(stabilize(images, noise), noise) / FULL_SCALE

    def from_domain(self, values: Tensor, noise: NoiseModel | None) -> Tensor:
        """Inverse of `to_domain`."""
        if not self.stabilize:
            return values
        noise = self._known(noise)
        return unstabilize(colour(values * FULL_SCALE, noise), noise)

    @staticmethod
    def _known(noise: NoiseModel | None) -> NoiseModel:
        if noise is None:
            raise ValueError("a stabilised first stage needs to know the noise")
        return noise

    def encode(self, x: Tensor) -> Tensor:
        """Features of the finest level before quantisation: (N, C, H, W) to (N, hidden_channels, H', W').

        H' = ceil(H / scale) * scale / scaling_rates[0], likewise W': sides that are no multiple of the total scaling are
        padded by their border pixels.
        """
        h, w = x.shape[-2:]
        x = F.pad(x, (0, -w % self.scale, 0, -h % self.scale), mode="replicate")  # (N, C, H' r_0, W' r_0)
        return self._features(x, 0)  # (N, hidden, H', W')

    def _features(self, x: Tensor, level: int) -> Tensor:
        x = F.pixel_unshuffle(x, self.scaling_rates[level])  # (N, C r^2, H / r, W / r)
        return self.encoders[level](self.downs[level](x))  # (N, hidden, H / r, W / r)

    def _pyramid(self, z: Tensor) -> list[Tensor]:
        """The features of all levels, finest first, from the finest."""
        return list(itertools.accumulate(range(1, self.nb_levels), self._features, initial=z))

    def decode(self, z: Tensor, quantize: bool | Tensor = True, shape: tuple[int, int] | None = None) -> VQVAEOutput:
        """Decode finest features (N, hidden_channels, H', W'), re-deriving the coarser levels from them.

        Args:
            z: what `encode` returned, or a restored version of it.
            quantize: True through the codebooks of all levels, False past them, or an (N,) tensor of both by sample.
            shape: (H, W) to crop the image to; None keeps what z stands for.
        """
        features = self._pyramid(z)
        weight = z.new_ones(len(z)) if isinstance(quantize, bool) else quantize
        weight = weight.float()
        vectors: list[Tensor] = []
        codes: list[Quantized] = []
        above: list[Tensor] = []  # what is decoded so far, once there is something
        for level in reversed(range(self.nb_levels)):
            code = self._code(level, features, above)  # (N, embed, h, w)
            if quantize is not False:
                vectors.insert(0, code.detach())
                codes.insert(0, self.quantizers[level](code, weight))
                code = codes[0].code
            above = [self._decoded(level, code, above)]  # (N, hidden, h r, w r), at last (N, C, H, W)
        error = torch.stack([code.error for code in codes] or [torch.zeros_like(weight)])  # (nb_levels, N)
        commitment_loss = (error * weight).sum() / weight.sum().clamp(min=1)
        return VQVAEOutput(_crop(above[0], shape), [code.indices for code in codes], vectors, commitment_loss)

    def decode_codes(self, indices: list[Tensor], shape: tuple[int, int] | None = None) -> Tensor:
        """Image (N, C, H, W) from code indices alone: a list, finest level first, of (N, h, w) int64."""
        above: list[Tensor] = []
        for level in reversed(range(self.nb_levels)):
            above = [self._decoded(level, self.quantizers[level].embed(indices[level]), above)]
        return _crop(above[0], shape)

    def _code(self, level: int, features: list[Tensor], above: list[Tensor]) -> Tensor:
        return self.projections[level](torch.cat([features[level], *above], dim=1))

    def _decoded(self, level: int, code: Tensor, above: list[Tensor]) -> Tensor:
        x = self.inputs[level](torch.cat([code, *above], dim=1))  # (N, hidden, h, w)
        x = self.ups[level](self.decoders[level](x))  # (N, C r^2, h, w)
        return F.pixel_shuffle(x, self.scaling_rates[level])  # (N, C, h r, w r)

    def forward(self, x: Tensor, quantize: bool | Tensor = True) -> VQVAEOutput:
        """Encode and decode (N, C, H, W) images of any size; see `decode`."""
        return self.decode(self.encode(x), quantize, x.shape[-2:])

    @torch.no_grad()
    def initialise_codebooks(
        self, batches: Sequence[Tensor], generator: torch.Generator | None = None, parts: int = 1
    ) -> None:
        """Initialise the codebooks from (N, C, H, W) batches, the coarsest first, so that each level sees the others' codes.

        In training, `parts` of them make up a batch.
        """
        pyramids = [self._pyramid(self.encode(images)) for images in batches]
        decoded: list[list[Tensor]] = [[] for _ in batches]
        for level, quantizer in reversed(list(enumerate(self.quantizers))):
            codes = [self._code(level, *both).float() for both in zip(pyramids, decoded, strict=True)]
            vectors = torch.cat([code.permute(0, 2, 3, 1).flatten(0, 2) for code in codes])
            quantizer.initialise(vectors, len(vectors) / math.ceil(len(codes) / parts), generator)
            decoded = [
                [self._decoded(level, quantizer.embed(quantizer.nearest(code)), above)]
                for code, above in zip(codes, decoded, strict=True)
            ]


def _crop(image: Tensor, shape: tuple[int, int] | None) -> Tensor:
    h, w = shape or image.shape[-2:]
    return image[..., :h, :w]
