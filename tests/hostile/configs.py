"""Configs and arguments that are wrong: what is written or given, and what the message says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hostile.door import config


@dataclass(frozen=True)
class Text:
    """A config file.

    Args:
        name: what is wrong.
        text: of the file, or a function that makes it.
        says: a regular expression that the message matches.
    """

    name: str
    text: str | bytes | Callable[[Path], object]
    says: str


@dataclass(frozen=True)
class Setting:
    """Arguments after a good config.

    Args:
        stage: whose config.
        args: ``key=value``, several with a blank between; values as YAML without blanks.
        says: a regular expression that the message matches.
    """

    stage: str
    args: str
    says: str


def changed(stage: str = "sft", **sections: Any) -> str:
    """A good config with other sections."""
    return yaml.safe_dump({**config(stage), **sections})


SFT = {"class_path": "lit_rlhf.SFT", "init_args": {"model": "base"}}
DATA = {"class_path": "lit_rlhf.SFTData", "init_args": {"train": "sft.jsonl"}}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
TEXTS = [
    Text("empty", "", "bad.yaml: expected keys with values .*, got nothing"),
    Text("a comment alone", "# nothing\n", "expected keys with values .*, got nothing"),
    Text("a list", "- model\n- data\n", "expected keys with values .*, got list"),
    Text("a number", "5\n", "Unexpected config: 5"),
    Text("a sentence", "train it well\n", "expected keys with values .*, got str"),
    Text("bracket not closed", "trainer: {max_steps: 1\n", "bad.yaml, line 1, column 10"),
    Text("quote not closed", "model: 'lit_rlhf.SFT\n", "bad.yaml, line 1, column 8"),
    Text("tab as indent", "trainer:\n\tmax_steps: 1\n", "bad.yaml, line 2, column 1"),
    Text("indent that fits no level", "trainer:\n    a: 1\n  b: 2\n", "bad.yaml, line 3"),
    Text("two documents", changed() + "---\n" + changed(), "expected a single document"),
    Text("a section twice", changed() + "trainer:\n  max_steps: 2\n", "the key 'trainer' stands twice; of its two"),
    Text("a knob twice", "trainer: {max_steps: 1, max_steps: 2}\n", "the key 'max_steps' stands twice"),
    Text("a tag that runs a command", 'model: !!python/object/apply:os.system ["touch ran"]\n', "no tag makes or runs"),
    Text("a tag that makes an object", "model: !!python/object/new:os.popen [touch ran]\n", "no tag makes or runs any"),
    Text("a tag that names a function", "model: !!python/name:os.system\n", "no tag makes or runs anything"),
    Text("a tag that imports", "model: !!python/module:antigravity\n", "no tag makes or runs anything"),
    Text("a tag of nobody", "model: !theirs {a: 1}\n", "no tag makes or runs anything"),
    Text("lists 5,000 deep", "model: " + "[" * 5_000 + "]" * 5_000 + "\n", "more than 50 levels of nesting"),
    Text("keys 300 deep", "".join(" " * i + "a:\n" for i in range(300)), "more than 50 levels of nesting"),
    Text("aliases of 282 thousand million", BOMB, "more than 100000 values, each alias counted"),
    Text("an alias within itself", "model: &a [*a]\n", r"\*a stands within what it names"),
    Text("an alias of nothing", "model: *nothing\n", "undefined alias"),
    Text("a date that is none", "trainer: {max_steps: !!timestamp 2020-99-99}\n", "month must be in 1..12"),
    Text("a number of 5,000 digits", "trainer: {max_steps: " + "9" * 5_000 + "}\n", "Exceeds the limit"),
    Text("base64 that is none", "trainer: {max_steps: !!binary a}\n", "failed to decode base64"),
    Text("a key that is a list", "? [a, b]\n: 1\n", "unhashable key"),
    Text("a key that is a number", "5: 6\n", "Key must be a string, got: 5"),
    Text("a key that is null", "null: 6\n", "Key must be a string, got: None"),
    Text("a NUL", "trainer: {max_steps: 1\0}\n", "control characters are not allowed"),
    Text("UTF-16", changed().encode("utf-16"), "config bad.yaml: expected YAML as UTF-8 text"),
    Text("Latin-1", "# caf\u00e9\nmodel: x\n".encode("latin-1"), "config bad.yaml: expected YAML as UTF-8 text"),
    Text("bytes at random", bytes(range(256)), "config bad.yaml: expected YAML as UTF-8 text"),
    Text("a folder", lambda path: path.mkdir(), "config: Path is not a file"),
    Text("not there", lambda path: None, "no config .*bad.yaml"),
    Text("a broken link", lambda path: path.symlink_to("gone.yaml"), "no config .*bad.yaml"),
    Text("JSON with a wrong value", '{"trainer": {"max_steps": "x"}}', "trainer.max_steps: expected int, got x"),
    Text("no model", yaml.safe_dump({"data": DATA}), "not given: model"),
    Text("model null", changed(model=None), "not given: model"),
    Text("model a list", changed(model=[1, 2]), r"model: expected class_path \(a LightningModule\) and init_args"),
    Text("model a number", changed(model=5), r"model: expected class_path \(a LightningModule\) and init_args"),
    Text("class_path a number", changed(model={"class_path": 5}), "model: expected a dotted path as class_path"),
    Text("class_path a file", changed(model={"class_path": "../../etc/passwd"}), "Unexpected import path format"),
    Text("class_path empty", changed(model={"class_path": ""}), "model: "),
    Text("class_path of no module", changed(model={"class_path": "nosuch.SFT"}), "No module named 'nosuch'"),
    Text("class_path misspelt", changed(model={"class_path": "lit_rlhf.SFTT"}), "has no SFTT.*did you mean SFT"),
    Text("class_path of another kind", changed(model=DATA), "subclass of LightningModule"),
    Text("class_path of a function", changed(model={"class_path": "os.system"}), "subclass of LightningModule"),
    Text("class_path of eval", changed(model={"class_path": "builtins.eval"}), "subclass of LightningModule"),
    Text("data of another kind", changed(data=SFT), "subclass of LightningDataModule"),
    Text("init_args a list", changed(model={**SFT, "init_args": [1]}), "model: expected keys with values, got a list"),
    Text("init_args without model", changed(model={"class_path": "lit_rlhf.SFT"}), "not given: model.model"),
    Text("knob unknown", changed(model={**SFT, "init_args": {"model": "base", "lr": 1}}), "model.lr is no option of"),
    Text("section unknown", changed(modle={"a": 1}), "modle.a is no option .*did you mean model"),
    Text("section of text", changed(trainer="fast please"), "trainer: Unable to load config"),
    Text("group of text", changed(model={**SFT, "init_args": {"model": "base", "optim": "adam"}}), "model.optim"),
    Text(
        "group a list",
        changed(model={**SFT, "init_args": {"model": "base", "optim": [1]}}),
        "optim: expected keys",
    ),
]

MORE = "or more"
SETTINGS = [
    Setting("sft", "model.optim.lr=fast", "model.optim.lr: expected float, got fast"),
    Setting("sft", "model.optim.lr=-1", f"optim.lr is -1.0: expected a number, 0 {MORE}"),
    Setting("sft", "model.optim.lr=.nan", "optim.lr is nan"),
    Setting("sft", "model.optim.lr=.inf", "optim.lr is inf"),
    Setting("sft", "model.optim.lr=null", "model.optim.lr: expected float, got None"),
    Setting("sft", "model.optim.betas=[2,0.9]", r"optim.betas\[0\] is 2.0: expected a number, 0 or more and below 1"),
    Setting("sft", "model.optim.betas=[0.9]", "model.optim.betas: Expected a tuple with 2 elements"),
    Setting("sft", "model.optim.eps=0", "optim.eps is 0.0: expected a number, above 0"),
    Setting("sft", "model.optim.weight_decay=.nan", "optim.weight_decay is nan"),
    Setting("sft", "model.optim.warmup_steps=-1", "optim.warmup_steps is -1: expected a whole number"),
    Setting("sft", "model.optim.final_fraction=2", "optim.final_fraction is 2.0"),
    Setting("sft", "model.optim.most_skips=-1", "optim.most_skips=-1"),
    Setting("sft", "model.optim.schedule=cosin", "model.optim.schedule: expected one of 'constant'"),
    Setting("sft", "model.optim.lrr=1", "model.optim.lrr is no option of .*did you mean lr"),
    Setting("sft", "model.network.dropout=1", "network.dropout is 1.0: a probability"),
    Setting("sft", "model.network.dtype=int8", "model.network.dtype: expected one of 'float32'"),
    Setting("sft", "model.network.attention=silly", "attn_implementation=.*silly"),
    Setting("sft", "model.network.lora.r=0", "lora.r is 0: the rank must be at least 1"),
    Setting("sft", "model.network.lora.alpha=0", "lora.alpha is 0: expected a number, above 0"),
    Setting("sft", "model.network.lora.dropout=2", "lora.dropout is 2.0"),
    Setting("sft", "model.network.lora.targets=[nope]", r"lora.targets=\['nope'\].*Linear layers of this model: .*q_"),
    Setting("sft", "model.network.lora.targets=[]", "lora.targets is an empty list"),
    Setting("sft", "model.neftune_alpha=.inf", "neftune_alpha is inf"),
    Setting("sft", "model.sample_prompts=-1", "sample_prompts is -1"),
    Setting("sft", "model.seed=-1", "seed is -1: expected a whole number, 0 or more and at most 4294967295"),
    Setting("sft", "seed_everything=-1", "seed_everything: -1 is not in bounds"),
    Setting("sft", "model.model=./none", "no such tokenizer folder: ./none"),
    Setting("sft", "model.model=", "no such tokenizer folder: ''"),
    Setting("sft", "model.model=sft.jsonl", "no such tokenizer folder: sft.jsonl"),
    Setting("sft", "model.tokenizer=./none", "no such tokenizer folder: ./none"),
    Setting("sft", "data.batch_size=0", "batch_size must be at least 1, got 0"),
    Setting("sft", "data.batch_size=1.5", "data.batch_size: expected int, got 1.5"),
    Setting("sft", "data.batch_size=1000", "4 training rows do not fill one batch: batch_size=1000"),
    Setting("sft", "data.max_length=-5", "max_length must be at least 1, got -5"),
    Setting("sft", "data.max_dropped=.nan", "data.max_dropped is nan"),
    Setting("sft", "data.val_fraction=-1", "val_fraction must lie between 0 and 1, got -1.0"),
    Setting("sft", "data.val_fraction=.nan", "val_fraction must lie between 0 and 1, got nan"),
    Setting("sft", "data.num_workers=-1", "data.num_workers is -1"),
    Setting("sft", "data.seed=-1", "data.seed is -1"),
    Setting("sft", "data.split_by=user data.val_fraction=0.5", 'has no column "user"'),
    Setting("sft", "data.chat_template=none.jinja", 'chat_template: expected "dialogue", Jinja text or an existing'),
    Setting("sft", "data.chat_template={%if%}", "chat_template, line 1: Expected an expression"),
    Setting("sft", "data.prompt_template={prompt.__class__}", "expected {column} with a column's name"),
    Setting("sft", "data.tokenizer=./none", "tokenizer: the folder ./none does not exist"),
    Setting("sft", "data.tokenizer=sft.jsonl", "tokenizer: 'sft.jsonl' cannot be loaded"),
    Setting("sft", "data.train=", "expected a file, a folder or a hub id, got ''"),
    Setting("sft", "data.train=./sft.json", "sft.json does not exist .*did you mean .*sft.jsonl"),
    Setting("sft", "data.train=[]", "train: expected a path or a list of at least one source"),
    Setting("sft", "data.train=[{path:sft.jsonl,weight:-1}]", "data.train|weight is -1|expected a path"),
    Setting("sft", "data.train=[sft.jsonl,sft.jsonl]", "sft.jsonl is named twice"),
    Setting("sft", "data.val_split=test", 'has no split "test" of its own'),
    Setting("sft", "data=PreferenceData", "has none of the columns looked for"),
    Setting("sft", "trainer.max_steps=-5", "max_steps"),
    Setting("sft", "trainer.max_steps=1e3.5", "trainer.max_steps: expected int, got 1e3.5"),
    Setting("sft", "trainer.max_stepz=5", "trainer.max_stepz is no option"),
    Setting("sft", "trainer.precision=7", "trainer.precision: expected one of"),
    Setting("sft", "trainer.precision=bf16-true", "precision=bf16-true keeps weights .* Use precision='bf16-mixed'"),
    Setting("sft", "trainer.accelerator=tpuu", "invalid accelerator name"),
    Setting("sft", "trainer.devices=-2", "trainer: `devices` selected with"),
    Setting("sft", "trainer.strategy=none", "invalid strategy name"),
    Setting("sft", "trainer.gradient_clip_val=-1", "trainer.gradient_clip_val is -1"),
    Setting("sft", "trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val is nan"),
    Setting("sft", "trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches is 0"),
    Setting("sft", "trainer.default_root_dir=sft.jsonl", "trainer.default_root_dir is sft.jsonl, which is a file"),
    Setting("sft", "trainer.default_root_dir=sft.jsonl/runs trainer.logger=true", "sft.jsonl"),
    Setting("sft", "trainer.callbacks=[lit_rlhf.SFT]", "trainer.callbacks"),
    Setting("sft", "trainer.max_steps=-1 trainer.max_epochs=-1 model.optim.schedule=linear", "schedule='linear' needs"),
    Setting("sft", "checkpoint.keep=0", "checkpoint.keep is 0"),
    Setting("sft", "checkpoint.save_top_k=-7", "save_top_k=-7"),
    Setting("sft", "checkpoint.train_time_interval=soon", "checkpoint.train_time_interval"),
    Setting("sft", "export.folder=sft.jsonl", "export.folder is sft.jsonl, which is a file"),
    Setting("sft", "preemption.signals=[SIGNOPE]", "preemption.signals: no signal SIGNOPE"),
    Setting("sft", "preemption.signals=[SIGKILL]", "preemption.signals: no process is told of SIGKILL"),
    Setting("sft", "ckpt_path=./none.ckpt", "checkpoint none.ckpt is not there"),
    Setting("sft", "ckpt_path=base", "checkpoint base is a folder"),
    Setting("sft", "ckpt_path=sft.jsonl", "sft.jsonl is no checkpoint that torch.save wrote"),
    Setting("reward", "model.loss=pair", "model.loss: expected one of 'pairwise', 'best_of_k'"),
    Setting("reward", "model.label_smoothing=0.5", "label_smoothing is 0.5"),
    Setting("reward", "model.loss=best_of_k model.label_smoothing=0.1", "label_smoothing is about pairs"),
    Setting("reward", "model.center=-1", "center is -1.0"),
    Setting("reward", "model.margin=maybe", "model.margin: expected bool, got maybe"),
    Setting("reward", "data.chosen_column=best", "has none of the columns looked for .*best"),
    Setting("ppo", "model.rewards=[]", "rewards is empty"),
    Setting("ppo", "model.rewards=[nosuch.f]", "model.rewards: No module named 'nosuch'"),
    Setting("ppo", "model.rewards=[arena.nosuch]", "model.rewards: arena has no nosuch"),
    Setting("ppo", "model.rewards=low_ids", "model.rewards: expected list, got low_ids"),
    Setting("ppo", "model.rewards=[5]", "model.rewards: Expected an import path"),
    Setting("ppo", "model.reward_weights=[1,2]", "2 reward weights for 1 rewards"),
    Setting("ppo", "model.reward_weights=[.nan]", "reward weights must be finite"),
    Setting("ppo", "model.missing_eos.penalty=-1", "penalty is -1"),
    Setting("ppo", "model.shaping.clip=0", "shaping.clip is 0"),
    Setting("ppo", "model.sampling.temperature=.inf", "sampling.temperature is inf"),
    Setting("ppo", "model.sampling.temperature=0", "greedy sampling has no log-probabilities"),
    Setting("ppo", "model.sampling.top_p=0", "sampling.top_p is 0"),
    Setting("ppo", "model.sampling.min_new_tokens=9", "sampling.min_new_tokens is 9"),
    Setting("ppo", "model.sampling.max_new_tokens=0", "sampling.max_new_tokens is 0"),
    Setting("ppo", "model.sampling.max_new_tokens=9999", "but the model has 256 positions: no prompt"),
    Setting("ppo", "model.sampling.stop_ids=[-1]", r"sampling.stop_ids\[0\] is -1"),
    Setting("ppo", "model.updates.epochs=0", "updates.epochs is 0: expected a whole number, 1 or more"),
    Setting("ppo", "model.updates.minibatches=0", "updates.minibatches is 0"),
    Setting("ppo", "model.updates.minibatches=3", "a rollout of 2 sequences does not divide into minibatches=3"),
    Setting("ppo", "model.updates.micro_batch_tokens=0", "updates.micro_batch_tokens is 0"),
    Setting("ppo", "model.updates.target_kl=.nan", "updates.target_kl is nan"),
    Setting("ppo", "model.updates.sampler_gap=-1", "updates.sampler_gap is -1"),
    Setting("ppo", "model.kl.coef=-1", "kl.coef is -1"),
    Setting("ppo", "model.kl.coef=.inf", "kl.coef is inf"),
    Setting("ppo", "model.kl.target=0", "kl.target is 0"),
    Setting("ppo", "model.kl.horizon=0", "kl.horizon is 0"),
    Setting("ppo", "model.kl.estimator=k4", "model.kl.estimator: expected one of 'k1'"),
    Setting("ppo", "model.clip.low=-1", "clip.low is -1"),
    Setting("ppo", "model.clip.high=.nan", "clip.high is nan"),
    Setting("ppo", "model.clip.dual=0.5", "clip.dual is 0.5: expected a number, above 1"),
    Setting("ppo", 'model.clip={"form":"truncate","high":null}', "needs clip.high"),
    Setting("ppo", "model.clip.penalty=-1", "clip.penalty is -1"),
    Setting("ppo", "model.correction.high=-1", "correction.high is -1"),
    Setting("ppo", "model.correction.low=3", "correction.low is 3"),
    Setting("ppo", "model.gamma=2", "gamma is 2"),
    Setting("ppo", "model.lam=-1", "lam is -1"),
    Setting("ppo", "model.value.coef=-1", "value.coef is -1"),
    Setting("ppo", "model.value.clip=0", "value.clip is 0"),
    Setting("ppo", "model.value.lr=-1", "value.lr is -1"),
    Setting("ppo", "model.value.warmup=-1", "value.warmup is -1"),
    Setting("ppo", "model.value.shared=true model.critic=base", "critic='base' is not read where value.shared"),
    Setting("ppo", "model.entropy.coef=.nan", "entropy.coef is nan"),
    Setting("ppo", "model.ptx_coef=-1", "ptx_coef is -1"),
    Setting("ppo", "model.ema=1", "ema is 1.0: expected a number, 0 or more and below 1"),
    Setting("ppo", "model.critic=./none", "no such model folder: ./none"),
    Setting("ppo", "data.max_prompt_length=0", "max_prompt_length must be at least 1"),
    Setting("ppo", "data.prompt_words=0", "prompt_words must be at least 1"),
    Setting("ppo", "data.pretraining=./none", "none does not exist"),
    Setting("ppo", "trainer.accumulate_grad_batches=2", "would accumulate over rollouts"),
    Setting("grpo", "model.group_size=0", "group_size is 0: expected a whole number, 1 or more"),
    Setting("grpo", "model.group_size=-1", "group_size is -1"),
    Setting("grpo", "model.groups=-1", "groups is -1"),
    Setting("grpo", "model.refresh_reference=0", "refresh_reference is 0"),
    Setting("grpo", "model.refresh_reference=1 model.kl.coef=0", "refresh_reference moves a frozen copy"),
    Setting("grpo", "model.truncated=maybe", "model.truncated: expected one of 'count', 'mask'"),
    Setting("grpo", "model.advantages.baseline=grp", "model.advantages.baseline: expected one of"),
    Setting("grpo", "model.advantages.mix=normalize_then_sum model.missing_eos.penalty=1", "would never see missing_"),
    Setting("grpo", "model.sampler=lit_rlhf.SFT", "model.sampler"),
]
