"""An IndexTTS-like text-to-speech GPT: reads conditions and text, predicts text and the audio's mel codes.

Shapes in names: B pairs, S text tokens and M mel tokens with their start and stop, C conditions, L = C + 1 + S + M tokens in all,
D width, N heads, K size of a head, F mel frames. Follows the published description of IndexTTS (arXiv 2502.05512); parameter names and
layouts are those of IndexTTS and of the GPT-2 in it, so that released weights keep their keys.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.errors import UsageError
from engine_kernels import PartiallyFrozenLinear

START_TEXT, STOP_TEXT = 0, 1
IGNORED = -100
INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class IndexTTSConfig:
    """Sizes of one model. ``text_vocab`` is the tokenizer's; the text tables have one row more."""

    layers: int
    width: int
    heads: int
    text_vocab: int
    mel_vocab: int  # audio codes, then start and stop
    text_positions: int  # the longest text, with start and stop
    mel_positions: int
    conditions: int = 32
    mel_bins: int = 100

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} over {self.heads} heads: each head needs a whole size")

    @property
    def codes(self) -> int:
        """How many audio codes there are: ids 0 to ``codes`` − 1."""
        return self.mel_vocab - 2

    @property
    def start_mel(self) -> int:
        return self.mel_vocab - 2

    @property
    def stop_mel(self) -> int:
        return self.mel_vocab - 1


PRESETS = {
    "tiny": IndexTTSConfig(layers=2, width=64, heads=2, text_vocab=600, mel_vocab=66, text_positions=66, mel_positions=130),
    "full": IndexTTSConfig(layers=24, width=1280, heads=20, text_vocab=24_000, mel_vocab=8194, text_positions=602, mel_positions=1818),
}


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is ``[in, out]``: :class:`torch.nn.Linear`'s transposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


