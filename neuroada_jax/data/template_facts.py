"""The variables, words and tokens in the source of a chat template."""

import functools
import re
from typing import NamedTuple

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from neuroada_jax.data import interruption, sandbox
from neuroada_jax.errors import UserError

_END_GENERATION = re.compile(r"\{%-?\s*endgeneration\s*-?%\}")
# Texts that are meant as one token: <|im_end|>, the same in DeepSeek's wide letters, <end_of_turn>, <eos>, </s>. Others in
# brackets are plain text for some models: [INST] of Llama 2, <think>, <tools>.
TOKEN_LIKE = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>|<(?:start|end)_of_[a-z]+>|<[be]os>|</?s>")
_GLOBALS = {"raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner"}


class Facts(NamedTuple):
    """What a template's source says about itself.

    Attributes:
      variables: the names that it reads from outside, or may read: jinja2 does not see that a branch has set them.
      options: those among them that it does not set itself, or sets where they are not given.
      words: every name, attribute and text constant in it.
      tokens: the texts in its constants that look like one token.
    """

    variables: frozenset[str]
    options: frozenset[str]
    words: frozenset[str]
    tokens: frozenset[str]


@functools.lru_cache(maxsize=64)
def _facts(source: str) -> Facts:
    """Parse a template.

    Raises:
      jinja2.TemplateSyntaxError: it is none.
    """
    if len(source) > sandbox.LARGEST_SOURCE:
        raise sandbox.TooMuch(f"it has {len(source):,} characters, expected at most {sandbox.LARGEST_SOURCE:,}")
    plain = _END_GENERATION.sub("{% endif %}", sandbox.GENERATION.sub("{% if true %}", source))
    environment = sandbox.bound(
        jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
    )
    tree = environment.parse(plain)
    texts = [str(node.value) for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    texts += [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    names |= {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    tokens = {token for text in texts for token in TOKEN_LIKE.findall(text)}
    variables = frozenset(jinja2.meta.find_undeclared_variables(tree)) - _GLOBALS
    return Facts(variables, variables - _own_names(tree), frozenset({*names, *texts}), frozenset(tokens))


def _own_names(tree: jinja2.nodes.Template) -> set[str]:
    """Return the names that a template sets, but not those that it sets only where they are not given."""
    own = {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "store"}
    tests = [node.node for node in tree.find_all(jinja2.nodes.Test) if node.name in ("defined", "undefined", "none")]
    defaults = [node.node for node in tree.find_all(jinja2.nodes.Filter) if node.name in ("default", "d")]
    return own - {node.name for node in (*tests, *defaults) if isinstance(node, jinja2.nodes.Name)}


def parsed(source: str) -> Facts:
    """Return the facts of a template.

    Raises:
      UserError: it cannot be parsed.
    """
    try:
        return interruption.within(sandbox.SECONDS, lambda: _facts(source))
    except (jinja2.TemplateError, RecursionError, ValueError, TypeError, SyntaxError, MemoryError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the chat template is not valid ({reason})") from error
