"""The networks of the three training scripts: policies A, B, C, D with their critics, and the novelty networks.

A policy reads the last four frames as uint8 and divides them by 256 itself; a novelty network reads floats that the
script has normalised. Every layer starts orthogonal with zero bias. Layers and gains follow the diagrams of SND's
author; see also Burda et al. 2018 (RND, arXiv 1810.12894) and Pecháč et al. 2023 (SND, arXiv 2302.11563).
"""

import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

SQRT2 = 2**0.5  # orthogonal gain that keeps the variance through ReLU and ELU layers


def orthogonal(layer: nn.Conv2d | nn.Linear, gain: float = SQRT2) -> nn.Conv2d | nn.Linear:
    """Give `layer` orthogonal weights of the given gain and a zero bias; returns the layer itself."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """An orthogonal convolution, (batch, inputs, height, width) -> (batch, outputs, ...)."""
    return orthogonal(nn.Conv2d(inputs, outputs, kernel, stride, padding))


def linear(inputs: int, outputs: int, gain: float = SQRT2) -> nn.Linear:
    """An orthogonal linear layer, (..., inputs) -> (..., outputs)."""
    return orthogonal(nn.Linear(inputs, outputs), gain)


class Flatten(nn.Module):
    """Features in the order of channels-last memory, so that nothing moves."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, height * width * channels)."""
        return x.permute(0, 2, 3, 1).flatten(1)


class SelfAttention(nn.Module):
    """Model D's block: x + relu(1×1 conv(self-attention(x))), one head; the tokens are the cells of a feature map."""

    def __init__(self, channels: int):
        super().__init__()
        self.query = linear(channels, channels)
        self.key = linear(channels, channels)
        self.value = linear(channels, channels)
        self.conv = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same shape."""
        tokens = x.flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        mixed = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return x + F.relu(self.conv(mixed.transpose(1, 2).unflatten(2, x.shape[2:])))


def make_trunk(model: str) -> tuple[nn.Sequential, int]:
    """The shared layers of a policy, (batch, 4, 96, 96) float -> (batch, width), and their width."""
    relu = nn.ReLU(inplace=True)
    if model == "A":  # 96 -> 24 -> 12 -> 12 pixels
        width = 448
        layers = [conv(4, 32, 8, stride=4, padding=2), relu]
        layers += [conv(32, 64, 3, stride=2, padding=1), relu]
        layers += [conv(64, 64, 3, stride=1, padding=1), relu]
        layers += [Flatten(), linear(64 * 12 * 12, width), relu, linear(width, width), relu]
    elif model == "B":  # 96 -> 24 -> 12 -> 12
        width = 800
        layers = [conv(4, 64, 8, stride=4, padding=2), relu]
        layers += [conv(64, 64, 3, stride=2, padding=1), relu]
        layers += [conv(64, 128, 3, stride=1, padding=1), relu]
        layers += [Flatten(), linear(128 * 12 * 12, width), relu]
    elif model == "C":  # 96 -> 48 -> 24 -> 12 -> 12
        width = 512
        layers = [conv(4, 32, 3, stride=2, padding=1), relu]
        layers += [conv(32, 64, 3, stride=2, padding=1), relu]
        layers += [conv(64, 64, 3, stride=2, padding=1), relu]
        layers += [conv(64, 128, 3, stride=1, padding=1), relu]
        layers += [Flatten(), linear(128 * 12 * 12, width), relu]
    elif model == "D":  # 96 -> 12 × 12 = 144 tokens of 128
        width = 512
        layers = [conv(4, 128, 8, stride=8), relu, SelfAttention(128), SelfAttention(128)]
        layers += [Flatten(), linear(128 * 12 * 12, width), relu]
    else:
        raise ValueError(f"model must be A, B, C or D, not {model!r}")
    return nn.Sequential(*layers), width


class ActorCritic(nn.Module):
    """One shared trunk, an actor, and a critic with a value head per reward stream.

    num_values is the number of reward streams; the gains are those of the hidden layers. At an actor_hidden_gain of
    0.01 a few gradient steps outweigh the start: in Breakout 98 % of the actor's units were dead after one update.
    """

    def __init__(
        self, model: str, num_actions: int, num_values: int, actor_hidden_gain: float, critic_hidden_gain: float
    ):
        super().__init__()
        self.trunk, width = make_trunk(model)
        self.actor_hidden = linear(width, width, actor_hidden_gain)
        self.logits = linear(width, num_actions, 0.01)
        self.critic_hidden = linear(width, width, critic_hidden_gain)
        self.critic_residual = model == "A"
        self.values = linear(width, num_values, 0.01)  # row i is the one-output layer of head i

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs (batch, 4, 96, 96) uint8 -> logits (batch, num_actions) and values (batch, num_values), float32."""
        kind = obs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32  # exact in either
        # Channels last while the pixels are still bytes: on a CPU obs.float() / 256 takes a fifth of the whole step.
        x = self.trunk(obs.contiguous(memory_format=torch.channels_last).to(dtype).div_(256))
        actor, critic = F.relu(self.actor_hidden(x)), self.critic_hidden(x)
        critic = F.relu(critic) + critic if self.critic_residual else F.relu(critic)
        with torch.autocast(kind, enabled=False):  # bfloat16 would round a logit to 1/256 of its size
            return self.logits(actor.float()), self.values(critic.float())


class NoveltyNetwork(nn.Module):
    """Three convolutions and linear layers with ELUs between, for the target, the predictor and the entropy encoder.

    The first is the diagrams' 8×8 / 4 as 2×2 / 1 over cells of 4×4 pixels, the same sums: cuDNN's deterministic
    gradient over a single channel took 0.9 ms for 128 frames (H200). `widths` are those of the linear layers.
    """

    def __init__(self, num_frames: int, widths: list[int]):
        super().__init__()
        elu = nn.ELU(inplace=True)
        layers = [nn.ZeroPad2d(2), nn.PixelUnshuffle(4), conv(num_frames * 16, 32, 2), elu]
        layers += [conv(32, 64, 3, stride=2, padding=1), elu]
        layers += [conv(64, 64, 3, stride=1, padding=1), elu]
        layers += [Flatten(), linear(64 * 12 * 12, widths[0])]
        for inputs, outputs in itertools.pairwise(widths):
            layers += [elu, linear(inputs, outputs)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, num_frames, 96, 96) float32 -> features (batch, widths[-1]) float32."""
        return self.layers(x)


def make_target() -> NoveltyNetwork:
    """The network to imitate: frozen in RND, trained by the contrastive loss in SND. One frame -> 512 features."""
    return NoveltyNetwork(1, [512])


def make_predictor() -> NoveltyNetwork:
    """The imitator, two layers deeper than the target. One frame -> 512 features."""
    return NoveltyNetwork(1, [512, 512, 512])


def make_entropy_encoder() -> NoveltyNetwork:
    """The features of a state in the entropy stream of SND + entropy. Four frames -> 256 features."""
    return NoveltyNetwork(4, [256])
