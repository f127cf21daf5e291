"""Own labels from a config to `neuroada classify`, transformers and Python, on a tiny random BERT."""

import csv
import json
import random

import numpy as np
import pytest
from data_helpers import message_of, write_lines
from helpers import write_bert, write_config, write_model

import neuroada_jax as na
from neuroada_jax import cli
from neuroada_jax.adapters import native
from neuroada_jax.data.examples import LabelledExamples
from neuroada_jax.tasks.classification import Problem, own_task
from neuroada_jax.training import config_file
from neuroada_jax.training.classification_objective import class_weights

NAMES = ("billing", "delivery", "login", "other", "sales")
TRAINING = {"epochs": 2, "batch_size": 8, "remat": "none", "log_every": 4}


def tickets(count, seed):
    """A text whose letter says what it is about."""
    draw = random.Random(seed)
    names = [NAMES[i % 5] for i in range(count)]
    return [{"text": name[0] * draw.randint(1, 5), "label": name} for name in names]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("labels")
    write_bert(found / "bert")
    write_csv(found / "train.csv", tickets(25, 0))
    write_csv(found / "dev.csv", tickets(10, 1))
    return found


def content(folder, out, **sections):
    made = {
        "name": "tickets",
        "output": str(out),
        "model": {"path": str(folder / "bert")},
        "bypass": {"k": 2, "targets": ["query"]},
        "data": {"train": str(folder / "train.csv"), "task": "classification", "max_length": 16, "buckets": [16]},
        "optimizer": {"learning_rate": 0.05, "schedule": "constant"},
        "training": TRAINING,
        "evaluation": {"sets": [{"name": "dev", "data": str(folder / "dev.csv")}], "before": False, "batch_size": 16},
    }
    for name, value in sections.items():
        made[name] = {**made.get(name, {}), **value} if isinstance(value, dict) else value
    return made


def neuroada(capsys, *arguments):
    capsys.readouterr()
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(folder):
    """The folder of a run on five classes, with its merged model."""
    sections = {"merge": True, "classifier": {"class_weights": "balanced"}}
    path = write_config(folder / "run.yaml", content(folder, folder / "out", **sections))
    assert cli.main(["train", str(path)]) == 0
    return folder / "out"


def test_a_run_on_own_labels(trained):
    score = json.loads((trained / "results.json").read_text())["after"]["dev"]
    assert score["metric"] == "accuracy" and set(score["beside"]) == {"macro_f1", "matthews"} and score["n"] == 10
    table, confusion = score["classes"]["classes"], np.array(score["classes"]["confusion"])
    assert [each["label"] for each in table] == list(NAMES) and [each["support"] for each in table] == [2] * 5
    assert confusion.sum(axis=1).tolist() == [2] * 5 and np.diag(confusion).sum() == 10 * score["value"]
    assert np.mean([each["f1"] for each in table if each["support"]]) == pytest.approx(score["beside"]["macro_f1"])
    assert (trained / "confusion-dev.png").stat().st_size > 5000
    predictions = lines(trained / "predictions-dev-after.jsonl")
    assert np.mean([each["correct"] for each in predictions]) == score["value"] and predictions[0]["answer"] == "billing"


