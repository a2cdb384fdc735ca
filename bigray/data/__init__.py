"""Source -> Arrow table -> split -> standardised arrays -> global batches."""
