"""`neuroada push`: upload an adapter with a model card to the Hugging Face hub."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from neuroada_jax import console
from neuroada_jax.commands import shared
from neuroada_jax.errors import UserError


def add(commands: shared.Commands) -> None:
    """Add the command."""
    parser = shared.add_command(commands, "push", run, "upload an adapter, with a model card, to the Hugging Face hub")
    parser.add_argument("adapter", metavar="ADAPTER", help="directory of an adapter, or of a run")
    parser.add_argument("repository", metavar="REPO", help="hub id, USER/NAME; created if there is none")
    parser.add_argument("--public", action="store_true", help="let everybody see the repository (default: private)")
    parser.add_argument("--message", metavar="TEXT", help="of the commit (default: Upload NeuroAda adapter)")
    parser.add_argument(
        "--base-model", metavar="USER/NAME", help="hub id of the base model, where the adapter names a path"
    )
    parser.add_argument("--dry-run", action="store_true", help="write the folder and upload nothing")
    parser.add_argument("--out", metavar="DIRECTORY", help="folder of --dry-run to create (default: NAME-upload)")


def run(parsed: argparse.Namespace) -> None:
    """Write the folder, and upload it unless --dry-run is given."""
    from neuroada_jax.sharing import folder, origin, upload

    upload.check_name(parsed.repository)
    if parsed.out and not parsed.dry_run:
        raise UserError("--out: only together with --dry-run")
    if parsed.message is not None and not parsed.message.strip():
        raise UserError("--message: expected a text, found an empty one")
    found = origin.find(parsed.adapter)
    base = origin.base_of(found, parsed.base_model)
    notes = _notes(found, base)
    for note in notes:
        console.warn(note)
    content: dict[str, Any] = {
        "repository": parsed.repository,
        "dry_run": parsed.dry_run,
        "base_model": base.hub_id,
        "notes": notes,
    }
    if parsed.dry_run:
        out = Path(parsed.out or f"{parsed.repository.rpartition('/')[2]}-upload")
        if out.exists():
            raise UserError(f"--out: {out} exists already; choose another folder or remove it")
        files = folder.write(found, base, parsed.repository, out)
        content |= {"private": not parsed.public, "out": str(out)}
    else:
        with tempfile.TemporaryDirectory(prefix="neuroada-push-") as temporary:
            files = folder.write(found, base, parsed.repository, Path(temporary) / "folder")
            message = parsed.message or "Upload NeuroAda adapter"
            done = upload.upload(Path(temporary) / "folder", parsed.repository, public=parsed.public, message=message)
        content |= done._asdict()
    content["files"] = [{"name": each.name, "bytes": each.size, "sha256": each.sha256} for each in files]
    shared.print_json(content) if parsed.json else _print(content, parsed.public)


def _notes(found: Any, base: Any) -> list[str]:
    """Return what the user may want to change before others see it."""
    notes = []
    if base.hub_id is None and base.name:
        kind = "in a Python package" if base.name.startswith("package:") else "a local one"
        notes.append(
            f"the base model is {kind}, called {base.name} in what is shared; if the hub has it with the same weights, "
            "name it: --base-model USER/NAME"
        )
    if found.results is None:
        notes.append("no results.json beside the adapter, so that the model card has no scores")
    if found.card:
        notes.append(f"{found.card.name} in the adapter's directory is uploaded as it is")
    return notes


def _print(content: dict[str, Any], asked_public: bool) -> None:
    repository, visibility = content["repository"], "private" if content["private"] else "public"
    rows = [(each["name"], f"{each['bytes']:,}") for each in content["files"]]
    console.table("would upload" if content["dry_run"] else "uploaded", ("file", "bytes"), rows)
    if content["dry_run"]:
        console.say(
            f"wrote {content['out']} for {repository} ({visibility}); change its README.md if you like, then "
            f"`neuroada push {content['out']} {repository}` uploads it"
        )
        return
    if asked_public and content["private"]:
        console.warn(f"{repository} was private and stays so; its settings on the hub change that")
    console.say(f"{content['url']} ({visibility}, commit {content['commit'][:10]})")