def test_the_adapter_and_the_merged_model_keep_labels_and_columns(trained):
    about = json.loads((trained / "adapter" / "adapter.json").read_text())
    assert about["base"]["labels"] == list(NAMES) and about["base"]["problem_type"] == "single_label_classification"
    want = {"task": "classification", "text": ["text"], "label": "label", "metric": "accuracy"}
    merged = json.loads((trained / "merged" / "neuroada.json").read_text())
    for prompt in (about["prompt"], merged["prompt"]):
        assert want.items() <= prompt.items()
    config = json.loads((trained / "merged" / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    assert config["label2id"] == {name: i for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def labelled(trained, folder):
    """What `classify` says of the rows of the dev set, by the adapter."""
    out = trained.parent / "labelled.jsonl"
    arguments = ["classify", "--adapter", trained / "adapter", "--data", folder / "dev.csv", "--all", "--out", out]
    assert cli.main([str(each) for each in arguments]) == 0
    return lines(out)


def test_classify_rows(trained, labelled, folder):
    predictions = lines(trained / "predictions-dev-after.jsonl")
    assert [each["label"] for each in labelled] == [each["prediction"] for each in predictions]
    assert [each["text"] for each in labelled] == [row["text"] for row in tickets(10, 1)]
    for each in labelled:
        assert list(each["probabilities"]) == list(NAMES) and sum(each["probabilities"].values()) == pytest.approx(1)
        assert each["probability"] == max(each["probabilities"].values()) == each["probabilities"][each["label"]]


def test_classify_texts(trained, labelled, capsys):
    texts = [each["text"] for each in labelled[:2]]
    arguments = ["--model", trained / "merged", "--text", texts[0], "--text", texts[1]]
    code, out, _ = neuroada(capsys, "classify", *arguments, "--top-k", "2", "--json")
    found = json.loads(out)["predictions"]
    assert code == 0 and [each["text"] for each in found] == texts
    for each, want in zip(found, labelled, strict=False):
        assert each["label"] == want["label"] and each["probability"] == pytest.approx(want["probability"], rel=1e-5)
        assert len(each["probabilities"]) == 2 and next(iter(each["probabilities"])) == each["label"]
    code, out, _ = neuroada(capsys, "classify", *arguments)
    assert code == 0 and f"{found[0]['label']} {found[0]['probability']:.3f}" in out


def test_evaluate_knows_task_columns_and_labels(trained, folder, tmp_path, capsys):
    want = json.loads((trained / "results.json").read_text())["after"]["dev"]
    out = tmp_path / "dev.jsonl"
    for model in (["--adapter", trained / "adapter"], ["--model", trained / "merged", "--task", "classification"]):
        code, printed, _ = neuroada(capsys, "evaluate", *model, "--data", folder / "dev.csv", "--out", out, "--json")
        found = json.loads(printed)
        assert code == 0 and found["task"] == "classification" and found["classes"] == want["classes"]
        assert (found["value"], found["macro_f1"]) == (want["value"], want["beside"]["macro_f1"])
    assert len(lines(out)) == 10 and (tmp_path / "confusion-dev.png").exists()
    code, _, err = neuroada(capsys, "evaluate", "--adapter", trained / "adapter")
    assert code == 2 and "task 'classification' has no rows of its own; name them in `data`" in err
    other = write_csv(tmp_path / "other.csv", [{"body": row["text"], "topic": row["label"]} for row in tickets(10, 1)])
    arguments = ["evaluate", "--adapter", trained / "adapter", "--data", other, "--columns", "text=body"]
    code, printed, _ = neuroada(capsys, *arguments, "label=topic", "--out", out, "--json")
    assert code == 0 and json.loads(printed)["classes"] == want["classes"]
    code, _, err = neuroada(capsys, *arguments, "lable=topic")
    assert code == 2 and "reads no field 'lable'; did you mean 'label'? It reads text, label" in err
    for task, message in (
        ("regression", "task 'regression' is about a number, and the classifier of"),
        ("multilabel", "task 'multilabel' has any number of labels an example, and the classifier of"),
        ("mrpc", "no column 'sentence1', which task 'mrpc' names"),
        ("instruct", "needs a decoder"),
    ):
        rows = write_lines(tmp_path / "rows.jsonl", [{"text": "a", "label": ["sales"] if task == "multilabel" else 1}])
        code, _, err = neuroada(capsys, "evaluate", "--adapter", trained / "adapter", "--data", rows, "--task", task)
        assert code == 2 and message in err.splitlines()[-1], err
    strange = write_csv(tmp_path / "strange.csv", [{"text": "a", "label": "refunds"}])
    code, _, err = neuroada(capsys, "evaluate", "--adapter", trained / "adapter", "--data", strange)
    assert code == 2 and "strange.csv:2: label 'refunds', expected one of billing, delivery, login, other, sales" in err


def test_transformers_has_the_same_labels(trained, labelled):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    ask = transformers.pipeline("text-classification", model=str(trained / "merged"))
    for each in labelled[:5]:
        found = ask(each["text"])[0]
        assert found["label"] == each["label"] and found["score"] == pytest.approx(each["probability"], rel=1e-4)


def test_python_has_the_same_labels(trained, labelled, folder):
    tuned = na.load(folder / "bert", adapter=trained / "adapter")
    found = tuned.predict([each["text"] for each in labelled])
    assert [each.label for each in found] == [each["label"] for each in labelled]
    assert found[0].probability == pytest.approx(labelled[0]["probability"], rel=1e-5)
    assert found[0].probabilities == pytest.approx(labelled[0]["probabilities"], rel=1e-4)


OPTIONS = {
    "k": 2,
    "targets": ["query"],
    "learning_rate": 0.05,
    "steps": 2,
    "batch_size": 8,
    "max_length": 24,
    "remat": "none",
}


def test_several_labels_from_python(folder, tmp_path):
    rows = [{"title": "a" * (i % 3 + 1), "body": "b", "topics": ["x", "y"][: i % 3]} for i in range(8)]
    sets = [{"name": "own", "data": str(write_lines(tmp_path / "own.jsonl", rows))}]
    tuned = na.fine_tune(
        na.load(folder / "bert"),
        rows,
        task="multilabel",
        text=["title", "body"],
        label="topics",
        metric="macro_f1",
        evaluation={"sets": sets, "before": False},
        **OPTIONS,
    )
    score = tuned.results["after"]["own"]
    assert score["metric"] == "macro_f1" and set(score["beside"]) == {"micro_f1", "accuracy"}
    assert [each["support"] for each in score["classes"]["classes"]] == [5, 2] and "confusion" not in score["classes"]
    found = tuned.predict([("a", "b"), ("aa", "b")])
    for each in found:
        assert each.label == [name for name, share in each.probabilities.items() if share > 0.5]
        assert each.probability == [each.probabilities[name] for name in each.label]
    tuned.save(tmp_path / "adapter")
    again = na.load(folder / "bert", adapter=tmp_path / "adapter").predict([("a", "b"), ("aa", "b")])
    assert again == found
    tuned.merged().save(tmp_path / "merged")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ask = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert ask.config.problem_type == "multi_label_classification"
    with torch.no_grad():
        shares = ask(**tuned.model.tokenizer("aa", "b", return_tensors="pt")).logits.sigmoid()[0]
    np.testing.assert_allclose(shares, list(found[1].probabilities.values()), rtol=1e-4)


def test_a_number_from_python(folder):
    rows = [{"text": "a" * (i + 1), "grade": f"{i / 2}"} for i in range(8)]  # as a table has them
    tuned = na.fine_tune(na.load(folder / "bert"), rows, task="regression", label="grade", **OPTIONS)
    first = tuned.predict(["a"])[0]
    assert isinstance(first.label, float) and first.probability is None and first.probabilities == {}
    assert tuned.adapter.metadata["base"]["problem_type"] == "regression"


def weighed(setting, labels=(0, 0, 0, 1)):
    task = own_task(Problem.CLASSIFICATION, ("text",), "label", ("a", "b"))
    none, offsets = np.zeros(0, np.int32), np.zeros(len(labels) + 1, np.int64)
    return class_weights(setting, task, LabelledExamples(none, none, np.int32(labels), offsets, 0, 0))


def test_class_weights():
    assert weighed("none") is None
    np.testing.assert_allclose(weighed("balanced"), [1, 3])  # n / (C n_c), over the smallest
    np.testing.assert_allclose(weighed({"b": 0.5}), [2, 1])
    assert message_of(weighed, {"c": 1.0}) == "classifier.class_weights: no label 'c', expected labels of a, b"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.label=lable"],
            "train.csv:2: no column 'lable', which data.label names; found text, label; did you mean 'label'?",
        ),
        (["data.text=[title, body]"], "train.csv:2: no column 'title', which data.text names; found text, label"),
        (
            ["data.labels=[billing, delivery, login, others, sales]"],
            "label 'other', expected one of billing, delivery, login, others",
        ),
        (["data.labels=[a]"], "data.labels: expected auto, or a list of at least two names or integers, found ['a']"),
        (["data.labels=[a, a]"], "data.labels: 'a' is given twice"),
        (["data.labels=[1, '1']"], "data.labels: '1' is given twice"),
        (
            ["data.labels=[0.5, 1]"],
            ': found 0.5, a number with a decimal point; as the name of a label write "0.5"',
        ),
        (["data.text=[a, b, c]"], "data.text: expected the name of a column, or a list of two, found ['a', 'b', 'c']"),
        (["data.text=[a, a]"], "data.text: expected the name of a column, or a list of two"),
        (["data.text=label"], "data.label: 'label' is a column of data.text, expected another one"),
        (
            ["data.metric=mcc"],
            "data.metric: found 'mcc', expected one of accuracy, macro_f1, matthews for task 'classification'",
        ),
        (["data.task=regression"], "train.csv:2: label 'billing', expected a number"),
        (
            ["data.task=regression", "data.labels=[a, b]"],
            "data.labels: task 'regression' learns a number, which has no labels",
        ),
        (["data.task=regression", "data.metric=mse"], "data.metric: found 'mse', expected one of pearson, spearman"),
        (["data.task=multilabel"], "train.csv:2: label 'billing', expected a list of names"),
        (["data.task=multilabel", "data.labels=[a, b]"], "train.csv:2: no column 'a', which data.labels names"),
        (["data.task=mrpc", "data.metric=f1"], "data.metric: found it with task 'mrpc', but it is for task classification"),
        (["data.task=clasification"], "data.task: unknown task 'clasification'; did you mean 'classification'?"),
        (["classifier.class_weights={spam: 2}"], "classifier.class_weights: no label 'spam', expected labels of billing"),
        (
            ["classifier.class_weights={billing: 0}"],
            "classifier.class_weights: expected none, balanced, or a positive weight",
        ),
        (["evaluation.sets=[{name: x, data: other.csv}]"], "other.csv:2: label 'refunds', expected one of billing"),
        (
            ["model.path=llama"],
            "data.task: 'classification' needs an encoder (bert, roberta, electra, deberta-v2, distilbert, modernbert, "
            "mpnet, xlm-roberta), and llama is a decoder",
        ),
    ],
)
def test_bad_config(overrides, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "other.csv", [{"text": "a", "label": "refunds"}])
    if overrides == ["model.path=llama"]:
        write_model(tmp_path / "llama")
    path = write_config(tmp_path / "run.yaml", content(folder, tmp_path / "out"))
    code, out, err = neuroada(capsys, "train", path, *overrides)
    assert code == 2 and out == "" and message in err.splitlines()[-1], err
    assert not (tmp_path / "out").exists()


