"""benchmarks/rows.py on a few chats: both sides tokenise the same texts."""

import contract
from helpers import write_model

from benchmarks import rows


def test_both_sides_tokenise_the_same_chats(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    rows.main(["--rows", "7", "--model", str(model), "--repeats", "2", "--out", str(tmp_path)])
    _, found = contract.read(tmp_path, "rows")
    assert [row["method"] for row in found] == ["datasets.map", "encode"]
    theirs, ours = (row["shape"] for row in found)
    # Each example ends with its last label: the newline after the last turn is not learnt.
    assert theirs[0] == ours[0] == 7 and theirs[1] - ours[1] == 7
    assert found[0]["speed"] == 1 and found[1]["speed"] > 0
    assert contract.printed_rows(capsys.readouterr().out) == 2
