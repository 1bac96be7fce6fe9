"""The three scripts are the same but for their algorithm, and their update never waits for the device."""

import ast
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from conftest import (
    ENTROPY,
    RND,
    ROOT,
    SCRIPTS,
    SND,
    make_args,
    make_learner,
    random_rollout,
    reward_and_estimate,
    update,
)
from torch.utils._python_dispatch import TorchDispatchMode

# Two scripts; what may differ between them, and what only the second has: the algorithm; the most lines of a diff.
RND_TO_SND = {"intrinsic_rewards", "novelty", "update"}, {"NUM_PAIRS", "augment", "contrastive_loss", "draw_pairs"}
TO_ENTROPY = {"LIMITS", "advantage_coefs", "estimate_advantages"}, {"FeatureRing", "entropy_rewards"}
PAIRS = [(RND, SND, *RND_TO_SND, 120), (SND, ENTROPY, *TO_ENTROPY, 114)]


def definitions(script: str) -> dict[str, str]:
    """Source of every function, class and constant, and of the last lines, in order; without imports."""
    source, found = (ROOT / f"{script}.py").read_text(), {}
    for node in ast.parse(source).body[1:]:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            target = getattr(node, "targets", [getattr(node, "target", node)])[0]
            name = getattr(target, "name", None) or ast.unparse(target).splitlines()[0]
            text = [ast.get_source_segment(source, part) for part in (*getattr(node, "decorator_list", []), node)]
            found[name] = "\n".join([found.get(name, ""), *text])
    return found


@pytest.mark.parametrize(("first", "second", "different", "added", "most"), PAIRS)
def test_shared_code_is_the_same(first: str, second: str, different: set[str], added: set[str], most: int):
    """Only the listed parts differ, and each of these does; only the listed ones are missing; the order is one."""
    one, other = definitions(first), definitions(second)
    shared = [name for name in one if name in other]
    assert {"main", "CHUNK", "MAX_EPISODE_STEPS", "if __name__ == '__main__':"} <= set(shared)
    everywhere = {"Args", "Learner", "main", "train_novelty"}
    assert {name for name in shared if one[name] != other[name]} == different | everywhere
    assert len(shared) == len(one) and set(other) - set(one) == added
    assert shared == [name for name in other if name in one]
    command = ["diff", f"{first}.py", f"{second}.py"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert 50 < sum(line.startswith(("<", ">")) for line in shown) <= most


def test_sections_are_the_same():
    """They have the same headings in one order."""
    one, *others = (re.findall("^# ---- .*", (ROOT / f"{script}.py").read_text(), re.M) for script in SCRIPTS)
    assert len(one) >= 6 and others == [one, one]


class NoSynchronisation(TorchDispatchMode):
    """Raises on the operations whose result or shape the host must wait for."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount")

    def __torch_dispatch__(self, func: object, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if any(func._schema.name.startswith(f"aten::{name}") for name in self.waiting):
            raise AssertionError(f"{func} waits for the device")
        if func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise AssertionError(f"{func} with a mask waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """The same, and raises on the read-outs of tensors into Python."""

    def wait(x: torch.Tensor, *_args: object) -> None:
        raise AssertionError("a read-out waits for the device")

    with NoSynchronisation(), pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"):
            patch.setattr(torch.Tensor, name, wait)
        yield


def test_watcher_catches_what_it_should():
    """It sees a wait when there is one."""
    x = torch.arange(3.0)
    waits = [lambda: x[x > 1], lambda: x.nonzero(), lambda: torch.equal(x, x), lambda: x.tolist(), lambda: bool(x[0])]
    for wait in (*waits, lambda: x.index_put_((x > 1,), x[0]), lambda: torch.where(x > 1)):
        with pytest.raises(AssertionError, match="waits"), no_synchronisation():
            wait()


def test_nothing_waits_for_the_device(script: ModuleType):
    """No host-device synchronisation in acting nor in two epochs of minibatches, which can so be recorded."""
    args, rollout = make_args(script, update_epochs=2), random_rollout(script)
    learner = make_learner(script, args)
    _, inputs = reward_and_estimate(script, learner, rollout, args)
    with no_synchronisation():
        results = script.act(learner, args, rollout.obs[0]) | update(script, learner, rollout, inputs, args)
    assert all(isinstance(result, torch.Tensor) for result in results.values())
