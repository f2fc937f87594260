"""Prints the shell block of README.md that follows the comment ``<!-- block: NAME -->``."""

import re
import sys
from pathlib import Path

text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
match = re.search(rf"<!-- block: {re.escape(sys.argv[1])} -->\s*```sh\n(.*?)```", text, re.DOTALL)
if match is None:
    sys.exit(f"README.md has no block {sys.argv[1]!r}")
print(match.group(1), end="")