def test_every_error_about_labels_is_one_short_line(folder):
    rows = [{"text": "a", "label": "x" * 10_000}, {"text": "b", "label": "y" * 10_000}]
    message = message_of(na.fine_tune, na.load(folder / "bert"), rows, task="classification", labels=["a", "b"], **OPTIONS)
    assert message.startswith("rows: row 0: label 'xxx") and len(message) < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --text or --data, found neither"),
        (["--text", "a", "--data", "b.csv"], "give either --text or --data, found both"),
        (
            ["--text", "a", "--text-pair", "b", "--text-pair", "c"],
            "--text-pair: found 2 for 1 --text, expected one for each",
        ),
        (["--text", "a", "--limit", "2"], "--limit: it is for the rows of --data; remove it"),
        (["--text", "a", "--all", "--top-k", "2"], "--top-k: --all gives all labels; remove one of them"),
        (["--text", "a", "--top-k", "0"], "--top-k: expected at least 1, found 0"),
        (["--text", "a", "--max-length", "41"], "--max-length: found 41, expected 1 to the model's 40 positions"),
        (["--text", "a", "--text-pair", "b"], "--text-pair: found 2 text(s), but the model was trained on one text (text)"),
        (["--data", "x.csv"], "x.csv:2: no column 'text', which the training names; found txt; did you mean 'txt'?"),
        (
            ["--data", "x.csv", "--text-column", "tx"],
            "x.csv:2: no column 'tx', which --text-column names; found txt; did you",
        ),
        (["--data", "x.jsonl"], "x.jsonl:1: column 'text' is 3, expected text"),
        (["--data", "none.csv"], "none.csv: no such file or directory"),
    ],
)
def test_bad_classify(arguments, message, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "x.csv", [{"txt": "a"}])
    write_lines(tmp_path / "x.jsonl", [{"text": 3}])
    code, out, err = neuroada(capsys, "classify", "--adapter", trained / "adapter", *arguments)
    assert code == 2 and out == "" and message in err.splitlines()[-1], err


