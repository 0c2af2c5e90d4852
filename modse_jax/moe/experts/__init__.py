"""The grouped expert FFN: one file per backend, and the choice between them."""
