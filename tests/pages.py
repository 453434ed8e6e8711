"""The programs of a page: run one after the other in one namespace, their output compared with what the page shows.

    python tests/pages.py docs/first-ten-minutes.md          # exit code 1 and a list of differences, if there are any
    python tests/pages.py docs/first-ten-minutes.md --write  # puts into the page what was printed

Needs the standard library and what the programs need, so that it also runs where no test package is installed.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"^```console\n\$ noetherflow (?P<arguments>[^\n]*)\n```\n(?:\n```text\n(?P<printed>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
FILE = re.compile(r"^```python\n# (\w+\.py)\b", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w]|\.\d)")
# Models are trained in float32. The order in which a processor adds changes the last bits of every step, and training
# amplifies the difference: Tr Sigma of the first ten minutes differs by 2e-8 between two instruction sets of a
# processor, the change of a loss by more. So numbers may differ by 1 %, or by 1 in their last digit after the point.
RELATIVE = 0.01
# A number with one digit and an exponent, such as 7e-16, is a rounding error. Its size depends on the processor.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Block:
    """A program of a page, the line on which it starts, and the output that the page shows (None for none)."""

    code: str
    line: int
    printed: str | None


def blocks(page: str) -> list[Block]:
    """Every block of Python of a page, with the block of text that follows it directly."""
    return [
        Block(match["code"], page.count("\n", 0, match.start()) + 2, match["printed"]) for match in FENCE.finditer(page)
    ]


def outputs(programs: list[str], limit: float = 300.0) -> list[str]:
    """What each program prints, all of them in one namespace of a new process; raises if a program does."""
    # In an empty folder, which takes the files that the programs write.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--serve"],
            input=json.dumps(programs),
            capture_output=True,
            text=True,
            cwd=folder,
            env=_environment(),
            timeout=limit,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"a program of the page failed:\n{done.stderr}")
    printed: list[str] = json.loads(done.stdout)
    return printed


def differences(expected: str, printed: str) -> list[str]:
    """Sentences on where two outputs differ: in words exactly, in numbers by more than processors do."""
    left, right = _pieces(expected), _pieces(printed)
    if left[0] != right[0]:
        return [f"expected the words\n{expected}\nbut printed was\n{printed}"]
    pairs = zip(left[1], right[1], strict=True)
    return [f"expected {shown}, but printed was {came}" for shown, came in pairs if not agree(shown, came)]


def agree(shown: str, came: str) -> bool:
    """Whether two printed numbers are equal but for what depends on the processor."""
    if shown == came:
        return True
    if all("e" in text and "." not in text for text in (shown, came)):
        return abs(_value(shown)) < ROUNDING and abs(_value(came)) < ROUNDING
    return abs(_value(shown) - _value(came)) <= max(RELATIVE * abs(_value(shown)), 1.001 * _last_digit(shown))


def check(path: Path) -> list[str]:
    """The differences of all blocks of a page, with the lines on which their programs start."""
    listed = blocks(path.read_text("utf-8"))
    printed = outputs([block.code for block in listed])
    return [
        f"{path.name}:{block.line}: {sentence}"
        for block, text in zip(listed, printed, strict=True)
        for sentence in differences(block.printed or "", text)
    ]


def command_outputs(page: str) -> list[tuple[str, str, str]]:
    """For every `noetherflow` command on a file of the page: its arguments, what the page shows, and what it prints.

    A file of the page consists of the programs that begin with its name as a comment, such as `# my_model.py`.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = dict.fromkeys(match[1] for match in FILE.finditer(page))
        for name in names:
            parts = [block.code for block in blocks(page) if block.code.startswith(f"# {name}")]
            (Path(folder) / name).write_text("\n".join(parts), "utf-8")
        answers = []
        for match in COMMAND.finditer(page):
            arguments = match["arguments"].split()
            if not names.keys() & set(arguments):
                continue
            done = subprocess.run(
                [sys.executable, "-m", "noetherflow", *arguments],
                capture_output=True,
                text=True,
                cwd=folder,
                env=_environment(),
                timeout=300.0,
                check=True,
            )
            answers.append((match["arguments"], match["printed"] or "", _trimmed(done.stdout)))
    return answers


def write(path: Path) -> None:
    """Replace the outputs of a page by what its programs and commands print."""
    page = path.read_text("utf-8")
    printed = iter(outputs([block.code for block in blocks(page)]))

    def shown(match: re.Match[str]) -> str:
        text = next(printed)
        return f"```python\n{match['code']}```\n" + (f"\n```text\n{text}```\n" if text else "")

    page = FENCE.sub(shown, page)
    for arguments, _, text in command_outputs(page):
        head = f"```console\n$ noetherflow {arguments}\n```\n"
        page = re.sub(
            re.escape(head) + r"(\n```text\n.*?^```\n)?",
            lambda _, new=f"{head}\n```text\n{text}```\n": new,
            page,
            flags=re.M | re.S,
        )
    path.write_text(page, "utf-8")


def _pieces(text: str) -> tuple[list[str], list[str]]:
    """The words with a mark for every number, and the numbers; rules of a table count as one word of any length."""
    plain = re.sub(r"[-─]{4,}", "----", text)
    return NUMBER.sub("#", plain).split(), NUMBER.findall(plain)


def _value(text: str) -> float:
    return float(text.replace(",", ""))


def _last_digit(text: str) -> float:
    """The size of 1 in the last digit, 1e-6 for 5.7e-05; 0 for whole numbers."""
    digits, _, exponent = text.partition("e")
    _, point, fraction = digits.partition(".")
    return 10.0 ** (int(exponent or 0) - len(fraction)) if point else 0.0


def _trimmed(text: str) -> str:
    """Lines without blanks at their ends."""
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def _environment() -> dict[str, str]:
    return os.environ | {"COLUMNS": "100", "PYTHONWARNINGS": "error"}


def _serve() -> None:
    """Run the programs that come in as JSON; what each printed goes out as JSON."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = []
    for index, program in enumerate(json.load(sys.stdin)):
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compile(program, f"<program {index}>", "exec"), namespace)
        printed.append(_trimmed(stream.getvalue()))
    print(json.dumps(printed))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        _serve()
    elif sys.argv[2:] == ["--write"]:
        write(Path(sys.argv[1]))
    else:
        sys.exit("\n".join(check(Path(sys.argv[1]))) or 0)
