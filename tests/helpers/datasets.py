"""TODO"""

from modse_jax.config.options import DataConfig
from modse_jax.data import loader, prepare


def make(source, tokenizer, out, length=32, fraction=0.1, vocab_size=400, workers=1, **options):
    data = DataConfig(
        source=source,
        tokenizer=tokenizer,
        sequence_length=length,
        validation_fraction=fraction,
        **options,
    )
    return prepare.prepare(data, str(out), vocab_size, workers)


def alone(dataset):
    return loader.TrainingData((dataset,), (1.0,))
