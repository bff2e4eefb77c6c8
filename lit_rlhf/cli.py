"""The command line: ``lit-rlhf COMMAND …``, or ``python cli.py COMMAND …`` from a checkout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import lit_rlhf

COMMANDS = {
    "demo": "the four stages on stories that it makes itself: no network, no GPU, a few minutes",
    "fit": "train a stage: lit-rlhf fit --config sft.yaml --data.train FILE",
    "validate": "held-out metrics of a stage",
    "test": "the same on the test split",
    "predict": "a stage's answers to held-out prompts",
    "generate": "continue a prompt, or a file of prompts, with an exported folder",
    "export": "checkpoint → Hugging Face folder, adapters merged or kept",
    "pairs": "sample answers from a policy, label them with a reward → preference data",
    "best-of-n": "sample answers from a policy, keep the one a reward likes best → SFT data",
    "configs": "list the configs that come with the package",
}
TRAINING = ("fit", "validate", "test", "predict")
HELP = f"""usage: lit-rlhf COMMAND [options]      lit-rlhf COMMAND --help

RLHF with PyTorch Lightning {lit_rlhf.__version__}.

commands:
{chr(10).join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())}

Configs stack, later ones win: lit-rlhf fit --config ppo.yaml --config lora.yaml --trainer.max_steps 200
A bare name is a file here or one that comes with the package. --print_config shows the outcome.
"""


def command(name: str) -> Callable[..., Any]:
    """Import the function behind a command; nothing is imported for the others.

    Args:
        name: one of ``COMMANDS`` that is not LightningCLI's.
    """
    if name == "demo":
        from lit_rlhf.demo.run import main as demo

        return demo
    if name == "generate":
        from lit_rlhf.commands.generate import generate

        return generate
    if name == "export":
        from lit_rlhf.export import export

        return export
    if name == "pairs":
        from lit_rlhf.commands.pairs import pairs

        return pairs
    if name == "best-of-n":
        from lit_rlhf.commands.best_of_n import best_of_n

        return best_of_n
    from lit_rlhf.commands.configs import configs

    return configs


def run(name: str, args: list[str]) -> int | None:
    """Run one command.

    Args:
        name: one of ``COMMANDS``.
        args: what stands after it.

    Returns:
        The process's exit code, if the command has one to say.
    """
    if name in TRAINING:
        from lit_rlhf.commands.train import train

        train([name, *args])
        return None
    from jsonargparse import auto_cli

    from lit_rlhf.commands.parser import FriendlyParser

    return auto_cli(command(name), args=args, as_positional=False, parser_class=FriendlyParser, prog=f"lit-rlhf {name}")


def main(args: list[str] | None = None) -> None:
    """Run ``lit-rlhf``.

    Args:
        args: the arguments; those of the process if None.

    Raises:
        SystemExit: 2 where the arguments, the data or a model folder are wrong, after a few lines that say what.
    """
    args = sys.argv[1:] if args is None else args
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a warning at every forked loader worker
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return
    if args[0] in ("-V", "--version"):
        print(f"lit-rlhf {lit_rlhf.__version__}")
        return
    if args[0] not in COMMANDS:
        fail(f"no command {args[0]!r}; there are: {', '.join(COMMANDS)}")
    try:
        code = run(args[0], args[1:])
    except Exception as error:
        if followed(error):
            fail(str(error.__cause__), 1)
        if not told(error, training=args[0] in TRAINING):
            raise
        fail(str(error))
    if code:
        sys.exit(code)


def told(error: Exception, training: bool) -> bool:
    """Whether an error was raised at the door, in words that are for the user: data, files, settings.

    Args:
        error: what was raised.
        training: a ValueError out of a training loop is none of these; out of a short command it is one.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from lit_rlhf.checkpoints import CheckpointError
    from lit_rlhf.data import DataError
    from lit_rlhf.ranges import SettingError

    wandb = sys.modules.get("wandb")  # no key, no login: it says itself what to do
    door = (
        DataError,
        SettingError,
        CheckpointError,
        FileNotFoundError,
        MisconfigurationException,
        *((wandb.errors.UsageError,) if wandb else ()),
    )
    if isinstance(error, OSError) and error.filename is not None:  # a file or folder that the system refuses
        return True
    return isinstance(error, door) or (type(error) is ValueError and not training)


def followed(error: Exception) -> bool:
    """Whether it followed from the failure of another process of this run, which is its cause."""
    callbacks = sys.modules.get("lit_rlhf.callbacks")
    return callbacks is not None and isinstance(error.__cause__, callbacks.RankError)


def fail(message: str, code: int = 2) -> NoReturn:
    """Say what is wrong and exit."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
