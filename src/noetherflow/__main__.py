"""`python -m noetherflow` is the command line."""

from noetherflow._cli import app

if __name__ == "__main__":
    app(prog_name="noetherflow")