def test_models_that_cannot_classify(folder, tmp_path, capsys):
    code, _, err = neuroada(capsys, "classify", "--model", folder / "bert", "--text", "a")
    assert code == 2 and "has no classifier.bias: give an --adapter, which brings its trained classifier" in err
    code, _, err = neuroada(capsys, "classify", "--model", write_model(tmp_path / "llama"), "--text", "a")
    assert code == 2 and "llama is a decoder, which has no classifier; neuroada generate continues texts" in err


def test_a_classifier_for_another_number_of_labels(trained, folder, tmp_path, capsys):
    rows = write_csv(tmp_path / "two.csv", [{"text": name, "label": name} for name in "ab" * 4])
    sections = {"model": {"path": str(trained / "merged")}, "data": {"train": rows}, "evaluation": {"sets": []}}
    code, _, err = neuroada(
        capsys, "train", write_config(tmp_path / "run.yaml", content(folder, tmp_path / "o", **sections))
    )
    line = err.splitlines()[-1]
    assert code == 2 and "[5], expected [2]; its classifier is for another number of labels: begin with" in line
    assert not (tmp_path / "o").exists()


def test_labels_of_any_script_are_matched_by_their_names(trained):
    """Names that have the same letters and digits, or none, such as C, C++ and C#."""
    from neuroada_jax.evaluation import classification
    from neuroada_jax.pretrained.load import open_model

    names = ["C", "C++", "C#", "日本", "中国"]
    opened = open_model(str(trained / "merged"), labels=names)
    task = own_task(Problem.CLASSIFICATION, ("text",), "label", tuple(reversed(names)))
    assert classification.label_classes(opened, task) == [4, 3, 2, 1, 0]
    assert "has the labels" in message_of(
        classification.label_classes, opened, own_task(Problem.CLASSIFICATION, ("t",), "l", ("c", "c+", "c-", "日", "中"))
    )


def test_a_config_reads_labels_of_all_kinds(folder, tmp_path):
    for given, names in (("[no, yes]", [False, True]), ("[2, 1]", [2, 1]), ("[a, 'b']", ["a", "b"]), ("auto", "auto")):
        path = write_config(tmp_path / "run.yaml", content(folder, tmp_path))
        assert config_file.load(str(path), [f"data.labels={given}"]).data.labels == names


def test_the_adapter_is_read_without_its_form(trained):
    """As adapters of before: the labels are there, the columns are the caller's."""
    adapter = native.read(str(trained / "adapter"))
    assert native.labels_of({**adapter.metadata["base"], "problem_type": None}).names == NAMES
    assert native.labels_of({}) is None
