"""A Wan-style video diffusion transformer, bidirectional (teacher, critic) or block-causal (student).

Shapes in names: B videos, T latent frames, S tokens of a frame, L text tokens, N heads, K size of a head, D width,
C latent channels, H and W latent height and width. Follows the published description of Wan 2.1 (arXiv 2503.20314)
and CausVid (arXiv 2412.07772); parameter names are Wan's, so that its released weights keep their keys.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0
TIME_PERIOD = 10_000.0


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    """Sizes of one model and of the videos it is trained on."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    text_dim: int
    text_tokens: int  # captions are padded or cut to this length
    frames: int  # latent frames of a video
    channels: int
    height: int  # of a latent frame, before patching
    width: int
    frames_per_block: int  # the student denoises this many frames at a time
    patch: tuple[int, int, int] = (1, 2, 2)
    time_dim: int = 256
    recompute: bool = False  # trade a second forward of each block for its activations

    def __post_init__(self) -> None:
        head_dim, left = divmod(self.dim, self.heads)
        if left or head_dim % 2:
            raise ValueError(f"dim {self.dim} over {self.heads} heads: each head needs a whole, even size")
        if self.patch[0] != 1 or self.height % self.patch[1] or self.width % self.patch[2]:
            raise ValueError(f"latent frames of {self.height}x{self.width} do not divide into patches {self.patch}")
        if self.frames % self.frames_per_block:
            raise ValueError(f"{self.frames} frames are not a whole number of blocks of {self.frames_per_block}")

    @property
    def frame_tokens(self) -> int:
        return (self.height // self.patch[1]) * (self.width // self.patch[2])

    @property
    def blocks(self) -> int:
        """Blocks of frames in a video (not transformer blocks: those are ``layers``)."""
        return self.frames // self.frames_per_block


PRESETS = {
    "tiny": WanConfig(
        dim=48,
        ffn_dim=128,
        heads=2,
        layers=2,
        text_dim=64,
        text_tokens=12,
        frames=4,
        channels=16,
        height=8,
        width=8,
        frames_per_block=2,
    ),
    "wan1.3b": WanConfig(
        dim=1536,
        ffn_dim=8960,
        heads=12,
        layers=30,
        text_dim=4096,
        text_tokens=512,
        frames=21,
        channels=16,
        height=60,
        width=104,
        frames_per_block=3,
        recompute=True,
    ),
}


@dataclass
class LayerCache:
    """Keys (rotated) and values of the frames that one layer has already seen, ``[B, T·S, N, K]`` each."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored, followed by the new frames'; nothing is stored."""
        if self.keys is None or self.values is None:
            return keys, values
        return torch.cat([self.keys, keys], dim=1), torch.cat([self.values, values], dim=1)


@dataclass
class KVCache:
    """What a block-causal model remembers of a video's earlier frames."""

    layers: list[LayerCache] = field(default_factory=list)
    frames: int = 0

    @classmethod
    def empty(cls, layers: int) -> "KVCache":
        return cls([LayerCache() for _ in range(layers)])


@lru_cache(maxsize=64)
def rope_table(frames: int, rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 3-D rotary positions, float32 ``[T, S, K/2]`` each.

    Of the K/2 rotated pairs a third each turns with the row and the column, what is left over with the frame. Computed,
    not a buffer: casting the model to bfloat16 must not round it.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    angles = []
    for size, count in ((frames, pairs - 2 * spatial), (rows, spatial), (columns, spatial)):
        frequencies = ROPE_BASE ** -(torch.arange(count, dtype=torch.float64, device=device) / max(count, 1))
        angles.append(torch.outer(torch.arange(size, dtype=torch.float64, device=device), frequencies))
    angle = torch.cat(
        [
            angles[0][:, None, None].expand(frames, rows, columns, -1),
            angles[1][None, :, None].expand(frames, rows, columns, -1),
            angles[2][None, None, :].expand(frames, rows, columns, -1),
        ],
        dim=-1,
    ).flatten(1, 2)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BTSNK: Tensor, cos_TSP: Tensor, sin_TSP: Tensor) -> Tensor:
    """Turn each adjacent pair of channels by its position's angle; P = K/2."""
    even, odd = x_BTSNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TSP[:, :, None], sin_TSP[:, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_BTSNK.dtype)


def attend(q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor) -> Tensor:
    """Every query sees every key; returns ``[B, L, D]``."""
    out = F.scaled_dot_product_attention(q_BLNK.transpose(1, 2), k_BLNK.transpose(1, 2), v_BLNK.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def attend_block_causal(q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, block_tokens: int) -> Tensor:
    """Queries of a block see their own block and those before it.

    One unmasked call a block rather than one call with a mask: at full size the mask alone would be a gigabyte, and
    half of the work would be thrown away.
    """
    outs = []
    for start in range(0, q_BLNK.shape[1], block_tokens):
        end = start + block_tokens
        outs.append(attend(q_BLNK[:, start:end], k_BLNK[:, :end], v_BLNK[:, :end]))
    return torch.cat(outs, dim=1)


def layer_norm(x: Tensor) -> Tensor:
    """Non-affine, in float32 whatever the model's precision."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)


def sinusoid(timestep: Tensor, size: int) -> Tensor:
    """Timesteps of any shape to ``[..., size]``: cosines, then sines, float32."""
    half = size // 2
    frequencies = TIME_PERIOD ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


class Attention(nn.Module):
    """Projections with RMS-normalised queries and keys; what attends to what is the caller's business."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=NORM_EPS), nn.RMSNorm(dim, eps=NORM_EPS)

    def queries(self, x: Tensor) -> Tensor:
        return self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)), self.v(x).unflatten(-1, (self.heads, -1))


