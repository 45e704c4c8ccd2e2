"""What happens to answers that must follow public JSON schemas, and how long the masks take.

    python -m tests.serving.schema_figures --schemas FOLDER... --count 300

Each folder is searched for files with JSON schemas (also lists of them, and JSON Lines with one per line, as in
JSONSchemaBench). A model answers each with at most `--tokens` tokens, 16 at a time. The script prints how many answers are
valid, how many the length limit cut off, how many requests were refused or ended with an error, and every answer that is
complete and yet invalid, of which there must be none; then the time of a mask in the engine, and in llguidance alone for the
same tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from fastgen_jax import Engine, SamplingParams
from fastgen_jax.engine import stepper
from fastgen_jax.text.filters import Matcher, fill_masks
from fastgen_jax.text.grammar import Grammar, GrammarError, GrammarMatcher
from fastgen_jax.text.schemas import fitted

AT_A_TIME = 16
SCHEMA_WORDS = frozenset({"$schema", "properties", "definitions", "$defs", "anyOf", "oneOf", "allOf", "$ref"})


def main() -> int:
    """Prints the figures; returns 1 if a complete answer is invalid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--schemas", type=Path, nargs="+", required=True, help="folders with schemas")
    parser.add_argument("--count", type=int, default=300, help="schemas, drawn with a fixed seed (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="maximum length of an answer (default: %(default)s)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="(default: %(default)s)")
    options = parser.parse_args()
    found = [schema for folder in options.schemas for schema in schemas_in(folder)]
    unique = list({json.dumps(schema, sort_keys=True): schema for schema in found}.values())
    random.Random(1).shuffle(unique)
    chosen = unique[: options.count]
    print(f"{len(unique)} different schemas, of which {len(chosen)} are used")
    engine = Engine.from_pretrained(options.model, max_num_seqs=AT_A_TIME)
    times = record_masks()
    outcomes, invalid, lengths = answer(engine, chosen, tokens=options.tokens)
    print("\n| outcome | schemas |\n|---|---|")
    for outcome, count in outcomes.most_common():
        print(f"| {outcome} | {count} |")
    for schema, text in invalid:
        print(f"\ncomplete but invalid: {json.dumps(schema)[:300]}\n  {text[:300]}")
    alone = [seconds for grammar, ids in lengths for seconds in time_alone(engine, grammar, ids)]
    print("\n| time of a mask | number | median, us | P99, us | longest, us |\n|---|---|---|---|---|")
    print(row("in the engine, per mask", times))
    print(row("llguidance alone, same tokens", alone))
    return 1 if invalid else 0


def schemas_in(folder: Path) -> Iterator[dict[str, Any]]:
    """The JSON schemas in the files of a folder."""
    for path in sorted(folder.rglob("*.json*")):
        if not path.is_file() or path.stat().st_size > 2**20:
            continue
        try:
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            values = [json.loads(text) for text in texts]
        except (ValueError, OSError, RecursionError):
            continue
        for value in values:
            yield from schemas_of(value)


def schemas_of(value: Any) -> Iterator[dict[str, Any]]:
    """The schemas that a file's value is, or holds in a list or under "schema" or "json_schema"."""
    if isinstance(value, list):
        for item in value:
            yield from schemas_of(item)
    elif isinstance(value, dict):
        inner = value.get("schema", value.get("json_schema"))
        if isinstance(inner, str):
            try:
                inner = json.loads(inner)
            except ValueError:
                inner = None
        if isinstance(inner, dict) and not SCHEMA_WORDS & set(value):
            yield inner
        elif SCHEMA_WORDS & set(value) and isinstance(value.get("properties", {}), dict):
            yield value


def record_masks() -> list[float]:
    """A list to which the engine's steps add the seconds of each mask that they compute."""
    times: list[float] = []

    def timed(matchers: list[Matcher], masks: np.ndarray) -> None:
        start = time.perf_counter()
        fill_masks(matchers, masks)
        times.extend([(time.perf_counter() - start) / max(1, len(matchers))] * len(matchers))

    stepper.fill_masks = timed  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    return times


def answer(
    engine: Engine, schemas: Iterable[dict[str, Any]], *, tokens: int
) -> tuple[Counter[str], list[tuple[dict[str, Any], str]], list[tuple[Grammar, list[int]]]]:
    """Counts of what became of each schema, the complete and invalid answers, and the tokens of all by their grammars."""
    outcomes: Counter[str] = Counter()
    invalid: list[tuple[dict[str, Any], str]] = []
    told: list[tuple[Grammar, list[int]]] = []
    waiting = list(schemas)[::-1]
    running: dict[str, tuple[dict[str, Any], Grammar, list[str], list[int]]] = {}
    number = 0
    while waiting or running:
        while waiting and len(running) < AT_A_TIME:
            schema = waiting.pop()
            number += 1
            try:
                usable = fitted(schema, strict=False)
                grammar = Grammar.json_schema(usable.schema)
                params = SamplingParams(max_new_tokens=tokens, temperature=0.7, seed=number)
                about = schema.get("title") or schema.get("description") or "an object"
                prompt = f"As JSON, {str(about)[:80]}:\n"
                request_id = engine.add(prompt, params, grammar=grammar)
            except GrammarError as error:
                outcomes[f"refused: {str(error)[:60]}"] += 1
                continue
            running[request_id] = (usable.schema, grammar, [], [])
        for output in engine.step():
            schema, grammar, texts, ids = running[output.request_id]
            texts.append(output.text)
            ids += output.new_token_ids
            if output.finished:
                del running[output.request_id]
                told.append((grammar, ids))
                outcome = outcome_of(schema, "".join(texts), output.finish_reason, output.error)
                outcomes[outcome] += 1
                if outcome == "invalid":
                    invalid.append((schema, "".join(texts)))
    return outcomes, invalid, told


def outcome_of(schema: dict[str, Any], text: str, reason: str | None, error: str | None) -> str:
    """What an answer is: valid, cut off, an error, or invalid."""
    if error is not None:
        return f"error: {error[:50]}"
    if reason == "length":
        return "cut off by the length limit"
    try:
        value = json.loads(text)
        validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        validator(schema).validate(value)
    except jsonschema.ValidationError as problem:
        return "invalid" if problem.validator not in RELAXABLE else f"valid but for {problem.validator}, which is relaxed"
    except ValueError:
        return "invalid"
    except Exception as problem:  # of the validator, for a schema that it cannot read
        return f"valid JSON that {type(problem).__name__} keeps from being checked"
    return "valid"


RELAXABLE = frozenset(
    {"oneOf", "not", "uniqueItems", "dependencies", "dependentRequired", "contains", "format", "if", "pattern"}
)


def time_alone(engine: Engine, grammar: Grammar, ids: list[int]) -> Iterator[float]:
    """Seconds of each mask of a text, with nothing else running."""
    matcher = engine.intake.matcher(grammar)
    assert isinstance(matcher, GrammarMatcher)
    words = np.zeros(-(-engine.model.vocab_size // 32), np.int32)
    for token_id in ids:
        start = time.perf_counter()
        matcher.fill_mask(words)
        yield time.perf_counter() - start
        if matcher.advance(token_id):
            return


def row(name: str, seconds: list[float]) -> str:
    """A line of the table."""
    if not seconds:
        return f"| {name} | 0 | - | - | - |"
    ordered = sorted(seconds)
    high = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return (
        f"| {name} | {len(seconds)} | {1e6 * statistics.median(ordered):.0f} | {1e6 * high:.0f} | {1e6 * ordered[-1]:.0f} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
