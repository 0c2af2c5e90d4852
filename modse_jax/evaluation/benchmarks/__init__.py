"""Benchmarks such as MMLU and GSM8K, run through EleutherAI's lm-evaluation-harness."""
