#!/usr/bin/env bash
# Ms. Pac-Man without external rewards: 32 games, a lost life ends the episode, no sticky actions.
# Settable: SEEDS, WORKERS and TOTAL_TIMESTEPS in the environment, flags of run.py, and after -- flags for every run:
#     SEEDS=1 WORKERS=2 bash benchmark/pacman_without_reward.sh --dry-run -- --compile
cd "$(dirname "$0")/.." || exit

flags='--model C --ext-coef 0 --num-envs 32 --episodic-life --repeat-action-probability 0'
tuned='--int-episodic --actor-hidden-gain 1.414'  # chosen in Breakout with model A: benchmark/RESULTS.md
python benchmark/run.py --env-ids MsPacmanNoFrameskip-v4 \
    --num-seeds "${SEEDS:-3}" --workers "${WORKERS:-1}" --total-timesteps "${TOTAL_TIMESTEPS:-32000000}" \
    --commands \
    ppo_rnd_without_reward "python ppo_rnd_atari.py $flags" \
    ppo_snd_without_reward "python ppo_snd_atari.py $flags" \
    ppo_rnd_tuned_without_reward "python ppo_rnd_atari.py $flags $tuned --norm-obs mean-std" \
    ppo_snd_tuned_without_reward "python ppo_snd_atari.py $flags $tuned" \
    ppo_snd_entropy_tuned_without_reward "python ppo_snd_entropy_atari.py $flags $tuned" \
    "$@"
