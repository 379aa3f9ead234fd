"""Will the engine load it? Every rule over one checkpoint, planned or written, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.preflight.cache import caches
from quantkit.preflight.experts import experts_there
from quantkit.preflight.foreign import format_of, reading_of, settings, unread
from quantkit.preflight.kernels import needed, no_kernel
from quantkit.preflight.names import siblings, spelled
from quantkit.preflight.sharding import heads, shard_of, splits
from quantkit.preflight.subject import HEAD, Finding, Linear, Subject, gathered, starred
from quantkit.preflight.tables import Reading, source
from quantkit.preflight.target import ENGINES, NAMES, Target

_SERVERS = ("vllm", "sglang")
_MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
SHOWN = ("sm80", "sm90", "sm100", "cpu")  # the devices that are named where a recipe names none


def preflight(subject: Subject, target: Target) -> list[Finding]:
    """What the target refuses or gets wrong, with layer, numbers and remedy; empty if nothing is known to be."""
    found: list[Finding] = []
    if foreign := unread(subject, target):
        return [foreign]
    found += settings(subject, target)
    if target.engine not in _SERVERS:
        found += _alone(subject, target)
    else:
        found += heads(subject, target)
        each: list[tuple[str, Finding]] = []
        reading = reading_of(subject, target)
        for linear in subject.quantized:
            each += [(linear.name, finding) for finding in _linear(linear, subject, target, reading)]
        each += siblings(subject, target)
        each += spelled(subject, target)
        found += gathered(each)
        found += _mtp(subject, target)
        found += _heads_tied(subject, target)
    return found + list(caches(subject, target))


def outlook(subject: Subject, target: Target) -> str:
    """What to say of a target that refuses nothing: which optional packages it needs, if any."""
    schemes = {linear.scheme for linear in subject.quantized if linear.scheme}
    packages = needed(schemes, target, reading_of(subject, target))
    return f"nothing is known that {target} would refuse" + (
        f", with {', '.join(packages)}" if packages else ""
    )


def _linear(linear: Linear, subject: Subject, target: Target, reading: Reading | None) -> Iterator[Finding]:
    """What is wrong with one quantized linear."""
    if linear.transposed:
        yield Finding(
            "class",
            "",
            "is a Conv1D of the original model, which engines do not take packed",
            "serve it with quantkit",
            source(target.engine, "model_executor/models/gpt2.py"),
        )
        return
    yield from splits(linear, subject, target)
    shard = shard_of(linear, subject, target.tensor_parallel)
    finding = None if shard is None else no_kernel(linear, shard, target, reading)
    if finding:
        yield finding


def _alone(subject: Subject, target: Target) -> Iterator[Finding]:
    """transformers and quantkit: no tensor parallelism of packed linears; in transformers what its versions refuse."""
    name = NAMES[target.engine]
    if target.tensor_parallel > 1 and subject.quantized:
        yield Finding(
            "split",
            "",
            f"tensor_parallel {target.tensor_parallel}: {name} does not split packed linears over devices",
            "use tensor_parallel: 1, or engine: vllm",
            name,
        )
    if target.engine == "transformers" and format_of(subject) is None:
        where = "transformers 5.23, compressed-tensors 0.20"
        turned = [linear.name for linear in subject.quantized if linear.transposed]
        if turned:
            numbers = "is a Conv1D, which stays at random values there"
            one = Finding("class", "", numbers, "serve it with quantkit", where)
            yield from gathered([(linear, one) for linear in turned])
        kinds = {linear.scheme for linear in subject.quantized}
        if len(kinds) > 1 and any(kind and not kind.weights.symmetric for kind in kinds):
            numbers = f"{len(kinds)} schemes, some asymmetric: its dequantize=True decodes all by the first"
            yield Finding("schemes", "", numbers, "use one scheme, or symmetric: true", where)
        yield from experts_there(subject, where)


def _mtp(subject: Subject, target: Target) -> Iterator[Finding]:
    """Layers that predict further tokens: counted by config.json, and not in the file."""
    counted = subject.count(*_MTP_COUNTS)
    names = [*subject.names, *(linear.name for linear in subject.linears)]
    if counted and not any(subject.of_mtp(name) for name in names):
        yield Finding(
            "mtp",
            "",
            f"config.json counts {counted} layers for further tokens, the files have no tensor of them: a server that "
            "predicts with them reads uninitialised memory",
            "keep them from the source, or set the count in config.json to 0",
            source(target.engine, "model_executor/models/deepseek_mtp.py"),
        )


def _heads_tied(subject: Subject, target: Target) -> Iterator[Finding]:
    """A quantized output head that config.json ties to the embedding."""
    tied = subject.config.get("tie_word_embeddings", subject.text.get("tie_word_embeddings", False))
    packed = [linear.name for linear in subject.quantized if HEAD.search(linear.name)]
    if tied and packed:
        yield Finding(
            "tied head",
            starred(packed[0]),
            "is quantized, but tie_word_embeddings says that it is the input embedding",
            "skip it, or untie the head",
            source(target.engine, "model_executor/models/llama.py"),
        )


def verdicts(subject: Subject) -> list[tuple[bool, str]]:
    """(whether it runs, one line): each engine and what it refuses, where no target is named."""
    lines: list[tuple[bool, str]] = []
    for engine in ENGINES:
        if engine not in _SERVERS:
            found = preflight(subject, Target(engine))
            lines.append((not found, f"{NAMES[engine]}{': ' + str(found[0]) if found else ''}"))
            continue
        runs, refused = [], {}
        for device in SHOWN:
            found = preflight(subject, Target(engine, 1, device))
            if found:
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                refused[device] = f"{found[0]}{more}"
            else:
                runs.append(device)
        if runs:
            widths = [n for n in (1, 2, 4, 8) if not preflight(subject, Target(engine, n, runs[0]))]
            shared = f"; tensor_parallel {', '.join(map(str, widths))}" if runs[0] != "cpu" else ""
            schemes = {linear.scheme for linear in subject.quantized if linear.scheme}
            reading = reading_of(subject, Target(engine))
            packages = {device: needed(schemes, Target(engine, 1, device), reading) for device in runs}
            said = [
                f"{device} (with {packages[device][0]})" if packages[device] else device for device in runs
            ]
            lines.append((True, f"{NAMES[engine]} on {', '.join(said)}{shared}"))
        lines += [(False, f"{NAMES[engine]} on {device}: {said}") for device, said in refused.items()]
    return lines
