"""The command line: flags, subcommands, one-line error messages and exit codes."""
