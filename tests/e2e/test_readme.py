"""The README's Python runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_ten_lines_of_python_in_the_readme_run(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
    elsewhere = block.replace('["training.epochs=4"]', f'["training.epochs=4", "storage=\'{tmp_path}\'"]')
    assert elsewhere != block, "the run must not write into the checkout"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", elsewhere], env=clean, capture_output=True, text=True, timeout=170, check=False
    )
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0].isdigit(), "trials at once"
    assert "val_accuracy" in lines[1]
    assert "'label'" in lines[2]
    assert "'probabilities'" in lines[2]
