"""The comparison of mixed precision with uniform schemes takes long: it goes on behind the sizes that it has."""

import json
import sys

import pytest

from quantkit.bench.quality import mixed


class Compared:
    ids = (0, 1)

    def __init__(self, path, windows):
        pass


def test_the_command_goes_on_behind_what_its_file_holds(tmp_path, monkeypatch):
    made = []

    def size(bits, path, work, compared, arguments):
        if len(made) == 1 and bits == "2.5":
            raise KeyboardInterrupt
        made.append((path.name, bits))
        return {"bits_per_weight": float(bits), "wins": {"kl": True}}

    monkeypatch.setattr(mixed, "Compared", Compared)
    monkeypatch.setattr(mixed, "_size", size)
    monkeypatch.setattr(mixed, "markdown", lambda *_: "")
    file = tmp_path / "mixed.json"
    call = ["mixed", "--model", "a", "--model", "b", "--work", str(tmp_path), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", call)
    with pytest.raises(KeyboardInterrupt):
        mixed.main()
    assert [
        [row["bits_per_weight"] for row in each["sizes"]] for each in json.loads(file.read_text())["models"]
    ] == [[3.25]]
    made.append(None)
    mixed.main()
    assert [each for each in made if each] == [("a", "3.25"), ("a", "2.5"), ("b", "3.25"), ("b", "2.5")]
    monkeypatch.setattr(sys, "argv", [*call, "--samples", "7"])  # another setting begins again
    mixed.main()
    assert len([each for each in made if each]) == 8
