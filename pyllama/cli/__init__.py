"""The command `pyllama`: one file per subcommand. A leaf: nothing else of the package imports it."""
