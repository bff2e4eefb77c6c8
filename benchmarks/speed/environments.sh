#!/usr/bin/env bash
# Make the peers' Python environments, pinned to this project's torch and transformers:
#   benchmarks/speed/environments.sh FOLDER [PYTHON]
# FOLDER/trl       TRL 1.16: GRPO, RLOO, SFT, reward model
# FOLDER/trl_ppo   TRL 1.12, the last release with a PPO trainer; it is laid over the first environment by PYTHONPATH
# benchmarks/speed/peers.py --peers FOLDER finds them there.
set -euo pipefail
folder=${1:?usage: environments.sh FOLDER [PYTHON]}
python=${2:-python3}
constraints=$(cd "$(dirname "$0")/../.." && pwd)/constraints.txt

"$python" -m venv "$folder/trl"
"$folder/trl/bin/python" -m pip install --quiet --upgrade pip
"$folder/trl/bin/python" -m pip install --quiet -c "$constraints" torch transformers trl==1.16.0
"$folder/trl/bin/python" -m pip install --quiet --no-deps --upgrade --target "$folder/trl_ppo" trl==1.12.0
"$folder/trl/bin/python" -c 'import torch, transformers, trl; print(torch.__version__, transformers.__version__, trl.__version__)'
PYTHONPATH="$folder/trl_ppo" TRL_EXPERIMENTAL_SILENCE=1 "$folder/trl/bin/python" -c 'import trl.experimental.ppo; print(trl.__version__)'
