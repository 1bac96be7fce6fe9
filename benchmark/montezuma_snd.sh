#!/usr/bin/env bash
# Montezuma's Revenge, SND: rows c0, c3, c4. The source gives no settings for them; we take three reward scales.
# Settable: SEEDS, WORKERS and TOTAL_TIMESTEPS in the environment, flags of run.py, and after -- flags for every run:
#     SEEDS=1 WORKERS=2 bash benchmark/montezuma_snd.sh --dry-run -- --compile
cd "$(dirname "$0")/.." || exit

python benchmark/run.py --env-ids MontezumaRevengeNoFrameskip-v4 \
    --num-seeds "${SEEDS:-3}" --workers "${WORKERS:-1}" --total-timesteps "${TOTAL_TIMESTEPS:-128000000}" \
    --commands \
    ppo_snd_c0 "python ppo_snd_atari.py --model C --int-reward-scale 0.25" \
    ppo_snd_c3 "python ppo_snd_atari.py --model C --int-reward-scale 0.4" \
    ppo_snd_c4 "python ppo_snd_atari.py --model C --int-reward-scale 0.5" \
    "$@"
