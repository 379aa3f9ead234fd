"""What looks wrong about a calibration text, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.calibration.duplicates import RUN

if TYPE_CHECKING:
    from quantkit.pipeline.doctor import CalibrationReport, SourceReport

UNKNOWN = 0.01  # share of tokens
TWICE = 0.05  # share of documents
REPEATED = 0.2  # share of characters
FOREIGN_TOKENS, FOREIGN_SHARE = (
    100,
    0.01,
)  # of the vocabulary, from which a script is one the model was made for


def advice(report: CalibrationReport) -> list[str]:
    """Each line says what was found and what to do."""
    found = [line for source in report.sources for line in _of_source(source, report)]
    tokens = report.samples * report.sequence_length
    if report.needed is False:
        found.insert(0, "the recipe calibrates nothing, so this text is not used; nothing is to be done")
    elif report.widest is not None and tokens < report.widest:
        found.append(
            f"{tokens:,} tokens are fewer than the {report.widest:,} inputs of the widest linear, so its Hessian has "
            "not full rank; raise calibration.samples or sequence_length"
        )
    if report.overlap.windows:
        found.append(
            f"{report.overlap.windows} of {report.samples} windows share {RUN} tokens in a row, or more, with the "
            f"evaluation text ({', '.join(report.evaluation)}), {report.overlap.share:.1%} of it: the evaluation will "
            "look better than it is; calibrate or evaluate on other text"
        )
    return [*found, *_of_template(report), *_of_scripts(report), *_of_experts(report)]


def _of_source(source: SourceReport, report: CalibrationReport) -> list[str]:
    found = []
    if source.unknown > UNKNOWN:
        found.append(
            f"{source.name}: {source.unknown:.1%} of its tokens are unknown to the tokenizer; is it the right language "
            "and encoding? Use text that the model was made for"
        )
    twice = source.duplicates
    if twice.exact + twice.near > TWICE * source.documents:
        found.append(
            f"{source.name}: of {source.documents} documents, {twice.exact} are equal to an earlier one, and "
            f"{twice.near} nearly so; remove them, as they count twice"
        )
    if twice.repeated_lines > REPEATED:
        found.append(
            f"{source.name}: {twice.repeated_lines:.0%} of its characters are in lines that came before (headers, "
            "licences, menus?); remove what is repeated"
        )
    if source.empty:
        found.append(
            f"{source.name}: {source.empty} of {source.empty + source.documents} records are empty and left out; is "
            "`field` the right column?"
        )
    if source.windows == 1 and report.samples > 1:
        found.append(f"{source.name}: gives a single window; give it more with {source.name}:N, or remove it")
    return found


def _of_template(report: CalibrationReport) -> list[str]:
    found, tokenizer = [], report.tokenizer
    chats = sum(source.chats for source in report.sources)
    if tokenizer.template and not chats:
        found.append(
            "the tokenizer has a chat template, and no text uses it; if the model is for chats, add records with "
            "`messages`"
        )
    if tokenizer.bos_first and tokenizer.bos_inside and chats:
        found.append(
            f"windows begin with {tokenizer.bos}, and the chat template or the text has {tokenizer.bos_inside} more "
            "inside; that is right for joined chats, and wrong if every message has one: look at the window"
        )
    return found


def _of_scripts(report: CalibrationReport) -> list[str]:
    total = sum(each.tokens for each in report.scripts)
    missed = [
        each
        for each in report.scripts
        if each.written
        and not each.seen
        and each.tokens >= FOREIGN_TOKENS
        and each.tokens > FOREIGN_SHARE * total
    ]
    if not missed:
        return []
    named = ", ".join(f"{each.name} ({each.tokens / total:.1%})" for each in missed[:6])
    return [
        f"parts of the vocabulary that the text never touches: {named}; add text in these scripts if the model is to "
        "be used in them"
    ]


def _of_experts(report: CalibrationReport) -> list[str]:
    found = []
    layers = report.experts or []
    unseen = sum(count == 0 for layer in layers for count in layer.tokens)
    few = sum(0 < count < layer.needed for layer in layers for count in layer.tokens)
    every = sum(len(layer.tokens) for layer in layers)
    if unseen:
        found.append(
            f"no token comes to {unseen} of {every} experts, which would be rounded to nearest; give more or more "
            "varied text, or calibrate them on all tokens with `experts: {calibrate: all}`"
        )
    if few:
        found.append(
            f"{few} of {every} experts get fewer tokens than they have inputs, and will be calibrated on tokens of "
            "others too; raise calibration.samples"
        )
    return found
