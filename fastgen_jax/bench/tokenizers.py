"""Agreement with llama.cpp's tokenizer tests: strings with identical ids, for every vocabulary that it ships.

fastgen bench tokenizers                       # downloads the source distribution of llama-cpp-python from PyPI (77 MB)
fastgen bench tokenizers --sdist FILE.tar.gz
fastgen bench tokenizers --folder .../llama.cpp/models
"""

from __future__ import annotations

import argparse
import contextlib
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

SEPARATOR = "\n__ggml_vocab_test__\n"
INDEX = "https://pypi.org/simple/llama-cpp-python/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's flags."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--sdist", type=Path, help="source distribution of llama-cpp-python (default: download it)")
    source.add_argument("--folder", type=Path, help="folder with ggml-vocab-*.gguf, .inp and .out instead (default: none)")
    parser.add_argument("--show", action="store_true", help="print every string that differs, with both lists of ids")


def run(args: argparse.Namespace) -> int:
    """Prints one line per vocabulary and returns the exit code."""
    with _folder(args.folder, args.sdist) as folder:
        files = sorted(folder.glob("ggml-vocab-*.gguf"))
        if not files:
            raise ValueError(f"{folder} has no ggml-vocab-*.gguf; pass the folder models/ of llama.cpp")
        print(f"{'vocabulary':<20} {'strings':>7} {'identical':>9}  different strings")
        for file in files:
            name = file.stem.removeprefix("ggml-vocab-")
            if not file.with_suffix(".gguf.inp").exists():
                continue
            try:
                differing, total = compare(file)
            except ValueError as error:
                print(f"{name:<20} {'':>7} {'refused':>9}  {error}")
                continue
            shown = ", ".join(repr(text)[:40] for text, _, _ in differing)
            print(f"{name:<20} {total:>7} {total - len(differing):>9}  {shown}")
            for text, expected, got in differing if args.show else ():
                print(f"    {text!r}\n      expected {list(expected)}\n      got      {list(got)}")
    return 0


def compare(vocabulary: Path) -> tuple[list[tuple[str, Sequence[int], Sequence[int]]], int]:
    """(text, expected ids, our ids) of every string that differs, and the total number of strings.

    llama.cpp's ids are without special tokens at the ends.
    """
    from fastgen_jax.text import load_tokenizer

    tokenizer = load_tokenizer(vocabulary)
    texts = vocabulary.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)
    lines = vocabulary.with_suffix(".gguf.out").read_text().split("\n")[:-1]
    if texts[-1] == "":  # after the last separator, if there is one
        texts.pop()
    if len(lines) != len(texts):
        raise ValueError(f"{vocabulary.name} has {len(texts)} strings but {len(lines)} results; download it again")
    differing = []
    for text, line in zip(texts, lines, strict=True):
        expected = [int(id) for id in line.split()]
        got = tokenizer.encode(text, add_special_tokens=False)
        if got != expected:
            differing.append((text, expected, got))
    return differing, len(texts)


@contextlib.contextmanager
def _folder(folder: Path | None, sdist: Path | None) -> Iterator[Path]:
    """Yields the folder itself, or a temporary one with the vocabularies of the source distribution."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        archive = sdist or _fetch(Path(temporary))
        with tarfile.open(archive) as tar:
            for member in tar:
                if "/llama.cpp/models/ggml-vocab-" in member.name:
                    member.name = Path(member.name).name
                    tar.extract(member, temporary, filter="data")
        yield Path(temporary)


def _fetch(folder: Path) -> Path:
    """Downloads the newest source distribution; `pip download` would build it first."""
    import json
    import urllib.parse
    import urllib.request

    request = urllib.request.Request(INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    newest = [file for file in files if file["filename"].endswith(".tar.gz")][-1]
    target = folder / newest["filename"]
    print(f"downloading {newest['filename']}", flush=True)
    urllib.request.urlretrieve(urllib.parse.urljoin(INDEX, newest["url"]), target)
    return target
