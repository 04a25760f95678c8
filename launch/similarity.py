"""How alike two models' outputs are: pure functions on tensors, computed in FP64.

Equal inputs give exactly KL 0, top-1 agreement 1.0, cosine 1.0, errors 0 and an infinite PSNR. A NaN in either input
makes the number NaN, which no limit accepts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

CERTAIN = 1 - 2.0**-23  # an FP32 log-probability cannot tell more than this from 1
ROWS = 16  # distributions in FP64 at a time: a vocabulary of 150,000 takes 20 MB a copy

# ---------------------------------------------------------------- language models


def token_kl(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) of next-token distributions in nats, FP64 [N], from their logits [N, V]."""
    _same_shape(reference, candidate)
    pieces = zip(_pieces(reference), _pieces(candidate), strict=True)
    return torch.cat([_kl(p.double().log_softmax(-1), q.double().log_softmax(-1)) for p, q in pieces])


def _pieces(rows: Tensor) -> Iterator[Tensor]:
    return (rows[start : start + ROWS] for start in range(0, len(rows), ROWS))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # 0 log 0 is 0. Rounding may leave a sum just below zero, where no divergence can be.
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp_min(0.0)


def same_top1(reference: Tensor, candidate: Tensor) -> Tensor:
    """Whether both rank the same token first, bool [N], from logits [N, V]; of equal logits the first counts."""
    _same_shape(reference, candidate)
    return (reference.argmax(-1) == candidate.argmax(-1)) & ~reference.isnan().any(-1) & ~candidate.isnan().any(-1)


def surprisal(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log probability of each token that came, in nats, FP64 [N], from logits [N, V]."""
    pieces = zip(_pieces(logits), _pieces(tokens), strict=True)
    return torch.cat([-p.double().log_softmax(-1).gather(-1, t[:, None]).squeeze(-1) for p, t in pieces])


def perplexity(surprisals: Tensor) -> float:
    """exp of the mean surprisal."""
    return surprisals.double().mean().exp().item()


def least_kl(
    reference_ids: Tensor, reference_logprobs: Tensor, candidate_ids: Tensor, candidate_logprobs: Tensor
) -> Tensor:
    """A lower bound of KL(reference || candidate), FP64 [N], where of each only the likeliest token is known.

    Merging all other tokens into one cannot raise a divergence (data processing inequality). Where the two likeliest
    tokens a and b differ, candidate(a) is at most min(candidate(b), 1 - candidate(b)), and so for reference(b).
    """
    p, q = (logprobs.double().exp().clamp_max(CERTAIN) for logprobs in (reference_logprobs, candidate_logprobs))
    q_of_a, p_of_b = torch.minimum(q, 1 - q), torch.minimum(p, 1 - p)
    zero = torch.zeros_like(p)
    differing = torch.maximum(
        torch.where(p > q_of_a, _binary_kl(p, q_of_a), zero), torch.where(q > p_of_b, _binary_kl(p_of_b, q), zero)
    )
    bound = torch.where(reference_ids == candidate_ids, _binary_kl(p, q), differing)
    return torch.where(p.isnan() | q.isnan(), math.nan, bound)


def _binary_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of two coins that show heads with probability p and q."""
    return (_term(p, q) + _term(1 - p, 1 - q)).clamp_min(0.0)


def _term(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * (p.log() - q.log()))


# ---------------------------------------------------------------- latents and frames


def cosine(reference: Tensor, candidate: Tensor) -> float:
    """Cosine of the angle between two tensors of one shape; two zeros point the same way, a zero and another do not."""
    a, b = _flat(reference, candidate)
    norms = (a * a).sum() * (b * b).sum()
    if norms == 0:
        return float(torch.equal(a, b))
    # The root of the product, not the product of roots: for a = b it is a's square exactly, and the quotient 1.
    return ((a * b).sum() / norms.sqrt()).clamp(-1.0, 1.0).item()


def mae(reference: Tensor, candidate: Tensor) -> float:
    """Mean absolute error."""
    a, b = _flat(reference, candidate)
    return (a - b).abs().mean().item()


def rmse(reference: Tensor, candidate: Tensor) -> float:
    """Root of the mean squared error."""
    a, b = _flat(reference, candidate)
    return (a - b).square().mean().sqrt().item()


def max_abs(reference: Tensor, candidate: Tensor) -> float:
    """Largest absolute error."""
    a, b = _flat(reference, candidate)
    return (a - b).abs().max().item()


def psnr(reference: Tensor, candidate: Tensor, peak: float) -> float:
    """Peak signal-to-noise ratio in dB: 20 log10(peak / rmse); infinite for equal frames."""
    error = rmse(reference, candidate)
    if error == 0 or peak == 0:
        return math.inf if error == 0 else -math.inf
    return 20 * math.log10(peak / error) if math.isfinite(error) else math.nan


def _flat(reference: Tensor, candidate: Tensor) -> tuple[Tensor, Tensor]:
    _same_shape(reference, candidate)
    return reference.double().flatten(), candidate.double().flatten()


def _same_shape(reference: Tensor, candidate: Tensor) -> None:
    if reference.shape != candidate.shape:
        raise ValueError(
            f"candidate of shape {list(candidate.shape)}; expected the reference's {list(reference.shape)}"
        )
