"""What SECURITY.md promises: nothing of config, data, models or checkpoints runs unasked, and secrets stay secret."""

from __future__ import annotations

import ast
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

import lit_rlhf
from lit_rlhf.checkpoints import write
from lit_rlhf.models import Network, load_causal, load_tokenizer, without_weights

PACKAGE = Path(lit_rlhf.__file__).parent
ROOT = PACKAGE.parent
CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
    ),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "dill.load", "dill.loads", "marshal.loads"),
    *("shutil.unpack_archive", "tarfile.open", "importlib.reload"),
}
SHELL = ("run", "Popen", "call", "check_call", "check_output", "getoutput", "getstatusoutput")


def dangers(source: str) -> Iterator[str]:
    """Calls in ``source`` that run text, open pickles, unpack archives or ask a shell."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in CALLS or name.endswith((".extractall", ".extract")):
            yield f"{node.lineno}: {name}"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load without weights_only"
        is_process = name.startswith("subprocess.") and name.removeprefix("subprocess.") in SHELL
        if is_process and ("shell" in given or not isinstance(node.args[0], ast.List)):
            yield f"{node.lineno}: {name} by a shell"
        if given.get("trust_remote_code") == "True":
            yield f"{node.lineno}: trust_remote_code"


def test_the_package_runs_no_text_opens_no_pickle_and_asks_no_shell():
    found = [f"{path}:{what}" for path in PACKAGE.rglob("*.py") for what in dangers(path.read_text(encoding="utf-8"))]
    assert not found
    configs = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "configs").glob("*.yaml"))
    assert "trust_remote_code" not in configs


@pytest.mark.parametrize(
    "line",
    [
        *("eval('1')", "os.system(x)", "pickle.load(f)", "yaml.load(f)", "archive.extractall(x)", "torch.load(f)"),
        *("torch.load(f, weights_only=False)", "subprocess.run(x, shell=True)", "subprocess.run(f'ls {x}')"),
        "load(x, trust_remote_code=True)",
    ],
)
def test_each_of_these_is_found(line):
    assert len(list(dangers(line))) == 1


# -- code that comes with a model ----------------------------------------------------------------------------------


@pytest.fixture
def with_code(tmp_path: Path) -> str:
    """A model folder whose config names a class of its own, which leaves a mark when it is imported."""
    folder = tmp_path / "own"
    tiny.save_tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return str(folder)


def test_code_of_a_model_is_not_run_unasked(with_code: str, tmp_path: Path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_causal(with_code)
    assert not (tmp_path / "ran").exists()


def test_code_that_was_asked_for_is_named_in_the_log(with_code: str, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    load_causal(with_code, Network(trust_remote_code=True, revision="abc123"))
    assert (tmp_path / "ran").exists()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lit_rlhf"]
    assert all(word in line for word in (with_code, "revision abc123", "own.Config", "own.Model"))
    caplog.clear()
    load_tokenizer(with_code, trust_remote_code=True)  # it brings none
    assert not [record for record in caplog.records if record.name == "lit_rlhf"]


def test_a_checkpoint_cannot_ask_for_code(refused, with_code: str, tmp_path: Path):
    hyper_parameters = {"_class_path": "lit_rlhf.stages.sft.SFT", "model": with_code}
    hyper_parameters["network"] = {"trust_remote_code": True}
    write({"state_dict": {"w": torch.zeros(1)}, "hyper_parameters": hyper_parameters}, tmp_path / "a.ckpt")
    lines = refused("export", "--checkpoint", str(tmp_path / "a.ckpt"), "--folder", str(tmp_path / "out"))
    assert "--trust_remote_code true" in lines[-1]
    assert not (tmp_path / "ran").exists()


# -- secrets ---------------------------------------------------------------------------------------------------------

SECRET = "s3cr3t-bearer-of-the-test"


class Scorer(http.server.BaseHTTPRequestHandler):
    """Scores every text 0.5; the last request has no answer but the token, sent back."""

    tokens: list = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.tokens.append(self.headers["Authorization"])
        data = json.dumps({"scores": [0.5] * len(body["texts"])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


def test_a_token_is_in_no_file_of_a_run_and_in_no_output(cli, workspace: Path, tmp_path: Path, capfd, monkeypatch):
    """Log, CSV, hparams, saved config, checkpoint, export and W&B's files, of a run that sends it with each request."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SCORER_TOKEN", SECRET)
    form = {"url": f"http://127.0.0.1:{server.server_port}/", "form": "json", "token_env": "SCORER_TOKEN"}
    form |= {"request": {"texts": "$texts"}, "answer": "scores.*"}
    reward = json.dumps([{"class_path": "lit_rlhf.rewards.HTTPReward", "init_args": form}])
    own = ("--model.rewards", reward, "--model.model", "base", "--model.sampling.max_new_tokens", "4")
    where = ("--trainer.default_root_dir", str(tmp_path / "run"), "--export.folder", str(tmp_path / "run" / "model"))
    offline = ("--config", "wandb.yaml", "--trainer.logger.init_args.save_dir", str(tmp_path / "run"))
    cli.fit("grpo.yaml", "math.jsonl", *offline, *own, *where)
    server.shutdown()
    server.server_close()
    assert set(Scorer.tokens) == {f"Bearer {SECRET}"}
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = " ".join(map(str, files))
    assert all(
        part in names for part in ("hparams.yaml", "config.yaml", "metrics.csv", ".ckpt", ".wandb", "model.safe")
    )
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in "".join(capfd.readouterr())
    assert b"SCORER_TOKEN" in next(path for path in files if path.name == "config.yaml").read_bytes()


def test_the_audit_command_stands_in_contributing():
    assert "pip-audit -r constraints.txt" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert os.path.exists(ROOT / "SECURITY.md")


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b"])
def test_a_chat_template_that_is_called_like_a_path_is_refused(name: str, tmp_path: Path) -> None:
    """Saving a tokenizer writes each of its templates to a file of that name."""
    tiny.save_tiny(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for jinja in tmp_path.glob("*.jinja"):
        jinja.unlink()
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "y"}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": templates}))
    with pytest.raises(ValueError, match="which is a path: refused"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["../model-1.safetensors", "/tmp/model.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.save_tiny(folder)
    (folder / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    (folder / "other.safetensors").touch()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with without_weights(), pytest.raises(ValueError, match="no file of its folder: refused"):
        load_causal(str(folder))
