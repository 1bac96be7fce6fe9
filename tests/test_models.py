"""The architectures against the layer table: shapes, parameter counts, initial weights, forward passes."""

import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ENTROPY, RND, SND, make_args
from torch import Tensor

from models import ActorCritic, SelfAttention, make_entropy_encoder, make_predictor, make_target

ACTIONS = 18
# Weights and biases of every layer, worked out from the table by hand: trunk and features, actor's and critic's hidden
# layers, logits, and one value head.
PARAMETERS = {
    "A": (8_224 + 18_496 + 36_928 + 4_129_216 + 201_152, 201_152, 8_082, 449),
    "B": (16_448 + 36_928 + 73_856 + 14_746_400, 640_800, 14_418, 801),
    "C": (1_184 + 18_496 + 36_928 + 73_856 + 9_437_696, 262_656, 9_234, 513),
    "D": (32_896 + 2 * (3 * 16_512 + 16_512) + 9_437_696, 262_656, 9_234, 513),
}
NOVELTY = {
    make_target: (2_080 + 18_496 + 36_928 + 4_719_104, 1, 512),
    make_predictor: (2_080 + 18_496 + 36_928 + 4_719_104 + 262_656 + 262_656, 1, 512),
    make_entropy_encoder: (8_224 + 18_496 + 36_928 + 2_359_552, 4, 256),
}


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def layers(module: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """The layers with weights, in order."""
    return [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def check_orthogonal(layer: nn.Conv2d | nn.Linear, gain: float) -> None:
    """The rows, or where there are fewer the columns, are orthogonal and `gain` long; the bias is zero."""
    weight = layer.weight.detach().flatten(1).double()
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    torch.testing.assert_close(gram / gain**2, torch.eye(len(gram), dtype=torch.float64), atol=1e-4, rtol=0)
    assert (layer.bias == 0).all()


@functools.cache
def agent_of(model: str) -> ActorCritic:
    """A model with three value heads."""
    torch.manual_seed(1)
    return ActorCritic(model, ACTIONS, 3, actor_hidden_gain=1.5, critic_hidden_gain=0.1)


@pytest.mark.parametrize("model", "ABCD")
def test_policy_layers(model: str):
    """The counts that follow from the layer table; gain √2 in trunk and features, 0.01 in logits and value heads."""
    agent, (trunk, hidden, logits, head) = agent_of(model), PARAMETERS[model]
    assert (count(agent.trunk), count(agent.actor_hidden), count(agent.critic_hidden)) == (trunk, hidden, hidden)
    assert (count(agent.logits), count(agent.values)) == (logits, 3 * head)
    assert count(agent) == trunk + 2 * hidden + logits + 3 * head
    for layer in layers(agent.trunk):
        check_orthogonal(layer, 2**0.5)
    check_orthogonal(agent.actor_hidden, 1.5)
    check_orthogonal(agent.critic_hidden, 0.1)
    check_orthogonal(agent.logits, 0.01)
    torch.testing.assert_close(agent.values.weight.norm(dim=1), torch.full((3,), 0.01))
    assert (agent.values.bias == 0).all()


def attention_reference(block: SelfAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(128)) v over the cells, a 1×1 convolution, ReLU, and the block's input added."""
    tokens = x.movedim(1, 3)  # (batch, height, width, channels)
    query, key, value = (layer(tokens) for layer in (block.query, block.key, block.value))
    scores = torch.einsum("byxc, bvuc -> byxvu", query, key) / 128**0.5
    mixed = torch.einsum("byxvu, bvuc -> bcyx", scores.flatten(3).softmax(dim=3).view_as(scores), value)
    return x + F.relu(block.conv(mixed))


def trunk_reference(agent: ActorCritic, model: str, obs: Tensor) -> Tensor:
    """The features of obs by the layer table, written out with plain functions."""
    # Stride and padding of each convolution.
    convs = {"C": [(2, 1), (2, 1), (2, 1), (1, 1)], "D": [(8, 0)]}.get(model, [(4, 2), (2, 1), (1, 1)])
    x = obs.float() / 256
    plain = [layer for layer in agent.trunk if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, (stride, padding) in zip(plain, convs, strict=False):
        x = F.relu(F.conv2d(x, layer.weight, layer.bias, stride, padding))
    for block in (block for block in agent.trunk if isinstance(block, SelfAttention)):
        x = attention_reference(block, x)
    x = x.movedim(1, -1).reshape(len(x), -1)
    for layer in plain[len(convs) :]:
        x = F.relu(layer(x))
    return x


@pytest.mark.parametrize("model", "ABCD")
@torch.no_grad()
def test_forward_pass(model: str):
    """Logits and values against plain functions, only A's critic is residual; in bfloat16 but for its rounding."""
    agent, obs = agent_of(model), torch.randint(256, (2, 4, 96, 96), dtype=torch.uint8)
    features = trunk_reference(agent, model, obs)
    hidden = agent.critic_hidden(features)
    hidden = hidden.clamp(min=0) + (hidden if model == "A" else 0)
    expected = agent.actor_hidden(features).relu() @ agent.logits.weight.T, hidden @ agent.values.weight.T
    results = agent(obs)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = agent(obs)
    for x, rounded, reference, width in zip(results, coarse, expected, (ACTIONS, 3), strict=True):
        assert x.shape == (2, width) and x.dtype == rounded.dtype == torch.float32
        torch.testing.assert_close(x, reference, atol=1e-6, rtol=1e-3)
        assert (x.abs() > 1e-5).any() and 0 < (rounded - x).norm() < 0.05 * x.norm()


@pytest.mark.parametrize("network", NOVELTY)
@torch.no_grad()
def test_novelty_networks(network: type[nn.Module]):
    """Shapes, counts, gain √2, zero biases, ELU between the layers but not after the last.

    The first layer's weights, in another order, are those of an 8×8 convolution of stride 4 and padding 2.
    """
    parameters, frames, features = NOVELTY[network]
    net = network()
    assert count(net) == parameters
    for layer in layers(net):
        check_orthogonal(layer, 2**0.5)
    first, *convs = layers(net)[:3]
    frame, weight = torch.randn(3, frames, 96, 96), F.pixel_shuffle(first.weight, 4)
    expected = F.elu(F.conv2d(frame, weight, first.bias, stride=4, padding=2))
    for layer, stride in zip(convs, (2, 1), strict=True):
        expected = F.elu(F.conv2d(expected, layer.weight, layer.bias, stride, padding=1))
    expected = expected.movedim(1, -1).reshape(3, -1)
    for i, layer in enumerate(layers(net)[3:]):
        expected = (F.elu(expected) if i else expected) @ layer.weight.T
    result = net(frame)
    assert result.shape == (3, features) and result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-3)


def test_learner(script: object):
    """The flags reach their layers; the heads of each script; only RND's target never learns; one optimiser each."""
    args = make_args(script, actor_hidden_gain=1.5, critic_hidden_gain=0.7, learning_rate=0.3)
    heads = 3 if script.__name__ == ENTROPY else 2
    learner = script.Learner(args, 5, torch.device("cpu"))
    check_orthogonal(learner.agent.actor_hidden, 1.5)
    check_orthogonal(learner.agent.critic_hidden, 0.7)
    logits, values = learner.agent(torch.zeros(2, 4, 96, 96, dtype=torch.uint8))
    assert logits.shape == (2, 5) and values.shape == (2, heads)
    more = {RND: set(), SND: {"target"}, ENTROPY: {"target", "encoder"}}
    trained = {"agent", "predictor"} | more[script.__name__]
    assert set(learner.optimizers) == trained
    assert {name.split(".")[0] for name, weight in learner.named_parameters() if weight.requires_grad} == trained
    for name, optimizer in learner.optimizers.items():
        (group,) = optimizer.param_groups
        assert isinstance(optimizer, torch.optim.Adam) and group["lr"] == pytest.approx(0.3)
        assert [id(p) for p in group["params"]] == [id(p) for p in getattr(learner, name).parameters()]
