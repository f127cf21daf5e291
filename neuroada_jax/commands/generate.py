"""`neuroada generate`: continue prompts."""

import argparse
import dataclasses

from neuroada_jax import console
from neuroada_jax.commands import shared


def add(commands: shared.Commands) -> None:
    """Add the command."""
    summary = "continue prompts greedily, by sampling or by beam search"
    parser = shared.add_command(commands, "generate", run, summary)
    shared.add_model(parser)
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="text to continue; may be repeated"
    )
    shared.add_prompt_form(parser, "that of the training, else verbatim")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="longest continuation (default: 64)")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends a continuation; may be repeated",
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, metavar="X", help="sample, with the logits divided by X")
    sampling.add_argument("--top-k", type=int, metavar="N", help="sample from the N most likely tokens")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most likely tokens that have probability P together"
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="seed of the samples (default: 0)")
    beams = parser.add_argument_group("beam search")
    beams.add_argument("--beams", type=int, default=1, metavar="N", help="hypotheses of a beam search (default: 1, none)")
    beams.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X", help="above 0 favours longer hypotheses (default: 1)"
    )
    beams.add_argument("--early-stopping", action="store_true", help="end a search once --beams hypotheses have ended")
    repetition = parser.add_argument_group("repetition")
    repetition.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 makes repeated tokens less likely"
    )
    repetition.add_argument(
        "--no-repeat-ngram", type=int, default=0, metavar="N", help="never repeat any N tokens in a row (default: 0, off)"
    )


def run(parsed: argparse.Namespace) -> None:
    """Continue the prompts and print the texts."""
    from neuroada_jax.adapters import prompting
    from neuroada_jax.generation.sampling import Decoding
    from neuroada_jax.generation.texts import continue_texts

    fields = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Decoding)}
    decoding = Decoding(**{**fields, "stop": tuple(parsed.stop)})
    options = shared.prompt_options(parsed)
    opened, tokenizer, adapter = shared.open_model(parsed)
    found = prompting.recorded(opened, adapter, parsed.adapter)
    asked = prompting.resolve(found, options, opened, tokenizer, spell=shared.flag)
    asked = prompting.without_chats(asked, options, tokenizer, shared.flag)
    prompting.say(asked, found, options, tokenizer, shared.flag)
    base_model, params = shared.load_params(opened, adapter)
    texts = continue_texts(
        base_model,
        params,
        tokenizer,
        parsed.prompt,
        form=asked.form,
        max_new_tokens=parsed.max_new_tokens,
        decoding=decoding,
    )
    if parsed.json:
        pairs = zip(parsed.prompt, texts, strict=True)
        shared.print_json({"generations": [{"prompt": prompt, **each._asdict()} for prompt, each in pairs]})
    else:
        console.result("\n\n".join(each.text for each in texts))
