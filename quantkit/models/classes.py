"""Which class of transformers a checkpoint is opened as: the one its config names, so that nothing of it is lost.

`AutoModelForCausalLM` gives the text model alone for some multimodal types and refuses others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that `architectures` names if it generates text, else the causal LM or image-text model of the type.

    ModelError if transformers has neither.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    for name in config.architectures or ():
        found: Any = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.GenerationMixin):
            asked = getattr(found, "config_class", None)
            if asked is not None and isinstance(config, asked):
                return _model(found)
    maps: Any = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    for mapping in maps:
        if type(config) in mapping:
            chosen = mapping[type(config)]
            return _model(chosen[0] if isinstance(chosen, tuple | list) else chosen)
    raise ModelError(
        f"transformers cannot build a model that generates text from model type {config.model_type!r}; give a "
        "checkpoint of a causal language model"
    )


def _model(found: Any) -> type[PreTrainedModel]:
    kind: type[PreTrainedModel] = found
    return kind
