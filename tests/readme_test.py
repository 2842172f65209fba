"""The README's Python runs as it stands."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_python_of_the_readme(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        # Two rounds say as much as seven.
        exec(block.replace("num_rounds=6", "num_rounds=1"), names)
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0].isdigit()]
    assert labels == ["50", "75"]
    assert names["query"].positions.shape == (25,)
