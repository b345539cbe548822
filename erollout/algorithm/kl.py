"""Estimators of KL(policy || reference) from log-probs of sampled tokens (J. Schulman, "Approximating KL divergence")."""

from collections.abc import Callable

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(p/q): unbiased, can be negative."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(p/q)^2 / 2: biased, never negative; its gradient is an unbiased estimate of the KL's."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p): unbiased, never negative, low variance."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1.0 - log_ratio


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""By the value of algorithm.kl_estimator; each maps two tensors [...] to one [...]."""
