#!/usr/bin/env bash
# Gravitar: RND, SND and SND + entropy.
# Settable: SEEDS, WORKERS and TOTAL_TIMESTEPS in the environment, flags of run.py, and after -- flags for every run:
#     SEEDS=1 WORKERS=2 bash benchmark/gravitar.sh --dry-run -- --compile
cd "$(dirname "$0")/.." || exit

python benchmark/run.py --env-ids GravitarNoFrameskip-v4 \
    --num-seeds "${SEEDS:-3}" --workers "${WORKERS:-1}" --total-timesteps "${TOTAL_TIMESTEPS:-128000000}" \
    --commands \
    ppo_rnd_c0 "python ppo_rnd_atari.py --model C" \
    ppo_snd_c4 "python ppo_snd_atari.py --model C --int-reward-scale 0.5" \
    ppo_snd_entropy_c0 "python ppo_snd_entropy_atari.py --model C" \
    "$@"
