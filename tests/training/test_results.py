"""results.json: today's form, and what neuroada-jax 0.1 wrote."""

import json
import math
from pathlib import Path

from neuroada_jax.evaluation.scoring import Part, Score
from neuroada_jax.training import report, results

FINISHED = Path(__file__).parents[1] / "fixtures" / "version_0_1" / "finished"


def test_a_score_survives_json():
    part = Part(0.5, 4, (0.1, 0.9))
    whole = Score(0.75, 8, (0.4, 0.9), [{"correct": True}], "accuracy", {"f1": 0.5}, 1, 4, {"clean": part}, {"f1": None})
    found = Score.from_json(json.loads(json.dumps(whole.to_json())))
    assert found == whole._replace(predictions=[])
    assert math.isnan(Score.from_json(whole.to_json() | {"value": None}).value)


def test_a_run_of_0_1_is_read():
    path = FINISHED / "decoder-run" / "results.json"
    former, found = json.loads(path.read_text()), results.read(path)
    (name,) = former["evaluation"]
    figures = former["evaluation"][name]
    for when in ("before", "after"):
        score = report.scores(found, when)[name]
        assert (score.value, score.n) == (figures[f"accuracy_{when}"], figures["n"])
        assert score.interval == tuple(figures[f"interval_{when}"]) and score.empty == figures[f"empty_{when}"]
    assert found.keys().isdisjoint({"evaluation", "accuracy_before", "accuracy_after", "n"})
    assert found["trainable"] == former["trainable"] and found["dropped"] == former["left_out"]


def test_what_0_1_did_not_score_is_left_out_and_the_further_metrics_are_kept():
    path = FINISHED / "encoder-seeds" / "seed-1" / "results.json"
    figures, found = json.loads(path.read_text())["evaluation"]["dev"], results.read(path)
    after = report.scores(found, "after")["dev"]
    assert after.beside == {"f1": figures["f1_after"]}
    assert after.beside_intervals == {"f1": figures["f1_interval_after"]} == {"f1": None}
    assert ("dev" in found["before"]) == (figures["accuracy_before"] is not None)


def test_a_table_of_scores(capsys):
    one = Score(0.5, 8, (0.2, 0.8), [], overlap=2, parts={"clean": Part(0.25, 4, (0.1, 0.6))})
    report.print_scores({"a": one._replace(value=math.nan, interval=None, parts={})}, {"a": one}, None, "run: ")
    printed, below = capsys.readouterr()
    assert "50.0 (20.0 to 80.0)" in printed and "25.0 (10.0 to 60.0)" in printed and "before" in printed
    assert "overlap: questions that are among the training rows" in below and "nan" not in printed
