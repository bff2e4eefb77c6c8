"""The commands behind ``lit-rlhf``, one file each; ``lit_rlhf.cli`` chooses among them."""
