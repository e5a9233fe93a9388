"""Whole models over the layers: language model, classifier, registry, generation, checkpoints."""
