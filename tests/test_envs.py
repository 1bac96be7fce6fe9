"""Both backends on the real emulators: one protocol, the same frames, true scores, rooms."""

import functools
from functools import partial
from types import ModuleType

import ale_py.vector_env
import envpool
import numpy as np
import pytest
from conftest import BACKENDS, GAMES, Recorder, make_args

import ppo_snd_atari

START_ROOMS = {"MontezumaRevenge": 1, "Pitfall": 196, "PrivateEye": 0, "Venture": 8, "Solaris": 21}


@functools.cache
def played(game: str, backend: str) -> Recorder:
    """120 random steps of two copies of a game."""
    args = make_args(ppo_snd_atari, env_id=f"ALE/{game}-v5", env_backend=backend, num_envs=2)
    return Recorder(ppo_snd_atari, args).play(120)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("game", GAMES)
def test_protocol(snd: ModuleType, game: str, backend: str) -> None:
    """Three spellings of an id, shapes, types; a new stack is one frame (EnvPool) or black but for it; newest last."""
    for env_id in (f"{game}NoFrameskip-v4", f"ALE/{game}-v5", f"{game}-v5"):
        assert snd.game_of(make_args(snd, env_id=env_id, env_backend=backend)) == game
    record = played(game, backend)
    obs, first = record.obs, np.concatenate([np.ones((1, 2), bool), record.resets[:-1]])
    assert obs.shape == (121, 2, 4, 96, 96) and obs.dtype == np.uint8
    assert record.dones.dtype == record.terminations.dtype == bool
    assert (obs[first][:, :-1] == (obs[first][:, -1:] if backend == "envpool" else 0)).all()
    assert (obs[1:][~first[1:]][:, :-1] == obs[:-1][~first[1:]][:, 1:]).all()
    assert (obs[1:, :, -1] != obs[:-1, :, -1]).any()
    assert not np.array_equal(obs[:, 0], obs[:, 1])  # each copy has a seed of its own
    assert record.envs.num_actions == {"Breakout": 4, "MsPacman": 9}.get(game, 18)
    assert game != "MsPacman" or record.rewards.max() == 10  # not clipped


@pytest.mark.parametrize("game", GAMES[:7])
def test_backends_are_identical(snd: ModuleType, monkeypatch: pytest.MonkeyPatch, game: str) -> None:
    """Without stickiness and with equal start no-ops: the same frames, rewards, ends and scores, bit by bit.

    But for a truncated game's final frame, which ALE mixes with the frame before.
    """
    monkeypatch.setattr(envpool, "make", partial(envpool.make, noop_max=1))
    monkeypatch.setattr(ale_py.vector_env, "AtariVectorEnv", partial(ale_py.vector_env.AtariVectorEnv, noop_max=1))
    limit, steps = (200, 300) if game == "Breakout" else (100, 110)
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", limit)
    args = [make_args(snd, env_id=f"{game}-v5", env_backend=backend, num_envs=2) for backend in BACKENDS]
    for each in args:
        each.repeat_action_probability = 0.0
    one, other = (Recorder(snd, each).play(steps) for each in args)
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


