"""The architectures against the layer table: shapes, parameter counts, initial weights, forward passes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import make_args, make_learner
from torch import Tensor

from models import (
    ELU,
    ActorCritic,
    Chain,
    FirstConv,
    Flatten,
    SelfAttention,
    cells,
    conv,
    make_entropy_encoder,
    make_predictor,
    make_target,
    product,
)

ACTIONS = 18
# Weights and biases of every layer, worked out from the table by hand: trunk and features, actor, critic's
# hidden layer, and one value head.
PARAMETERS = {
    "A": (8_224 + 18_496 + 36_928 + 4_129_216 + 201_152, 201_152 + 8_082, 201_152, 449),
    "B": (16_448 + 36_928 + 73_856 + 14_746_400, 640_800 + 14_418, 640_800, 801),
    "C": (1_184 + 18_496 + 36_928 + 73_856 + 9_437_696, 262_656 + 9_234, 262_656, 513),
    "D": (32_896 + 2 * (3 * 16_512 + 16_512) + 9_437_696, 262_656 + 9_234, 262_656, 513),
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


@pytest.fixture(scope="module")
def agents() -> dict[str, ActorCritic]:
    """Every model once, with the default gain and three value heads."""
    torch.manual_seed(1)
    return {model: ActorCritic(model, ACTIONS, num_values=3) for model in PARAMETERS}


@pytest.mark.parametrize("model", "ABCD")
def test_policy_shapes(agents: dict[str, ActorCritic], model: str) -> None:
    """Logits for every action and one value a head, in float32, also under bfloat16 autocast."""
    obs = torch.randint(256, (3, 4, 96, 96), dtype=torch.uint8)
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, values = agents[model](obs)
        assert logits.shape == (3, ACTIONS) and values.shape == (3, 3)
        assert logits.dtype == values.dtype == torch.float32


@pytest.mark.parametrize("model", "ABCD")
def test_policy_parameter_counts(agents: dict[str, ActorCritic], model: str) -> None:
    """The counts that follow from the layer table, for 2 and 3 value heads."""
    trunk, actor, hidden, head = PARAMETERS[model]
    agent = agents[model]
    assert (count(agent.trunk), count(agent.actor), count(agent.critic_hidden)) == (trunk, actor, hidden)
    assert count(agent) == trunk + actor + hidden + 3 * head


def test_value_heads(script: object) -> None:
    """RND and SND have two value heads, SND + entropy has three."""
    heads = 3 if script.__name__ == "ppo_snd_entropy_atari" else 2
    agent = make_learner(script, make_args(script)).agent
    trunk, _, hidden, head = PARAMETERS["A"]
    assert count(agent) == trunk + 201_152 + 4 * 449 + hidden + heads * head
    assert agent(torch.zeros(2, 4, 96, 96, dtype=torch.uint8))[1].shape == (2, heads)


@pytest.mark.parametrize("model", "ABCD")
def test_policy_init(agents: dict[str, ActorCritic], model: str) -> None:
    """Gain √2 in trunk and features, 0.01 in the actor and each value head, 0.1 in the critic's hidden layer."""
    agent = agents[model]
    for layer in layers(agent.trunk):
        check_orthogonal(layer, 2**0.5)
    for layer in layers(agent.actor):
        check_orthogonal(layer, 0.01)
    check_orthogonal(agent.critic_hidden, 0.1)
    torch.testing.assert_close(agent.values.weight.norm(dim=1), torch.full((3,), 0.01))
    assert (agent.values.bias == 0).all()


def test_hidden_gains(script: object) -> None:
    """Each flag reaches its own hidden layer and nothing else."""
    gains = {"actor_hidden_gain": 1.5, "critic_hidden_gain": 2**0.5}
    learner = script.Learner(make_args(script, **gains), 4, torch.device("cpu"))
    check_orthogonal(learner.agent.actor[0], 1.5)
    check_orthogonal(learner.agent.actor[2], 0.01)
    check_orthogonal(learner.agent.critic_hidden, 2**0.5)


def attention_reference(block: SelfAttention, x: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(128)) v over the cells, a 1×1 convolution, ReLU, and the block's input added."""
    batch, channels, height, width = x.shape
    mixed = torch.empty(batch, height * width, channels)
    for i in range(batch):
        tokens = torch.stack([x[i, :, row, column] for row in range(height) for column in range(width)])
        query, key, value = (layer(tokens) for layer in (block.query, block.key, block.value))
        mixed[i] = torch.softmax(query @ key.T / 128**0.5, dim=1) @ value
    mixed = mixed @ block.conv.weight[:, :, 0, 0].T + block.conv.bias
    return x + mixed.relu().transpose(1, 2).reshape(x.shape)


