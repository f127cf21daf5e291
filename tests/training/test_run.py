"""The stages of a run: `prepare` writes nothing, and a model and rows in memory train to what those on disk train to."""

import dataclasses
import json
import os
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import message_of
from helpers import run_config, write_bert, write_model, write_rows
from safetensors.numpy import load_file

from neuroada_jax.adapters import native
from neuroada_jax.data.rows import load_rows, rows_from_list
from neuroada_jax.errors import NeuroadaWarning
from neuroada_jax.pretrained.load import load_model
from neuroada_jax.pretrained.tokenizer import load_tokenizer
from neuroada_jax.training import config_file, run, run_directory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_model(folder / "model"), write_rows(folder / "rows.jsonl")


def settings(folder, inputs, **sections):
    sections = {"bypass": {"targets": ["q_proj"], "k": 2}, **sections}
    return config_file.from_dict(run_config(folder, *inputs, **sections), "test")


def test_stages_on_a_model_and_rows_in_memory_equal_a_run_from_disk(tmp_path, inputs):
    evaluation = {"sets": [{"name": "some", "data": str(inputs[1]), "limit": 4, "max_new_tokens": 2}]}
    (tmp_path / "disk").mkdir()
    want = run.train(settings(tmp_path / "disk", inputs, evaluation=evaluation))

    loaded, tokenizer = load_model(str(inputs[0])), load_tokenizer(str(inputs[0]))
    config = settings(tmp_path / "memory", (inputs[0], "not read"), evaluation=evaluation)
    rows = rows_from_list(load_rows(str(inputs[1])).rows)
    prepared = run.prepare(config, model=(loaded, tokenizer), rows=rows)
    assert not hasattr(prepared.opened, "params") and not config.directory.exists()

    lines = []
    fitted = run.fit(prepared, loaded=loaded, on_lines=lines.extend)
    assert not hasattr(fitted.base_model, "params") and int(fitted.state.step) == 3
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(loaded.params))  # donated
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert fitted.history.losses == [line["loss"] for line in lines]
    assert fitted.history.learning_rates == [line["learning_rate"] for line in lines]
    assert lines == [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    found = run.finish(fitted)

    timed = ("directory", "train_seconds", "tokens_per_second")
    assert {**found, **dict.fromkeys(timed)} == {**want, **dict.fromkeys(timed)}
    here, there = (native.read(str(each["directory"]) + "/adapter").values for each in (found, want))
    assert here.keys() == there.keys() and all(np.array_equal(here[each], there[each]) for each in here)
    assert any(values.any() for values in here.values())


@pytest.mark.parametrize(("k", "rate"), [(1, 1e-5), (5, 1e-2)])
def test_a_bfloat16_base_trains_the_model_that_is_merged(tmp_path, k, rate):
    """Resident weights, merged files and a numpy sum have the same bits, and so have the logits; the rest is reported."""
    model, rows = write_model(tmp_path / "model", dtype="bfloat16"), write_rows(tmp_path / "rows.jsonl")
    sections = {"bypass": {"targets": None, "k": k}, "optimizer": {"learning_rate": rate, "schedule": "constant"}}
    few, message = rate < 1e-3, "round to nothing in bfloat16: .* model.dtype=float32"
    with jax.numpy_dtype_promotion("standard"):  # JAX transposes its own attention in mixed precision
        fitted = run.fit(run.prepare(settings(tmp_path, (model, rows), merge=True, **sections)))
        state = jax.tree.map(jnp.copy, fitted.state)
        with pytest.warns(NeuroadaWarning, match=message) if few else nullcontext():
            results = run.finish(fitted)

    merged = load_model(str(tmp_path / "out" / "merged"))
    jax.tree.map(np.testing.assert_array_equal, merged.params, state.params)
    ids, module = jnp.asarray([[5, 6, 7, 8] * 5]), merged.model.module()
    resident = {"params": state.params, "columns": state.columns, "resident": state.bypass.values}
    found, want = (jax.jit(module.apply)(variables, ids)[0] for variables in (resident, {"params": merged.params}))
    np.testing.assert_array_equal(found, want)

    adapter = native.read(str(tmp_path / "out" / "adapter"))
    before, after = (load_file(each / "model.safetensors") for each in (model, tmp_path / "out" / "merged"))
    unchanged = []
    for name, values in adapter.values.items():
        weight, columns = before[f"{name}.weight"], adapter.columns[name]
        entries = np.take_along_axis(weight, columns, axis=1)
        new = (entries.astype(np.float32) + values).astype(weight.dtype)
        unchanged.append((new == entries).reshape(-1))
        np.put_along_axis(weight, columns, new, axis=1)
        np.testing.assert_array_equal(after[f"{name}.weight"], weight)
    assert results["rounded_to_nothing"] == pytest.approx(np.concatenate(unchanged).mean())
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    low, high = (0.9, 1) if few else (0, 0.2)
    assert low <= results["rounded_to_nothing"] <= high


def test_one_run_a_folder(tmp_path, inputs):
    config = settings(tmp_path, inputs)
    prepared, late = run.prepare(config), run.prepare(config)
    fitted = run.fit(prepared)
    used = f"{config.directory} is in use by process {os.getpid()} on "
    assert message_of(run.prepare, config, resume=True).startswith(used)  # at once
    assert message_of(run.prepare, config, overwrite=True).startswith(used)
    assert message_of(run.fit, late).startswith(used)  # once it would write
    run.finish(fitted)
    names = {path.name: path.stat().st_mtime_ns for path in config.directory.iterdir()}
    assert run_directory.LOCK not in names and "adapter" in names
    wanted = f"{config.directory}: another run has been at work here meanwhile; start this one again"
    assert message_of(run.fit, late) == wanted
    assert {path.name: path.stat().st_mtime_ns for path in config.directory.iterdir()} == names


def test_a_classifier_in_memory_that_no_checkpoint_has_is_initialised_from_the_runs_seed(tmp_path):
    """The model was loaded for three labels and with another seed; the task has two."""
    model, data = write_bert(tmp_path / "bert"), tmp_path / "rows.jsonl"
    rows = [{"sentence1": "a" * (i % 5 + 1), "sentence2": "ab"[i % 2], "label": i % 2} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {"data": {"task": "mrpc", "max_length": 32}, "bypass": {"targets": ["query"]}, "training": {"steps": 1}}
    (tmp_path / "disk").mkdir()
    run.train(settings(tmp_path / "disk", (model, data), **sections))

    loaded, tokenizer = load_model(str(model), labels=["a", "b", "c"], seed=1), load_tokenizer(str(model))
    prepared = run.prepare(settings(tmp_path / "memory", (model, data), **sections), model=(loaded, tokenizer))
    fitted = run.fit(prepared, loaded=loaded)
    fitted.close()
    fitted.save_adapter(tmp_path / "adapter")
    here, there = (native.read(str(each)) for each in (tmp_path / "adapter", tmp_path / "disk" / "out" / "adapter"))
    assert here.dense_parameters.keys() == there.dense_parameters.keys()
    assert here.dense_parameters and all(
        np.array_equal(here.dense_parameters[name], there.dense_parameters[name]) for name in here.dense_parameters
    )


def test_what_is_in_memory_has_to_fit(tmp_path, inputs):
    config = settings(tmp_path, inputs)
    message = message_of(run.prepare, config, rows=rows_from_list([]))
    assert message == "rows: no rows, expected at least one"
    prepared = run.prepare(config)
    bfloat16 = load_model(str(inputs[0]), "bfloat16")
    message = message_of(run.fit, prepared, loaded=bfloat16)
    assert message.startswith(f"{inputs[0]}: ") and "expected float32 [" in message and "found bfloat16 [" in message
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, limit=2))
    assert len(run.prepare(without, rows=load_rows(str(inputs[1]))).rows) == 2


def test_more_steps_than_a_schedule_counts_are_one_line(tmp_path, inputs):
    config = settings(tmp_path, inputs, training={"epochs": 2**31 - 1, "steps": None, "batch_size": 4})
    assert "training.epochs: 2147483647 times" in message_of(run.prepare, config)
