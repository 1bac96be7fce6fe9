"""Both backends on the real emulators: one protocol, the same frames, true scores, rooms."""

from functools import partial

import ale_py.vector_env
import envpool
import numpy as np
import pytest
from conftest import BACKENDS, GAMES, Recorder, make_args

import ppo_snd_atari as snd

# The room where a game starts, and those next to it that random play may reach.
ROOMS = {"MontezumaRevenge": [1], "Gravitar": [32], "Venture": [8], "Solaris": [21]}
ROOMS |= {"Pitfall": [196, 226, 113, 137], "PrivateEye": [0, 31, 30, 1, 2, 19]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("game", GAMES)
def test_protocol(game: str, backend: str):
    """Three spellings of an id, shapes, types, stacks with the newest frame last, true rewards, rooms.

    After a reset EnvPool repeats the first frame, ALE's other frames are black.
    """
    for env_id in (f"{game}NoFrameskip-v4", f"ALE/{game}-v5", f"{game}-v5"):
        assert snd.game_of(make_args(snd, env_id=env_id, env_backend=backend)) == game
    record = Recorder(snd, make_args(snd, env_id=f"ALE/{game}-v5", env_backend=backend, num_envs=2)).play(120)
    obs, first = record.obs, np.concatenate([np.ones((1, 2), bool), record.resets[:-1]])
    assert obs.shape == (121, 2, 4, 96, 96) and obs.dtype == np.uint8
    assert record.dones.dtype == record.terminations.dtype == bool
    assert (obs[first][:, :-1] == (obs[first][:, -1:] if backend == "envpool" else 0)).all()
    assert (obs[1:][~first[1:]][:, :-1] == obs[:-1][~first[1:]][:, 1:]).all()
    assert (obs[1:, :, -1] != obs[:-1, :, -1]).any()
    assert not np.array_equal(obs[:, 0], obs[:, 1])  # each copy has a seed of its own
    assert record.envs.num_actions == {"Breakout": 4, "MsPacman": 9}.get(game, 18)
    assert game != "MsPacman" or record.rewards.max() == 10  # not clipped
    if game in ROOMS and backend == "envpool":
        assert {ROOMS[game][0]} <= record.envs.rooms <= set(ROOMS[game])
        assert (len(record.envs.rooms) > 1) == (len(ROOMS[game]) > 1)
    else:  # ALE's vector environment does not show the memory
        assert record.envs.rooms == set()


def test_names_of_the_games():
    """They are EnvPool's, and ALE starts the one whose ROM's name does not follow from its capitals."""
    games = {name.removesuffix("-v5") for name in envpool.list_all_envs() if name.endswith("-v5")}
    assert set(snd.ROMS) <= games and len(snd.ROMS) == 104
    ale_py.vector_env.AtariVectorEnv(snd.ROMS["TicTacToe3d"], num_envs=1)


@pytest.mark.parametrize("game", GAMES[:7])
def test_backends_are_identical(monkeypatch: pytest.MonkeyPatch, game: str):
    """Without stickiness and with equal start no-ops: the same frames, rewards, ends and scores, bit by bit.

    But for a truncated game's final frame, which ALE mixes with the frame before.
    """
    monkeypatch.setattr(envpool, "make", partial(envpool.make, noop_max=1))
    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", partial(ale_py.vector_env.AtariVectorEnv, noop_max=1))
    limit, steps = (200, 300) if game == "Breakout" else (100, 110)
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", limit)
    common = dict(env_id=f"{game}-v5", num_envs=2, repeat_action_probability=0.0)
    one, other = (Recorder(snd, make_args(snd, env_backend=name, **common)).play(steps) for name in BACKENDS)
    for name in ("resets", "dones", "terminations", "rewards"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    compared = np.concatenate([np.ones((1, 2), bool), ~one.dones | one.terminations])
    assert np.array_equal(one.obs[compared][:, -1], other.obs[compared][:, -1])
    assert one.envs.finished == other.envs.finished and len(one.envs.finished) >= 2
    assert game != "Breakout" or (one.terminations.any() and one.rewards.any())


def slow_room(game: str, ram: list[int], last_ram: list[int], first: bool) -> int:
    """The room of one game's memory, -1 where it shows none."""
    if game == "MontezumaRevenge":
        return ram[3] + 24 * ram[57]
    if game == "Gravitar":
        place = ram[2] % 16 if ram[1] == 3 else ram[2] // 4 % 4 * 4
        return 16 * ram[1] + place if ram[1] in (2, 3, 4, 5) else -1
    if game == "Solaris":
        warped = last_ram[13] == 16 and ram[13] != 16
        return 64 * ram[77] + ram[8] if first or warped else -1
    return ram[{"Pitfall": 1, "PrivateEye": 92, "Venture": 90}[game]]


@pytest.mark.parametrize("game", GAMES[:6])
def test_rooms_of_any_memory(game: str):
    """Those of every kind of memory: other levels, modes and warps than random play reaches."""
    rng = np.random.default_rng(0)
    ram, last_ram = rng.integers(0, 256, (2, 2000, 128), dtype=np.uint8)
    last_ram[:, 13], ram[:, 13], first = *rng.choice([0, 16], (2, 2000)), rng.random(2000) < 0.1
    ram[:, 1] = rng.integers(0, 8 if game == "Gravitar" else 256, 2000)
    expected = [slow_room(game, *memory) for memory in zip(ram.tolist(), last_ram.tolist(), first, strict=True)]
    assert snd.rooms_of(game, ram, last_ram, first).tolist() == expected and max(expected) > 15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("episodic_life", [False, True])
@pytest.mark.parametrize("limit", [60, 4500, "first end"])
def test_scores_and_ends(monkeypatch: pytest.MonkeyPatch, backend: str, episodic_life: bool, limit: int | str):
    """Against Breakout's lives: what ends the learner's episode, what is reset, true scores and lengths of whole games.

    A lost life ends the episode if that is asked for; on EnvPool a reset row follows, on ALE the game goes on. A game
    that is over in its last permitted step has ended for good; if a life is lost there, it is truncated.
    """
    assert snd.MAX_EPISODE_STEPS == 4500
    args = make_args(snd, env_backend=backend, episodic_life=episodic_life)
    if limit == "first end":
        limit = 1 + Recorder(snd, args, seed=2).play(260).dones.any(axis=1).argmax()
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", limit)
    record = Recorder(snd, args, seed=2).play(260)
    lives, truncated = (np.stack([info[name] for info in record.infos]) for name in ("lives", "truncated"))
    before = np.concatenate([np.full((1, 4), 5), lives[:-1]])
    over, lost = lives == 0, (lives > 0) & (lives < before)
    assert lost.any() and (limit in (60, 4500) or (lost if episodic_life else over)[limit - 1].any())
    lost &= ~truncated
    assert np.array_equal(record.terminations, over | lost if episodic_life else over)
    assert np.array_equal(record.dones, record.terminations | truncated)
    resets = record.dones if backend == "envpool" else over | truncated
    assert np.array_equal(record.resets[1:], resets)
    scores, lengths, finished = np.zeros(4), np.zeros(4, int), []
    for t, i in np.ndindex(260, 4):
        scores[i] += record.rewards[t, i]
        lengths[i] += not record.resets[t, i]
        if over[t, i] or truncated[t, i]:
            finished.append((scores[i], lengths[i]))
            scores[i] = lengths[i] = 0
    assert record.envs.finished == finished and len(finished) >= 3 and (limit < 60 or max(finished)[0] > 0)
    lengths = [length for _, length in finished]
    assert max(lengths) <= limit and (limit == 4500 or limit in lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_rows_ignore_their_action(monkeypatch: pytest.MonkeyPatch, backend: str):
    """The step after an end is the same whatever the action, pays nothing and ends nothing."""
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", 10)
    plays = []
    for reset_action in (0, 3):
        plays.append(Recorder(snd, make_args(snd, env_backend=backend), seed=5))
        for t in range(24):
            plays[-1].step(np.full(4, reset_action if plays[-1].envs.resets.any() else t % 4))
    one, other = (record.stack() for record in plays)
    assert np.flatnonzero(one.resets.all(axis=1)).tolist() == [10, 21] and one.resets.any(axis=1).sum() == 2
    assert np.array_equal(one.obs, other.obs)
    assert not (one.rewards[[10, 21]].any() or one.dones[[10, 21]].any())


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_and_sticky_actions(backend: str):
    """The same seed plays the same games, another one others; at stickiness 1 actions do not matter, at 0 they do."""

    def frames(seed: int, actions_seed: int, repeat: float) -> np.ndarray:
        args = make_args(snd, env_backend=backend, num_envs=2, repeat_action_probability=repeat)
        return Recorder(snd, args, seed).play(40, actions_seed).obs

    one = frames(1, 0, 0.25)
    assert np.array_equal(one, frames(1, 0, 0.25)) and not np.array_equal(one, frames(2, 0, 0.25))
    assert np.array_equal(frames(1, 0, 1.0), frames(1, 1, 1.0))
    assert not np.array_equal(frames(1, 0, 0.0), frames(1, 1, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts(backend: str):
    """Games start after up to 30 no-ops, each after a number of its own; FIRE has served the ball."""
    args = make_args(snd, env_backend=backend)
    *_, info = snd.make_envs(args, 1, 12)
    frames = info["ram"][:, 90] if backend == "envpool" else info["episode_frame_number"]
    assert frames.min() >= 1 and 15 < frames.max() <= 30 and len(set(frames.tolist())) > 6
    record = Recorder(snd, args)
    for _ in range(60):
        record.step(np.zeros(4))
    assert (record.infos[-1]["lives"] < 5).any()


@pytest.mark.parametrize(("backend", "num_envs"), [("envpool", 5), ("gymnasium", 2)])
def test_groups_play_the_same_games(monkeypatch: pytest.MonkeyPatch, backend: str, num_envs: int):
    """Games in up to three groups, as on a GPU, are those that play in one, over the ends of many episodes."""
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", 25)
    args = make_args(snd, env_id="MontezumaRevenge-v5", env_backend=backend, num_envs=num_envs)
    one, groups = snd.AtariEnvs(args, 5), snd.AtariEnvs(args, 5, num_groups=3)
    assert [len(envs.groups) for envs in (one, groups)] == [1, min(3, num_envs)]
    rng = np.random.default_rng(0)
    for _ in range(75):
        actions = rng.integers(18, size=num_envs, dtype=np.int32)
        one.send(0, actions)
        for group, rows in enumerate(groups.groups):
            groups.send(group, actions[rows])
        returned = [groups.recv(group) for group in range(len(groups.groups))]
        for expected, *parts in zip(one.recv(0), *returned, strict=True):
            assert np.array_equal(expected, np.concatenate(parts))
        assert np.array_equal(one.next_obs[0], np.concatenate(groups.next_obs))
        assert np.array_equal(one.resets, groups.resets)
    assert len(one.finished) >= 2 * num_envs
    assert sorted(groups.finished) == sorted(one.finished) and groups.rooms == one.rooms
