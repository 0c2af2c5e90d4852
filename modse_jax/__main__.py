"""Runs a subcommand: python -m modse_jax train|eval|plan|prepare|inspect|train_tokenizer ..."""

from modse_jax.cli import subcommands

if __name__ == "__main__":
    subcommands.main()
