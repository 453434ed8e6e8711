"""`python -m noetherflow` and the script `noetherflow` are the command line."""

import sys

from noetherflow._errors import MissingExtraError
from noetherflow._extras import require


def main() -> None:
    """Run the command line; where its packages are not installed, say so and end with exit code 2."""
    try:
        require("cli", "typer", "rich", purpose="the command line")
    except MissingExtraError as error:
        sys.exit(_plainly(error))
    from noetherflow._cli import app

    app(prog_name="noetherflow")


def _plainly(error: Exception) -> int:
    print(error, file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
