"""The tasks, prompts and metrics of the lm-evaluation-harness on a model of this package."""

import difflib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import linen as nn

from neuroada_jax import files
from neuroada_jax.core.trees import Tree
from neuroada_jax.data.batches import Batch
from neuroada_jax.data.packing import default_buckets
from neuroada_jax.data.prompts import PromptForm, PromptStyle, chat_template
from neuroada_jax.errors import UserError, install_line
from neuroada_jax.evaluation.scoring import Progress
from neuroada_jax.generation.generate import before_stop, generate
from neuroada_jax.generation.sampling import Decoding
from neuroada_jax.generation.texts import ending
from neuroada_jax.models.losses import label_scores
from neuroada_jax.pretrained.load import OpenedModel

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
except ModuleNotFoundError as error:
    raise UserError(f"lm-eval needs {error.name}, which is missing: {install_line('eval')}") from error

# The generation settings that a task may have; those of sampling have no effect while do_sample is off.
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams"}


class _Row(NamedTuple):
    """One text to run, and the numbers of the requests whose continuation is predicted from these tokens."""

    tokens: tuple[int, ...]
    requests: list[int]


@functools.partial(jax.jit, static_argnames="module")
def _scores(module: nn.Module, params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return label_scores(module, {"params": params}, batch)


class NeuroAdaLM(TemplateLM):
    """A base or merged model behind lm-eval's interface; texts are tokenised as in lm-eval's own `HFLM`.

    Log-likelihoods are natural logarithms, computed from float32 logits whatever the model's dtype.
    """

    def __init__(
        self,
        base_model: OpenedModel,
        params: Tree,
        tokenizer: transformers.PreTrainedTokenizerBase,
        batch_size: int = 16,
        on_progress: Progress | None = None,
        form: PromptForm | None = None,
    ) -> None:
        """Wrap a model.

        Args:
          base_model: architecture and config.
          params: complete plain parameters, with any adapter in them.
          tokenizer: the model's.
          batch_size: texts at a time.
          on_progress: called with (requests done, requests in all) for each kind of request.
          form: of the prompts that the model was trained on: its end tokens, and its template for `--apply-chat-template`.
        """
        super().__init__()
        self.base_model, self.params, self.tokenizer = base_model, params, tokenizer
        self.batch_size, self.on_progress = batch_size, on_progress
        self.form = form or PromptForm(PromptStyle.CHAT)
        self.max_length: int = base_model.model.config.max_positions

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The name of lm-eval's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation, for `--apply-chat-template`."""
        text: Any = self.tokenizer.apply_chat_template(
            chat_history,
            chat_template=chat_template(self.form, self.tokenizer, "--apply-chat-template").source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.form.template_arguments,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenise a text; by default with special tokens, unless the text begins with BOS already."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding gives it) of every continuation, in the order of the requests.

        Contexts that are too long lose tokens on the left. Requests that differ in the last token alone share a text.
        """
        rows: dict[tuple[int, ...], _Row] = {}
        for number, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                text = f" ({texts[1][:60]!r})" if texts else ""
                raise UserError(
                    f"a continuation{text} has {len(continuation)} tokens, expected 1 to {self.max_length} (the positions)"
                )
            tokens = tuple([*context, *continuation][-(self.max_length + 1) : -1])
            rows.setdefault(tokens, _Row(tokens, [])).requests.append(number)
        continuations = [continuation for _, _, continuation in requests]
        module = self.base_model.model.module()
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for chosen, batch in _batches(list(rows.values()), continuations, self.batch_size):
            losses, likeliest = (np.asarray(each) for each in _scores(module, self.params, batch))
            for place, row in enumerate(chosen):
                first = 0
                for number in row.requests:
                    own = slice(first, first := first + len(continuations[number]))
                    results[number] = (-float(losses[place, own].sum()), bool(likeliest[place, own].all()))
                done += len(row.requests)
            if self.on_progress:
                self.on_progress(done, len(requests))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of complete texts; long ones in windows, each with as much context as fits."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (string,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(string), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations up to the first stop string, in the order of the requests.

        Raises:
          UserError: a task asks for sampling or another unsupported setting, or for more tokens than fit.
        """
        groups: dict[str, list[int]] = {}  # by their settings
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for settings, numbers in groups.items():
            until, new_tokens = _generation_settings(json.loads(settings))
            room = self.max_length - new_tokens
            if room < 1:
                raise UserError(
                    f"a task generates {new_tokens} tokens, which leaves no room in {self.max_length} positions"
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] or [self.prefix_token_id] for number in numbers]
            outputs = generate(
                self.base_model.model,
                self.params,
                prompts,
                ending(
                    self.base_model, self.tokenizer, self.form
                ),  # decodes with special tokens, as in lm-eval's search for stops
                max_new_tokens=new_tokens,
                decoding=Decoding(stop=until),
                batch_size=self.batch_size,
                on_progress=self.on_progress,
            )
            for number, each in zip(numbers, outputs, strict=True):
                texts[number] = before_stop(str(self.tokenizer.decode(each.ids, skip_special_tokens=True)), until)
        return texts


def _batches(rows: list[_Row], continuations: list[list[int]], batch_size: int) -> Iterator[tuple[list[_Row], Batch]]:
    """Yield the rows in batches of at most 6 shapes, longest first: a batch that exceeds the memory fails at once."""
    if not rows:
        return
    rows = sorted(rows, key=lambda row: len(row.tokens), reverse=True)
    batch_size = min(batch_size, len(rows))
    lengths = np.array([len(row.tokens) for row in rows])
    counts = np.array([sum(len(continuations[number]) for number in row.requests) for row in rows])
    sizes = default_buckets(lengths)
    for first in range(0, len(rows), batch_size):
        chosen = rows[first : first + batch_size]
        time = min(size for size in sizes if size >= lengths[first])
        most = int(counts[lengths <= time].max())  # one M for each T
        batch = Batch(
            input_ids=np.zeros((batch_size, time), np.int32),
            lengths=np.zeros(batch_size, np.int32),
            label_positions=np.zeros((batch_size, most), np.int32),
            label_ids=np.zeros((batch_size, most), np.int32),
            label_mask=np.zeros((batch_size, most), np.float32),
        )
        for place, row in enumerate(chosen):
            length = len(row.tokens)
            own = [continuations[number] for number in row.requests]
            count = sum(map(len, own))
            batch.input_ids[place, :length] = row.tokens
            batch.lengths[place] = length
            batch.label_positions[place, :count] = np.concatenate([np.arange(length - len(each), length) for each in own])
            batch.label_ids[place, :count] = np.concatenate(own)
            batch.label_mask[place, :count] = 1
        yield chosen, jax.tree.map(jnp.asarray, batch)


def _generation_settings(asked: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Return the stop strings and the largest number of new tokens."""
    settings: Any = normalize_gen_kwargs(asked)
    unknown = sorted(set(settings) - _GENERATION)
    if unknown or settings.get("num_beams", 1) != 1 or (settings["do_sample"] and settings.get("temperature", 1.0) > 0):
        raise UserError(
            f"a task's generation_kwargs are {asked}: expected greedy decoding, without {unknown or 'sampling'}"
        )
    return tuple(stop for stop in settings["until"] if stop), settings["max_gen_toks"]


class _Tasks(TaskManager):
    """lm-eval's task index; its errors become UserError."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--tasks: {', '.join(task_list)} cannot be loaded ({type(error).__name__}: {error})"
            ) from error


class Tasks(NamedTuple):
    """Names of existing tasks, and lm-eval's index to load them from."""

    names: list[str]
    manager: TaskManager


def find_tasks(names: Sequence[str], include_path: str | None = None) -> Tasks:
    """Find tasks, groups and tags by name.

    Args:
      names: each a name, a pattern with * or ?, or a YAML file.
      include_path: a folder of further tasks. If it has all of them, lm-eval's own tasks (15,000 files) are not read.

    Raises:
      UserError: a name that matches nothing (names the nearest), or no such folder.
    """
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError("--tasks: expected at least one name")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include-path: {include_path} is no folder")
    paths = [name for name in names if Path(name).is_file()]
    others = [name for name in names if name not in paths]
    manager = _Tasks(include_path=include_path, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in others):
        manager = _Tasks(include_path=include_path)
    for name in others:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            raise UserError(f"--tasks: unknown task {name!r}; nearest: {', '.join(near) or 'none'}")
    return Tasks([*paths, *manager.match_tasks(others)] if others else paths, manager)


def evaluate(lm: TemplateLM, tasks: Tasks, **options: Any) -> dict[str, Any]:
    """Run lm-eval's `simple_evaluate` with its own `options`; return its results, configs, versions and samples."""
    results = lm_eval.simple_evaluate(lm, tasks=tasks.names, task_manager=tasks.manager, **options)
    assert results is not None  # None is for runs of several processes
    return results


def summary_table(results: dict[str, Any]) -> str:
    """Return lm-eval's own table of the tasks, and its table of the groups where there are any."""
    return "\n".join(make_table(results, *which) for which in [(), ("groups",)] if not which or results.get("groups"))


def summary_json(results: dict[str, Any]) -> str:
    """Return one line of JSON with every task's metrics, rows, shots and version."""
    kept: dict[str, Any] = {
        key: results[key] for key in ("results", "groups", "n-samples", "n-shot", "versions") if key in results
    }
    return _json({"lm_eval": lm_eval.__version__, **kept})


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write one JSON file with results, the configs of the tasks, and under `samples` every row with its answer."""
    files.write_text(path, _json(results, indent=1) + "\n")


def _json(content: dict[str, Any], **options: Any) -> str:
    return json.dumps(content, ensure_ascii=False, default=handle_non_serializable, **options)