class SelfAttention(Attention):
    def forward(
        self,
        x_BTSD: Tensor,
        rope: tuple[Tensor, Tensor],
        block_tokens: int | None,
        past: LayerCache | None,
        remember: bool,
    ) -> Tensor:
        """``block_tokens`` None: bidirectional. With ``past``, the frames follow those it holds."""
        q = rotate(self.queries(x_BTSD), *rope).flatten(1, 2)
        k, v = self.keys_values(x_BTSD)
        k, v = rotate(k, *rope).flatten(1, 2), v.flatten(1, 2)
        if past is not None:
            k, v = past.extended(k, v)
            if remember:
                past.keys, past.values = k, v
            out = attend(q, k, v)
        elif block_tokens is None:
            out = attend(q, k, v)
        else:
            out = attend_block_causal(q, k, v, block_tokens)
        return self.o(out.view_as(x_BTSD))


class CrossAttention(Attention):
    def forward(self, x_BTSD: Tensor, text_BLD: Tensor) -> Tensor:
        out = attend(self.queries(x_BTSD.flatten(1, 2)), *self.keys_values(text_BLD))
        return self.o(out.view_as(x_BTSD))


class Block(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.self_attn = SelfAttention(dim, config.heads)
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(dim, config.heads)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))

    def forward(
        self,
        x_BTSD: Tensor,
        time_BT6D: Tensor,
        text_BLD: Tensor,
        rope: tuple[Tensor, Tensor],
        block_tokens: int | None,
        past: LayerCache | None,
        remember: bool,
    ) -> Tensor:
        """The T of ``time_BT6D`` is 1 where a video has one timestep."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time_BT6D)[..., None, :].unbind(2)
        y = layer_norm(x_BTSD) * (1 + scale) + shift
        x_BTSD = x_BTSD + gate * self.self_attn(y, rope, block_tokens, past, remember)
        x_BTSD = x_BTSD + self.cross_attn(self.norm3(x_BTSD), text_BLD)
        return x_BTSD + ffn_gate * self.ffn(layer_norm(x_BTSD) * (1 + ffn_scale) + ffn_shift)


class Head(nn.Module):
    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.dim, math.prod(config.patch) * config.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))

    def forward(self, x_BTSD: Tensor, time_BTD: Tensor) -> Tensor:
        shift, scale = (self.modulation + time_BTD[:, :, None])[..., None, :].unbind(2)
        return self.head(layer_norm(x_BTSD) * (1 + scale) + shift)


class VideoDiT(nn.Module):
    """Predicts the flow ``noise − video`` of a noisy latent video."""

    def __init__(self, config: WanConfig, *, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.channels, dim, kernel_size=config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.time_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        self.initialize()

    def initialize(self) -> None:
        """Xavier weights, small embeddings, and a zero head: an untrained model predicts no flow."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def forward(
        self,
        x_BTCHW: Tensor,
        timestep: Tensor,
        text_BLE: Tensor,
        cache: KVCache | None = None,
        remember: bool = False,
    ) -> Tensor:
        """The predicted flow, shaped as ``x_BTCHW``, float32.

        ``timestep`` (0 clean … 1000 noise) is ``[B, T]`` for a causal model, ``[B]`` for a bidirectional one.
        ``text_BLE`` are the caption's token embeddings. With ``cache``, ``x_BTCHW`` is the one block that follows the
        frames it holds; ``remember`` adds this block to it. Cache and all go through ``forward`` because that is where
        ZeRO-3 and FSDP2 gather the parameters.
        """
        config = self.config
        if timestep.ndim != (2 if self.causal else 1):
            raise ValueError(f"timestep {tuple(timestep.shape)}: one a frame if causal, one a video if not")
        if cache is not None and not (self.causal and x_BTCHW.shape[1] == config.frames_per_block):
            raise ValueError(f"a cache is for a causal model fed one block of {config.frames_per_block} frames at a time")
        frames, rows, columns = x_BTCHW.shape[1], config.height // config.patch[1], config.width // config.patch[2]
        dtype = self.patch_embedding.weight.dtype

        x_BTSD = self.patch_embedding(x_BTCHW.to(dtype).transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
        text_BLD = self.text_embedding(text_BLE.to(dtype))
        time_BTD = self.time_embedding(sinusoid(timestep if self.causal else timestep[:, None], config.time_dim).to(dtype))
        time_BT6D = self.time_projection(time_BTD).unflatten(-1, (6, -1))

        seen = cache.frames if cache else 0
        cos, sin = rope_table(seen + frames, rows, columns, config.dim // config.heads, x_BTCHW.device)
        block_tokens = config.frames_per_block * config.frame_tokens if self.causal else None
        for index, block in enumerate(self.blocks):
            past = cache.layers[index] if cache else None
            arguments = (x_BTSD, time_BT6D, text_BLD, (cos[seen:], sin[seen:]), block_tokens, past, remember)
            if config.recompute and torch.is_grad_enabled():
                x_BTSD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BTSD = block(*arguments)
        if cache is not None and remember:
            cache.frames += frames
        return self._unpatch(self.head(x_BTSD, time_BTD), rows, columns).float()

    def _unpatch(self, x_BTSP: Tensor, rows: int, columns: int) -> Tensor:
        """Tokens back to ``[B, T, C, H, W]``; P holds (patch rows, patch columns, channels)."""
        _, patch_rows, patch_columns = self.config.patch
        x = x_BTSP.unflatten(3, (patch_rows, patch_columns, self.config.channels)).unflatten(2, (rows, columns))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)
