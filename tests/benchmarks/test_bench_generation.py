"""benchmarks/generation.py on a tiny model."""

import contract
import pytest
from helpers import write_model

from benchmarks import common, generation
from neuroada_jax.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """Every call is made, once, and takes the time that is told here: (library, batch, new tokens) -> seconds."""

    def set_to(seconds):
        def alternate(runs, repeats, **_):
            for run in runs.values():
                run()
            return {key: [seconds(*key)] * repeats for key in runs}

        monkeypatch.setattr(common, "alternate", alternate)

    return set_to


def test_every_phase_has_a_row_for_each_library(tmp_path, capsys, clock):
    clock(lambda name, batch, new: (0.5 if name == generation.THEIRS else 0.25) * batch + new / 100)
    model = str(write_model(tmp_path / "model"))
    options = ["--batch-sizes", "1", "3", "--prompt", "5", "--new", "9", "--repeats", "3"]
    generation.main(["--model", model, *options, "--out", str(tmp_path)])
    _, rows = contract.read(tmp_path, "generation")
    assert [(row["batch"], row["phase"], row["method"]) for row in rows] == [
        (batch, phase, method)
        for batch in (1, 3)
        for phase in ("prefill", "decode")
        for method in ("neuroada-jax", "transformers")
    ]
    for row in rows:
        first = (0.5 if row["method"] == "transformers" else 0.25) * row["batch"] + 0.01
        tokens, seconds = (5, first) if row["phase"] == "prefill" else (9, 0.09)
        assert row["seconds"] == pytest.approx(seconds)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * tokens / seconds)
    speedups = [row["speedup"] for row in rows if row["method"] == "neuroada-jax"]
    assert speedups == pytest.approx([0.51 / 0.26, 1, 1.51 / 0.76, 1])
    assert contract.printed_rows(capsys.readouterr().out) == len(rows)


def test_a_decode_that_noise_hides_is_refused(tmp_path, clock):
    clock(lambda name, batch, new: 0.2 if new == 1 else 0.1)
    model = str(write_model(tmp_path / "model"))
    options = ["--batch-sizes", "1", "--prompt", "5", "--new", "2", "--repeats", "2"]
    with pytest.raises(UserError, match=r"--new: neuroada-jax took 0\.2 s for 1 token and 0\.1 s for 3 \(batch 1\)"):
        generation.main(["--model", model, *options, "--out", str(tmp_path)])
    assert not (tmp_path / "generation.json").exists()
