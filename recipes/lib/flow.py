"""The rectified-flow schedule of Wan and CausVid: x_t = (1 − σ) x₀ + σ ε, velocity ε − x₀."""

import torch
from torch import Tensor

SHIFT = 8.0
NOISE_LEVELS = 1000
TIMESTEP_RANGE = (20.0, 980.0)  # what the score networks are asked for; at the ends their scores say nothing
DENOISING_STEPS = (1000.0, 757.0, 522.0, 0.0)  # of the few-step student: from pure noise to the finished video


class FlowSchedule:
    """1,000 noise levels from 1 down, σ = shift·s / (1 + (shift−1)·s), a level's timestep being 1000 σ.

    A timestep, ``[B]`` or ``[B, T]``, broadcasts over the trailing axes of the video ``[B, T, C, H, W]`` it belongs to.
    """

    def __init__(self, shift: float = SHIFT, device: torch.device | str = "cpu") -> None:
        s = torch.linspace(1, 0, NOISE_LEVELS + 1, dtype=torch.float64)[:-1]
        self.shift = shift
        self.sigmas = (shift * s / (1 + (shift - 1) * s)).float().to(device)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The nearest of the noise levels, shaped as ``timestep``."""
        nearest = (self.sigmas * NOISE_LEVELS - timestep[..., None]).abs().argmin(dim=-1)
        return self.sigmas[nearest]

    def noisy(self, x0_BTCHW: Tensor, noise_BTCHW: Tensor, timestep: Tensor) -> Tensor:
        sigma = _over(self.sigma(timestep), x0_BTCHW)
        return (1 - sigma) * x0_BTCHW + sigma * noise_BTCHW

    def clean(self, x_BTCHW: Tensor, velocity_BTCHW: Tensor, timestep: Tensor) -> Tensor:
        """The x₀ that a velocity predicted at ``timestep`` points to."""
        return x_BTCHW - _over(self.sigma(timestep), x_BTCHW) * velocity_BTCHW

    def random_timesteps(self, count: int) -> Tensor:
        """Uniform levels warped by the shift and clamped to the range the scores are used in, ``[count]``."""
        s = torch.randint(0, NOISE_LEVELS, (count,), device=self.sigmas.device) / NOISE_LEVELS
        return (NOISE_LEVELS * self.shift * s / (1 + (self.shift - 1) * s)).clamp(*TIMESTEP_RANGE)


def _over(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
