"""--compile changes the speed alone."""

import shutil

import pytest
import torch
from conftest import make_args, random_rollout, reward_and_estimate, update
from torch._dynamo.utils import counters

import ppo_snd_atari as snd


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="torch.compile needs a C++ compiler")
def test_compile_on_and_off_agree():
    """One step of every network: the same losses, and gradients but for bfloat16's rounding, where there is one."""
    losses, gradients = [], []
    for compile_networks in (False, True):
        torch._dynamo.reset()  # another test may have compiled the networks
        args = make_args(snd, compile=compile_networks, num_minibatches=1, bf16=True)
        torch.manual_seed(3)
        learner, rollout = snd.Learner(args, 4, torch.device("cpu")), random_rollout(snd)
        _, inputs = reward_and_estimate(snd, learner, rollout, args)
        torch.manual_seed(4)
        counters.clear()
        losses.append(torch.stack(list(update(snd, learner, rollout, inputs, args).values())))
        # It did compile: the policy, the target with and without gradients, the predictor.
        assert (counters["stats"]["unique_graphs"] >= 3) == compile_networks
        nets = (learner.agent, learner.target, learner.predictor)
        gradients.append([torch.cat([p.grad.flatten() for p in net.parameters()]) for net in nets])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for plain, compiled in zip(*gradients, strict=True):
        assert plain.norm() > 0 and (compiled - plain).norm() < plain.norm() / 256