@pytest.mark.parametrize("game", GAMES)
def test_rooms_of_real_memory(game: str) -> None:
    """The rooms that EnvPool's games counted are those of their memory; ALE's vector environment shows none."""
    assert played(game, "gymnasium").envs.rooms == set()
    record = played(game, "envpool")
    if game in ("Breakout", "MsPacman"):
        assert record.envs.rooms == set()
        return
    ram = [record.first_ram.tolist(), *(info["ram"].tolist() for info in record.infos)]
    firsts = [[True, True], *record.resets[:-1].tolist()]
    rows = zip(ram, [ram[0], *ram], firsts, strict=False)
    rooms = [[slow_room(game, *memory) for memory in zip(*row, strict=True)] for row in rows]
    assert record.envs.rooms == set(np.ravel(rooms).tolist()) - {-1}
    assert [room // 16 if game == "Gravitar" else room for room in rooms[0]] == [START_ROOMS.get(game, 2)] * 2


@pytest.mark.parametrize("game", GAMES[:6])
def test_rooms_of_any_memory(snd: ModuleType, game: str) -> None:
    """Also of memory that random play does not reach: other levels, modes and warps."""
    rng = np.random.default_rng(0)
    ram, last_ram = rng.integers(0, 256, (2, 2000, 128), dtype=np.uint8)
    last_ram[:, 13], ram[:, 13] = rng.choice([0, 16], (2, 2000))
    if game == "Gravitar":
        ram[:, 1] = rng.integers(0, 8, 2000)
    first = rng.random(2000) < 0.1
    expected = [slow_room(game, *memory) for memory in zip(ram.tolist(), last_ram.tolist(), first, strict=True)]
    assert snd.rooms_of(game, ram, last_ram, first).tolist() == expected and max(expected) > 15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("episodic_life", [False, True])
@pytest.mark.parametrize("limit", [60, 4500])
def test_scores_and_ends(
    snd: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str, episodic_life: bool, limit: int
) -> None:
    """Against Breakout's lives: what ends the learner's episode, what is reset, true scores and lengths of whole games.

    A lost life ends the episode if that is asked for; on EnvPool a reset row follows, on ALE the game goes on.
    """
    assert snd.MAX_EPISODE_STEPS == 4500
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", limit)
    args = make_args(snd, env_backend=backend, episodic_life=episodic_life)
    record = Recorder(snd, args, seed=2).play(260)
    lives, truncated = (np.stack([info[name] for info in record.infos]) for name in ("lives", "truncated"))
    before = np.concatenate([np.full((1, 4), 5), lives[:-1]])
    over, lost = lives == 0, (lives > 0) & (lives < before) & ~truncated
    assert np.array_equal(record.terminations, over | lost if episodic_life else over)
    assert np.array_equal(record.dones, record.terminations | truncated)
    resets = record.dones if backend == "envpool" else over | truncated
    assert np.array_equal(record.resets[1:], resets) and lost.any()
    finished = []
    for i in range(args.num_envs):
        score = length = 0
        for t in range(260):
            score, length = score + record.rewards[t, i], length + (not record.resets[t, i])
            if over[t, i] or truncated[t, i]:
                finished.append((t, i, score, length))
                score = length = 0
    finished = [numbers for *_, numbers in sorted((t, i, (score, length)) for t, i, score, length in finished)]
    assert record.envs.finished == finished and len(finished) >= 3
    scores, lengths = zip(*finished, strict=True)
    assert max(scores) > 0 and max(lengths) <= limit and (limit == 4500 or limit in lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("episodic_life", [False, True])
def test_an_end_in_the_last_permitted_step(
    snd: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str, episodic_life: bool
) -> None:
    """A game that is over there has ended for good; of a lost life nothing is left to learn, the game is truncated."""
    args = make_args(snd, env_backend=backend, episodic_life=episodic_life)
    t, i = np.argwhere(Recorder(snd, args, seed=2).play(260).dones)[0]
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", t + 1)
    record = Recorder(snd, args, seed=2).play(t + 1)
    assert record.dones[t].all() and record.resets[t + 1].all()
    assert record.terminations[t, i] == (record.infos[t]["lives"][i] == 0) == (not episodic_life)
    assert [length for _, length in record.envs.finished] == [t + 1] * args.num_envs


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_rows_ignore_their_action(snd: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
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
def test_seeds_and_sticky_actions(snd: ModuleType, backend: str) -> None:
    """The same seed plays the same games, another one others; at stickiness 1 actions do not matter, at 0 they do."""

    def frames(seed: int, actions_seed: int, repeat: float) -> np.ndarray:
        args = make_args(snd, env_backend=backend, num_envs=2, repeat_action_probability=repeat)
        return Recorder(snd, args, seed).play(40, actions_seed).obs

    one = frames(1, 0, 0.25)
    assert np.array_equal(one, frames(1, 0, 0.25)) and not np.array_equal(one, frames(2, 0, 0.25))
    assert np.array_equal(frames(1, 0, 1.0), frames(1, 1, 1.0))
    assert not np.array_equal(frames(1, 0, 0.0), frames(1, 1, 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_starts(snd: ModuleType, backend: str) -> None:
    """Games start after up to 30 no-ops, each after a number of its own; FIRE has served the ball."""
    args = make_args(snd, env_backend=backend)
    *_, info = snd.make_envs(args, 1, 24)
    frames = info["ram"][:, 90] if backend == "envpool" else info["episode_frame_number"]
    assert frames.min() >= 1 and 20 < frames.max() <= 30 and len(set(frames.tolist())) > 10
    record = Recorder(snd, args)
    for _ in range(60):
        record.step(np.zeros(4))
    assert (record.infos[-1]["lives"] < 5).any()


@pytest.mark.parametrize("game", ["CartPole-v1", "MontezumaRevenge", "Montezuma-v5", "ALE/Breakout-v4"])
def test_unknown_games(snd: ModuleType, game: str, capsys: pytest.CaptureFixture) -> None:
    """Other ids are refused, with the nearest games by name."""
    with pytest.raises(SystemExit) as error:
        snd.game_of(make_args(snd, env_id=game))
    message = capsys.readouterr().err
    assert error.value.code == 2 and game in message and "NoFrameskip-v4" in message
    if game != "CartPole-v1":
        assert ("Breakout" if "Breakout" in game else "MontezumaRevenge") + "NoFrameskip-v4" in message


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_envs", [2, 5])
def test_groups_play_the_same_games(
    snd: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str, num_envs: int
) -> None:
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
