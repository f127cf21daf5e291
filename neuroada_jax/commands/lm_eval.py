"""`neuroada lm-eval`: score a model on tasks of the lm-evaluation-harness."""

import argparse
from pathlib import Path

from neuroada_jax import console
from neuroada_jax.commands import shared
from neuroada_jax.errors import UserError


def add(commands: shared.Commands) -> None:
    """Add the command."""
    summary = "score a model on tasks of the lm-evaluation-harness (extra `eval`)"
    parser = shared.add_command(commands, "lm-eval", run, summary)
    shared.add_model(parser)
    parser.add_argument(
        "--tasks", required=True, metavar="NAME,...", help="names or patterns with commas between, or YAML files"
    )
    parser.add_argument("--include-path", metavar="DIRECTORY", help="directory of further task YAML files")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="score the first N rows of each task only")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts at a time (default: 16)")
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="prompt with the chat template of the training, else the tokenizer's",
    )
    parser.add_argument("--out", metavar="FILE", help="JSON file for results, task configs and every row's answer")


def run(parsed: argparse.Namespace) -> None:
    """Run the harness, print its table and write its results."""
    from neuroada_jax.adapters import prompting
    from neuroada_jax.evaluation import lm_eval_harness

    shared.check_minimum(parsed, batch_size=1, limit=1, num_fewshot=0)
    if parsed.out and not Path(parsed.out).parent.is_dir():
        raise UserError(f"--out: the folder {Path(parsed.out).parent} does not exist")
    names = parsed.tasks.split(",")
    tasks = lm_eval_harness.find_tasks(names, parsed.include_path)  # before the weights, which take longer
    opened, tokenizer, adapter = shared.open_model(parsed)
    found = prompting.recorded(opened, adapter, parsed.adapter)
    chat = prompting.Options("chat")
    asked = prompting.resolve(found, chat, opened, tokenizer)
    if parsed.apply_chat_template:
        prompting.say(asked, found, chat, tokenizer)
    base_model, params = shared.load_params(opened, adapter)
    with console.bar("scoring") as bar:
        results = lm_eval_harness.evaluate(
            lm_eval_harness.NeuroAdaLM(
                base_model, params, tokenizer, parsed.batch_size, console.reporter(bar), form=asked.form
            ),
            tasks,
            num_fewshot=parsed.num_fewshot,
            limit=parsed.limit,
            apply_chat_template=parsed.apply_chat_template,
        )
    if parsed.out:
        lm_eval_harness.write_results(Path(parsed.out), results)
    if parsed.json:
        shared.print_json_text(lm_eval_harness.summary_json(results))
    else:
        print(lm_eval_harness.summary_table(results))