def trunk_reference(agent: ActorCritic, model: str, obs: Tensor) -> Tensor:
    """The features of obs by the layer table, written out with plain functions."""
    convs = {
        "A": [(4, 2), (2, 1), (1, 1)],
        "B": [(4, 2), (2, 1), (1, 1)],
        "C": [(2, 1), (2, 1), (2, 1), (1, 1)],
        "D": [(8, 0)],
    }[model]  # stride, padding
    x = obs.float() / 256
    plain = [layer for layer in agent.trunk if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for layer, (stride, padding) in zip(plain, convs, strict=False):
        x = F.relu(F.conv2d(x, layer.weight, layer.bias, stride, padding))
    for block in (block for block in agent.trunk if isinstance(block, SelfAttention)):
        x = attention_reference(block, x)
    x = x.movedim(1, -1).reshape(len(x), -1)
    for layer in plain[len(convs) :]:
        x = F.relu(x @ layer.weight.T + layer.bias)
    return x


@pytest.mark.parametrize("model", "ABCD")
@torch.no_grad()
def test_forward_pass(agents: dict[str, ActorCritic], model: str) -> None:
    """The whole forward pass against plain functions; only A's critic is residual."""
    agent, obs = agents[model], torch.randint(256, (2, 4, 96, 96), dtype=torch.uint8)
    features = trunk_reference(agent, model, obs)
    hidden = agent.critic_hidden(features)
    hidden = hidden.clamp(min=0) + (hidden if model == "A" else 0)
    logits, values = agent(obs)
    torch.testing.assert_close(values, hidden @ agent.values.weight.T, atol=1e-6, rtol=1e-3)
    expected = agent.actor[0](features).relu() @ agent.actor[2].weight.T
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-3)
    assert (values.abs() > 1e-5).all() and (logits.abs() > 1e-8).all()  # the comparison has something to compare


def test_unknown_model() -> None:
    """Another letter is refused."""
    with pytest.raises(ValueError, match="A, B, C or D"):
        ActorCritic("E", 4, 2)


@pytest.mark.parametrize("network", NOVELTY)
def test_novelty_networks(network: type[nn.Module]) -> None:
    """Shapes, counts, gain √2, zero biases, and ELU between the layers but not after the last."""
    parameters, frames, features = NOVELTY[network]
    net = network()
    assert count(net) == parameters
    for layer in layers(net):
        check_orthogonal(layer, 2**0.5)
    x = torch.randn(3, frames, 96, 96)
    result = expected = x
    for layer, (stride, padding) in zip(layers(net)[:3], [(4, 2), (2, 1), (1, 1)], strict=True):
        expected = F.elu(F.conv2d(expected, layer.weight, layer.bias, stride, padding))
    expected = expected.movedim(1, -1).reshape(3, -1)
    for i, layer in enumerate(layers(net)[3:]):
        expected = (F.elu(expected) if i else expected) @ layer.weight.T
    result = net(x)
    assert result.shape == (3, features) and result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-3)


def test_only_rnd_freezes_its_target(script: object) -> None:
    """RND's target never learns, SND's does; every other network does in all scripts."""
    learner = make_learner(script, make_args(script))
    frozen = script.__name__ == "ppo_rnd_atari"
    assert all(parameter.requires_grad != frozen for parameter in learner.target.parameters())
    networks = [learner.agent, learner.predictor] + ([learner.encoder] if hasattr(learner, "encoder") else [])
    assert all(parameter.requires_grad for network in networks for parameter in network.parameters())


@pytest.mark.parametrize("geometry", [(1, 32, 8, 4), (4, 64, 8, 4), (4, 32, 3, 2), (4, 8, 8, 8)])
def test_first_convolution_is_a_strided_convolution(geometry: tuple[int, ...]) -> None:
    """Over cells of pixels, as a product, or plain: values and gradients in float64; uint8 frames divided by 256."""
    torch.manual_seed(0)
    layer, stride, padding = conv(*geometry).double(), geometry[3], {(8, 4): 2, (3, 2): 1, (8, 8): 0}[geometry[2:]]
    assert isinstance(layer, FirstConv)
    x = torch.randn(2, geometry[0], 96, 96, dtype=torch.float64)
    expected = F.conv2d(x, layer.weight, layer.bias, stride, padding)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    for y in (layer(x), product(*layer.cut(x), layer.bias)):
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        gradients = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-8)

    frames, layer = torch.randint(256, (2, geometry[0], 96, 96), dtype=torch.uint8), layer.float()
    expected = F.conv2d(frames.double() / 256, layer.weight.double(), None, stride, padding)
    torch.testing.assert_close(layer(frames).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_cells_are_the_pixels_of_a_square(size: int, dtype: torch.dtype) -> None:
    """Against torch's own, for every width that a row of a cell has in memory, with and without gradients."""
    x = torch.arange(2 * 3 * 13 * 21).view(2, 3, 13, 21).remainder(251).to(dtype)
    expected = F.pixel_unshuffle(F.pad(x, (1, 2, 1, 2)), size).unflatten(1, (3, size, size))
    expected = expected.transpose(1, 2).flatten(1, 3)  # whose channels are in the order channel, row, column
    for leaf in (x, x.contiguous(memory_format=torch.channels_last), x.clone().requires_grad_(dtype.is_floating_point)):
        result = cells(leaf, size, 1, 2)
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result, expected)


