"""The commands: one module each, `run(config)` for Python and `main()` for the command line."""