class Attention(nn.Module):
    def __init__(self, config: IndexTTSConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.c_attn, self.c_proj = Conv1D(config.width, 3 * config.width), Conv1D(config.width, config.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Every token sees itself and those before it."""
        q, k, v = self.c_attn(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: IndexTTSConfig) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(config.width, 4 * config.width), Conv1D(4 * config.width, config.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BLD), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: IndexTTSConfig) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.width), Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(config.width), MLP(config)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.ln_1(x_BLD))
        return x_BLD + self.mlp(self.ln_2(x_BLD))


class GPT2(nn.Module):
    """GPT-2 without its tables: tokens and positions are embedded by the model around it. No dropout."""

    def __init__(self, config: IndexTTSConfig) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        for block in self.h:
            x_BLD = block(x_BLD)
        return self.ln_f(x_BLD)


class LearnedPositions(nn.Module):
    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(positions, width)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """``[S, D]``. Through the embedding's own ``forward``, where ZeRO-3 gathers its weight."""
        return self.emb(torch.arange(ids_BS.shape[1], device=ids_BS.device))


class ConditioningEncoder(nn.Module):
    """Mel frames ``[B, F, mel_bins]`` to conditions ``[B, C, D]``: learned queries attend to the frames."""

    def __init__(self, config: IndexTTSConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(INIT_STD * torch.randn(config.conditions, config.width))
        self.keys_values = nn.Linear(config.mel_bins, 2 * config.width)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, mel_BFM: Tensor) -> Tensor:
        k, v = self.keys_values(mel_BFM).chunk(2, dim=-1)
        return self.norm(F.scaled_dot_product_attention(self.latents.expand(mel_BFM.shape[0], -1, -1), k, v))


def shifted(ids_BS: Tensor, length_B: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs ``[start, ids…, stop]``, the targets ``[ids…, stop]`` that they predict, and which inputs are tokens: all ``[B, S + 2]``.

    Padding is ``stop`` among the inputs whatever it was, and :data:`IGNORED` among the targets.
    """
    place = torch.arange(ids_BS.shape[1] + 2, device=ids_BS.device)
    last_B1 = length_B[:, None]
    inputs = torch.where(place <= last_B1, F.pad(ids_BS, (1, 1), value=start), stop)
    targets = torch.where(place <= last_B1, inputs.roll(-1, dims=1), IGNORED)
    return inputs, targets, place <= last_B1 + 1


def tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Int64 ``[2]``: over how many text and mel tokens the batch's losses are sums. Every id is predicted, and a stop."""
    return torch.stack([(batch["text_len"] + 1).sum(), (batch["code_len"] + 1).sum()])


def summed_loss(head: nn.Module, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    if isinstance(head, PartiallyFrozenLinear):
        return head(x_BSD, targets_BS, ignore_index=IGNORED, reduction="sum")  # logits are never whole
    return F.cross_entropy(head(x_BSD).flatten(0, 1).float(), targets_BS.flatten(), ignore_index=IGNORED, reduction="sum")


class IndexTTS(nn.Module):
    """Tokens are ``[conditions + emotion, speed, text, mel codes]``; text and codes are predicted from what is before them."""

    def __init__(self, config: IndexTTSConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.text_embedding, self.mel_embedding = nn.Embedding(config.text_vocab + 1, width), nn.Embedding(config.mel_vocab, width)
        self.text_pos_embedding = LearnedPositions(config.text_positions, width)
        self.mel_pos_embedding = LearnedPositions(config.mel_positions, width)
        self.speed_emb = nn.Embedding(2, width)
        self.emo_layer = nn.Linear(width, width)
        self.gpt = GPT2(config)
        self.final_norm = nn.LayerNorm(width)
        self.text_head, self.mel_head = nn.Linear(width, config.text_vocab + 1), nn.Linear(width, config.mel_vocab)
        # Conditions come precomputed with the data: ``forward`` does not use what makes them, and it is not trained.
        self.conditioning_encoder = ConditioningEncoder(config).requires_grad_(False)
        self.initialize()

    def initialize(self) -> None:
        """As GPT-2: small weights, smaller ones where a block adds to what passes it."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
                depth = 2 * self.config.layers if name.endswith("c_proj") else 1
                nn.init.normal_(module.weight, std=INIT_STD / math.sqrt(depth))
            if isinstance(module, nn.Linear | Conv1D):
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        """What FSDP2 shards one by one."""
        return self.gpt.h

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Float32 ``[2]``: cross-entropy of text and of mel codes, each the sum over its :func:`tokens`.

        Sums, so that a mean is right over several batches and ranks: divide by the tokens of all of them.
        ``batch``: ``text_ids [B, S − 2]`` and ``codes [B, M − 2]`` int64, padded on the right with anything, ``text_len [B]``,
        ``code_len [B]`` int64, ``conditions [B, C, D]`` and ``emo [B, D]`` float. A length of −1 leaves a pair nothing to predict.
        """
        config, dtype = self.config, self.mel_embedding.weight.dtype
        text_BS, text_targets_BS, is_text = shifted(batch["text_ids"], batch["text_len"], START_TEXT, STOP_TEXT)
        mel_BM, mel_targets_BM, is_mel = shifted(batch["codes"], batch["code_len"], config.start_mel, config.stop_mel)
        parts = [
            batch["conditions"].to(dtype) + self.emo_layer(batch["emo"].to(dtype))[:, None],
            self.speed_emb(torch.zeros_like(batch["text_len"]))[:, None],
            self.text_embedding(text_BS) + self.text_pos_embedding(text_BS),
            self.mel_embedding(mel_BM) + self.mel_pos_embedding(mel_BM),
        ]
        is_token_BL = torch.cat([is_text.new_ones(len(text_BS), config.conditions + 1), is_text, is_mel], dim=1)
        x_BLD = self.trunk(torch.cat(parts, dim=1), is_token_BL)
        _, text_BSD, mel_BMD = x_BLD.split([config.conditions + 1, text_BS.shape[1], mel_BM.shape[1]], dim=1)
        text_loss = summed_loss(self.text_head, text_BSD, text_targets_BS)
        return torch.stack([text_loss, summed_loss(self.mel_head, mel_BMD, mel_targets_BM)])

    def trunk(self, x_BLD: Tensor, is_token_BL: Tensor) -> Tensor:
        """Each pair's padding is moved behind its tokens and back: after the text it would be seen by the codes, and a causal mask
        together with one for padding would cost attention its fast kernels."""
        order_BL = (~is_token_BL).int().argsort(dim=1, stable=True)
        packed = x_BLD.gather(1, order_BL[..., None].expand_as(x_BLD))
        y_BLD = self.final_norm(self.gpt(packed))
        return y_BLD.gather(1, order_BL.argsort(dim=1)[..., None].expand_as(y_BLD))


# Base weights.

TEXT_TABLES = ("text_embedding.weight", "text_head.weight", "text_head.bias")
ENCODER = "conditioning_encoder."
LISTED = 12  # of the weights that do not fit


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a ``.pth`` or ``.pt`` file, there itself or under "model", or from a ``.safetensors`` file; on the CPU.

    Raises :class:`~engine.errors.UsageError` where there is none. Python objects in the file are refused, not executed.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise UsageError(f"{path}: cannot be read: {e}") from e
    except Exception as e:  # of a damaged file torch raises almost anything, with pages of text
        kind = type(e).__name__
        raise UsageError(f"{path}: is not a file of weights alone ({kind}): damaged, of another format, or with Python objects in it") from e
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not state or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UsageError(f'{path}: holds no state dict; expected a dict of names and tensors, or one under "model"')
    return state


def load_base(model: IndexTTS, state: Mapping[str, Tensor], base_vocab: int) -> list[str]:
    """Fill ``model`` with a base model's weights; returns the names in ``state`` that were left out, for the log.

    The base's text tables have ``base_vocab`` + 1 rows, which may be fewer than the model's: the model's further rows keep their values.
    Names may come from LoRA training: ``.base_layer`` is dropped from them. Left out is what the model does not have: the inference
    model's copies, adapters, GPT-2's token table, other encoders; also the conditioning encoder, unless it fits, as training goes without.

    Raises :class:`~engine.errors.UsageError` listing what is missing or has another shape; the model is then unchanged.
    """
    config, own = model.config, model.state_dict()
    if not 0 < base_vocab <= config.text_vocab:
        raise UsageError(f"the base's vocabulary has {base_vocab} pieces, the tokenizer's {config.text_vocab}: it must have all of the base's")
    given = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
    shapes = {key: (base_vocab + 1, *value.shape[1:]) if key in TEXT_TABLES else tuple(value.shape) for key, value in own.items()}
    fits = {key: key in given and given[key].shape == shape for key, shape in shapes.items()}
    encoder_fits = all(fit for key, fit in fits.items() if key.startswith(ENCODER))
    used = [key for key in own if encoder_fits or not key.startswith(ENCODER)]
    problems = [f"{key} {_shape(given.get(key))}, expected {list(shapes[key])}" for key in used if not fits[key]]
    problems += [f"{key} {_shape(given[key])}, expected {config.layers} layers" for key in given if key.startswith(f"gpt.h.{config.layers}.")]
    if problems:
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise UsageError(f"the base's weights do not fit the model: {'; '.join(problems[:LISTED])}{more}. It needs a base of its own sizes")
    # The base's last row is no piece, and where pieces were added its place is the first new one's: only rows [0, base_vocab) are the base's.
    kept = base_vocab if base_vocab < config.text_vocab else base_vocab + 1
    rows = {key: torch.cat([given[key][:kept].to(own[key]), own[key][kept:]]) for key in TEXT_TABLES}
    model.load_state_dict({**own, **{key: given[key] for key in used}, **rows})
    return [name for name, key in zip(state, given, strict=True) if key not in used]


def _shape(tensor: Tensor | None) -> str:
    return "is missing" if tensor is None else f"is {list(tensor.shape)}"
