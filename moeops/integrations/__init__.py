"""moeops inside other projects' code. Nothing here is imported by ``import moeops``: import the module you need.

- ``moeops.integrations.transformers``: moeops as the experts of Hugging Face transformers' models.
"""
