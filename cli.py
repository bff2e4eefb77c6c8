"""Door to the command line from a checkout: ``python cli.py fit --config sft.yaml`` (installed: ``lit-rlhf``)."""

from lit_rlhf.cli import main

if __name__ == "__main__":
    main()
