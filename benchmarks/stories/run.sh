#!/usr/bin/env bash
# One step of the study on stories, through the installed command line:
#
#   bash benchmarks/stories/run.sh DATA OUT MODEL STEP [SEED]
#
# DATA holds models/{stories260K,stories15M} and sft/tinystories_{train,val}.jsonl.gz. MODEL is one of the two.
# STEP: prompts, before, sft, after, pairs, reward, start, ppo, grpo, words, topic, texts; `all` makes them all for SEED.
# Further: ptx, dr-grpo, rloo, dapo (other algorithms, the same reward model and number of responses as ppo and grpo);
# perplexity (of held-out stories, under SFT and every policy of SEED that is there).
# Results land in OUT/MODEL/STEP (RL: STEP_SEED); benchmarks/stories/report.py reads them.
set -euo pipefail
data=$1 out=$2/$3 base=$1/models/$3 name=$3 step=$4 seed=${5:-0}
here=$(cd "$(dirname "$0")" && pwd)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$out"

case $name in
  # Context, response length (about fifty words either way), and learning rates by size.
  stories260K) context=512 tokens=96 sft_lr=5e-4 reward_lr=1e-3 rl_lr=2e-4 batch=64 groups=8 steps=30 draws='0 1' words_kl=0.15 ;;
  stories15M) context=256 tokens=64 sft_lr=1e-4 reward_lr=1e-4 rl_lr=3e-5 batch=32 groups=4 steps=20 draws=0 words_kl=0.05 ;;
  *) echo "MODEL is $name; expected stories260K or stories15M" >&2; exit 2 ;;
esac
model='{"class_path": "lit_rlhf.rewards.RewardModel", "init_args": {"model": "'$out/reward/model'", "normalize": true}}'
gold='{"class_path": "lit_rlhf.rewards.VaderSentiment", "init_args": {"name": "gold"}}'
given='{"class_path": "lit_rlhf.rewards.ContainsWords", "init_args": {"words": ["bird", "tree", "ball"], "name": "words"}}'
topic='{"class_path": "lit_rlhf.rewards.ContainsWords", "init_args": {"column": "words", "name": "topic"}}'
stories="--data.train $data/sft/tinystories_train.jsonl.gz --data.val $data/sft/tinystories_val.jsonl.gz"
rl="--model.model $out/sft/model --data.train $out/train.jsonl --data.val $out/val.jsonl --model.optim.lr $rl_lr"
rl="$rl --model.sampling.max_new_tokens $tokens --model.seed $seed --seed_everything $seed"
rl="$rl --trainer.max_steps $steps --progress.refresh_rate 0 --trainer.default_root_dir $out/${step}_$seed --export.folder $out/${step}_$seed/model"

ending() { # does the model end its stories? from the first words, to the end of its context
  lit-rlhf generate --model "$1" --prompts "$out/val.jsonl" --limit 64 --batch_size 64 --output "$2" \
    --sampling.max_new_tokens $((context - 48)) --sampling.stop_ids '[2]'
}

