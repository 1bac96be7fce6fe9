#!/usr/bin/env bash
# Montezuma's Revenge, SND + entropy: row c0.
# Settable: SEEDS, WORKERS and TOTAL_TIMESTEPS in the environment, flags of run.py, and after -- flags for every run:
#     SEEDS=1 WORKERS=2 bash benchmark/montezuma_snd_entropy.sh --dry-run -- --compile
cd "$(dirname "$0")/.." || exit

python benchmark/run.py --env-ids MontezumaRevengeNoFrameskip-v4 \
    --num-seeds "${SEEDS:-3}" --workers "${WORKERS:-1}" --total-timesteps "${TOTAL_TIMESTEPS:-128000000}" \
    --commands \
    ppo_snd_entropy_c0 "python ppo_snd_entropy_atari.py --model C" \
    "$@"
