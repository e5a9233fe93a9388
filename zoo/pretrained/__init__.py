"""Published weights: folders of config.json and safetensors, read into this zoo's models and written back.

    cfg, params = zoo.load_pretrained("state-spaces/mamba-130m-hf")     a directory, or a name on the hub
    logits, state, aux = zoo.lm.apply(params, cfg, tokens)
    zoo.save_pretrained("folder", cfg, params, like="state-spaces/mamba-130m-hf")

Weights are mapped into memory and copied to where they belong, tensor by tensor. Whatever is not as it should
be, a key, a shape, an option, is an error that names all of them: nothing is skipped or started anew.
"""

from zoo.pretrained.convert import keep_source, load_pretrained, save_pretrained
from zoo.pretrained.files import locate

__all__ = ["keep_source", "load_pretrained", "locate", "save_pretrained"]
