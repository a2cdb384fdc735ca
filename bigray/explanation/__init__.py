"""Why a model answered as it did: what each column or pixel of a row adds to its answer."""
