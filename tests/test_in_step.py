"""The three scripts are the same but for their algorithm, and their update never waits for the device."""

import ast
import difflib
from types import ModuleType

import pytest
import torch
from conftest import ENTROPY, RND, ROOT, SCRIPTS, SND, make_args, make_learner, random_rollout, reward_and_estimate
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What may differ between RND and SND, and between SND and SND + entropy: the algorithm.
DIFFERENT = {
    (RND, SND): {"Args", "Learner", "intrinsic_rewards", "main", "novelty", "novelty_step"}
    | {"train_novelty", "update"},
    (SND, ENTROPY): {"Args", "Learner", "estimate_advantages", "explained_variance", "main", "novelty_step"}
    | {"train_novelty", "train_policy", "update"},
}
# What only one of the two has.
ADDED = {
    (RND, SND): {"augment", "contrastive_loss", "draw_pairs"},
    (SND, ENTROPY): {"FeatureBuffer", "state_entropy_rewards"},
}


def definitions(script: str) -> dict[str, str]:
    """Source of every top-level function and class, in order."""
    source = (ROOT / f"{script}.py").read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    lines = source.splitlines()
    # From the first decorator on.
    starts = [min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1 for node in nodes]
    return {node.name: "\n".join(lines[start : node.end_lineno]) for node, start in zip(nodes, starts, strict=True)}


@pytest.mark.parametrize("pair", DIFFERENT)
def test_shared_code_is_the_same(pair: tuple[str, str]) -> None:
    """Only the listed functions differ, and each of these does; only the listed ones are missing; the order is one."""
    one, other = (definitions(script) for script in pair)
    shared = [name for name in one if name in other]
    assert {name for name in shared if one[name] != other[name]} == DIFFERENT[pair]
    assert set(one) - set(other) == set() and set(other) - set(one) == ADDED[pair]
    assert shared == [name for name in other if name in one]


@pytest.mark.parametrize(("pair", "most"), [((RND, SND), 130), ((SND, ENTROPY), 135)])
def test_diff_shows_only_the_algorithm(pair: tuple[str, str], most: int) -> None:
    """The changed lines of `diff`, both sides counted where a line is new or gone, once where it is replaced."""
    one, other = ((ROOT / f"{script}.py").read_text().splitlines() for script in pair)
    changes = difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    assert sum(max(a1 - a0, b1 - b0) for kind, a0, a1, b0, b1 in changes if kind != "equal") <= most


def test_arguments_are_the_same() -> None:
    """Every script has the arguments of the RND script; only the entropy script has four more."""
    rnd, snd, entropy = (set(__import__(script).Args.__dataclass_fields__) for script in SCRIPTS)
    assert rnd == snd
    assert entropy - snd == {"entropy_coef", "entropy_gamma", "entropy_scale", "entropy_buffer_size"} and snd < entropy


def test_sections_are_the_same() -> None:
    """The headings of the sections, in one order."""
    headings = []
    for script in SCRIPTS:
        lines = (ROOT / f"{script}.py").read_text().splitlines()
        headings.append([line for line in lines if line.startswith("# ---- ")])
    assert len(headings[0]) >= 6 and headings[0] == headings[1] == headings[2]


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


class CountReads(TorchFunctionMode):
    """Counts the read-outs of tensors into Python."""

    reads = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self):
        super().__init__()
        self.counted = []

    def __torch_function__(self, func: object, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if getattr(func, "__name__", "") in self.reads:
            self.counted.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_modes_catch_what_they_should() -> None:
    """The two watchers see a wait when there is one."""
    x = torch.arange(3.0)
    for wait in (lambda: x[x > 1], lambda: x.max().item(), lambda: x.nonzero(), lambda: torch.equal(x, x)):
        with pytest.raises(AssertionError, match="waits"), NoSynchronisation():
            wait()
    with CountReads() as reads:
        x.tolist()
        bool(x[0] > 1)
    assert reads.counted == ["tolist", "__bool__"]


def test_update_never_waits_for_the_device(script: ModuleType) -> None:
    """No host-device synchronisation in two epochs of minibatches; the losses are still on the device."""
    args, rollout = make_args(script, update_epochs=2), random_rollout(script, 8, 4)
    learner = make_learner(script, args)
    inputs, _ = reward_and_estimate(script, learner, rollout, args)
    with NoSynchronisation(), CountReads() as reads:
        losses, _ = script.update(learner, rollout, *inputs, args)
    assert reads.counted == [] and all(isinstance(loss, torch.Tensor) for loss in losses.values())
