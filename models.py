"""The networks of the three training scripts: policies A, B, C, D with their critics, and the novelty networks.

A policy reads the last four frames as uint8 and divides by 256 itself; a novelty network reads floats that the script
has already normalised. Every layer starts orthogonal with zero bias. Layers and gains follow the architecture diagrams
of SND's author; see also Burda et al. 2018 (RND, arXiv 1810.12894) and Pecháč et al. 2023 (SND, arXiv 2302.11563).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

FAST_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()  # several times as fast as float32, by this processor's own units
SQRT2 = 2**0.5  # orthogonal gain that keeps the variance through ReLU and ELU layers


def init(layer: nn.Conv2d | nn.Linear, gain: float = SQRT2) -> nn.Conv2d | nn.Linear:
    """Give `layer` orthogonal weights of the given gain and a zero bias; returns the layer itself."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class FirstConv(nn.Conv2d):
    """A network's first, strided convolution, computed over cells of stride × stride pixels.

    Frames have one to four channels, and matrix units want many. Cut into cells they have stride² times as many, and
    the stride becomes 1. With 8×8 / 4, for instance, 96 + 2·2 pixels are 25 cells, the kernel spans 2, and 24 outputs
    are left; a 3×3 kernel of stride 2 is first filled up with zeros to 4×4. The sums stay the same up to rounding.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int):
        super().__init__(inputs, outputs, kernel)  # whose own stride of 1 and padding of 0 are those over cells
        self.cell, self.border = stride, padding

    def cut(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The frames and the kernel, both over cells.

        x (batch, inputs, height, width), float, or uint8 that the kernel divides by 256 -> (batch, inputs * stride²,
        cells down, cells across), float, uint8 as autocast's type or float32; (outputs, inputs * stride², cells down,
        cells across), float32.
        """
        x = cells(x, self.cell, self.border, self.border)
        kernel = cells(self.weight, self.cell, 0, -self.kernel_size[0] % self.cell)
        if x.dtype == torch.uint8:
            # The kernel is divided in the frames' place. Both are exact, also in bfloat16: 8 bits, a power of two.
            device = x.device.type
            x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32)
            kernel = kernel / 256
        return x, kernel

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width), float or uint8 to be divided by 256 -> (batch, outputs, ...)."""
        x, kernel = self.cut(x)
        # cuDNN's deterministic gradient of a kernel over one frame takes 2.4 to 65 times as long as a product's (H200).
        multiply = product if x.is_cuda and self.in_channels == 1 else F.conv2d
        return multiply(x, kernel, self.bias)


def product(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """F.conv2d(x, kernel, bias) as one matrix product, over a copy of all windows of x.

    x (batch, inputs, height, width), kernel (outputs, inputs, down, across), bias (outputs,) -> (batch, outputs, ...).
    """
    windows = x.permute(0, 2, 3, 1).unfold(1, kernel.shape[2], 1).unfold(2, kernel.shape[3], 1)
    windows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)  # (batch, down, across, window)
    return F.linear(windows, kernel.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def cells(x: Tensor, size: int, before: int, after: int) -> Tensor:
    """(batch, channels, height, width) -> (batch, channels * size², cells down, cells across), channels last.

    Space to depth: the new channels are in the order row in the cell, channel, column in the cell. x is first filled up
    with zeros, `before` of them above and on the left, `after` below and on the right.
    """
    x = F.pad(x.transpose(1, 2), (before, after, 0, 0, before, after))  # (batch, height, channels, width)
    (batch, height, channels, width), pixel = x.shape, x.dtype
    # The one copy: of (cells down, rows in a cell * channels, cells across, pixels side by side in a cell) the middle
    # two change places. Those pixels stay together, so where there is no gradient (a view as another type has none) and
    # no compiler that fuses the copy, they move as one number of their size in bytes, several times as fast.
    if not (x.requires_grad or torch.compiler.is_compiling()):
        wide = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
        x = x.contiguous().flatten().view(wide.get(size * x.itemsize, torch.int64))  # 32 bytes are four of 8
    x = x.reshape(batch, height // size, size * channels, width // size, -1).transpose(2, 3).contiguous()
    x = x if x.dtype == pixel else x.view(pixel)
    return x.flatten(3).permute(0, 3, 1, 2)


def conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    """A convolution with the padding that the trunks share: 2 for 8×8 / 4, 1 for 3×3, none for D's 8×8 / 8 patches."""
    padding = {(8, 4): 2, (8, 8): 0, (3, 1): 1, (3, 2): 1}[kernel, stride]
    return init((FirstConv if inputs <= 4 else nn.Conv2d)(inputs, outputs, kernel, stride, padding))


