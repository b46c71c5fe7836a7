"""TinyDiT: a diffusion transformer (Peebles and Xie, arXiv 2212.09748) on pixels, conditioned on time and class."""

import math

import torch
from torch import nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu

from tinycats.models import crops

TIMESTEP_FREQUENCIES = 256
MLP_RATIO = 4
FINAL_CHANNELS = 16
FEW_TOKENS = 256  # whose attention weights may all be in memory


def unpatchify(patches: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[B, N, C * patch_size**2], N patches row by row, each flattened as (C, y, x) -> [B, C, H, W], square. In memory,
    channels are last, as convolutions are fastest."""
    batch, count, size = patches.shape
    side, channels = math.isqrt(count), size // patch_size**2
    grid = patches.reshape(batch, side, side, channels, patch_size, patch_size).permute(0, 1, 4, 2, 5, 3)
    return grid.reshape(batch, side * patch_size, side * patch_size, channels).permute(0, 3, 1, 2)


def sinusoids(positions: torch.Tensor, dim: int, longest: float = 10_000) -> torch.Tensor:
    """[N] -> [N, dim]: cosines and sines at dim / 2 frequencies from 1 down to 1/longest (Vaswani et al., arXiv
    1706.03762, section 3.5)."""
    frequencies = torch.exp(-math.log(longest) * torch.arange(dim // 2, device=positions.device) / (dim // 2))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_embedding(side: int, dim: int) -> torch.Tensor:
    """[side**2, dim], fixed: half of it says in which row a patch lies, half in which column.

    Two departures from the paper, by measurement (ADR-026). Its waves, made for sentences, are up to 60,000
    positions long, and most of them the same all over a grid of eight; and it is twice as large, to be heard
    above what a patch shows.
    """
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return 2 * torch.cat([sinusoids(axis.flatten(), dim // 2, longest=2 * side) for axis in (rows, columns)], dim=1)


class TimestepEmbedder(nn.Module):
    """Timesteps in [0, 1], [B] -> [B, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        # The frequencies were made for a thousand steps.
        return self.mlp(sinusoids(1000 * timesteps, TIMESTEP_FREQUENCIES))


def modulate(tokens: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[B, N, dim] scaled and shifted by [B, dim]."""
    return tokens * (1 + scale[:, None]) + shift[:, None]


class PatchEmbedder(nn.Conv2d):
    """Images [B, 3, S, S] -> a token for each patch, [B, N, dim].

    A departure from the paper, by measurement (ADR-029): a token is made of what its patch shows and of what the
    halves of its neighbours that lie next to it show, so that patches overlap. Beyond the image there is zero. It is
    computed as a linear layer of what each token sees: of so large a kernel, a CPU takes ten times as long for the
    gradient in bf16 (ADR-029).
    """

    bias: torch.Tensor

    def __init__(self, patch_size: int, dim: int):
        around = patch_size // 2
        super().__init__(3, dim, patch_size + 2 * around, stride=patch_size, padding=around)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        size, patch_size = self.kernel_size[0], self.stride[0]
        padded = pad(images, [(size - patch_size) // 2] * 4)
        seen = padded.unfold(2, size, patch_size).unfold(3, size, patch_size)  # [B, 3, rows, columns, size, size]
        return linear(seen.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)


class Block(nn.Module):
    """A transformer block with adaLN-Zero: the condition sets the norms' scale and shift, and a gate on each
    branch that is zero at first, so that the block begins as the identity. Queries and keys are normalised (Dehghani
    et al., arXiv 2302.05442, section 2) unless `qk_norm` is false."""

    def __init__(self, dim: int, heads: int, qk_norm: bool = True):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm, self.key_norm = (
            nn.LayerNorm(dim // heads, eps=1e-6, bias=False) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.projection = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        tokens = tokens + gate1[:, None] * self.attention(modulate(self.norm1(tokens), shift1, scale1))
        return tokens + gate2[:, None] * self.mlp(modulate(self.norm2(tokens), shift2, scale2))

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """Multi-head self-attention, [B, N, dim] -> [B, N, dim]."""
        batch, count, dim = tokens.shape
        query, key, value = self.qkv(tokens).reshape(batch, count, 3, self.heads, -1).unbind(2)
        query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # [B, heads, N, dim / heads]
        if value.device.type == "cpu" and value.dtype == torch.bfloat16:
            # torch's takes up to ten times as long there (2.14), most of it for its gradient.
            mixed = _attention_in_bf16(query, key, value)
        else:
            mixed = scaled_dot_product_attention(query, key, value)
        return self.projection(mixed.transpose(1, 2).reshape(batch, count, dim))


def _attention_in_bf16(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`scaled_dot_product_attention`, on a CPU: few tokens' weights are written out; among more it is computed in
    float32, of which autocast would make bf16 again."""
    if query.shape[2] <= FEW_TOKENS:
        return (query @ key.mT / query.shape[3] ** 0.5).softmax(3) @ value
    with torch.autocast("cpu", enabled=False):
        return scaled_dot_product_attention(query.float(), key.float(), value.float())


class FinalLayer(nn.Module):
    """Tokens [B, N, dim] -> images [B, 3, S, S].

    A departure from the paper, by measurement (ADR-029): each token draws a patch of feature maps, and convolutions
    draw the image from them, across the patches' borders. They do not see the noisy image, whose grain they would pass.
    """

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, FINAL_CHANNELS * patch_size**2)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.smoothing = nn.Conv2d(FINAL_CHANNELS, FINAL_CHANNELS, 3, padding=1)
        self.to_rgb = nn.Conv2d(FINAL_CHANNELS, 3, 3, padding=1)

    def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        features = unpatchify(self.linear(modulate(self.norm(tokens), shift, scale)), self.patch_size)
        return self.to_rgb(features + silu(self.smoothing(features)))


class TinyDiT(nn.Module):
    """Images [B, 3, S, S], timesteps in [0, 1] [B], classes int64 [B] -> [B, 3, S, S].

    In training it is also told how images were cropped, [B, 3] (`crops.sample_crops`); untold, they were not.
    The class `num_classes` is the null class, which stands for no class at all: guidance needs it.
    """

    position: torch.Tensor

    def __init__(
        self,
        num_classes: int,
        image_size: int = 128,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 12,
        heads: int = 6,
        qk_norm: bool = True,
    ):
        super().__init__()
        self.num_classes, self.image_size, self.patch_size = num_classes, image_size, patch_size
        self.x_embedder = PatchEmbedder(patch_size, dim)
        self.register_buffer("position", position_embedding(image_size // patch_size, dim), persistent=False)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = nn.Embedding(num_classes + 1, dim)
        self.crop_embedder = nn.Parameter(torch.zeros(crops.NUMBERS, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch_size)
        self.initialize_weights()

    @property
    def null_class(self) -> int:
        """The class that means none."""
        return self.num_classes

    def matrices(self) -> list[nn.Parameter]:
        """The weights of attention and of the MLPs."""
        named = self.blocks.named_parameters()
        return [weight for name, weight in named if weight.ndim == 2 and "adaLN_modulation" not in name]

    def initialize_weights(self) -> None:
        """The paper's scheme: Xavier for linear layers, small normals for the embeddings, and zero for what
        would make a block differ from the identity, or the output from zero, before anything is learned."""
        for module in self.modules():
            if isinstance(module, nn.Linear | PatchEmbedder):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.weight, std=0.02)
        for parameter in self.t_embedder.mlp.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                for parameter in module.adaLN_modulation.parameters():
                    nn.init.zeros_(parameter)
        for parameter in self.final_layer.to_rgb.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        images: torch.Tensor,
        timesteps: torch.Tensor,
        classes: torch.Tensor,
        cropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.with_tokens(images, timesteps, classes, cropped)[0]

    def with_tokens(
        self,
        images: torch.Tensor,
        timesteps: torch.Tensor,
        classes: torch.Tensor,
        cropped: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the tokens after a third of the blocks, [B, N, dim]."""
        tokens = self.x_embedder(images) + self.position
        condition = self.t_embedder(timesteps) + self.y_embedder(classes)
        if cropped is not None:
            condition = condition + cropped @ self.crop_embedder
        third = -(-len(self.blocks) // 3)
        for block in self.blocks[:third]:
            tokens = block(tokens, condition)
        early = tokens
        for block in self.blocks[third:]:
            tokens = block(tokens, condition)
        return self.final_layer(tokens, condition), early
