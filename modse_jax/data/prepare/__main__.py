"""Runs `python -m modse_jax.data.prepare`."""

from modse_jax.data.prepare.command_line import main

if __name__ == "__main__":
    main()
