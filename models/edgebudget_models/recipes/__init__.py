"""How the packaged weights were trained; every recipe runs as a module."""