case $step in
  prompts)
    python "$here/prepare.py" "$data/sft/tinystories_train.jsonl.gz" "$out/train.jsonl"
    python "$here/prepare.py" "$data/sft/tinystories_val.jsonl.gz" "$out/val.jsonl" ;;
  before)
    lit-rlhf validate --config "$here/sft.yaml" --model.model "$base" $stories --data.max_length $context \
      --data.val_limit 200 --trainer.default_root_dir "$out/before"
    ending "$base" "$out/before/endings.jsonl" ;;
  sft)
    lit-rlhf fit --config "$here/sft.yaml" --model.model "$base" $stories --data.max_length $context \
      --data.val_limit 200 --model.optim.lr $sft_lr --trainer.default_root_dir "$out/sft" --export.folder "$out/sft/model" ;;
  after)
    ending "$out/sft/model" "$out/sft/endings.jsonl" ;;
  pairs)
    for draw in $draws; do # a small model needs more pairs
      lit-rlhf pairs --policy "$out/sft/model" --prompts "$out/train.jsonl" --reward lit_rlhf.rewards.VaderSentiment \
        --output "$out/pairs_$draw.jsonl" --min_gap 0.1 --batch_size 32 --sampling.max_new_tokens $tokens --seed $draw
    done
    cat "$out"/pairs_*.jsonl > "$out/pairs.jsonl" ;;
  reward)
    lit-rlhf fit --config "$here/reward.yaml" --model.model "$out/sft/model" --data.train "$out/pairs.jsonl" \
      --model.optim.lr $reward_lr --trainer.default_root_dir "$out/reward" --export.folder "$out/reward/model" ;;
  start) # where RL starts from: the SFT policy, judged on the held-out prompts as the runs below are
    lit-rlhf validate --config "$here/ppo.yaml" $rl --model.rewards "[$model, $gold, $given, $topic]" \
      --model.reward_weights '[1, 0, 0, 0]' ;;
  ppo) # against the reward model; gold is watched
    lit-rlhf fit --config "$here/ppo.yaml" $rl --model.critic "$out/reward/model" --model.rewards "[$model, $gold]" \
      --model.reward_weights '[1, 0]' --data.batch_size $batch ;;
  grpo) # the same reward, the same number of responses
    lit-rlhf fit --config "$here/grpo.yaml" $rl --model.rewards "[$model, $gold]" --model.reward_weights '[1, 0]' \
      --data.batch_size $groups ;;
  ptx) # PPO, and the stories themselves go on being learned
    lit-rlhf fit --config "$here/ppo.yaml" $rl --model.critic "$out/reward/model" --model.rewards "[$model, $gold]" \
      --model.reward_weights '[1, 0]' --data.batch_size $batch --model.ptx_coef 1.0 --trainer.val_check_interval $steps \
      --data.pretraining "$data/sft/tinystories_train.jsonl.gz" --data.pretraining_batch_size 32 \
      --data.pretraining_length 256 ;;
  dr-grpo) # no division by the group's spread or by the length
    lit-rlhf fit --config "$here/grpo.yaml" $rl --model.rewards "[$model, $gold]" --model.reward_weights '[1, 0]' \
      --data.batch_size $groups --model.advantages.scale none --model.aggregation fixed_length --trainer.val_check_interval $steps ;;
  rloo) # against the others of the group; the KL of the whole response is taken off its score
    lit-rlhf fit --config "$here/grpo.yaml" $rl --model.rewards "[$model, $gold]" --model.reward_weights '[1, 0]' \
      --data.batch_size $groups --model.advantages.baseline leave_one_out --model.advantages.scale none \
      --model.kl.place score --model.kl.estimator k1 --trainer.val_check_interval $steps ;;
  dapo) # no KL, wider above, a mean over tokens, groups without signal replaced
    lit-rlhf fit --config "$here/grpo.yaml" $rl --model.rewards "[$model, $gold]" --model.reward_weights '[1, 0]' \
      --data.batch_size $((groups + groups / 2)) --model.groups $groups --model.kl.coef 0 --model.clip.high 0.28 \
      --model.aggregation token_mean --model.updates.minibatches 4 --trainer.val_check_interval $steps ;;
  perplexity) # what became of the language: held-out stories under each policy
    for policy in sft ppo_$seed ptx_$seed grpo_$seed dr-grpo_$seed rloo_$seed dapo_$seed; do
      test -e "$out/$policy/model" || continue
      lit-rlhf validate --config "$here/sft.yaml" --model.model "$out/$policy/model" $stories --data.max_length $context \
        --data.val_limit 200 --model.sample_prompts 0 --trainer.default_root_dir "$out/perplexity/$policy"
    done ;;
  words) # a verifiable reward: use the given words, the same for every story; gold is watched here too
    lit-rlhf fit --config "$here/grpo.yaml" $rl --model.rewards "[$given, $gold]" --model.reward_weights '[1, 0]' \
      --data.batch_size 8 --model.updates.epochs 2 --model.updates.minibatches 2 --model.kl.coef $words_kl ;;
  topic) # a harder one: use again what the prompt was about, other words for every story
    lit-rlhf fit --config "$here/grpo.yaml" $rl --model.rewards "[$topic, $gold]" --model.reward_weights '[1, 0]' \
      --data.batch_size 8 --model.updates.epochs 2 --model.updates.minibatches 2 --model.kl.coef 0.05 --trainer.max_steps $((2 * steps)) ;;
  texts) # ten held-out prompts, the first ten, continued by every policy
    for policy in sft ppo_$seed grpo_$seed words_$seed; do
      lit-rlhf generate --model "$out/$policy/model" --prompts "$out/val.jsonl" --limit 10 --batch_size 10 \
        --output "$out/texts/$policy.jsonl" --sampling.max_new_tokens $tokens
    done ;;
  all)
    for one in prompts before sft after pairs reward start ppo grpo words texts; do
      bash "$0" "$data" "$2" "$name" $one "$seed"
    done ;;
  *) echo "STEP is $step; see the head of this file" >&2; exit 2 ;;
esac
