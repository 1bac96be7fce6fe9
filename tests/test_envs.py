"""Both backends on the real emulators: one protocol, the same frames, true scores, rooms."""

from types import ModuleType

import numpy as np
import pytest
from conftest import BACKENDS, GAMES, Recorder, make_args

START_ROOMS = {"MontezumaRevenge": 1, "Pitfall": 196, "PrivateEye": 0, "Venture": 8, "Solaris": 21}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("game", GAMES)
def test_spellings_of_a_game(script: ModuleType, game: str, backend: str) -> None:
    """The three ids name the same game in every script and backend."""
    for env_id in (f"{game}NoFrameskip-v4", f"ALE/{game}-v5", f"{game}-v5"):
        assert script.game_of(make_args(script, env_id=env_id, env_backend=backend)) == game


def test_spellings_play_the_same_frames(snd: ModuleType) -> None:
    """One protocol for the three ids, not that of the id's own registration."""
    play = [
        Recorder(snd, make_args(snd, env_id=env_id, num_envs=2)).play(20)
        for env_id in ("BreakoutNoFrameskip-v4", "ALE/Breakout-v5", "Breakout-v5")
    ]
    assert all(np.array_equal(np.stack(play[0].obs), np.stack(other.obs)) for other in play[1:])


@pytest.fixture(scope="module")
def played_games() -> dict[tuple[str, str], Recorder]:
    """120 random steps of two copies of every game on each backend."""
    import ppo_snd_atari as snd

    return {
        (game, backend): Recorder(snd, make_args(snd, env_id=f"ALE/{game}-v5", env_backend=backend, num_envs=2)).play(
            120
        )
        for game in GAMES
        for backend in BACKENDS
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("game", GAMES)
def test_games_reset_and_step(played_games: dict[tuple[str, str], Recorder], game: str, backend: str) -> None:
    """Shapes and types of the protocol; the first stack is one frame four times; the newest frame comes last."""
    record = played_games[game, backend]
    obs, dones = np.stack(record.obs), np.stack(record.dones)
    assert obs.shape == (121, 2, 4, 96, 96) and obs.dtype == np.uint8
    assert dones.dtype == bool and record.rewards[0].dtype == np.float32 and record.terminations[0].dtype == bool
    assert np.stack(record.ram).shape == (121, 2, 128) and record.ram[0].dtype == np.uint8
    first = np.concatenate([np.ones((1, 2), bool), dones[:-1]])  # the first observation and those of reset rows
    assert (obs[first] == obs[first][:, :1]).all()
    for t, i in zip(*np.nonzero(~first), strict=True):
        assert np.array_equal(obs[t, i, :-1], obs[t - 1, i, 1:])
    assert (obs[1:, :, -1] != obs[:-1, :, -1]).any()
    assert not np.array_equal(obs[:, 0], obs[:, 1])  # each copy has a seed of its own
    assert record.envs.num_actions == (4 if game == "Breakout" else 9 if game == "MsPacman" else 18)


@pytest.mark.parametrize("game", GAMES)
def test_rooms_of_real_memory(snd: ModuleType, played_games: dict[tuple[str, str], Recorder], game: str) -> None:
    """Rooms of recorded RAM, row by row, and the rooms that the environments counted."""
    for backend in BACKENDS:
        record = played_games[game, backend]
        if game in ("Breakout", "MsPacman"):
            assert record.envs.rooms is None
            continue
        rooms, first, last = set(), np.ones(2, bool), record.ram[0]
        for ram, done in zip(record.ram, record.dones, strict=True):
            found = snd.rooms_of(game, ram, last, first)
            expected = [slow_room(game, *memory) for memory in zip(ram.tolist(), last.tolist(), first, strict=True)]
            assert found.tolist() == [-1 if room is None else room for room in expected]
            rooms.update(room for room in expected if room is not None)
            first, last = done, ram
        assert record.envs.rooms == rooms
        if game == "Gravitar":
            assert record.ram[0][:, 1].tolist() == [2, 2]
        else:
            assert {slow_room(game, ram, ram, True) for ram in record.ram[0].tolist()} == {START_ROOMS[game]}


def slow_room(game: str, ram: list[int], last_ram: list[int], first: bool) -> int | None:
    """The room of one game's memory, None where it shows none."""
    if game == "MontezumaRevenge":
        return ram[3] + 24 * ram[57]
    if game == "Gravitar":
        if ram[1] not in (2, 3, 4, 5):
            return None
        return 16 * ram[1] + (ram[2] % 16 if ram[1] == 3 else ram[2] // 4 % 4 * 4)
    if game == "Solaris":
        warped = last_ram[13] == 16 and ram[13] != 16
        return 64 * ram[77] + ram[8] if first or warped else None
    return ram[{"Pitfall": 1, "PrivateEye": 92, "Venture": 90}[game]]


@pytest.mark.parametrize("game", GAMES[:6])
def test_rooms_of_any_memory(script: ModuleType, game: str) -> None:
    """The same on memory that random play does not reach: other levels, modes and warps."""
    rng = np.random.default_rng(0)
    ram, last_ram = rng.integers(0, 256, (2, 2000, 128), dtype=np.uint8)
    last_ram[:, 13], ram[:, 13] = rng.choice([0, 16], (2, 2000))
    if game == "Gravitar":
        ram[:, 1] = rng.integers(0, 8, 2000)
    first = rng.random(2000) < 0.1
    rooms = script.rooms_of(game, ram, last_ram, first)
    expected = [slow_room(game, *memory) for memory in zip(ram.tolist(), last_ram.tolist(), first, strict=True)]
    assert rooms.tolist() == [-1 if room is None else room for room in expected]
    assert rooms.max() > 15


class FewestNoops:
    """A generator of start no-ops that always draws the smallest number."""

    def integers(self, _high: int) -> int:
        return 0


@pytest.mark.parametrize("episodic_life", [False, True])
@pytest.mark.parametrize(("game", "steps"), [("Breakout", 500), ("MontezumaRevenge", 250), ("MsPacman", 250)])
def test_backends_are_identical(
    snd: ModuleType, monkeypatch: pytest.MonkeyPatch, game: str, steps: int, episodic_life: bool
) -> None:
    """Without stickiness and with equal start no-ops: the same frames, rewards, RAM, ends and scores, bit by bit."""
    import envpool

    make, atari_game = envpool.make, snd.AtariGame

    class FewestNoopsGame(atari_game):
        def __init__(self, *args: object):
            super().__init__(*args)
            self.rng = FewestNoops()

    monkeypatch.setattr(envpool, "make", lambda *args, **settings: make(*args, **settings, noop_max=1))
    monkeypatch.setattr(snd, "AtariGame", FewestNoopsGame)
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", 140)
    play = {}
    for backend in BACKENDS:
        args = make_args(
            snd,
            env_id=f"{game}-v5",
            env_backend=backend,
            num_envs=2,
            repeat_action_probability=0.0,
            episodic_life=episodic_life,
        )
        play[backend] = Recorder(snd, args).play(steps)
    one, other = play.values()
    for name in ("dones", "terminations", "rewards", "ram", "obs"):
        first, second = np.stack(getattr(one, name)), np.stack(getattr(other, name))
        rows = np.flatnonzero((first != second).reshape(len(first), -1).any(axis=1))
        assert not len(rows), f"{name} differ first in row {rows[0]}"
    assert (one.envs.returns, one.envs.lengths) == (other.envs.returns, other.envs.lengths)
    assert one.envs.rooms == other.envs.rooms
    dones, terminations = np.stack(one.dones)[1:], np.stack(one.terminations)
    assert (dones & ~terminations).any()  # episodes were truncated
    assert terminations.any() or game == "MsPacman" or not (episodic_life or game == "Breakout")  # and ended


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("episodic_life", [False, True])
@pytest.mark.parametrize("limit", [60, 4500])
def test_scores(
    snd: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str, episodic_life: bool, limit: int
) -> None:
    """True scores and lengths of whole games, also of truncated ones: nothing is carried over, no reset row counted."""
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", limit)
    args = make_args(snd, env_backend=backend, episodic_life=episodic_life)
    record = Recorder(snd, args, seed=2).play(260)
    finished, lives_lost = [], 0
    for i in range(args.num_envs):
        score = length = 0
        for t, info in enumerate(record.infos):
            if not record.dones[t][i]:  # not a reset row
                score += info["reward"][i]
                length += 1
            game_over = bool(info["terminated"][i])
            truncated = record.dones[t + 1][i] and not record.terminations[t][i]
            if game_over or truncated:
                finished.append((t, i, score, length))
                score = length = 0
            lives_lost += bool(record.terminations[t][i]) and not game_over
    finished.sort()
    assert record.envs.returns == [score for _, _, score, _ in finished]
    assert record.envs.lengths == [length for _, _, _, length in finished]
    assert len(finished) >= 4 and max(record.envs.returns) > 0
    assert (lives_lost > 0) == episodic_life
    assert max(record.envs.lengths) <= limit and (limit == 4500 or limit in record.envs.lengths)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("episodic_life", [False, True])
def test_an_end_in_the_last_permitted_step(
    snd: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str, episodic_life: bool
) -> None:
    """A game that is over there has ended for good; of a lost life nothing is left to learn, the game is truncated."""
    args = make_args(snd, env_backend=backend, episodic_life=episodic_life)
    ends = np.stack(Recorder(snd, args, seed=2).play(260).dones[1:])
    t, i = np.argwhere(ends)[0]
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", t + 1)
    record = Recorder(snd, args, seed=2).play(t + 1)
    assert record.dones[t + 1].all() and bool(record.terminations[t][i]) != episodic_life
    assert record.infos[t]["terminated"][i] != episodic_life
    assert record.envs.lengths == [t + 1] * args.num_envs


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_rows_ignore_their_action(snd: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The step after an end is the same whatever the action, pays nothing and ends nothing."""
    monkeypatch.setattr(snd, "MAX_EPISODE_STEPS", 10)
    plays = []
    for reset_action in (0, 3):
        record = Recorder(snd, make_args(snd, env_backend=backend), seed=5)
        for t in range(24):
            action = reset_action if record.envs.next_done.any() else t % 4
            record.envs.step(np.full(4, action, np.int32))
        record.envs.close()
        plays.append(record)
    dones = np.stack(plays[0].dones)
    assert np.flatnonzero(dones.all(axis=1)).tolist() == [10, 21] and dones.any(axis=1).sum() == 2
    assert np.array_equal(np.stack(plays[0].obs), np.stack(plays[1].obs))
    for t in (10, 21):
        assert (plays[0].rewards[t] == 0).all() and not plays[0].terminations[t].any()
        assert (plays[0].obs[t + 1] == plays[0].obs[t + 1][:, :1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_and_stickiness(snd: ModuleType, backend: str) -> None:
    """The same seed plays the same games; another seed, or other sticky actions, do not."""
    args = make_args(snd, env_backend=backend, num_envs=2)
    one, same, other = (np.stack(Recorder(snd, args, seed=seed).play(40).obs) for seed in (1, 1, 2))
    args.repeat_action_probability = 1.0
    stuck = Recorder(snd, args, seed=1).play(40)
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert not np.array_equal(one, np.stack(stuck.obs))


@pytest.mark.parametrize("repeat", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sticky_actions_reach_the_emulator(snd: ModuleType, backend: str, repeat: float) -> None:
    """With probability 1 the actions do not matter at all, with 0 they do."""
    args = make_args(snd, env_backend=backend, num_envs=2, repeat_action_probability=repeat)
    one, other = (np.stack(Recorder(snd, args).play(40, seed=seed).obs) for seed in (0, 1))
    assert np.array_equal(one, other) == (repeat == 1)


@pytest.mark.parametrize("game", ["CartPole-v1", "MontezumaRevenge", "Montezuma-v5", "ALE/Breakout-v4"])
def test_unknown_games(script: ModuleType, game: str, capsys: pytest.CaptureFixture) -> None:
    """Other ids are refused, with the nearest games by name."""
    with pytest.raises(SystemExit) as error:
        script.game_of(make_args(script, env_id=game))
    message = capsys.readouterr().err
    assert error.value.code == 2 and game in message and "NoFrameskip-v4" in message
    if game != "CartPole-v1":
        assert ("Breakout" if "Breakout" in game else "MontezumaRevenge") + "NoFrameskip-v4" in message


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_envs", [2, 4])
def test_groups_of_a_gpu_play_the_same_games(snd: ModuleType, backend: str, num_envs: int, short_episodes: int) -> None:
    """Games in up to three groups, as on a GPU, are those that play in one, over the ends of many episodes."""
    args = make_args(snd, env_id="MontezumaRevenge-v5", env_backend=backend, num_envs=num_envs)
    one, groups = snd.AtariEnvs(args, 5), snd.AtariEnvs(args, 5, num_groups=3)
    assert [len(envs.groups) for envs in (one, groups)] == [1, min(3, num_envs)]
    rng = np.random.default_rng(0)
    for _ in range(3 * short_episodes):
        actions = rng.integers(18, size=num_envs, dtype=np.int32)
        for expected, seen in zip(one.step(actions), groups.step(actions), strict=True):
            np.testing.assert_array_equal(seen, expected)
        for name in ("next_obs", "next_done", "ram", "scores", "steps"):
            np.testing.assert_array_equal(getattr(groups, name), getattr(one, name))
    assert len(one.returns) >= 2 * num_envs
    assert sorted(groups.returns) == sorted(one.returns) and sorted(groups.lengths) == sorted(one.lengths)
    assert groups.rooms == one.rooms
    one.close()
    groups.close()


def test_start_noops(snd: ModuleType) -> None:
    """A game's first observation comes after 1 to 30 emulator frames, FIRE's the last of them; seeds differ."""
    games = [snd.AtariGame("breakout", seed, 0.25, False) for seed in (1, 2)]
    first, second = ([game.reset() and game.ale.getEpisodeFrameNumber() for _ in range(60)] for game in games)
    assert min(first) >= 1 and max(first) <= 30 and len(set(first)) > 15 and first != second
