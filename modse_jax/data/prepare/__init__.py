"""Prepares text as records of a fixed number of tokens; see `pipeline` for the steps.

`python -m modse_jax.data.prepare` is the command, `pipeline.prepare_data` the function.
"""
