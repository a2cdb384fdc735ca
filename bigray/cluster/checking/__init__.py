"""`bigray cluster check FILE`: the files people edit, checked without a network, a cloud account or a Ray process."""