class Flatten(nn.Module):
    """Features in the order of channels-last memory, so that nothing moves."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, height * width * channels)."""
        return x.permute(0, 2, 3, 1).flatten(1)


class ELU(nn.Module):
    """The exponential linear unit, x or e^x - 1, in place."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ...) float -> the same."""
        plain = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled()
        if plain or torch.compiler.is_compiling():
            return F.elu(x, inplace=True)
        # torch's own takes three times as long as exp. Four passes, over pieces that stay in the processor's cache.
        for piece in x.split(max(1, 2**18 // x[0].numel())):
            torch.maximum(piece, piece.clamp(max=0).exp_().sub_(1), out=piece)
        return x


class CoarseGradients(torch.autograd.Function):
    """Convolutions and linear layers with ELUs or ReLUs between, on a CPU, whose gradients are in bfloat16.

    For processors that multiply bfloat16 several times as fast. In float32 the features, and so rewards and losses,
    stay exact; the parameters' gradients are off by about half a percent of their norm. There is none for the input.
    """

    @staticmethod
    def forward(ctx, x: Tensor, layers: list[nn.Module], *parameters: Tensor) -> Tensor:
        """x (batch, channels, height, width) float32 or bfloat16 -> (batch, features) of the same type.

        `parameters` are each layer's kernel and bias, float32, the first layer's kernel over cells.
        """
        ctx.weighted, inputs, kernels, pairs = [], [], [], zip(parameters[::2], parameters[1::2], strict=True)
        ctx.relu = any(isinstance(layer, nn.ReLU) for layer in layers)
        fused = ctx.relu and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        for i, layer in enumerate(layers):
            if isinstance(layer, nn.ReLU) and fused and isinstance(layers[i - 1], nn.Conv2d):
                continue  # the convolution has done it
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                x = layer(x)
                continue
            kernel, bias = (parameter.to(x.dtype) for parameter in next(pairs))
            ctx.weighted.append(layer)
            inputs.append(x.bfloat16())
            kernels.append(kernel.bfloat16())
            if isinstance(layer, nn.Linear):
                x = F.linear(x, kernel, bias)
            elif fused:  # with the ReLU that follows, in one pass
                geometry = layer.padding, layer.stride, layer.dilation, 1
                x = torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, *geometry, "relu", [], "")
            else:
                x = F.conv2d(x, kernel, bias, layer.stride, layer.padding)
        ctx.save_for_backward(*inputs, *kernels, x.bfloat16())
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the parameters, float32."""
        count, grad, grads = len(ctx.weighted), grad.bfloat16(), []
        inputs, kernels, output = ctx.saved_tensors[:count], ctx.saved_tensors[count:-1], ctx.saved_tensors[-1]
        if ctx.relu:  # a chain of ReLUs ends in one
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        for i, layer in reversed(list(enumerate(ctx.weighted))):
            if isinstance(layer, nn.Linear):
                kernel_grad, bias_grad = grad.t() @ inputs[i], grad.sum(dim=0, dtype=torch.float32)
                grad = grad @ kernels[i]
            else:
                if grad.ndim == 2:  # undo Flatten; the maps are square
                    side = math.isqrt(grad.shape[1] // layer.out_channels)
                    grad = grad.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
                geometry = layer.stride, layer.padding, layer.dilation, False, (0, 0), 1
                grad, kernel_grad, bias_grad = torch.ops.aten.convolution_backward(
                    grad, inputs[i], kernels[i], [layer.out_channels], *geometry, (i > 0, True, True)
                )
            grads += [bias_grad.float(), kernel_grad.float()]
            if i > 0 and ctx.relu:  # the input is what a ReLU or an ELU has returned
                grad = torch.ops.aten.threshold_backward(grad, inputs[i], 0)
            elif i > 0:
                grad = torch.ops.aten.elu_backward(grad, 1, 1, 1, True, inputs[i])
        return None, None, *reversed(grads)


class Chain(nn.Sequential):
    """Layers one after the other, on a CPU that is fast in bfloat16 trained by CoarseGradients, which skips hooks.

    So is every chain under autocast, and with `coarse_gradients` also one in float32. A chain of another form than
    those of this file, say with another activation, gets ordinary gradients.
    """

    def __init__(self, *layers: nn.Module, coarse_gradients: bool = False):
        super().__init__(*layers)
        self.coarse_gradients = coarse_gradients

    def known(self) -> bool:
        """Whether CoarseGradients can do these layers."""
        layers = [layer for layer in self if not isinstance(layer, Flatten)]
        weighted, activations = layers[::2], {type(layer) for layer in layers[1::2]}
        return (
            type(weighted[0]) is FirstConv
            # The novelty networks end in a layer with weights, the policy's trunk in a ReLU.
            and activations == ({ELU} if len(layers) % 2 else {nn.ReLU})
            and all(type(layer) in (FirstConv, nn.Conv2d, nn.Linear) and layer.bias is not None for layer in weighted)
            and all(
                (layer.groups, layer.dilation, layer.padding_mode, type(layer.padding)) == (1, (1, 1), "zeros", tuple)
                for layer in weighted
                if isinstance(layer, nn.Conv2d)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, 96, 96) uint8 or float -> (batch, features)."""
        fast = FAST_BFLOAT16 and (self.coarse_gradients or torch.is_autocast_enabled("cpu"))
        if fast and x.device.type == "cpu" and torch.is_grad_enabled() and not x.requires_grad and self.known():
            x, kernel = self[0].cut(x)
            return CoarseGradients.apply(x, list(self), kernel, *list(self.parameters())[1:])
        for layer in self:  # written out because torch.compile passes over a forward that is torch's own
            x = layer(x)
        return x


class SelfAttention(nn.Module):
    """Model D's block: x + relu(1×1 conv(single-head self-attention(x))) over the cells of a feature map.

    The cells of (batch, channels, height, width) are the tokens; scores are scaled by 1/sqrt(channels).
    """

    def __init__(self, channels: int = 128):
        super().__init__()
        self.query = init(nn.Linear(channels, channels))
        self.key = init(nn.Linear(channels, channels))
        self.value = init(nn.Linear(channels, channels))
        self.conv = init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same shape."""
        tokens = x.flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        mixed = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return x + F.relu(self.conv(mixed.transpose(1, 2).unflatten(2, x.shape[2:])))


class ActorCritic(nn.Module):
    """One shared trunk, an actor, and a critic with a value head per reward stream.

    Args:
        model: "A", "B", "C" or "D".
        num_actions: actions of the game.
        num_values: reward streams (2 for RND and SND: extrinsic, intrinsic; 3 for SND + entropy).
        actor_hidden_gain: orthogonal gain of the actor's hidden layer. At 0.01 a few gradient steps outweigh it: in
            Breakout 98 % of its units were dead after the first update; at √2 24 to 31 % after 24 updates.
        critic_hidden_gain: orthogonal gain of the critic's hidden layer (√2 in the variants b1, b3 and c1).
    """

    def __init__(
        self,
        model: str,
        num_actions: int,
        num_values: int,
        actor_hidden_gain: float = 0.01,
        critic_hidden_gain: float = 0.1,
    ):
        super().__init__()
        relu, flatten = nn.ReLU(inplace=True), Flatten()
        if model == "A":  # 96 -> 24 -> 12 -> 12 pixels
            width = 448
            trunk = [conv(4, 32, 8, 4), relu, conv(32, 64, 3, 2), relu, conv(64, 64, 3, 1), relu, flatten]
            trunk += [init(nn.Linear(64 * 12 * 12, width)), relu, init(nn.Linear(width, width)), relu]
        elif model == "B":  # 96 -> 24 -> 12 -> 12
            width = 800
            trunk = [conv(4, 64, 8, 4), relu, conv(64, 64, 3, 2), relu, conv(64, 128, 3, 1), relu, flatten]
            trunk += [init(nn.Linear(128 * 12 * 12, width)), relu]
        elif model == "C":  # 96 -> 48 -> 24 -> 12 -> 12
            width = 512
            trunk = [conv(4, 32, 3, 2), relu, conv(32, 64, 3, 2), relu, conv(64, 64, 3, 2), relu]
            trunk += [conv(64, 128, 3, 1), relu, flatten, init(nn.Linear(128 * 12 * 12, width)), relu]
        elif model == "D":  # 96 -> 12 x 12 = 144 tokens of 128
            width = 512
            trunk = [conv(4, 128, 8, 8), relu, SelfAttention(128), SelfAttention(128), flatten]
            trunk += [init(nn.Linear(128 * 12 * 12, width)), relu]
        else:
            raise ValueError(f"model must be A, B, C or D, not {model!r}")
        self.trunk = Chain(*trunk)
        actor_hidden = init(nn.Linear(width, width), actor_hidden_gain)
        self.actor = nn.Sequential(actor_hidden, relu, init(nn.Linear(width, num_actions), 0.01))
        self.critic_hidden = init(nn.Linear(width, width), critic_hidden_gain)
        self.critic_residual = model == "A"
        self.values = init(nn.Linear(width, num_values), 0.01)  # row i is the one-output layer of head i

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """obs (batch, 4, 96, 96) uint8 -> logits (batch, num_actions) and values (batch, num_values), float32."""
        features = self.trunk(obs)
        actor, critic = self.actor[:-1](features), self.critic_hidden(features)
        critic = F.relu(critic) + critic if self.critic_residual else F.relu(critic)
        with torch.autocast(obs.device.type, enabled=False):  # bfloat16 would round a logit to 1/256 of its size
            return self.actor[-1](actor.float()), self.values(critic.float())


def novelty_convs(frames: int) -> list[nn.Module]:
    """The three ELU convolutions of every novelty network: (batch, frames, 96, 96) -> (batch, 9216)."""
    elu = ELU()
    return [conv(frames, 32, 8, 4), elu, conv(32, 64, 3, 2), elu, conv(64, 64, 3, 1), elu, Flatten()]


def make_target(coarse_gradients: bool = False) -> Chain:
    """The network to imitate: frozen in RND, trained by the contrastive loss in SND.

    Input (batch, 1, 96, 96) float32, the newest frame, normalised; output (batch, 512).
    """
    return Chain(*novelty_convs(1), init(nn.Linear(64 * 12 * 12, 512)), coarse_gradients=coarse_gradients)


def make_predictor(coarse_gradients: bool = False) -> Chain:
    """The imitator, two layers deeper than the target.

    Input (batch, 1, 96, 96) float32, the newest frame, normalised; output (batch, 512).
    """
    head = [init(nn.Linear(64 * 12 * 12, 512)), ELU(), init(nn.Linear(512, 512)), ELU(), init(nn.Linear(512, 512))]
    return Chain(*novelty_convs(1), *head, coarse_gradients=coarse_gradients)


def make_entropy_encoder(coarse_gradients: bool = False) -> Chain:
    """The network of a state's features in the entropy stream of SND + entropy.

    Input (batch, 4, 96, 96), all four frames: float32, divided by 256, or without gradients uint8; output (batch, 256).
    """
    return Chain(*novelty_convs(4), init(nn.Linear(64 * 12 * 12, 256)), coarse_gradients=coarse_gradients)
