"""A prompt as a chat model sees it: rendered by the tokenizer's own template, in transformers' sandbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    """The user's message, behind a system message if there is one, up to where the answer begins.

    The text holds its special tokens, BOS too. ModelError for a tokenizer without a template, or one that refuses these
    messages.
    """
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template; leave --chat out to continue the text as it is")
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of the model's maker
        raise ModelError(f"the chat template refuses these messages: {error}") from error
