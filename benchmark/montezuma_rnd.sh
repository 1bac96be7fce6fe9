#!/usr/bin/env bash
# Montezuma's Revenge, RND: the eight rows of the source's parameter table.
# Settable: SEEDS, WORKERS and TOTAL_TIMESTEPS in the environment, flags of run.py, and after -- flags for every run:
#     SEEDS=1 WORKERS=2 bash benchmark/montezuma_rnd.sh --dry-run -- --compile
cd "$(dirname "$0")/.." || exit

python benchmark/run.py --env-ids MontezumaRevengeNoFrameskip-v4 \
    --num-seeds "${SEEDS:-3}" --workers "${WORKERS:-1}" --total-timesteps "${TOTAL_TIMESTEPS:-128000000}" \
    --commands \
    ppo_rnd_a0 "python ppo_rnd_atari.py --model A" \
    ppo_rnd_b0 "python ppo_rnd_atari.py --model B" \
    ppo_rnd_b1 "python ppo_rnd_atari.py --model B --critic-hidden-gain 1.41421356" \
    ppo_rnd_b2 "python ppo_rnd_atari.py --model B --norm-int-reward" \
    ppo_rnd_b3 "python ppo_rnd_atari.py --model B --norm-int-reward --critic-hidden-gain 1.41421356" \
    ppo_rnd_c0 "python ppo_rnd_atari.py --model C" \
    ppo_rnd_c1 "python ppo_rnd_atari.py --model C --critic-hidden-gain 1.41421356" \
    ppo_rnd_d0 "python ppo_rnd_atari.py --model D" \
    "$@"
