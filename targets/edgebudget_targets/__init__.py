"""Built-in targets: `<engine>.py` lowers and runs, `<device>.toml` describes."""
