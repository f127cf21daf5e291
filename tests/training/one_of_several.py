"""One process of a job that trains the runs of FOLDER/runs.json, by name, one after another.

A run has a config with overrides, and may have: overrides that the last process has besides ("different"), whether to
resume ("resume"), and a folder that is removed before ("forget"), after a copy of the run. The errors of runs that differ
go to FOLDER/<index>.json; those of others end the job.
"""

import argparse
import json
import shutil
from pathlib import Path

from neuroada_jax.errors import UserError
from neuroada_jax.training import config_file, processes, run

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--coordinator")
parser.add_argument("--processes", type=int)
parser.add_argument("--process", type=int)
job = parser.parse_args()
errors = {}
with processes.joined(job.coordinator, job.processes, job.process, 100.0) as together:
    for name, each in json.loads((job.folder / "runs.json").read_text()).items():
        different = each.get("different", []) if job.process == job.processes - 1 else []
        config = config_file.load(each["config"], [*each["overrides"], *different])
        if "forget" in each and together.is_first:
            shutil.copytree(config.output, f"{config.output}, before")
            shutil.rmtree(each["forget"])
        try:
            with processes.own_output(config) as own:
                run.train(own, resume=each.get("resume", False))
        except UserError as error:
            if "different" not in each:
                raise
            errors[name] = str(error)
            (job.folder / f"{job.process}.json").write_text(json.dumps(errors))
