"""Data: text sources, tokenizers, prepared records, and batches.

Text is prepared once (`prepare`) into records of a fixed number of tokens. A run opens prepared
directories (`training_data`), maps batches to records (`mixture_order`), and reads them
(`batching`).
"""