def test_elu_is_torchs_in_place() -> None:
    """Against float64, on pieces and a rest; an infinity does not become a NaN, nor a NaN a number; with a gradient."""
    edges = torch.tensor([0.0, -0.0, 1e-8, -1e-8, 100.0, -100.0, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([torch.randn(2**19 + 3), edges])
    for shape in ((-1,), (-1, 4), (2, -1)):
        y, expected = x.clone().view(shape), F.elu(x.double()).view(shape)
        with torch.no_grad():
            assert ELU()(y) is y
            assert torch.equal(ELU()(expected.bfloat16()).nan_to_num(), F.elu(expected.bfloat16()).nan_to_num())
        torch.testing.assert_close(y.double(), expected, rtol=1e-7, atol=1e-7, equal_nan=True)
    leaf = torch.randn(10, requires_grad=True)
    torch.testing.assert_close(*(torch.autograd.grad(f(leaf * 1).sum(), leaf) for f in (ELU(), F.elu)))


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no fast bfloat16")
@pytest.mark.parametrize("kind", [make_target, make_predictor, make_entropy_encoder])
def test_coarse_gradients_and_float32_features_are_close(kind: Callable[..., Chain]) -> None:
    """Against the same layers in float32: the features up to rounding, gradients to within 0.5 % of their norm."""
    torch.manual_seed(0)
    net = kind(coarse_gradients=True)
    x, goal = torch.rand(64, net[0].in_channels, 96, 96), torch.randn(64, net[-1].out_features)
    features, gradients = [], []
    for coarse in (True, False):
        net.coarse_gradients = coarse
        features.append(net(x))
        loss = (features[-1] - goal).square().mean()
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
    torch.testing.assert_close(*features, rtol=0, atol=1e-5)
    for coarse, exact in zip(*gradients, strict=True):
        assert 0 < (coarse - exact).norm() < 0.005 * exact.norm()


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no fast bfloat16")
@pytest.mark.parametrize("model", ["A", "B", "C", "A without linear layers", "A flattened before a ReLU"])
def test_a_policy_in_bfloat16_has_the_gradients_of_its_layers(model: str) -> None:
    """Under autocast, against autograd of the same layers: the same but for bfloat16's rounding, 1/256, in both."""
    torch.manual_seed(0)
    trunk, obs = ActorCritic(model[0], 6, 2).trunk, torch.randint(256, (64, 4, 96, 96), dtype=torch.uint8)
    if "without" in model:
        trunk = trunk[:7]
    if "flattened" in model:
        trunk = Chain(*trunk[:5], Flatten(), nn.ReLU(inplace=True), *trunk[7:])
    with torch.autocast("cpu", torch.bfloat16):
        features = [trunk(obs), nn.Sequential(*trunk)(obs)]
    assert ["CoarseGradients" in type(x.grad_fn).__name__ for x in features] == [True, False]
    losses = [(x - 0.1).square().mean() for x in features]
    gradients = [torch.autograd.grad(loss, list(trunk.parameters())) for loss in losses]
    torch.testing.assert_close(*features, rtol=1 / 128, atol=1 / 128)
    for coarse, plain in zip(*gradients, strict=True):
        assert coarse.dtype == torch.float32
        assert (coarse - plain).norm() < 0.01 * plain.norm()


def test_other_chains_have_ordinary_gradients() -> None:
    """Another activation or option, none between two layers, none at a policy's end: CoarseGradients cannot do them."""
    first, second, relu, elu = conv(1, 4, 8, 8), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), ELU()
    later = [Flatten(), nn.Linear(4 * 144, 3)]
    assert Chain(first, elu, *later).known()
    assert Chain(first, relu, second, relu, *later, relu).known()
    for layers in ([first, relu, *later], [first, *later], [first, nn.ELU(), *later], [first, elu], [*later, relu]):
        assert not Chain(*layers).known()
    for option in ({"bias": False}, {"groups": 2}, {"dilation": 2}, {"padding_mode": "circular"}):
        assert not Chain(first, elu, nn.Conv2d(4, 4, 3, **{"padding": 1} | option), elu, *later).known()
    assert not Chain(first, elu, nn.Conv2d(4, 4, 3, padding="same"), elu, *later).known()
    assert not ActorCritic("D", 6, 2).trunk.known()
    chain = Chain(first, elu, *later)
    chain[1] = nn.Tanh()
    assert not chain.known()


def test_what_comes_before_a_chain_learns() -> None:
    """CoarseGradients has no gradient for its input, so a chain whose input has one does without it."""
    x = torch.rand(2, 1, 96, 96, requires_grad=True)
    gradient, *_ = torch.autograd.grad(make_predictor(coarse_gradients=True)(x).square().sum(), x)
    assert gradient.norm() > 0


def test_a_slice_of_a_network_has_its_layers() -> None:
    """And not those of a new network of its kind."""
    target, x = make_target(), torch.rand(2, 1, 96, 96)
    assert torch.equal(target[-1](target[:-1](x)), target(x))
